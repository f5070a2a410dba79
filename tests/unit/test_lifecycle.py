"""One application in every process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_eventsourcing import lifecycle
from flask_eventsourcing.exceptions import (
    ApplicationConstructingError,
    ApplicationInitializedError,
    ApplicationNotInitializedError,
    FlaskEventSourcingError,
)
from flask_eventsourcing.lifecycle import (
    ApplicationSlot,
    HostSlot,
    close_application,
    get_application,
    init_application,
)
from tests.domain import in_threads


class App:
    """Stands for an application: notes how it was made and how often it was closed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args, kwargs
        self.closed = 0

    def close(self) -> None:
        """Note that it was closed."""
        self.closed += 1


@pytest.fixture(autouse=True)
def process_slot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test a process without an application."""
    monkeypatch.setattr(lifecycle, "_process_slot", ApplicationSlot())
    yield
    close_application()


def test_init_returns_what_get_returns() -> None:
    """The application is constructed with the arguments given, and everyone gets that one."""
    application = init_application(App, 1, env={"A": "b"})
    assert application.arguments == ((1,), {"env": {"A": "b"}})
    assert get_application() is application
    assert get_application() is application


def test_init_twice_is_refused() -> None:
    """A second initialisation is an error, and the first application stays."""
    application = init_application(App)
    with pytest.raises(ApplicationInitializedError, match="close_application"):
        init_application(App)
    assert get_application() is application


def test_get_before_init_is_refused() -> None:
    """Asking for the application before it was initialised is an error that says what to call."""
    with pytest.raises(ApplicationNotInitializedError, match="init_application"):
        get_application()


def test_slot_without_constructor_cannot_be_initialised() -> None:
    """A slot that was never told how to construct says so."""
    with pytest.raises(ApplicationNotInitializedError):
        ApplicationSlot[App]().init()


@pytest.mark.parametrize(
    "error", [ApplicationInitializedError, ApplicationNotInitializedError, ApplicationConstructingError]
)
def test_errors_are_assertion_errors(error: type[Exception]) -> None:
    """Code that catches the classic pattern's ``AssertionError`` still works."""
    assert issubclass(error, AssertionError)
    assert issubclass(error, FlaskEventSourcingError)


def test_close_is_idempotent() -> None:
    """Closing twice, or before there is anything to close, does nothing more."""
    close_application()
    application = init_application(App)
    close_application()
    close_application()
    assert application.closed == 1
    with pytest.raises(ApplicationNotInitializedError):
        get_application()


def test_init_again_after_close() -> None:
    """After closing there can be a new application, made with new arguments."""
    first = init_application(App, 1)
    close_application()
    second = init_application(App, 2)
    assert second is not first
    assert get_application().arguments == ((2,), {})


def test_application_without_close_is_let_go() -> None:
    """An object that has no ``close`` can be held too."""
    with ApplicationSlot(object) as slot:
        first = slot.get()
    assert slot.get() is not first


def test_lazy_slot_constructs_at_the_first_get() -> None:
    """A lazy slot constructs nothing until it is asked, and then once."""
    made: list[App] = []

    def construct() -> App:
        made.append(App())
        return made[-1]

    with ApplicationSlot(construct) as slot:
        assert made == []
        assert slot.get() is slot.get()
        assert slot.constructed
        assert len(made) == 1


def test_lazy_slot_keeps_its_constructor() -> None:
    """A lazy slot that was initialised with another constructor returns to its own after closing."""
    slot = ApplicationSlot(lambda: "lazy")
    assert slot.init(lambda: "other") == "other"
    assert slot.get() == "other"
    slot.close()
    assert slot.get() == "lazy"


def test_racing_threads_construct_once() -> None:
    """However many threads ask first, one application is constructed and all get that one."""
    made: list[App] = []
    got: list[App] = []

    def construct() -> App:
        time.sleep(0.05)
        made.append(App())
        return made[-1]

    with ApplicationSlot(construct) as slot:
        in_threads([lambda: got.append(slot.get())] * 16)
    assert len(made) == 1
    assert len(got) == 16
    assert {id(application) for application in got} == {id(made[0])}


def test_racing_initialisations_succeed_once() -> None:
    """Of threads that initialise at the same time, one succeeds and the others get an error."""
    results: list[object] = []

    def construct() -> App:
        time.sleep(0.02)
        return App()

    def init() -> None:
        try:
            results.append(init_application(construct))
        except ApplicationInitializedError as error:
            results.append(error)

    in_threads([init] * 8)
    assert sum(isinstance(result, App) for result in results) == 1
    assert sum(isinstance(result, ApplicationInitializedError) for result in results) == 7


