"""PostgreSQL: writers never wait for each other, readers stop at the high-water mark.

A position is drawn from the sequence before the transaction commits, so a reader could pass over a position that is
committed later. To prevent that, each writer publishes a *floor*, in a shared advisory lock that lasts to the end
of its transaction and that no other writer waits for, and readers stop at the lowest one. ``docs/ordering.md`` has
the argument.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Sequence
from typing import Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, OperationalError, StoredEvent
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection, Engine

from ...config import DialectOptions
from ...exceptions import StandbyError
from ...tailing import Waiter
from ..subscriptions import ListenWaiter, Receive, SharedWaiter, listener_of, poll, receive
from .base import FrozenSnapshotError
from .calls import in_autocommit, status_of
from .event_tables import (
    NOTHING,
    PLAIN,
    VERSION_KEY,
    Beside,
    EventTable,
    Known,
    KnownLog,
    Shape,
    begins,
    columns_of,
    gap,
    heads,
    transposed,
)
from .event_values import as_parameter
from .locks import OpenWriter, RunnerLock
from .looks import Use
from .postgresql_catalog import LOOK, CatalogLooks
from .postgresql_drivers import ACTIVE, IDLE, INERROR, QUOTES, UNKNOWN, begun, code_of, prepare_connections, text_of
from .postgresql_statements import SMALL_BLOCK, key_arrays, literal, make_draw, make_statement, regclass, row_arrays
from .postgresql_swapping import PostgreSQLSwaps
from .session_locks import AdvisoryLock

# Its words are in the server's language.
KEY_IN_DETAIL = re.compile(r"\(([^()]*)\)[^(]?=")

NOT_DRAWN = (
    "The positions of {count} events could not be drawn one after another, as others draw positions of {table} without "
    "waiting: let all processes that write to it run the same version of this package, and try again."
)
QUIET = " quiet!"
"""The suffix of the uses of statements that send no notification."""

_LATEST = ("read committed", "read uncommitted")
"""The isolation levels in which each statement sees what is committed by then."""


class PostgreSQLDialect(PostgreSQLSwaps, CatalogLooks):
    """Order without serialising writers, or with a table lock for tables that the library's recorders write too."""

    # serialization_failure, deadlock_detected; unique_violation.
    serialization_failures: ClassVar[frozenset[object]] = frozenset({"40001", "40P01"})
    duplicates: ClassVar[frozenset[object]] = frozenset({"23505"})
    rights_lacking: ClassVar[frozenset[object]] = frozenset({"42501"})
    title = "PostgreSQL"
    clock: ClassVar[str] = "(clock_timestamp() AT TIME ZONE 'UTC' + interval '{:g} seconds')"
    drivers: ClassVar[dict[str, str]] = {"psycopg": "Flask-EventSourcing[postgres]", "psycopg2": "psycopg2-binary"}
    counts = "bytes"
    missing_table: ClassVar[re.Pattern[str]] = re.compile(rf"{QUOTES} ?(?P<name>.+?) ?{QUOTES}")
    missing_table_code: ClassVar[object] = "42P01"
    column_types: ClassVar[dict[str, Any]] = {"text id": sa.Text(), "metadata": postgresql.JSONB()}
    aborts_transactions = True
    reads_in_autocommit = True

    def __init__(self, engine: Engine, options: DialectOptions) -> None:
        super().__init__(engine, options)
        self.appends_in_autocommit: bool = options.postgres_order == "advisory-lock"  # A table's lock needs a block.
        self.appends_one_by_one: bool = options.postgres_order == "table-lock"
        self._logs: dict[tuple[str, int], KnownLog] = {}
        self._notifying: weakref.WeakKeyDictionary[sa.Update, sa.Update] = weakref.WeakKeyDictionary()

    @classmethod
    def code(cls, driver_error: Any) -> object:
        """Return the SQLSTATE."""
        return code_of(driver_error)

    def install(self, engine: Engine) -> None:
        """Get binary values, and count what ends transactions."""
        prepare_connections(engine)

    def append(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], beside: Beside = NOTHING
    ) -> list[int]:
        """Insert events with contiguous positions, having published a floor below them."""
        if self.options.postgres_order == "table-lock":
            self._lock_table(connection, table)
        floors = Known.of(connection).floors_of(connection)
        log = self._last_log(connection, table)
        # Before anything else is done with them: their values may be wrong.
        values = beside._replace(columns=[*transposed(table.row(event) for event in events), *beside.columns])
        while True:
            start = None
            if len(events) <= SMALL_BLOCK:
                start = self._append_small(connection, table, log, events, values)
            if start is None:
                start = self._append_at_gate(connection, table, log, events, values)
            if start is not None:
                # Whatever this transaction draws later is above its first position.
                floors.setdefault(log.identity, start - 1)
                return list(range(start, start + len(events)))
            log = self._log(connection, table, "append")

    def _append_small(
        self, connection: Connection, table: EventTable, log: KnownLog, events: Sequence[StoredEvent], values: Beside
    ) -> int | None:
        """Return the first position, or None if nothing was inserted, for whatever reason."""
        floor = Known.of(connection).floors_of(connection).get(log.identity)
        if len(events) == 1:
            row, first = values.first(()), begins(events[0])
            # An id for each table that is looked into.
            looked = (row[0],) * (1 + (table.snapshots is not None)) if first else row[:2]
            statement = self._append_statement(connection, table, log, "first" if first else "next", values.shape)
            rows = self.fetch(connection, statement, (*row, log.identity, *looked, floor))
            if not rows:
                statement = self._append_statement(connection, table, log, "begin" if first else "follow", values.shape)
                rows = self.fetch(connection, statement, (*row, log.identity, floor))
        else:
            statement = self._append_statement(connection, table, log, "block", values.shape)
            keys = key_arrays(table, heads(events))
            columns = [*values.shared, *row_arrays(table, values)]
            parameters = (floor, log.identity, *keys, len(events), *columns, len(events))
            rows = self.fetch(connection, statement, parameters)
        return rows[0][0] if rows else None

    def _append_at_gate(
        self, connection: Connection, table: EventTable, log: KnownLog, events: Sequence[StoredEvent], values: Beside
    ) -> int | None:
        """Return the first position, or None where the table's name means another one now.

        :raises IntegrityError: for an event that would leave a gap.
        """
        first, columns = heads(events), [*values.shared, *row_arrays(table, values)]
        start: int | None = None
        # The floor is the transaction's.
        with begun(connection, self.modify):
            floor = Known.of(connection).floors_of(connection).get(log.identity)
            statement = self._append_statement(connection, table, log, "gap")
            rows = self.fetch(connection, statement, (floor, log.identity, *key_arrays(table, first)))
            if rows:
                if rows[0][0] is not None:
                    raise self._refusal(connection, first[rows[0][0] - 1])
                self.modify(connection, make_draw(log, len(events), self.options.lock_timeout))
                statement = self._append_statement(connection, table, log, "drawn", values.shape)
                start = self.fetch(connection, statement, [*columns, len(events)])[0][0]
                if start is None:
                    raise OperationalError(NOT_DRAWN.format(count=len(events), table=table.name))
        return start

    def _refusal(self, connection: Connection, event: StoredEvent) -> IntegrityError:
        isolation = self.fetch(connection, "SELECT current_setting('transaction_isolation')")[0][0]
        # A frozen snapshot may lack what others have stored since.
        return gap(event) if isolation in _LATEST else self.conflict_error(str(gap(event)))

    def _lock_table(self, connection: Connection, table: EventTable) -> None:
        milliseconds = int(self.options.lock_timeout * 1000)
        self.modify(connection, f"SET LOCAL lock_timeout = {milliseconds}")
        self.modify(connection, f"LOCK TABLE {table.name} IN EXCLUSIVE MODE")

    def lock_log(self, connection: Connection, table: EventTable) -> None:
        """Lock the table against writers; readers go on."""
        self._lock_table(connection, self.located(connection, table))

    def _append_statement(
        self, connection: Connection, table: EventTable, log: KnownLog, how: str, shape: Shape = PLAIN
    ) -> str:
        use = f"{how}{shape.key}{QUIET}" if self._is_quiet(connection) else f"{how}{shape.key}"
        return log.statements.get(use) or self._make_statement(table, log, how, use, shape)

    def _is_quiet(self, connection: Connection) -> bool:
        # The server prepares no transaction that has notified. Waiting readers look again by themselves.
        return not self.options.postgres_notify or isinstance(connection.get_transaction(), sa.TwoPhaseTransaction)

    def _make_statement(self, table: EventTable, log: KnownLog, how: str, use: str, shape: Shape = PLAIN) -> str:
        made = make_statement(table, log, how, self._compiled, shape, quiet=use.endswith(QUIET))
        log.statements[use] = made
        return made

    def _compiled(self, column_type: Any) -> str:
        compiled: str = column_type.compile(self.engine.dialect)
        return compiled

    def is_meant(self, connection: Connection, table: EventTable) -> str:
        """Compare the identity of the table whose mark was asked for."""
        return f"{regclass(table.name)} = {Known.of(connection).logs[table.name].identity}::oid"

    def _last_log(self, connection: Connection, table: EventTable) -> KnownLog:
        # A new connection begins with what others have found.
        known = Known.of(connection).logs
        found = known.get(table.name) or self._logs.get((table.name, 0)) or self._log(connection, table)
        known[table.name] = found
        return found

    def _log(self, connection: Connection, table: EventTable, use: Use = "read") -> KnownLog:
        """Look which table a name means on a connection now."""
        parameters = (table.snapshots and as_parameter(table.snapshots), *self.place(connection, table.table))
        identity, place, name, short, is_found, snapshots = self.fetch(connection, LOOK, parameters)[0]
        if identity is None:
            raise self.missing(table.table.fullname)
        log = self._logs.get((table.name, identity))
        if log is None:
            if (table.name, 0) in self._logs:
                # What was looked at before was another table of this name.
                self.look_again(connection, table, use)
            # Named as the table is, so that the same statements do for the tables of others.
            is_found = is_found and table.name == self.quote(table.table.name)
            name = self.quote(short) if is_found else name.replace("%", "%%")
            log = self._logs[table.name, identity] = KnownLog(
                identity, name, snapshots and snapshots.replace("%", "%%"), {}, place.replace("%", "%%")
            )
        Known.of(connection).logs[table.name] = self._logs[table.name, 0] = log
        return log

    def forget_looks(self, connection: Connection) -> None:
        """Forget which tables the names mean, too."""
        if not (connection.closed or connection.invalidated):
            Known.of(connection).logs.clear()
        self._logs.clear()
        super().forget_looks(connection)

    def waiter(self, table: EventTable) -> Waiter:
        """Return what waits for notifications, unless they are switched off."""
        return self.listen(table.table.name) if self.options.postgres_notify else Waiter()

    def shared_waiter(self, table: EventTable) -> Waiter:
        """Return the same for runners, which share a connection."""
        if not self.options.postgres_notify:
            return Waiter()
        return SharedWaiter(listener_of(self.engine, self._receive), table.table.name)

    @property
    def _receive(self) -> Receive:
        return receive if self.engine.driver == "psycopg" else poll

    def listen(self, channel: str) -> Waiter:
        """Return what waits for ``NOTIFY`` on a channel."""
        return ListenWaiter(self.engine, channel, self._receive)

    def high_water_mark(self, connection: Connection, table: EventTable, *, joined: bool) -> int | None:
        """Return the high-water mark: no writer in progress can commit a position at or below it.

        :raises StandbyError: on a standby, which has no locks of the writers.
        """
        if self.options.postgres_order == "table-lock":
            return None
        use = "joined mark" if joined else "mark"
        log = self._last_log(connection, table)
        while True:
            statement = log.statements.get(use) or self._make_statement(table, log, use, use)
            position, isolation, standby, identity = self.fetch(connection, statement)[0]
            if identity == log.identity:
                break
            log = self._log(connection, table)
        if standby:
            raise StandbyError
        if joined and isolation not in _LATEST:
            # The snapshot of this transaction is older than the locks that were just read.
            raise FrozenSnapshotError
        return int(position)

    def free_connections(self, connection: Connection) -> int | None:
        """Return what is left of ``max_connections`` for roles that are no superusers."""
        rows = self.fetch(
            connection,
            "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
            " - sum(numbackends)::int FROM pg_stat_database",
        )
        return int(rows[0][0])

    def shares_connections(self) -> bool:
        """Whether one connection's process is another one's in between, as behind PgBouncer in transaction mode."""
        with in_autocommit(self.engine.connect()) as one:
            # Out of the pool, which may have no second one.
            one.detach()
            before = self._process(one)
            with self.engine.connect() as other:
                return self._process(other) == before or self._process(one) != before

    def _process(self, connection: Connection) -> int:
        return int(self.fetch(connection, "SELECT pg_backend_pid()")[0][0])

    def oldest_writer(self, connection: Connection, table: EventTable) -> OpenWriter | None:
        """Return the process, or the prepared transaction, that has published a floor for the longest time."""
        if self.options.postgres_order == "table-lock":
            return None
        log = self._last_log(connection, table)
        statement = log.statements.get("writer") or self._make_statement(table, log, "writer", "writer")
        rows = self.fetch(connection, statement)
        if not rows:
            return None
        pid, prepared, seconds, role, state = rows[0]
        if pid is None:
            name, remedy = "a prepared transaction", "COMMIT PREPARED or ROLLBACK PREPARED it, see pg_prepared_xacts"
            if prepared is not None:
                name = f"prepared transaction {literal(prepared)}"
                remedy = f"COMMIT PREPARED {literal(prepared)} or ROLLBACK PREPARED {literal(prepared)}"
            return OpenWriter(name, seconds, remedy)
        described = ", ".join(filter(None, (f"role {role}" if role else None, state)))
        name = f"process {pid} ({described})" if described else f"process {pid}"
        return OpenWriter(name, seconds, f"SELECT pg_terminate_backend({pid})")

    def is_same_table(self, one: Connection, other: Connection, table: EventTable) -> bool:
        """Look it up too, as the search path may differ."""
        same = super().is_same_table(one, other, table)
        return same and self._log(one, table).identity == self._log(other, table).identity

    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Take an exclusive advisory lock for the aggregate, in the space of two 32-bit keys, apart from floors."""
        function = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
        statement = f"SELECT {function}(hashtext(%s), hashtext(%s))"
        self.fetch(connection, statement, (self.located(connection, table).name, str(originator_id)))

    def is_aborted(self, connection: Connection) -> bool:
        """Ask the driver, without a round trip, whether the transaction has failed."""
        return bool(status_of(connection.connection.driver_connection) == INERROR)

    @classmethod
    def is_left_midway(cls, driver_connection: Any, error: BaseException) -> bool:
        """Whether the server is still busy with the statement."""
        return bool(status_of(driver_connection) == ACTIVE)

    def is_over(self, connection: Connection) -> bool:
        """Ask the driver, without a round trip, whether there is a transaction."""
        return status_of(connection.connection.driver_connection) in (IDLE, INERROR, UNKNOWN)

    def driver_commits(self, connection: Connection) -> bool:
        """Ask the driver."""
        return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))

    def violated(self, connection: Connection, error: Any, table: sa.Table) -> Collection[str] | None:
        """Return the columns of the constraint; of one that the record class does not have, those in the detail."""
        diagnosis: Any = getattr(error, "diag", None)
        name, detail = getattr(diagnosis, "constraint_name", None), getattr(diagnosis, "message_detail", None)
        # The row may have been for a partition; what a function of a trigger has inserted has a context.
        if name is None or (diagnosis.table_name != table.name and diagnosis.context):
            return None
        known = columns_of(table, name)
        found = KEY_IN_DETAIL.search(detail or "")
        if known is None and found is not None:
            known = [column.strip('" ') for column in found[1].split(",")]
        # A role that may not read all of its columns is told no detail.
        return known if known is not None or found is not None else VERSION_KEY

    @classmethod
    def text(cls, driver_error: Any, code: object = None) -> str:
        """Return what the server says without its detail."""
        return text_of(driver_error, code)

    # ------------------------------------------------------------------------------------- what projections need

    keeps_microseconds = True
    canceled: ClassVar[frozenset[object]] = frozenset({"57014"})
    full: ClassVar[frozenset[object]] = frozenset({"53100"})

    @staticmethod
    def passes(driver_error: BaseException) -> bool:
        """Whether a lock was not obtained in time."""
        return PostgreSQLDialect.code(driver_error) == "55P03"

    @staticmethod
    def is_read_only(driver_error: BaseException) -> bool:
        """Whether the transaction is one that only reads, as each is on a standby."""
        return PostgreSQLDialect.code(driver_error) == "25006"

    def runner_lock(self, name: str) -> RunnerLock:
        """Return an advisory lock."""
        return AdvisoryLock(self.engine, name)

    def update_and_notify(
        self, connection: Connection, table: sa.Table, change: sa.Update, message: str, parameters: dict[str, Any]
    ) -> int:
        """Notify waiting readers in the statement that writes the row, so that it costs no round trip."""
        if self._is_quiet(connection):
            return super().update_and_notify(connection, table, change, message, parameters)
        notifying = self._notifying.get(change)
        if notifying is None:
            notifying = self._notifying[change] = change.returning(sa.func.pg_notify(table.name, message))
        return len(connection.execute(notifying, parameters).all())

    def update_waiter(self, table: sa.Table) -> Waiter:
        """Return what waits for notifications, unless they are switched off."""
        return self.listen(table.name) if self.options.postgres_notify else Waiter()
