"""A datastore: a database for recorders, with engine, dialect, tables, and the unit of work to join."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self
from uuid import UUID, uuid4

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection, Engine

from ..exceptions import WriteTimeoutError
from ..metadata import Collector
from .describing import Collect, Description
from .dialects import Dialect, DialectOptions, dialect_for, in_autocommit
from .dialects.event_tables import EventTable
from .dialects.event_values import shown_id
from .forks import drop_inherited_connections


class JoinedUnit(Protocol):
    """The unit of work that recorders join, as ``flask_eventsourcing.uow`` provides it."""

    def connection(self) -> Connection:
        """The connection of its transaction to the database of the events."""

    def before_write(self) -> Connection:
        """Called before a write; returns the connection to write with."""

    def before_read(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Called before an aggregate is read."""

    def failed(self, connection: Connection) -> None:
        """Called after a write that failed."""

    def conflicted(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Told when events could not be written because another writer was first."""

    def recorded(
        self,
        connection: Connection,
        application_name: str,
        table: EventTable,
        events: Sequence[StoredEvent],
        positions: Sequence[int],
        described: Description,
    ) -> None:
        """Called after events were written, which are not committed yet."""

    def written(self) -> None:
        """Called at the very end of a write that succeeded."""

    def pending_events(self) -> Iterable[tuple[Connection, EventTable, Sequence[StoredEvent]]]:
        """Return the events that were written and whose transaction has not ended, with its connection, and the table.

        No connection is taken for it.
        """


class _InThread(threading.local):
    """The units of work in which a thread, or a greenlet, has written lately."""

    units: Sequence[weakref.ref[JoinedUnit]] = ()


_in_thread = _InThread()


AfterAppend = Callable[[Connection, JoinedUnit | None, Sequence[StoredEvent], Sequence[int], Description], None]
Tables = Mapping[str, sa.Table]
"""The tables of an application by their use: ``events``, ``snapshots``, ``tracking``."""


def _no_tables(application_name: str) -> Tables | None:
    return None


def _no_unit() -> JoinedUnit | None:
    return None


@dataclass(frozen=True, eq=False)
class Datastore:
    """What the recorders of one or more applications share. Making it does not touch the database.

    :param engine: the engine of the database with the tables.
    :param options: the options of the database.
    :param tables: returns the tables of an application by its name, or None for one that it does not know.
    :param unit: returns the unit of work to join, or None if recorders commit on their own.
    :param after_append: functions that are called within the transaction of an append, by the application's name.
    :param metadata: returns the metadata of a save; None if none are stored.
    :raises ConfigurationError: when the database is not supported.
    """

    engine: Engine
    options: DialectOptions = field(default_factory=DialectOptions)
    tables: Callable[[str], Tables | None] = _no_tables
    unit: Callable[[], JoinedUnit | None] = _no_unit
    after_append: dict[str, AfterAppend] = field(default_factory=dict)
    metadata: Collect | None = field(default_factory=Collector)
    dialect: Dialect = field(init=False)
    token: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dialect", dialect_for(self.engine, self.options))
        object.__setattr__(self, "token", uuid4().hex)
        _datastores[self.token] = self

    def prepare(self) -> None:
        """Install what the engine needs; a second call does nothing. Recorders call it when they are made."""
        self.dialect.prepare_engine()
        drop_inherited_connections(self.engine)

    def joining(self, unit: Callable[[], JoinedUnit | None]) -> Self:
        """Return a datastore on the same database, whose recorders join a unit of work."""
        return replace(self, unit=unit)

    def writing(self, *, in_autocommit: bool = False) -> Write:
        """Return a context manager with a connection to write with.

        It is the unit's connection, or one that is committed at the end.

        :param in_autocommit: whether there is only one statement, which needs no transaction.
        """
        return Write(self, self.unit(), in_autocommit)

    def reading(self, *, join: bool = True) -> Read:
        """Return a context manager with a connection to read with: the unit's, if *join* is set, or one of its own."""
        return Read(self, self.unit() if join else None)


class Read:
    """A connection to read with, in a ``with`` block; errors become the library's.

    :param unit: the unit of work whose connection it is, or None for one of its own.
    """

    connection: Connection

    def __init__(self, datastore: Datastore, unit: JoinedUnit | None) -> None:
        self._datastore = datastore
        self.unit = unit

    def __enter__(self) -> Self:
        with self._datastore.dialect.translated:
            if self.unit is not None:
                self.connection = self.unit.connection()
            else:
                self.connection = self._datastore.engine.connect()
                if self._datastore.dialect.reads_in_autocommit:
                    in_autocommit(self.connection)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._datastore.dialect.translated:
            if self.unit is None:
                self.connection.close()
        if error is not None:
            self._datastore.dialect.translated.check(error)


class Write:
    """A connection to write with, in a ``with`` block; errors become the library's, and the unit is told of the end.

    :param unit: the unit of work whose connection it is, or None for one of its own, which is committed at the end.
    """

    connection: Connection

    def __init__(self, datastore: Datastore, unit: JoinedUnit | None, in_autocommit: bool) -> None:
        self._datastore = datastore
        self.unit = unit
        self._in_autocommit = in_autocommit and datastore.dialect.appends_in_autocommit

    def __enter__(self) -> Self:
        with self._datastore.dialect.translated:
            if self.unit is not None:
                self.connection = self.unit.before_write()
            else:
                self._begin()
        return self

    def _begin(self) -> None:
        self.connection = self._datastore.engine.connect()
        if self._in_autocommit:
            in_autocommit(self.connection)
        else:
            self.connection.begin()

    def check_thread(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Refuse to wait for another transaction of this thread, which can only end after this one.

        :raises WriteTimeoutError: naming the aggregate.
        """
        for found in _in_thread.units:
            other = found()
            if other is not None and other is not self.unit:
                self._check_other(table, events, other)

    def _check_other(self, table: EventTable, events: Sequence[StoredEvent], other: JoinedUnit) -> None:
        dialect = self._datastore.dialect
        found = other.pending_events()
        ids = {event.originator_id for event in events} if found and not dialect.appends_one_by_one else None
        for connection, known, pending in found:
            before = next((event for event in pending if ids is None or event.originator_id in ids), None)
            if before is None or known.name != table.name:
                continue
            # An aborted transaction does not keep others waiting.
            if not dialect.is_aborted(connection) and dialect.is_same_table(connection, self.connection, table):
                raise WriteTimeoutError(
                    f"This thread has saved events of {shown_id(before.originator_id)} in another session, and this "
                    "save would wait for its end: commit or roll it back before, or use one session."
                )

    def conflicted(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Told when events could not be written because another writer was first."""
        if self.unit is not None:
            self.unit.conflicted(table, events)

    def recorded(
        self,
        application_name: str,
        table: EventTable,
        events: Sequence[StoredEvent],
        positions: Sequence[int],
        described: Description,
    ) -> None:
        """Called after events were written, to do what belongs to their transaction."""
        if self.unit is not None:
            self.unit.recorded(self.connection, application_name, table, events, positions, described)
            _note_in_thread(self.unit)
        after_append = self._datastore.after_append.get(application_name)
        if after_append is not None:
            after_append(self.connection, self.unit, events, positions, described)

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        translated = self._datastore.dialect.translated
        if self.unit is not None:
            if error is None:
                with translated:
                    self.unit.written()
                return
            # After any error, the unit must know before it commits.
            self.unit.failed(self.connection)
        else:
            with translated:
                self._end(commit=error is None)
        if error is not None:
            translated.check(error)

    def _end(self, *, commit: bool) -> None:
        # close() rolls back what is left open.
        try:
            if commit and not self._in_autocommit:
                self.connection.commit()
        finally:
            self.connection.close()


def _note_in_thread(unit: JoinedUnit) -> None:
    known = _in_thread.units
    if len(known) != 1 or known[0]() is not unit:
        others = [found for found in known if (other := found()) not in (None, unit) and other.pending_events()]
        _in_thread.units = [*others, weakref.ref(unit)]


_datastores: weakref.WeakValueDictionary[str, Datastore] = weakref.WeakValueDictionary()


def find_datastore(token: str) -> Datastore | None:
    """Return the datastore that was registered under a token, if it is still in use."""
    return _datastores.get(token)
