"""The base of the dialects: plain SQL on the driver, and rows that become ``StoredEvent`` directly."""

from __future__ import annotations

import re
import secrets
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, Notification, StoredEvent, Tracking
from sqlalchemy.engine import Connection, Engine, ExceptionContext

from ...config import DialectOptions
from ...tailing import Waiter
from .calls import root_engine
from .event_tables import EVENT_COLUMNS, NOTHING, OF_AGGREGATE, POSITION, Beside, EventTable, Processor, begins
from .event_values import Accepted, as_text, check_names, check_tracking
from .locks import ForProjections
from .looks import Looks

_CHANGES = re.compile(r"(?<!FOR )(?<!KEY )\b(INSERT|UPDATE|DELETE|MERGE|REPLACE|TRUNCATE|CALL)\b", re.IGNORECASE)
_ENDS = re.compile(
    r"\s*(COMMIT|ROLLBACK(?!\s+(WORK\s+)?TO\b)|END|ABORT|BEGIN|START|PREPARE\s+TRANSACTION)\b", re.IGNORECASE
)
_prepared: weakref.WeakSet[Engine] = weakref.WeakSet()
MARK_HOLDS_FOR = 1.0
"""Seconds for which a high-water mark is remembered. It stays true unless the table is created again."""

IDENTITY = "__log__"
"""The name under which the tracking table has the identity of the log."""


def new_identity() -> dict[str, Any]:
    """Return a row of a tracking table with the identity of a new log, a number that every integer column holds."""
    return {"application_name": IDENTITY, POSITION: secrets.randbelow(2**31 - 1) + 1}


HEADS_AT_ONCE = 100
"""The events of one statement of :meth:`Dialect.find_gap`."""


class FrozenSnapshotError(Exception):
    """The transaction's snapshot is older than the high-water mark: read the log on another connection."""


class _KnownMark(NamedTuple):
    position: int
    until: float
    condition: str
    """That the name of the table still means the one whose mark it is; empty where it always does."""


class _Page(NamedTuple):
    start: int | None
    limit: int
    stop: int | None = None
    topics: Sequence[str] = ()
    inclusive_of_start: bool = True


