"""What every database has in common: plain SQL through the driver, rows to ``StoredEvent`` without a detour."""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, Notification, StoredEvent, Tracking
from sqlalchemy.engine import Connection, Engine

from ...config import PostgresOrder
from .driver import Driver, notification, stored_event
from .waiting import Waiter


@dataclass(frozen=True)
class DialectOptions:
    """What the configuration says about databases; ``lock_timeout`` in seconds."""

    lock_timeout: float = 30.0
    postgres_order: PostgresOrder = "floor"
    postgres_notify: bool = True
    sqlite_wal: bool = True


_prepared: weakref.WeakSet[Engine] = weakref.WeakSet()

SETTLED_FOR = 1.0
"""Seconds for which a settled position is remembered. Settled is for ever, unless somebody makes the table anew."""


class FrozenSnapshotError(Exception):
    """The transaction's snapshot is from before the log's horizon: the log is to be read on another connection."""


class _Settled(NamedTuple):
    position: int
    until: float


class _Page(NamedTuple):
    start: int | None
    limit: int
    stop: int | None
    topics: Sequence[str]
    inclusive_of_start: bool


@dataclass(frozen=True)
class EventTable:
    """A table of events or snapshots as the statements need it."""

    table: sa.Table
    name: str
    """Quoted, and qualified by the schema if there is one."""
    text_ids: bool
    counter: str | None = None
    """The quoted name of the tracking table, where a database counts positions in it."""
    statements: dict[str, str] = field(default_factory=dict, compare=False)
    """Statements by their use, filled by the dialect as they are needed."""


