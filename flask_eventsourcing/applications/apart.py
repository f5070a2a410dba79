"""Applications whose events are apart from the host's sessions, in a store where each save is stored when it returns.

There is no unit of work: nothing waits for a commit, and nothing that was saved can be rolled back. So a function is
run again after a conflict only if it has saved nothing before.
"""

from __future__ import annotations

import importlib
import random
import time
import typing
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.persistence import IntegrityError

from .._patches import application_method, repository_cache
from ..config import Config, OriginatorIdType
from ..exceptions import ConfigurationError, HandlerError
from ..host import send_recorded
from ..metadata import Collector, Recorded
from ..uow import Run, always
from . import CommittedCache, install_repository
from .stale import Records, refuse_stale_aggregates

A = TypeVar("A", bound=Application[Any])
R = TypeVar("R")

LONGEST_PAUSE = 0.5
"""The most seconds between two tries."""


STORES = {"cassandra": "flask_eventsourcing.cassandra.hosted"}
"""The module with the store of each kind, whose driver is not always installed."""


class EventStore(Protocol):
    """The place of applications' events, if it is not the database of the host's sessions."""

    title: str

    @property
    def id_types(self) -> Mapping[str, OriginatorIdType]:
        """The type of the aggregates' ids by the name of the application."""

    def environment(self, env: Mapping[str, str], application_name: str | None = None) -> dict[str, str]:
        """Return the environment with which an application uses the store."""

    def create_tables(self) -> list[str]:
        """Make the tables that are missing, and return their names."""

    def look(self) -> Iterable[tuple[str, bool]]:
        """Return lines about the servers and the tables, each with whether it is a fault."""

    def log_identity(self, application_name: str) -> int | None:
        """Return the identity of an application's log, which no other log has, or None if the log is missing."""

    def address(self) -> str:
        """Return the address as users read it."""

    def close(self) -> None:
        """Close the connections of this process; they are opened again when they are used."""


def make_store(
    config: Config, collector: Collector | None, id_types: Mapping[str, OriginatorIdType], where: str
) -> EventStore:
    """Make the store that settings describe, without connecting.

    :param where: how messages name the setting that chooses the store.
    :raises ConfigurationError: when its driver cannot be used in this process.
    """
    try:
        module: Any = importlib.import_module(STORES[config.persistence])
    except ImportError as error:
        raise ConfigurationError(
            f"{where} needs a driver that cannot be imported: {error}. Run pip install "
            f"'Flask-EventSourcing[{config.persistence}]'."
        ) from error
    store: EventStore = module.make_store(config, collector, id_types)
    return store


def id_type_of(application_class: type[Application[Any]], env: Mapping[str, str]) -> OriginatorIdType:
    """Return the type of an application's ids: as its environment or ``Application[str]`` says, or ``uuid``."""
    for each in (env, application_class.env):
        if each.get("ORIGINATOR_ID_TYPE", "").lower() == "text":
            return "text"
    for cls in application_class.__mro__:
        for base in getattr(cls, "__orig_bases__", ()):
            if typing.get_args(base) == (str,) and issubclass(typing.get_origin(base) or object, Application):
                return "text"
    return "uuid"


def tell_recorded(sender: object, application: Any, recordings: Sequence[Any]) -> None:
    """Send ``events_recorded`` for what is stored."""
    notifications = tuple(each.notification for each in recordings)
    send_recorded(
        sender, application, notifications, lambda: [Recorded(each.id, None, None, {}) for each in notifications]
    )


class _Try:
    """One try of a function, in this thread or task and in what it calls."""

    def __init__(self, outer: _Try | None) -> None:
        self.has_saved = False
        self.conflict: IntegrityError | None = None
        """The last conflict in a store."""
        self._outer = outer

    def note(self) -> None:
        """Note that something was saved, or may have been."""
        self.has_saved = True
        if self._outer is not None:
            self._outer.note()

    def note_conflict(self, error: IntegrityError) -> None:
        """Note a conflict, after which nothing was saved."""
        self.conflict = error
        if self._outer is not None:
            self._outer.note_conflict(error)


_current: ContextVar[_Try | None] = ContextVar("flask_eventsourcing.try", default=None)
_refused: ContextVar[str | None] = ContextVar("flask_eventsourcing.refused", default=None)


@contextmanager
def refusing_saves(why: str) -> Iterator[None]:
    """Refuse every save into a store within the block, in this thread or task, with a ``HandlerError``."""
    token = _refused.set(why)
    try:
        yield
    finally:
        _refused.reset(token)


@contextmanager
def trying() -> Iterator[_Try]:
    """Yield an object that tells whether something was saved into a store in the block."""
    made = _Try(_current.get())
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)


