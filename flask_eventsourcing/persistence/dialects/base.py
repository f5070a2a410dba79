"""What every database has in common: plain SQL through the driver, rows to ``StoredEvent`` without a detour."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, Notification, StoredEvent, Tracking
from sqlalchemy.engine import Connection, Engine

from ...config import PostgresOrder


@dataclass(frozen=True)
class DialectOptions:
    """What the configuration says about databases; ``lock_timeout`` in seconds."""

    lock_timeout: float = 30.0
    postgres_order: PostgresOrder = "floor"
    sqlite_wal: bool = True


@dataclass(frozen=True)
class EventTable:
    """A table of events or snapshots as the statements need it."""

    table: sa.Table
    name: str
    """Quoted, and qualified by the schema if there is one."""
    text_ids: bool
    statements: dict[str, str] = field(default_factory=dict, compare=False)
    """Statements by their use, filled by the dialect as they are needed."""


class Dialect(ABC):
    """How one database appends events in order and reads them.

    Statements go through ``Connection.exec_driver_sql``, so that echoing, recording of queries and the
    instrumentation of engines see them, without the cost of compiling expressions.
    """

    mark = "%s"
    """The driver's parameter placeholder."""
    reads_in_autocommit = False
    """Whether reads outside a session are to run without a transaction."""

    def __init__(self, engine: Engine, options: DialectOptions) -> None:
        self.engine = engine
        self.options = options

    def prepare_engine(self) -> None:
        """Install what the engine needs, once an engine."""
        return

    def event_table(self, table: sa.Table) -> EventTable:
        """Describe a table for the statements."""
        preparer = self.engine.dialect.identifier_preparer
        text = isinstance(table.c.originator_id.type, sa.String)
        return EventTable(table, preparer.format_table(table), text)

    def encode_id(self, originator_id: UUID | str) -> Any:
        """Return an id as the driver takes it."""
        return originator_id.hex if isinstance(originator_id, UUID) else originator_id

    def decode_id(self, table: EventTable, value: Any) -> UUID | str:
        """Return an id as the library takes it."""
        return value if table.text_ids or isinstance(value, UUID) else UUID(value)

    def parameters(self, event: StoredEvent) -> tuple[Any, ...]:
        """Return the four parameters of one event."""
        return (self.encode_id(event.originator_id), event.originator_version, event.topic, event.state)

    @abstractmethod
    def append(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> list[int]:
        """Insert events at the end of the log, contiguously, and return their positions."""

    def insert(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Insert events that have no position, such as snapshots."""
        connection.exec_driver_sql(self.insert_statement(table), [self.parameters(event) for event in events])

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
        statement = (
            "SELECT originator_id, originator_version, topic, state "
            f"FROM {table.name} WHERE originator_id = {self.mark}"
        )
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
        rows = connection.exec_driver_sql(statement, tuple(parameters)).fetchall()
        decode = self.decode_id
        return [StoredEvent(decode(table, row[0]), row[1], row[2], bytes(row[3])) for row in rows]

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
        settled = self.settled_position(connection, table, joined=joined)
        if settled is not None:
            stop = settled if stop is None else min(stop, settled)
        conditions: list[str] = []
        parameters: list[Any] = []
        if start is not None:
            conditions.append(f"notification_id {'>=' if inclusive_of_start else '>'} {self.mark}")
            parameters.append(start)
        if stop is not None:
            conditions.append(f"notification_id <= {self.mark}")
            parameters.append(stop)
        if topics:
            conditions.append(f"topic IN ({', '.join([self.mark] * len(topics))})")
            parameters.extend(topics)
        where = " WHERE " + " AND ".join(conditions) if conditions else ""
        statement = (
            "SELECT notification_id, originator_id, originator_version, topic, state "
            f"FROM {table.name}{where} ORDER BY notification_id LIMIT {self.mark}"
        )
        rows = connection.exec_driver_sql(statement, (*parameters, limit)).fetchall()
        decode = self.decode_id
        return [Notification(decode(table, row[1]), row[2], row[3], bytes(row[4]), row[0]) for row in rows]

    def max_position(self, connection: Connection, table: EventTable, *, joined: bool = False) -> int | None:
        """Return the last settled position of the log, or None for an empty log."""
        settled = self.settled_position(connection, table, joined=joined)
        statement = f"SELECT max(notification_id) FROM {table.name}"
        parameters: tuple[Any, ...] = ()
        if settled is not None:
            statement += f" WHERE notification_id <= {self.mark}"
            parameters = (settled,)
        position: int | None = connection.exec_driver_sql(statement, parameters).scalar()
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
        parameters = (tracking.application_name, tracking.notification_id)
        if connection.exec_driver_sql(statement, parameters).rowcount != 1:
            raise IntegrityError(
                f"Position {tracking.notification_id} of {tracking.application_name} is not above the recorded one."
            )

    def max_tracking_id(self, connection: Connection, table: sa.Table, application_name: str) -> int | None:
        """Return the recorded position of an upstream application, or None."""
        name = self.engine.dialect.identifier_preparer.format_table(table)
        statement = f"SELECT max(notification_id) FROM {name} WHERE application_name = {self.mark}"
        position: int | None = connection.exec_driver_sql(statement, (application_name,)).scalar()
        return position

    @abstractmethod
    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Wait until no other unit of work has queued for this aggregate; the turn lasts to the transaction's end."""

    def is_aborted(self, connection: Connection) -> bool:
        """Whether the database would turn a commit of this transaction into a rollback."""
        return False