class Dialect(Driver, ABC):
    """How one database appends events in order and reads them."""

    aborts_transactions = False
    """Whether an error makes the database refuse all but a rollback."""
    appends_in_autocommit = False
    """Whether one append is one statement, so that it needs no transaction around it."""
    reads_in_autocommit = False
    """Whether reads outside a session are to run without a transaction."""
    rows_at_once = 1
    """The rows of one statement of :meth:`insert_rows`."""

    def __init__(self, engine: Engine, options: DialectOptions) -> None:
        super().__init__(engine)
        self.options = options
        self._settled: dict[str, _Settled] = {}

    def prepare_engine(self) -> None:
        """Install what the engine needs, once an engine; that of ``execution_options()`` has what its parent has."""
        engine = self.engine
        while (parent := getattr(engine, "_proxied", None)) is not None:
            engine = parent
        if engine not in _prepared:
            _prepared.add(engine)
            self.install(engine)

    def install(self, engine: Engine) -> None:
        """Install it."""
        return

    def event_table(self, table: sa.Table, tracking_table: sa.Table | None = None) -> EventTable:
        """Describe a table for the statements."""
        quoted = self.engine.dialect.identifier_preparer.format_table
        text = isinstance(table.c.originator_id.type, sa.String)
        counter = None if tracking_table is None else quoted(tracking_table)
        return EventTable(table, quoted(table), text, counter)

    def encode_id(self, originator_id: UUID | str) -> Any:
        """Return an id as the driver takes it."""
        return originator_id.hex if isinstance(originator_id, UUID) else originator_id

    def id_decoder(self, table: EventTable) -> Callable[[Any], UUID | str]:
        """Return the function that makes an id from a column's value."""
        return str if table.text_ids else UUID

    def parameters(self, event: StoredEvent) -> tuple[Any, ...]:
        """Return the four parameters of one event."""
        return (self.encode_id(event.originator_id), event.originator_version, event.topic, event.state)

    @abstractmethod
    def append(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> list[int]:
        """Insert events at the end of the log, contiguously, and return their positions."""

    def insert(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Insert events that have no position, such as snapshots."""
        self.modify_many(connection, self.insert_statement(table), [self.parameters(event) for event in events])

    def insert_rows(self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> Any:
        """Insert all of the rows, or none, with a statement that would insert one; returns the driver's last id."""
        if len(rows) <= self.rows_at_once:
            return self._insert_chunk(connection, statement, rows)
        # One statement is all or nothing; several need a savepoint to be so.
        last = None
        self.modify(connection, "SAVEPOINT flask_eventsourcing")
        try:
            for start in range(0, len(rows), self.rows_at_once):
                last = self._insert_chunk(connection, statement, rows[start : start + self.rows_at_once])
        except BaseException:
            # Whatever it was, half of a save must not be committed. An aborted transaction has no savepoint.
            if not connection.invalidated and not self.is_aborted(connection):
                self.modify(connection, "ROLLBACK TO SAVEPOINT flask_eventsourcing")
                self.modify(connection, "RELEASE SAVEPOINT flask_eventsourcing")
            raise
        self.modify(connection, "RELEASE SAVEPOINT flask_eventsourcing")
        return last

    def _insert_chunk(self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> Any:
        marks = f", ({', '.join([self.mark] * len(rows[0]))})" * (len(rows) - 1)
        return self.modify(connection, statement + marks, [item for row in rows for item in row]).lastrowid

    def insert_statement(self, table: EventTable) -> str:
        """The statement that inserts one event."""
        statement = table.statements.get("insert")
        if statement is None:
            marks = ", ".join([self.mark] * 4)
            statement = f"INSERT INTO {table.name} (originator_id, originator_version, topic, state) VALUES ({marks})"
            table.statements["insert"] = statement
        return statement

    def select_events(
        self,
        connection: Connection,
        table: EventTable,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> list[StoredEvent]:
        """Read the events of one aggregate."""
        statement = f"SELECT originator_version, topic, state FROM {table.name} WHERE originator_id = {self.mark}"
        parameters: list[Any] = [self.encode_id(originator_id)]
        if gt is not None:
            statement += f" AND originator_version > {self.mark}"
            parameters.append(gt)
        if lte is not None:
            statement += f" AND originator_version <= {self.mark}"
            parameters.append(lte)
        statement += " ORDER BY originator_version" + (" DESC" if desc else "")
        if limit is not None:
            statement += f" LIMIT {self.mark}"
            parameters.append(limit)
        if isinstance(originator_id, str) and not table.text_ids:
            originator_id = UUID(originator_id)
        rows = self.fetch(connection, statement, parameters)
        return [stored_event(originator_id, version, topic, state) for version, topic, state in rows]

    def settled_position(self, connection: Connection, table: EventTable, *, joined: bool) -> int | None:
        """Return the position up to which no event can appear any more, or None where that is all of them.

        With *joined*, the transaction's own events do not count.
        """
        return None

    def select_notifications(
        self,
        connection: Connection,
        table: EventTable,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
        joined: bool = False,
    ) -> list[Notification]:
        """Read the log by position, up to the settled position."""
        page = _Page(start, limit, stop, topics, inclusive_of_start)
        if not joined:
            # While catching up, a full page below a position that was settled a moment ago needs no look at the locks.
            settled = self._settled.get(table.name)
            if settled is not None and settled.until > time.monotonic():
                found = self._select_page(connection, table, page, settled.position)
                if len(found) == limit:
                    return found
        position = self.settled_position(connection, table, joined=joined)
        if position is not None and not joined:
            self._settled[table.name] = _Settled(position, time.monotonic() + SETTLED_FOR)
        return self._select_page(connection, table, page, position)

    def _select_page(
        self, connection: Connection, table: EventTable, page: _Page, settled: int | None
    ) -> list[Notification]:
        stop = page.stop if settled is None else settled if page.stop is None else min(page.stop, settled)
        conditions: list[str] = []
        parameters: list[Any] = []
        if page.start is not None:
            conditions.append(f"notification_id {'>=' if page.inclusive_of_start else '>'} {self.mark}")
            parameters.append(page.start)
        if stop is not None:
            conditions.append(f"notification_id <= {self.mark}")
            parameters.append(stop)
        if page.topics:
            conditions.append(f"topic IN ({', '.join([self.mark] * len(page.topics))})")
            parameters.extend(page.topics)
        where = " WHERE " + " AND ".join(conditions) if conditions else ""
        statement = (
            "SELECT notification_id, originator_id, originator_version, topic, state "
            f"FROM {table.name}{where} ORDER BY notification_id LIMIT {self.mark}"
        )
        rows = self.fetch(connection, statement, [*parameters, page.limit])
        decode = self.id_decoder(table)
        return [
            notification(position, decode(originator_id), version, topic, state)
            for position, originator_id, version, topic, state in rows
        ]

    def max_position(self, connection: Connection, table: EventTable, *, joined: bool = False) -> int | None:
        """Return the last settled position of the log, or None for an empty log."""
        settled = self.settled_position(connection, table, joined=joined)
        statement = f"SELECT max(notification_id) FROM {table.name}"
        parameters: list[Any] = []
        if settled is not None:
            statement += f" WHERE notification_id <= {self.mark}"
            parameters = [settled]
        position: int | None = self.fetch(connection, statement, parameters)[0][0]
        return position

    def insert_tracking(self, connection: Connection, table: sa.Table, tracking: Tracking) -> None:
        """Record a position, which must be above the recorded one.

        :raises IntegrityError: when it is not.
        """
        name = self.engine.dialect.identifier_preparer.format_table(table)
        statement = (
            f"INSERT INTO {name} (application_name, notification_id) VALUES ({self.mark}, {self.mark}) "
            "ON CONFLICT (application_name) DO UPDATE SET notification_id = excluded.notification_id "
            f"WHERE {name}.notification_id < excluded.notification_id"
        )
        if self.modify(connection, statement, (tracking.application_name, tracking.notification_id)).rowcount != 1:
            raise IntegrityError(
                f"Position {tracking.notification_id} of {tracking.application_name} is not above the recorded one."
            )

    def max_tracking_id(self, connection: Connection, table: sa.Table, application_name: str) -> int | None:
        """Return the recorded position of an upstream application, or None."""
        name = self.engine.dialect.identifier_preparer.format_table(table)
        statement = f"SELECT max(notification_id) FROM {name} WHERE application_name = {self.mark}"
        position: int | None = self.fetch(connection, statement, (application_name,))[0][0]
        return position

    def waiter(self, table: EventTable) -> Waiter:
        """Return what waits for news of a log; here it polls."""
        return Waiter()

    @abstractmethod
    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Take the turn to change an aggregate, which lasts to the transaction's end.

        Without *wait* it is taken only if nobody has it; the unit of work goes on without it otherwise.
        """

    def lock_log(self, connection: Connection, table: EventTable) -> None:
        """Keep appends to a log out, to the end of the transaction, once those in progress have ended.

        Here the transaction has written something before and that is enough, as there is one writer at a time.
        """
        return

    def is_aborted(self, connection: Connection) -> bool:
        """Whether the database would turn a commit of this transaction into a rollback."""
        return False
