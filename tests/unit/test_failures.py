"""What is done when a block fails."""

from __future__ import annotations

import logging

import pytest

from flask_eventsourcing.failures import Kept, Logged


def test_failure_is_kept() -> None:
    """An error of the block is kept, and the caller goes on. Without an error, none is kept."""
    error = ValueError("x")
    with Kept() as kept:
        raise error
    assert kept.error is error
    with Kept() as kept:
        pass
    assert kept.error is None


def test_end_of_the_program_is_not_kept() -> None:
    """Ctrl-C is raised, and not kept."""
    with pytest.raises(KeyboardInterrupt), Kept() as kept:
        raise KeyboardInterrupt
    assert kept.error is None


def test_failure_that_is_kept_is_told() -> None:
    """Threads that wait for the block learn of its error, and of Ctrl-C as well, which is raised."""
    seen: list[BaseException] = []
    error, end = ValueError("x"), KeyboardInterrupt()
    with Kept(seen.append):
        raise error
    with pytest.raises(KeyboardInterrupt), Kept(seen.append):
        raise end
    with Kept(seen.append):
        pass
    assert seen == [error, end]


def test_failure_is_logged_and_passes(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the message and the traceback; the caller goes on."""
    with Logged(logging.getLogger("tests"), "Sending to %s failed.", "Ada"):
        raise ValueError("no route")
    assert caplog.messages == ["Sending to Ada failed."]
    assert "ValueError: no route" in caplog.text


def test_end_of_the_program_is_not_held(caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-C ends the block as it would without it."""
    with pytest.raises(KeyboardInterrupt), Logged(logging.getLogger("tests"), "It failed."):
        raise KeyboardInterrupt
    assert caplog.messages == []
