"""PostgreSQL: writers never wait for each other, readers stop at the high-water mark.

A position is drawn from the sequence before the transaction commits, so a reader could pass over a position that is
committed later. To prevent that, each writer publishes a *floor*, in a shared advisory lock that lasts to the end
of its transaction and that no other writer waits for, and readers stop at the lowest one. ``docs/ordering.md`` has
the argument.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection, Engine

from ...exceptions import StandbyError
from ..subscriptions import ListenWaiter, Waiter, poll, receive
from .base import Dialect, DialectOptions, FrozenSnapshotError
from .driver import AUTOCOMMIT
from .event_tables import (
    EVENT_COLUMNS,
    LATEST_FIRST_VERSION,
    POSITION,
    VERSION_KEY,
    ConflictError,
    EventTable,
    Known,
    KnownLog,
    begins,
    check_sequence,
    columns_of,
    gap,
    heads,
    transposed,
)
from .locks import AdvisoryLock, RunnerLock

IDLE, INERROR, UNKNOWN = 0, 3, 4
"""``PQTRANS_…`` of libpq: there is no transaction; it has failed and a commit would be a rollback; no connection."""
# Its words are in the server's language.
KEY_IN_DETAIL = re.compile(r"\(([^()]*)\)[^(]?=")
BLOCK_TRIES = 20

# A name without a schema means what the search path says, a tenant's table perhaps. What is known of a table holds for
# the one with its identity: if the name means another now, nothing is drawn.
# The key of the lock: the table in its high 16 bits, as the low bits of the sequence's oid, and the floor in its low
# 48 bits. The floor is read before the lock is taken and the ids are drawn after it: the CTEs are materialised, so
# that each is evaluated before the next uses it.
_HELD = """
WITH floor AS MATERIALIZED (
    SELECT coalesce(%s::bigint, CASE WHEN is_called THEN last_value ELSE last_value - 1 END) AS position,
           (tableoid::bigint & 65535) << 48 AS key
    FROM {sequence} WHERE {named} = %s::oid
), held AS MATERIALIZED (
    SELECT position, pg_advisory_xact_lock_shared(key | position) FROM floor
)"""

_APPEND_ONE = (
    _HELD
    + """
INSERT INTO {table} ({position}, {columns})
SELECT nextval({regclass}), e.* FROM held{notify}, (SELECT {values}) AS e WHERE {follows}
RETURNING {position}, (SELECT position FROM held)"""
)

# The ids of one append must be contiguous. They are drawn in one go, and if another writer drew one in between,
# nothing is inserted and the caller tries again: a gap in the positions does no harm. A gap in a stream does: ids are
# drawn only if each event whose predecessor is not among those to be inserted finds it in the tables.
_APPEND_BLOCK = (
    _HELD
    + """, gap AS MATERIALIZED (
    SELECT e.place FROM held, unnest({key_arrays}) WITH ORDINALITY AS e ({key}, place)
    WHERE NOT CASE WHEN e.originator_version <= {latest_first} THEN {follows_or_begins} ELSE {follows} END LIMIT 1
), drawn AS MATERIALIZED (
    SELECT array_agg(nextval({regclass})) AS ids FROM held{notify}, generate_series(1, %s::int)
    WHERE NOT EXISTS (SELECT FROM gap)
), block AS MATERIALIZED (
    SELECT ids[1] AS first FROM drawn WHERE ids[array_length(ids, 1)] - ids[1] = array_length(ids, 1) - 1
), inserted AS (
    INSERT INTO {table} ({position}, {columns})
    SELECT block.first + e.place - 1, {columns}
    FROM block, unnest({arrays}) WITH ORDINALITY AS e ({columns}, place)
)
SELECT (SELECT first FROM block), position, (SELECT place FROM gap) FROM held"""
)

# The order matters: ``high`` is read first, then the locks; the rows are read by a later statement. A writer that
# slips in between the two draws ids above ``high``.
_HIGH_WATER_MARK = """
WITH high AS MATERIALIZED (
    SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END AS position,
           tableoid::bigint & 65535 AS key
    FROM {sequence}
)
SELECT least(high.position, (
    SELECT min(((l.classid::bigint & 65535) << 32) | l.objid::bigint)
    FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.classid::bigint >> 16 = high.key
      {own}
)), current_setting('transaction_isolation'), pg_is_in_recovery(), {named}::oid::bigint
FROM high"""

_LOOK = """
SELECT %s::regclass::oid::bigint, found.name, c.relname, to_regclass(quote_ident(c.relname)) = c.oid,
       to_regclass(%s) IS NOT NULL, s.seqcache, s.seqincrement, s.seqcycle