def test_racing_close_closes_once() -> None:
    """Threads that close at the same time close one application once."""
    application = init_application(App)
    in_threads([close_application] * 8)
    assert application.closed == 1


def test_constructor_that_asks_for_its_application_is_told() -> None:
    """A constructor that needs the very application it constructs gets an error, not a deadlock or a second one."""
    with pytest.raises(ApplicationConstructingError):
        init_application(get_application)
    application = init_application(App)
    assert get_application() is application


def test_failed_construction_can_be_tried_again() -> None:
    """If the constructor fails, its error passes, and the next try constructs."""
    failures = [OSError("no database")]

    def construct() -> App:
        if failures:
            raise failures.pop()
        return App()

    with ApplicationSlot(construct) as slot:
        with pytest.raises(OSError, match="no database"):
            slot.get()
        assert not slot.constructed
        assert slot.get().closed == 0


@pytest.mark.parametrize("slot", [ApplicationSlot[App](), ApplicationSlot(App)], ids=["empty", "lazy"])
def test_get_after_an_init_that_failed_says_what_failed(slot: ApplicationSlot[App]) -> None:
    """After an ``init`` that raised, ``get`` raises and names the error; it is initialised again, or closed."""
    calls = []

    def construct() -> App:
        calls.append(1)
        raise OSError("no database")

    with pytest.raises(OSError, match="no database"):
        slot.init(construct)
    for _ in range(2):
        with pytest.raises(ApplicationNotInitializedError, match=r"construct failed with OSError: no database.*again"):
            slot.get()
    assert len(calls) == 1
    application = slot.init(App)
    assert slot.get() is application
    slot.close()


def test_close_forgets_an_init_that_failed() -> None:
    """``close_application`` after an initialisation that raised leaves a process as it was before."""
    with pytest.raises(TypeError):
        init_application(len)
    with pytest.raises(ApplicationNotInitializedError, match="failed with TypeError"):
        get_application()
    close_application()
    with pytest.raises(ApplicationNotInitializedError, match="no application yet"):
        get_application()


def test_slot_is_a_context_manager() -> None:
    """A slot closes its application at the end of a ``with`` block, on errors too."""
    slot = ApplicationSlot(App)
    applications: list[App] = []

    def work() -> None:
        with slot as entered:
            assert entered is slot
            applications.append(slot.get())
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert [application.closed for application in applications] == [1]


def test_slot_that_was_not_closed_warns() -> None:
    """A program that drops a slot without closing its application gets a ``ResourceWarning`` that names it."""
    slot = ApplicationSlot(App)
    slot.get()
    with pytest.warns(ResourceWarning, match=r"ApplicationSlot with a App was not closed: call its close\(\)"):
        del slot


@pytest.mark.parametrize(
    "use",
    [
        lambda _: None,
        lambda slot: slot.close(),
        lambda slot: (slot.get(), slot.close()),
        lambda slot: slot.init(object),
    ],
    ids=["never constructed", "closed", "constructed and closed", "nothing to close"],
)
def test_slot_with_nothing_to_close_does_not_warn(use: Callable[[ApplicationSlot[Any]], object]) -> None:
    """There is no warning for a slot that holds nothing that could be closed."""
    slot: ApplicationSlot[Any] = ApplicationSlot(App)
    use(slot)
    assert warnings_of(slot) == []


def test_host_does_not_warn() -> None:
    """A Flask app that a test does not close is let go without a warning."""
    slot = HostSlot(App)
    slot.get()
    assert warnings_of(slot) == []


def test_slot_of_the_parent_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no warning in a forked process that drops what its parent has constructed."""
    slot = ApplicationSlot(App)
    slot.get()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert warnings_of(slot) == []


def test_slot_that_lives_as_long_as_its_process_does_not_warn() -> None:
    """A program that ends with an open application, as one with a slot in a module, prints no warning."""
    program = (
        "import io, flask_eventsourcing.lifecycle as lifecycle\n"
        "slot = lifecycle.ApplicationSlot(io.StringIO)\n"
        "slot.get()\n"
        "lifecycle.init_application(io.StringIO)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def warnings_of(slot: ApplicationSlot[Any]) -> list[str]:
    """Return the warnings of a slot's finalizer."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        slot.__del__()
    return [str(each.message) for each in seen]
