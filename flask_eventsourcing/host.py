"""The protocol of a host, in which applications, projections, commands and workers run; the host without a framework.

Flask's host is in ``web.sessions``. ``PlainHost`` needs SQLAlchemy alone, and is for a script or a program without a
framework.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import sqlalchemy as sa
from blinker import NamedSignal
from eventsourcing.application import Application
from eventsourcing.persistence import Notification
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from .applications import check_environment, construct
from .exceptions import ConfigurationError, NotInitializedError
from .failures import call_each
from .lifecycle import ApplicationSlot, HostSlot
from .metadata import RECORDED, Collector, Provider, Recorded, names_recorded
from .models import Models
from .persistence import Datastore, DialectOptions
from .persistence.dialects.event_tables import ConflictError
from .signals import events_recorded
from .uow import (
    LENT,
    Batch,
    Commits,
    Run,
    SessionCommits,
    UnitOfWork,
    UnitRunner,
    Units,
    follow,
    same_database,
    session_of,
    writer_of,
)

R = TypeVar("R")
A = TypeVar("A", bound=Application[Any])

logger: logging.Logger = logging.getLogger(__name__)


class Host(Protocol):
    """A framework or program, for the applications, projections, commands and workers that run in it."""

    @property
    def datastore(self) -> Datastore:
        """The database of the events, the projections and their models."""

    def context(self) -> AbstractContextManager[object]:
        """The context of a piece of work that is not a request: an application context in Flask, nothing elsewhere."""

    def unit(self) -> UnitOfWork | None:
        """The unit of work to join now, made at the first call, or None if recorders commit on their own."""

    def open_unit(self) -> UnitOfWork | None:
        """The unit of work of the current session, if a recorder has joined it already."""

    def unit_of(self, session: orm.Session) -> UnitOfWork:
        """The unit of work of a session, made at the first call."""

    def transaction(self, *, queueing: bool = False, run: Run | None = None) -> AbstractContextManager[orm.Session]:
        """A unit of work on the current session: commits on success, rolls back on error.

        :param queueing: whether it can be run again; then it queues for contended aggregates.
        :param run: the run of the unit, if the caller needs to know more of it.
        """

    def retry(self, function: Callable[[], R], times: int, *, lenient: bool = False) -> R:
        """Call a function in :meth:`transaction`, and again after a conflict, *times* times at most.

        :param lenient: whether other code may commit in it, as in a task that did not ask for a unit of work.
        """

    def using(self, connection: Connection) -> AbstractContextManager[orm.Session]:
        """A context in which a new session is the current one, and uses *connection* instead of the events' engine."""

    def using_session(self, session: orm.Session) -> AbstractContextManager[orm.Session]:
        """A context in which the caller's session is the current one. The caller commits and closes it.

        :raises ConfigurationError: when it is for another database.
        """

    def tables_of(self, model: Any) -> Sequence[sa.Table]:
        """The tables of one of the host's models."""


def by_application(batches: Sequence[Batch]) -> dict[str, tuple[Notification, ...]]:
    """Return the events of batches by the name of the application that recorded them, in the order of its log."""
    names = dict.fromkeys(batch.application_name for batch in batches)
    return {name: tuple(n for b in batches if b.application_name == name for n in b.notifications) for name in names}


def recordings_of(batches: Sequence[Batch], name: str) -> tuple[Recorded, ...]:
    """Return the metadata and ids of an application's events in batches, in the order of its log."""
    return tuple(each for batch in batches if batch.application_name == name for each in batch.recorded)


def send_recorded(
    sender: object,
    application: Any,
    notifications: Sequence[Notification],
    find_recorded: Callable[[], Sequence[Recorded]],
) -> None:
    """Send ``events_recorded``. An error of a receiver is logged, because the events are committed.

    :param find_recorded: returns the argument for receivers with the parameter ``recorded``.
    """
    send_each(events_recorded, sender, find_recorded, application=application, notifications=notifications)


def send_each(
    signal: NamedSignal, sender: object, find_recorded: Callable[[], Sequence[Recorded]] | None = None, **told: Any
) -> None:
    """Send a signal to each receiver. An error of one is logged, and the others are called all the same."""
    name = signal.name.replace("-", "_")
    for receiver in signal.receivers_for(sender):
        further = {RECORDED: find_recorded()} if find_recorded is not None and names_recorded(receiver) else {}
        # An error here must not look to the caller of commit() like a failed commit.
        call_each(logger, [(partial(receiver, sender, **told, **further), "A receiver of %s failed.", (name,))])