FROM (SELECT pg_get_serial_sequence(%s, %s) AS name) AS found
LEFT JOIN pg_sequence s ON s.seqrelid = found.name::regclass LEFT JOIN pg_class c ON c.oid = s.seqrelid"""

_LATEST = ("read committed", "read uncommitted")
"""The isolation levels in which each statement sees what is committed by then."""


class PostgreSQLDialect(Dialect):
    """Order without serialising writers, or with a table lock for tables that the library's recorders write too."""

    # serialization_failure, deadlock_detected; unique_violation.
    serialization_failures = frozenset({"40001", "40P01"})
    duplicates = frozenset({"23505"})
    title = "PostgreSQL"
    missing_table = re.compile(r"relation \"(?P<name>[^\"]+)\" does not exist")
    column_types: ClassVar[dict[str, Any]] = {"text id": sa.Text(), "metadata": postgresql.JSONB()}
    aborts_transactions = True
    reads_in_autocommit = True

    def __init__(self, engine: Engine, options: DialectOptions) -> None:
        super().__init__(engine, options)
        # The table's lock needs a transaction.
        self.appends_in_autocommit = options.postgres_order == "advisory-lock"
        self._logs: dict[tuple[str, int], KnownLog] = {}

    @classmethod
    def code(cls, driver_error: Any) -> object:
        """Return the SQLSTATE, which the drivers call differently."""
        return getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)

    def open_cursor(self, driver_connection: Any) -> Any:
        """Open a cursor that, with psycopg 3, gets binary values: ``bytea`` as text is twice as long."""
        if self.engine.driver == "psycopg":
            return driver_connection.cursor(binary=True)
        return driver_connection.cursor()

    def append(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> list[int]:
        """Insert events with contiguous positions, having published a floor below them."""
        if self.options.postgres_order == "table-lock":
            self._lock_table(connection, table)
        floors = Known.of(connection).floors_of(connection)
        log = self._last_log(connection, table)
        while True:
            if len(events) == 1:
                statement = self._append_statement(connection, table, log, "begin" if begins(events[0]) else "follow")
                parameters = (floors.get(log.identity), log.identity, *table.row(events[0]))
                rows = self.fetch(connection, statement, parameters)
                if rows:
                    position, floors[log.identity] = rows[0]
                    return [position]
                missing: StoredEvent | None = events[0]
            else:
                start, missing = self._append_block(connection, table, log, events)
                if start is not None:
                    return list(range(start, start + len(events)))
            meant, log = log, self._log(connection, table)
            if log is meant:
                raise self._refusal(connection, missing or events[0])

    def _refusal(self, connection: Connection, event: StoredEvent) -> IntegrityError:
        isolation = self.fetch(connection, "SELECT current_setting('transaction_isolation')")[0][0]
        # A frozen snapshot may lack what others have stored since.
        return gap(event) if isolation in _LATEST else ConflictError(str(gap(event)))

    def _append_block(
        self, connection: Connection, table: EventTable, log: KnownLog, events: Sequence[StoredEvent]
    ) -> tuple[int | None, StoredEvent | None]:
        """Return the first position, or the event that would leave a gap, or neither where it is another table."""
        first, floors = heads(events), Known.of(connection).floors_of(connection)
        statement = self._append_statement(connection, table, log, "block")
        columns, keys = transposed(map(table.row, events)), transposed(table.row(event)[:2] for event in first)
        autocommit = connection.get_execution_options().get("isolation_level") == AUTOCOMMIT

        def append() -> tuple[int | None, StoredEvent | None] | None:
            parameters = (floors.get(log.identity), log.identity, *keys, len(events), *columns)
            for start, floors[log.identity], place in self.fetch(connection, statement, parameters):
                torn = start is None and place is None
                return None if torn else (start, first[place - 1] if place else None)
            return None, None

        for _ in range(BLOCK_TRIES * 100 if autocommit else BLOCK_TRIES):
            done = append()
            if done is not None:
                return done
        # A large block among very many small appends: keep the others out, up to the end of this transaction.
        if autocommit:
            # Without one, the lock would be refused. Should a statement fail, the pool's rollback ends it.
            self.modify(connection, "BEGIN")
        self._lock_table(connection, table)
        done = append()
        if autocommit:
            self.modify(connection, "COMMIT")
        return done or (None, None)

    def _lock_table(self, connection: Connection, table: EventTable) -> None:
        milliseconds = int(self.options.lock_timeout * 1000)
        self.modify(connection, f"SET LOCAL lock_timeout = {milliseconds}")
        self.modify(connection, f"LOCK TABLE {table.name} IN EXCLUSIVE MODE")

    def lock_log(self, connection: Connection, table: EventTable) -> None:
        """Lock the table against writers; readers go on."""
        self._lock_table(connection, self.located(connection, table))

    def _append_statement(self, connection: Connection, table: EventTable, log: KnownLog, how: str) -> str:
        use = f"{how} quiet" if self._is_quiet(connection) else how
        return log.statements.get(use) or self._make_statement(table, log, how, use)

    def _is_quiet(self, connection: Connection) -> bool:
        # The server prepares no transaction that has notified. Those who wait look again by themselves.
        return not self.options.postgres_notify or isinstance(connection.get_transaction(), sa.TwoPhaseTransaction)

    def _make_statement(self, table: EventTable, log: KnownLog, how: str, use: str) -> str:
        kinds = {name: table.table.c[name].type.compile(self.engine.dialect) for name in EVENT_COLUMNS}
        snapshots = table.snapshots is not None and log.has_snapshots
        event = ("e.originator_id", "e.originator_version")
        made = _APPEND_BLOCK if how == "block" else _HIGH_WATER_MARK if "mark" in how else _APPEND_ONE
        log.statements[use] = made.format(
            table=table.name,
            position=POSITION,
            columns=", ".join(EVENT_COLUMNS),
            values=", ".join(f"%s::{kind} AS {name}" for name, kind in kinds.items()),
            arrays=", ".join(f"%s::{kind}[]" for kind in kinds.values()),
            key=", ".join(VERSION_KEY),
            key_arrays=", ".join(f"%s::{kinds[name]}[]" for name in VERSION_KEY),
            latest_first=LATEST_FIRST_VERSION,
            follows=table.follows(*event, begins=how == "begin", snapshots=snapshots),
            follows_or_begins=table.follows(*event, begins=True, snapshots=snapshots),
            sequence=log.sequence,
            regclass=_regclass(log.sequence),
            named=_regclass(table.name),
            # The channel has the name that the library's own module gives it, so that its subscribers are woken too.
            notify="" if use.endswith("quiet") else f", pg_notify('{table.table.name}', '')",
            own="AND l.pid IS DISTINCT FROM pg_backend_pid()" if how == "joined mark" else "",
        )
        return log.statements[use]

    def is_meant(self, connection: Connection, table: EventTable) -> str:
        """Compare the identity of the table whose mark was asked for."""
        return f"{_regclass(table.name)} = {Known.of(connection).logs[table.name].identity}::oid"

    def _last_log(self, connection: Connection, table: EventTable) -> KnownLog:
        # A new connection begins with what others have found.
        known = Known.of(connection).logs
        found = known.get(table.name) or self._logs.get((table.name, 0)) or self._log(connection, table)
        known[table.name] = found
        return found

    def _log(self, connection: Connection, table: EventTable) -> KnownLog:
        """Look which table a name means on a connection now."""
        parameters = (table.name, table.snapshots, table.name, POSITION)
        identity, name, short, is_found, has_snapshots, *properties = self.fetch(connection, _LOOK, parameters)[0]
        log = self._logs.get((table.name, identity))
        if log is None:
            check_sequence(table.name, name, *properties)
            # Named as the table is, so that the same statements do for the tables of others.
            if is_found and table.name == self.quote(table.table.name):
                name = self.quote(short)
            log = self._logs[table.name, identity] = KnownLog(identity, name, bool(has_snapshots), {})
        Known.of(connection).logs[table.name] = self._logs[table.name, 0] = log
        return log

    def waiter(self, table: EventTable) -> Waiter:
        """Return what waits for notifications, unless they are switched off."""
        return self.listen(table.table.name) if self.options.postgres_notify else Waiter()

    def listen(self, channel: str) -> Waiter:
        """Return what waits for ``NOTIFY`` on a channel."""
        return ListenWaiter(self.engine, channel, receive if self.engine.driver == "psycopg" else poll)

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

    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Take an exclusive advisory lock for the aggregate, in the space of two 32-bit keys, apart from floors."""
        function = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
        statement = f"SELECT {function}(hashtext(%s), hashtext(%s))"
        self.fetch(connection, statement, (self.located(connection, table).name, str(originator_id)))

    def is_aborted(self, connection: Connection) -> bool:
        """Ask the driver, without a round trip, whether the transaction has failed."""
        return bool(_status(connection) == INERROR)

    def is_over(self, connection: Connection) -> bool:
        """Ask the driver, without a round trip, whether there is a transaction."""
        return _status(connection) in (IDLE, INERROR, UNKNOWN)

    def driver_commits(self, connection: Connection) -> bool:
        """Ask the driver."""
        return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))

    def violated(self, connection: Connection, error: Any, table: sa.Table) -> Collection[str] | None:
        """Return the columns of the constraint; of one that the record class does not have, those in the detail."""
        diagnosis: Any = getattr(error, "diag", None)
        name, detail = getattr(diagnosis, "constraint_name", None), getattr(diagnosis, "message_detail", None)
        if name is None or diagnosis.table_name != table.name:
            return None
        known = columns_of(table, name)
        found = KEY_IN_DETAIL.search(detail or "")
        if known is None and found is not None:
            known = [column.strip('" ') for column in found[1].split(",")]
        # Whoever may not read all of its columns is told no detail.
        return known if known is not None or found is not None else VERSION_KEY

    @classmethod
    def text(cls, driver_error: Any) -> str:
        """Return what the server says without its detail."""
        primary = getattr(getattr(driver_error, "diag", None), "message_primary", None)
        return str(primary or str(driver_error).split("\nDETAIL:")[0]).strip()

    # ------------------------------------------------------------------------------------- what projections need

    @staticmethod
    def passes(driver_error: BaseException) -> bool:
        """Whether a lock was not to be had in time."""
        return PostgreSQLDialect.code(driver_error) == LOCK_NOT_AVAILABLE

    def runner_lock(self, name: str) -> RunnerLock:
        """Return an advisory lock."""
        return AdvisoryLock(self.engine, name)

    def update_and_notify(self, connection: Connection, table: sa.Table, change: sa.Update, message: str) -> int:
        """Notify those who wait with the row itself, so that it costs no round trip."""
        if self._is_quiet(connection):
            return super().update_and_notify(connection, table, change, message)
        return len(connection.execute(change.returning(sa.func.pg_notify(table.name, message))).all())

    def update_waiter(self, table: sa.Table) -> Waiter:
        """Return what waits for notifications, unless they are switched off."""
        return self.listen(table.name) if self.options.postgres_notify else Waiter()

    def limit_ddl_waiting(self, connection: Connection, seconds: int) -> None:
        """Limit the waiting to the end of the transaction."""
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{seconds}s'")

    def name_shadow_constraint(self, constraint: sa.Constraint, suffix: str) -> None:
        """Give a key that has a name the suffix: it has an index of that name, and is renamed with it."""
        is_key = isinstance(constraint, sa.PrimaryKeyConstraint | sa.UniqueConstraint)
        if is_key and constraint.name is not None:
            constraint.name = sa.sql.quoted_name(f"{constraint.name}{suffix}", None)

    def rename_parts(self, connection: Connection, table: sa.Table, new: str, old: str) -> None:
        """Rename indexes and sequences, whose names are unique in the schema; constraints go with them."""
        for name, renamed in (
            (table.name + old, lambda part: f"{part[: self.longest_name - len(old)]}{old}"),
            (table.name, lambda part: part.replace(new, "")),
        ):
            qualified = self.qualified(table, name)
            for part, kind in connection.exec_driver_sql(_PARTS, (qualified, qualified)).all():
                if renamed(part) != part:
                    quoted = self.quote(renamed(part))
                    what = "SEQUENCE" if kind in ("S", b"S") else "INDEX"
                    connection.exec_driver_sql(f"ALTER {what} {self.qualified(table, part)} RENAME TO {quoted}")


def _status(connection: Connection) -> Any:
    return getattr(getattr(connection.connection.driver_connection, "info", None), "transaction_status", None)


def _regclass(name: str) -> str:
    return "'" + name.replace("'", "''") + "'::regclass"


LOCK_NOT_AVAILABLE = "55P03"

_PARTS = """
SELECT c.relname, c.relkind FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s::regclass
UNION ALL
SELECT c.relname, c.relkind FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'
WHERE d.refobjid = %s::regclass AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')"""