def run_again(function: Callable[[], R], times: int, rewind: Callable[[], bool] = always) -> R:
    """Call a function, and again after a conflict, *times* times at most, while it has saved nothing.

    :param rewind: called before another try; returns whether there can be one.
    :raises IntegrityError: for the last conflict, or the first one after something was saved in that try.
    """
    for tries in range(times):
        with trying() as attempt:
            try:
                return function()
            except IntegrityError:
                if attempt.has_saved or not rewind():
                    raise
        time.sleep(pause(tries))
    return function()


async def await_again(
    function: Callable[[], Awaitable[R]],
    times: int,
    sleep: Callable[[float], Awaitable[object]],
    rewind: Callable[[], bool] = always,
) -> R:
    """Do what :func:`run_again` does with a function whose result is awaited.

    :param sleep: waits for a number of seconds, while other tasks run.
    """
    for tries in range(times):
        with trying() as attempt:
            try:
                return await function()
            except IntegrityError:
                if attempt.has_saved or not rewind():
                    raise
        await sleep(pause(tries))
    return await function()


def pause(tries: int) -> float:
    """Return the seconds to wait before the next try."""
    return random.uniform(0, min(LONGEST_PAUSE, 0.01 * 2.0**tries))  # noqa: S311


class RecordsApart(Records):
    """Called as ``Application._record()`` of an application that is apart.

    :param recorded: called with what was recorded.
    """

    def __init__(self, application: Application[Any], recorded: Callable[[Any], object]) -> None:
        super().__init__(application)
        self._recorded = recorded

    def __call__(self, processing_event: ProcessingEvent[Any]) -> Any:
        """Record, note that something is stored now, and tell of it.

        :raises HandlerError: when the events would stay stored although the work that they belong to may be rolled
            back.
        """
        why = _refused.get()
        if why is not None and processing_event.events:
            raise HandlerError(why)
        attempt = _current.get() if processing_event.events or processing_event.tracking is not None else None
        conflict = None
        try:
            recordings = super().__call__(processing_event)
        except IntegrityError as error:
            conflict = error
            raise
        finally:
            # Only after a conflict it is known that nothing was stored.
            if attempt is not None and conflict is not None:
                attempt.note_conflict(conflict)
            elif attempt is not None:
                attempt.note()
        if recordings:
            self._recorded(recordings)
        return recordings


def construct_apart(
    constructor: Callable[..., A],
    name: str,
    store: EventStore,
    env: Mapping[str, str],
    recorded: Callable[[str, Any], object],
) -> A:
    """Construct an application whose recorders use a store.

    :param name: of the application.
    :param recorded: called with the application's name and what it has recorded, when that is stored.
    """
    application = constructor(env=store.environment(env, name))
    install_repository(application)
    cache = application.repository.cache
    if cache is not None:
        # The library would put the object itself into the cache, and the caller may change it later.
        repository_cache(application.repository, CommittedCache(cache, lambda: None, None))
    application_method(application, "_record", RecordsApart(application, partial(recorded, application.name)))
    refuse_stale_aggregates(application)
    return application


class ApartHost:
    """The host of applications that are apart, with the methods that task queues and decorated functions call.

    :param store: where they have their events.
    :param context: returns the context of a piece of work.
    """

    def __init__(self, store: EventStore, context: Callable[[], AbstractContextManager[object]]) -> None:
        self.store = store
        self.context = context

    def unit(self) -> None:
        """Return None: recorders commit on their own."""

    @contextmanager
    def transaction(self, *, queueing: bool = False, run: Run | None = None) -> Iterator[Any]:
        """Run a task that did not ask for a transaction, and note whether it has saved something.

        :raises ConfigurationError: when it asks for a transaction.
        """
        if run is None or not run.lenient:
            self.refuse("A transaction")
        with trying() as attempt:
            try:
                yield None
            finally:
                run.has_committed = run.has_committed or attempt.has_saved

    def retry(
        self, function: Callable[[], R], times: int, *, lenient: bool = False, rewind: Callable[[], bool] = always
    ) -> R:
        """Call a function, and again after a conflict, *times* times at most, while it has saved nothing."""
        return run_again(function, times, rewind)

    def using_session(self, session: object) -> NoReturn:
        """Refuse a session: no session has the events."""
        self.refuse("A session of your own")

    def refuse(self, what: str) -> NoReturn:
        """Raise an error that says why something cannot be done.

        :raises ConfigurationError: always.
        """
        raise ConfigurationError(
            f"{what} cannot hold events that are in {self.store.title}: each save() is stored when it returns, and "
            "cannot be rolled back. Save all that belongs together in one save(), which is atomic."
        )