class PlainHost:
    """Run applications on SQLAlchemy sessions, without a framework. Scripts get the promises of a Flask app.

    :param session: a ``scoped_session``, whose current session recorders always join; or a ``sessionmaker``, and then
        they join the one that :meth:`transaction` opens, and commit on their own outside of it.
    :param models: the record classes of each application class, as ``flask_eventsourcing.models.make_models`` makes
        them.
    :param options: options of the database, and how your users call the commands.
    :param env: what the library reads from the environment of an application.
    :param metadata: functions that return metadata for the events of each save; with False none are stored.
    :param commits: who commits; by default the sessions do.
    :param conflict_error: the error that is raised for a conflict.
    :raises ConfigurationError: when the session has no engine, its database is not supported, or a value cannot be
        used.
    """

    def __init__(
        self,
        session: orm.scoped_session[Any] | orm.sessionmaker[Any],
        models: Mapping[type[Application[Any]], Models],
        *,
        options: DialectOptions | None = None,
        env: Mapping[str, str] | None = None,
        metadata: Sequence[Provider] | Literal[False] = (),
        commits: Commits | None = None,
        conflict_error: type[ConflictError] = ConflictError,
    ) -> None:
        self._factory = session
        self.models: dict[type[Application[Any]], Models] = dict(models)
        """The record classes of each application class."""
        check_environment(env or {}, list(models), "env")
        by_name = {application_class.name: each.tables for application_class, each in models.items()}
        collector = None if metadata is False else Collector(metadata)
        plain = Datastore(_engine_of(session, models), options or DialectOptions(), by_name.get, metadata=collector)
        self._thread = threading.local()
        for each in models.values():
            plain.dialect.check_names(each.tables.values())
        self._current: ContextVar[list[orm.Session] | None] = ContextVar("current session", default=None)
        arguments = {"clause": _events_table(models)}
        self._units = Units(plain, commits or SessionCommits(), self._publish, arguments, scope=self._scope)
        self._runner = UnitRunner(self._required)
        self._datastore = plain.joining(self.unit)
        for store in (plain, self._datastore):
            store.dialect.conflict_error = conflict_error
        self._slots: dict[type[Application[Any]], ApplicationSlot[Application[Any]]] = {
            application_class: HostSlot(
                partial(construct, application_class, self._datastore, dict(env or {}), self.unit, self.using_session)
            )
            for application_class in models
        }
        plain.prepare()
        follow(plain.engine)

    # ------------------------------------------------------------------------------------------- applications

    @property
    def application(self) -> Application[Any]:
        """The single application of this process, or the first one of several. Its first use constructs it."""
        return next(iter(self._slots.values())).get()

    def __getitem__(self, application_class: type[A]) -> A:
        """Return the single instance of an application class in this process. Its first use constructs it.

        :raises ConfigurationError: when there are no models for the class.
        """
        if application_class not in self._slots:
            names = ", ".join(cls.__qualname__ for cls in self._slots)
            raise ConfigurationError(f"{application_class!r} has no models here: pass some for it, as for {names}.")
        return self._slots[application_class].get()  # type: ignore[return-value]

    @property
    def applications(self) -> Mapping[type[Application[Any]], Application[Any]]:
        """The single instance of each application class in this process."""
        return {application_class: slot.get() for application_class, slot in self._slots.items()}

    def close(self) -> None:
        """Close the applications of this process. It may be called again; the next use constructs them again."""
        for slot in self._slots.values():
            slot.close()

    def _publish(self, batches: Sequence[Batch]) -> None:
        if not events_recorded.receivers:
            return
        applications = {application_class.name: slot for application_class, slot in self._slots.items()}
        for name, notifications in by_application(batches).items():
            application = applications[name].get() if name in applications else None
            send_recorded(application, application, notifications, partial(recordings_of, batches, name))

    # ------------------------------------------------------------------------------------------- the host

    @property
    def datastore(self) -> Datastore:
        """The database of the events."""
        return self._datastore

    def context(self) -> AbstractContextManager[object]:
        """A context that does nothing."""
        return nullcontext()

    def unit(self) -> UnitOfWork | None:
        """The unit of work to join now, or None where recorders commit on their own."""
        session = self._joined()
        return None if session is None else self._units.of(session)

    def open_unit(self) -> UnitOfWork | None:
        """The unit of work of the current session, if a recorder has joined it already."""
        return self._units.open(self._made() or self._used_session())

    def unit_of(self, session: orm.Session) -> UnitOfWork:
        """The unit of work of a session."""
        return self._units.of(session)

    @contextmanager
    def session(self) -> Iterator[orm.Session]:
        """Make a session of the factory the current one in a block. Recorders join it, and you commit."""
        with self._made_current(self._maker()()) as made:
            yield made

    @contextmanager
    def transaction(self, *, queueing: bool = False, run: Run | None = None) -> Iterator[orm.Session]:
        """A unit of work: commits on success and rolls back on error. Within another one it joins that.

        :raises RollbackOnlyError: from the outermost, when an inner one had failed.
        """
        with self._open_session(), self._runner.transaction(queueing=queueing, run=run) as session:
            yield session

    def retry(self, function: Callable[[], R], times: int, *, lenient: bool = False) -> R:
        """Call a function in :meth:`transaction`, again after a conflict, *times* times at most. It must read again."""
        with self._open_session():
            return self._runner.retry(function, times, lenient=lenient)

    @contextmanager
    def using(self, connection: Connection) -> Iterator[orm.Session]:
        """A context in which a new session on *connection* is the current one."""
        with self._made_current(redirected_session(self._maker(), self._datastore.engine, connection)) as session:
            self._units.of(session).route.bind_arguments = {"bind": connection}
            yield session

    @contextmanager
    def using_session(self, session: orm.Session | orm.scoped_session[Any]) -> Iterator[orm.Session]:
        """A context in which the caller's session is the current one. The caller commits and closes it.

        :raises ConfigurationError: when it is for another database.
        """
        session = session_of(session)
        check_session(session, self._datastore.engine, self._units.bind_arguments["clause"])
        session.info[LENT] = True
        token = self._current.set([session])
        try:
            yield session
        finally:
            self._current.reset(token)

    def tables_of(self, model: Any) -> Sequence[sa.Table]:
        """The tables of a mapped class."""
        return mapped_tables(model)

    def _made(self) -> orm.Session | None:
        return next(iter(self._current.get() or ()), None)

    def _joined(self) -> orm.Session | None:
        return self._made() or self._current_session()

    def _current_session(self) -> orm.Session | None:
        """Return the session to join if no other one was made current, or None."""
        return self._factory() if isinstance(self._factory, orm.scoped_session) else None

    def _maker(self) -> orm.sessionmaker[Any]:
        factory: Any = self._factory
        maker: orm.sessionmaker[Any] = factory.session_factory if isinstance(factory, orm.scoped_session) else factory
        return maker

    def _used_session(self) -> orm.Session | None:
        """Return the same session, without making one."""
        scoped = self._factory if isinstance(self._factory, orm.scoped_session) else None
        return None if scoped is None or not scoped.registry.has() else scoped()

    def _scope(self) -> object:
        """The key of a scope: its session, and sessions that replace it, have the same key."""
        registry: Any = getattr(self._factory, "registry", None)
        if isinstance(registry, sa.util.ThreadLocalRegistry):
            # An object instead of the number of the thread, which another thread may get later.
            self._thread.scope = getattr(self._thread, "scope", None) or object()
            return self._thread.scope
        return None if registry is None else (id(registry), registry.scopefunc())

    def _required(self) -> UnitOfWork:
        session = self._joined()
        if session is None:
            raise NotInitializedError("A unit of work needs a session: use 'with host.transaction():'.")
        return self._units.of(session)

    @contextmanager
    def _open_session(self) -> Iterator[None]:
        if self._joined() is not None:
            yield
            return
        with self.session():
            yield

    @contextmanager
    def _made_current(self, session: orm.Session) -> Iterator[orm.Session]:
        session.info[LENT] = True
        current = [session]
        token = self._current.set(current)
        try:
            with session:
                yield session
        finally:
            # A task that was started in the block has a copy of the context, and may run longer.
            current.clear()
            self._current.reset(token)


