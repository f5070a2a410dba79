"""What is done when a block fails."""

from __future__ import annotations

import logging

import pytest

from flask_eventsourcing.failures import Kept, Logged, OnError


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), GeneratorExit()])
def test_what_was_begun_is_undone_and_the_error_goes_on(error: BaseException) -> None:
    """Whatever ends the block, its function is called with it, once, and the caller gets the error."""
    seen: list[BaseException] = []
    with pytest.raises(type(error)), OnError(seen.append):
        raise error
    assert seen == [error]


def test_nothing_is_undone_without_an_error() -> None:
    """A block that succeeds calls nothing."""
    seen: list[BaseException] = []
    with OnError(seen.append):
        pass
    assert seen == []


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
    """Ctrl-C goes on, as if nothing kept errors."""
    with pytest.raises(KeyboardInterrupt), Kept() as kept:
        raise KeyboardInterrupt
    assert kept.error is None


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