class Dialect(Looks, ForProjections, ABC):
    """How one database appends events in order and reads them."""

    title: ClassVar[str] = ""
    """The name of the database in messages."""
    column_types: ClassVar[Mapping[str, Any]] = {}
    """Column types of this database, by their use, if the general ones of ``persistence.tables`` are not right."""
    table_options: ClassVar[Mapping[str, Any]] = {}
    """Keyword arguments of the events' ``Table``."""
    has_schemas: ClassVar[bool] = True
    """Whether tables can be put into a schema."""
    aborts_transactions: ClassVar[bool] = False
    """Whether the database refuses everything but a rollback after an error."""
    survives_forks: ClassVar[bool] = True
    """Whether a forked process may open the database again that its parent had open."""
    appends_in_autocommit = False
    """Whether one append is one statement, so that it needs no transaction around it."""
    reads_in_autocommit: ClassVar[bool] = False
    """Whether reads outside a session are to run without a transaction."""

    def __init__(self, engine: Engine, options: DialectOptions) -> None:
        super().__init__(engine, options.program)
        self.options = options
        self._marks: dict[str, _KnownMark] = {}
        self._located: dict[str, EventTable] = {}

    @classmethod
    def search_path(cls, driver_connection: Any) -> str | None:
        """Return where a connection looks for tables, or None if that never changes, or cannot be asked."""
        return None

    @classmethod
    def set_search_path(cls, driver_connection: Any, path: str) -> None:
        """Make a connection look for tables elsewhere, until it is closed."""

    @classmethod
    def is_in_memory(cls, url: sa.URL) -> bool:
        """Whether an address is that of a database in this process's memory."""
        return False

    @classmethod
    def guard_forks(cls, engine: Engine) -> bool:
        """Have an engine refuse what a fork has made unsafe; returns whether to close idle connections before one."""
        return False

    def prepare_engine(self) -> None:
        """Install what the engine needs, once an engine; that of ``execution_options()`` has what its parent has."""
        engine = root_engine(self.engine)
        if engine not in _prepared:
            _prepared.add(engine)
            sa.event.listen(engine, "handle_error", self._after_interruption)
            self.install(engine)

    def _after_interruption(self, context: ExceptionContext) -> None:
        connection, error = context.connection, context.original_exception
        # A server that refuses writes is not the primary any more, so all connections of the pool are closed.
        context.is_disconnect = context.is_disconnect or self.is_read_only(error)
        answers = (self.driver_error, sa.exc.SQLAlchemyError)
        if connection is None or connection.closed or connection.invalidated or isinstance(error, answers):
            return
        if self.is_left_midway(connection.connection.dbapi_connection, error):
            # SQLAlchemy gives up a connection only for an error that is not an Exception. The pool's others stay.
            context.is_disconnect, context.invalidate_pool_on_disconnect = True, False

    def install(self, engine: Engine) -> None:
        """Install it."""

    def event_table(
        self, table: sa.Table, tracking_table: sa.Table | None = None, snapshots_table: sa.Table | None = None
    ) -> EventTable:
        """Describe a table for the statements."""
        quoted = self.engine.dialect.identifier_preparer.format_table
        given = [each for each in (table, tracking_table, snapshots_table) if each is not None]
        self.check_names(given)
        self.tables.update((quoted(each), each) for each in given)
        columns = [table.c[name] for name in EVENT_COLUMNS]
        found = ((number, self._bind_processor(column)) for number, column in enumerate(columns))
        accepted = Accepted.by(quoted(table), *(column.type for column in columns[:3]))
        decode = columns[0].type.dialect_impl(self.engine.dialect).result_processor(self.engine.dialect, None)
        return EventTable(
            table,
            quoted(table),
            accepted,
            tuple((number, bind) for number, bind in found if bind is not None),
            decode or (as_text if accepted.id_class is str else UUID),
            None if tracking_table is None else quoted(tracking_table),
            None if snapshots_table is None else quoted(snapshots_table),
        )

    def changes_rows(self, statement: str) -> bool:
        """Whether a statement may change rows."""
        return _CHANGES.search(statement) is not None

    def ends_transaction(self, statement: str) -> bool:
        """Whether a textual statement ends a transaction, or would, by its first word."""
        return _ENDS.match(statement) is not None

    def check_names(self, tables: Iterable[sa.Table]) -> None:
        """Check that the names of tables, and of what belongs to them, are not too long for the database.

        :raises ConfigurationError: for one that is.
        """
        check_names(tables, self.title, self.longest_name, self.counts)

    def _bind_processor(self, column: sa.Column[Any]) -> Processor | None:
        implementation = column.type.dialect_impl(dialect := self.engine.dialect)
        # Every driver takes ``bytes`` unchanged.
        return None if isinstance(implementation, sa.LargeBinary) else implementation.bind_processor(dialect)

    @abstractmethod
    def append(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], beside: Beside = NOTHING
    ) -> list[int]:
        """Insert events at the end of the log, contiguously, and return their positions."""

    def is_meant(self, connection: Connection, table: EventTable) -> str:
        """Return the condition under which a table's name means the table that it meant last on this connection."""
        return ""

    def name_of(self, connection: Connection, table: sa.Table) -> str:
        """Return the quoted name of a table, in the schema that a connection's ``schema_translate_map`` gives it."""
        preparer = self.engine.dialect.identifier_preparer
        schema = self.schema_of(connection, table)
        name = preparer.quote(table.name)
        return f"{preparer.quote_schema(schema)}.{name}" if schema else name

    def located(self, connection: Connection, table: EventTable) -> EventTable:
        """Return a table as a connection's ``schema_translate_map`` has it, with statements of its own."""
        if not connection.get_execution_options().get("schema_translate_map"):
            return table
        name = self.name_of(connection, table.table)
        if name not in self._located:
            # The dialect of a unit of work knows only the tables that it was given.
            beside = (table.counter, table.snapshots)
            others = [None if each is None else self.tables.get(each) for each in beside]
            names = [
                known if at is None else self.name_of(connection, at) for known, at in zip(beside, others, strict=True)
            ]
            self._located[name] = replace(table, name=name, counter=names[0], snapshots=names[1], statements={})
            self.tables.update({each: at for each, at in zip(names, others, strict=True) if each and at is not None})
            self.tables[name] = table.table
        return self._located[name]

    def insert(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Insert events that have no position, such as snapshots."""
        self.modify_many(connection, self.insert_statement(table), [table.row(event) for event in events])

    def find_gap(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], lock: str, *, snapshots: bool
    ) -> StoredEvent | None:
        """Return one of the events that would leave a gap in its stream, or None.

        :param lock: the words that make the reads locking ones.
        :param snapshots: what :meth:`needs_snapshots` has returned.
        """
        missing = self._find_gap(connection, table, events, lock, snapshots=snapshots)
        if missing is not None and not snapshots and self.has_snapshots(connection, table):
            missing = self._find_gap(connection, table, events, lock, snapshots=True)
        return missing

    def _find_gap(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], lock: str, *, snapshots: bool
    ) -> StoredEvent | None:
        for start in range(0, len(events), HEADS_AT_ONCE):
            some = events[start : start + HEADS_AT_ONCE]
            rows = self.fetch(connection, *table.look_for_gap(some, self.mark, lock, snapshots=snapshots))
            if rows:
                return some[int(rows[0][0])]
        return None

    def needs_snapshots(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> bool:
        """Whether the snapshots are read before some of the events are appended."""
        return any(map(begins, events)) and self.has_snapshots(connection, table)

    def has_snapshots(self, connection: Connection, table: EventTable) -> bool:
        """Whether there is a table of snapshots: the library makes none for an application that takes none.

        The catalog is asked, because a statement would fail without the table; and each time, because tenants may
        differ.
        """
        return table.snapshots is not None and self.is_there(connection, self.tables[table.snapshots])

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
        statement = f"SELECT {OF_AGGREGATE} FROM {table.name} WHERE originator_id = {self.mark}"
        parameters: list[Any] = [table.encode_id(originator_id)]
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
        rows = self.fetch(connection, statement, parameters)
        return table.stream(originator_id, rows)

    def high_water_mark(self, connection: Connection, table: EventTable, *, joined: bool) -> int | None:
        """Return the position up to which no event can appear any more, or None if that holds for all positions.

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
        """Read the log by position, up to the high-water mark; a page with rows that cannot be read says so."""
        page = _Page(start, limit, stop, topics, inclusive_of_start)
        if not joined:
            # A full page, or a page that ends below a mark of a moment ago, needs no look at the locks.
            known = self._marks.get(table.name)
            if known is not None and known.until > time.monotonic():
                found = self._select_page(connection, table, page, known.position, known.condition)
                # An empty page may mean that the table was made again.
                if len(found) == limit or (found and stop is not None and stop <= known.position):
                    return found
        return self._select_page(connection, table, page, self._find_mark(connection, table, joined=joined))

    def select_committed(
        self, connection: Connection, table: EventTable, after: int, limit: int, largest: int
    ) -> list[Notification]:
        """Read committed events by position, even if others may appear before them. Only the first may be large."""
        first = f"SELECT min({POSITION}) FROM {table.name} WHERE {POSITION} > {after}"
        small = f"({POSITION} = ({first}) OR length(state) <= {largest})"
        return self._select_page(connection, table, _Page(after, limit, inclusive_of_start=False), None, small)

    def _find_mark(self, connection: Connection, table: EventTable, *, joined: bool) -> int | None:
        mark = self.high_water_mark(connection, table, joined=joined)
        if mark is not None and not joined:
            is_meant = self.is_meant(connection, table)
            self._marks[table.name] = _KnownMark(mark, time.monotonic() + MARK_HOLDS_FOR, is_meant)
        return mark

    def _select_page(
        self, connection: Connection, table: EventTable, page: _Page, mark: int | None, condition: str = ""
    ) -> list[Notification]:
        stop = page.stop if mark is None else mark if page.stop is None else min(page.stop, mark)
        conditions = [condition] if condition else []
        parameters: list[Any] = []
        if page.start is not None:
            conditions.append(f"{POSITION} {'>=' if page.inclusive_of_start else '>'} {self.mark}")
            parameters.append(page.start)
        if stop is not None:
            conditions.append(f"{POSITION} <= {self.mark}")
            parameters.append(stop)
        if page.topics:
            conditions.append(f"topic IN ({', '.join([self.mark] * len(page.topics))})")
            parameters.extend(page.topics)
        where = " WHERE " + " AND ".join(conditions) if conditions else ""
        columns = f"{POSITION}, {', '.join(EVENT_COLUMNS)}"
        statement = f"SELECT {columns} FROM {table.name}{where} ORDER BY {POSITION} LIMIT {self.mark}"
        return table.page(self.fetch(connection, statement, [*parameters, page.limit]))

    def last_position(self, connection: Connection, table: EventTable, *, joined: bool = False) -> int | None:
        """Return the position of the last event up to the high-water mark, or None for an empty log."""
        mark = self._find_mark(connection, table, joined=joined)
        upto = "" if mark is None else f" WHERE {POSITION} <= {self.mark}"
        statement = f"SELECT max({POSITION}) FROM {table.name}{upto}"
        return cast("int | None", self.fetch(connection, statement, [] if mark is None else [mark])[0][0])

    def insert_tracking(self, connection: Connection, table: sa.Table, tracking: Tracking) -> None:
        """Record a position, which must be above the recorded one.

        :raises IntegrityError: when it is not.
        """
        check_tracking(tracking)
        name = self.name_of(connection, table)
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
        name = self.name_of(connection, table)
        statement = f"SELECT max(notification_id) FROM {name} WHERE application_name = {self.mark}"
        return cast("int | None", self.fetch(connection, statement, (application_name,))[0][0])

    def log_identity(self, connection: Connection, tracking_table: sa.Table) -> int:
        """Return the identity of a log, a number that no other log has. A log without one gets one."""
        known = self.max_tracking_id(connection, tracking_table, IDENTITY)
        if known is not None:
            return known
        with suppress(sa.exc.IntegrityError), connection.begin_nested():
            connection.execute(sa.insert(tracking_table).values(new_identity()))
        query = sa.select(tracking_table.c[POSITION]).where(tracking_table.c.application_name == IDENTITY)
        return int(connection.scalars(query).one())

    def waiter(self, table: EventTable) -> Waiter:
        """Return a waiter for news of a log; here it polls."""
        return Waiter()

    @abstractmethod
    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Take the turn to change an aggregate, which lasts to the transaction's end.

        Without *wait* it is taken only if it is free. Otherwise the unit of work goes on without it.
        """

    def lock_log(self, connection: Connection, table: EventTable) -> None:
        """Wait for appends to a log in progress, and then lock out others to the end of the transaction."""
        # With one writer at a time, it is enough that the transaction has written something.