def redirected_session(factory: orm.sessionmaker[Any], engine: sa.Engine, connection: Connection) -> orm.Session:
    """Make a session like a factory, which uses a connection instead of one engine."""
    kind: Any = factory.class_

    class RedirectedSession(kind):  # type: ignore[misc]
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            found = super().get_bind(*args, **kwargs)
            return connection if found is engine else found

    made: orm.Session = RedirectedSession(**factory.kw)
    return made


def check_session(session: orm.Session, engine: sa.Engine, events_table: sa.Table) -> None:
    """Check that a session finds an events table in the database of an engine.

    :raises ConfigurationError: when it has no engine for it, or that of another database.
    """
    try:
        found = writer_of(session, events_table).engine
    except sa.exc.UnboundExecutionError as error:
        raise ConfigurationError(
            f"This session has no engine for {events_table.name!r}: make it with one, or with that of the events."
        ) from error
    if not same_database(found, engine):
        raise ConfigurationError(
            f"This session is for the database {found.url.render_as_string(hide_password=True)}, and "
            f"{events_table.name!r} is in {engine.url.render_as_string(hide_password=True)}: make it for that one."
        )


def mapped_tables(model: Any) -> list[sa.Table]:
    """Return the tables of a mapped class."""
    return [table for table in sa.inspect(model).tables if isinstance(table, sa.Table)]


def _events_table(models: Mapping[type[Application[Any]], Models]) -> sa.Table:
    for each in models.values():
        return each.tables["events"]
    raise ConfigurationError("There is no application class: give the models of at least one.")


def _engine_of(session: Any, models: Mapping[type[Application[Any]], Models]) -> sa.Engine:
    """Return the engine that a session factory's sessions use for the events."""
    factory: orm.sessionmaker[Any] = session.session_factory if isinstance(session, orm.scoped_session) else session
    with factory() as made:
        try:
            bind = writer_of(made, _events_table(models))
        except sa.exc.UnboundExecutionError as error:
            raise ConfigurationError(f"The session factory has no engine for the events: {error}") from error
    engine: sa.Engine = bind.engine
    return engine
