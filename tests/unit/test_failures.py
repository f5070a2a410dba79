"""What is done when a block fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

from flask_eventsourcing.failures import Kept, call_each, raised_as, resolve

Call = tuple[Callable[[], object], str, tuple[object, ...]]


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


def test_failure_is_raised_as_another() -> None:
    """An error of the block is the cause of the error that is raised instead; Ctrl-C is raised as it is."""
    error = ValueError("x")
    with (
        pytest.raises(LookupError, match="ValueError: x") as raised,
        raised_as(lambda e: LookupError(f"ValueError: {e}")),
    ):
        raise error
    assert raised.value.__cause__ is error
    with pytest.raises(KeyboardInterrupt), raised_as(LookupError):
        raise KeyboardInterrupt


def test_each_function_is_called_although_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A function that raises keeps no other from being called; the log has its message and the traceback."""
    called: list[str] = []

    def fail() -> None:
        raise ValueError("no route")

    calls: list[Call] = [(fail, "Sending to %s failed.", ("Ada",)), (partial(called.append, "Grace"), "It failed.", ())]
    call_each(logging.getLogger("tests"), calls)
    assert called == ["Grace"]
    assert caplog.messages == ["Sending to Ada failed."]
    assert "ValueError: no route" in caplog.text


def test_end_of_the_program_is_not_held(caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-C in a function is raised, and the functions behind it are not called."""
    called: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    calls: list[Call] = [(interrupt, "It failed.", ()), (partial(called.append, "Grace"), "It failed.", ())]
    with pytest.raises(KeyboardInterrupt):
        call_each(logging.getLogger("tests"), calls)
    assert (called, caplog.messages) == ([], [])


def test_what_a_topic_names_or_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A topic gives its class, or the error that kept it from being found, even one of the module's own."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module_of_a_topic.py").write_text("raise ValueError('no licence')")
    assert resolve("uuid:UUID") == (UUID, None)
    found, error = resolve("broken_module_of_a_topic:Account")
    assert found is None
    assert "no licence" in f"{error} {error.__cause__ if error else ''}"
