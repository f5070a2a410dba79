"""PostgreSQL: writers never wait for each other, readers stop at the high-water mark.

A position is drawn from the sequence before the transaction commits, so a reader could pass over a position that is
committed later. To prevent that, each writer publishes a *floor*, in a shared advisory lock that lasts to the end
of its transaction and that no other writer waits for, and readers stop at the lowest one. ``docs/ordering.md`` has
the argument.
"""

from __future__ import annotations

import re
import select
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection, Engine

from ...exceptions import MissingTableError, StandbyError, UnsafeSequenceError
from ..subscriptions import ListenWaiter, Waiter
from .base import Dialect, DialectOptions, FrozenSnapshotError
from .driver import EVENT_COLUMNS, POSITION, EventTable
from .runner_locks import NAMESPACE, RunnerLock, SessionLock

IDLE = 0
INERROR = 3
"""``PQTRANS_INERROR`` of libpq: the transaction failed and a commit would be a rollback."""
BLOCK_TRIES = 20

# The key of the lock: the table in its high 16 bits, as the low bits of the sequence's oid, and the floor in its low
# 48 bits. The floor is read before the lock is taken and the ids are drawn after it: the CTEs are materialised, so
# that each is evaluated before the next uses it.
_HELD = """
WITH floor AS MATERIALIZED (
    SELECT coalesce(%s::bigint, CASE WHEN is_called THEN last_value ELSE last_value - 1 END) AS position,
           (tableoid::bigint & 65535) << 48 AS key
    FROM {sequence}
), held AS MATERIALIZED (
    SELECT position, pg_advisory_xact_lock_shared(key | position) FROM floor
)"""

_APPEND_ONE = (
    _HELD
    + """
INSERT INTO {table} ({position}, {columns})
SELECT nextval({regclass}), {values} FROM held{notify}
RETURNING {position}, (SELECT position FROM held)"""
)

# The ids of one append must be contiguous. They are drawn in one go, and if another writer drew one in between,
# nothing is inserted and the caller tries again: a gap in the positions does no harm.
_APPEND_BLOCK = (
    _HELD
    + """, drawn AS MATERIALIZED (
    SELECT array_agg(nextval({regclass})) AS ids FROM held{notify}, generate_series(1, %s::int)
), block AS MATERIALIZED (
    SELECT ids[1] AS first FROM drawn WHERE ids[array_length(ids, 1)] - ids[1] = array_length(ids, 1) - 1
), inserted AS (
    INSERT INTO {table} ({position}, {columns})
    SELECT block.first + e.place - 1, {columns}
    FROM block, unnest({arrays}) WITH ORDINALITY AS e ({columns}, place)
)
SELECT (SELECT first FROM block), position FROM held"""
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
)), current_setting('transaction_isolation'), pg_is_in_recovery()
FROM high"""

_SEQUENCE = """
SELECT found.name, s.seqcache, s.seqincrement, s.seqcycle
FROM (SELECT pg_get_serial_sequence(%s, %s) AS name) AS found
LEFT JOIN pg_sequence s ON s.seqrelid = found.name::regclass"""


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
        statement = self._statement(connection, table, "one" if len(events) == 1 else "block")
        floor = _Floor.of(connection, table.name)
        if len(events) == 1:
            position, floor.position = self.fetch(connection, statement, (floor.position, *table.row(events[0])))[0]
            return [position]
        first = self._append_block(connection, table, statement, events, floor)
        return list(range(first, first + len(events)))

    def _append_block(
        self, connection: Connection, table: EventTable, statement: str, events: Sequence[StoredEvent], floor: _Floor
    ) -> int:
        columns = [list(column) for column in zip(*(table.row(event) for event in events), strict=True)]
        autocommit = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
        tries = BLOCK_TRIES * 100 if autocommit else BLOCK_TRIES
        for _ in range(tries):
            first, floor.position = self.fetch(connection, statement, (floor.position, len(events), *columns))[0]
            if first is not None:
                return int(first)
        # A large block among very many small appends: keep the others out, up to the end of this transaction.
        if autocommit:
            # Without one, the lock would be refused. Should a statement fail, the pool's rollback ends it.
            self.modify(connection, "BEGIN")
        self._lock_table(connection, table)
        first = self.fetch(connection, statement, (floor.position, len(events), *columns))[0][0]
        if autocommit:
            self.modify(connection, "COMMIT")
        return int(first)

    def _lock_table(self, connection: Connection, table: EventTable) -> None:
        milliseconds = int(self.options.lock_timeout * 1000)
        self.modify(connection, f"SET LOCAL lock_timeout = {milliseconds}")
        self.modify(connection, f"LOCK TABLE {table.name} IN EXCLUSIVE MODE")

    def lock_log(self, connection: Connection, table: EventTable) -> None:
        """Lock the table against writers; readers go on."""
        self._lock_table(connection, table)

    def _statement(self, connection: Connection, table: EventTable, use: str) -> str:
        statement = table.statements.get(use)
        if statement is None:
            sequence, regclass = self._sequence(connection, table)
            kinds = [table.table.c[name].type.compile(self.engine.dialect) for name in EVENT_COLUMNS]
            names = {
                "table": table.name,
                "position": POSITION,
                "columns": ", ".join(EVENT_COLUMNS),
                "values": ", ".join(f"%s::{kind}" for kind in kinds),
                "arrays": ", ".join(f"%s::{kind}[]" for kind in kinds),
                "sequence": sequence,
                "regclass": regclass,
                "notify": self._notify(table),
            }
            own = "AND l.pid IS DISTINCT FROM pg_backend_pid()"
            table.statements["one"] = _APPEND_ONE.format(**names)
            table.statements["block"] = _APPEND_BLOCK.format(**names)
            table.statements["mark"] = _HIGH_WATER_MARK.format(own="", **names)
            table.statements["joined mark"] = _HIGH_WATER_MARK.format(own=own, **names)
            statement = table.statements[use]
        return statement

    def _sequence(self, connection: Connection, table: EventTable) -> tuple[str, str]:
        name, cache, increment, cycle = self.fetch(connection, _SEQUENCE, (table.name, POSITION))[0]
        if name is None:
            raise MissingTableError(
                f"Column {POSITION} of table {table.name} has no sequence: make it a bigserial or identity column."
            )
        if (cache, increment, cycle) != (1, 1, False):
            # Each connection would draw a range of positions in advance, below what others have committed by then.
            raise UnsafeSequenceError(
                f"Sequence {name} has CACHE {cache}, INCREMENT {increment}{' and CYCLE' if cycle else ''}, with which "
                f"readers could miss events: ALTER SEQUENCE {name} INCREMENT 1 CACHE 1 NO CYCLE."
            )
        return name, "'" + name.replace("'", "''") + "'::regclass"

    def _notify(self, table: EventTable) -> str:
        # The channel has the name that the library's own module gives it, so that its subscribers are woken too.
        return f", pg_notify('{_channel(table)}', '')" if self.options.postgres_notify else ""

    def waiter(self, table: EventTable) -> Waiter:
        """Return what waits for notifications, unless they are switched off."""
        return self.listen(_channel(table)) if self.options.postgres_notify else Waiter()

    def listen(self, channel: str) -> Waiter:
        """Return what waits for ``NOTIFY`` on a channel."""
        return ListenWaiter(self.engine, channel, _receive if self.engine.driver == "psycopg" else _poll)

    def high_water_mark(self, connection: Connection, table: EventTable, *, joined: bool) -> int | None:
        """Return the high-water mark: no writer in progress can commit a position at or below it.

        :raises StandbyError: on a standby, which has no locks of the writers.
        """
        if self.options.postgres_order == "table-lock":
            return None
        statement = self._statement(connection, table, "joined mark" if joined else "mark")
        position, isolation, standby = self.fetch(connection, statement)[0]
        if standby:
            raise StandbyError
        if joined and isolation not in ("read committed", "read uncommitted"):
            # The snapshot of this transaction is older than the locks that were just read.
            raise FrozenSnapshotError
        return int(position)

    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Take an exclusive advisory lock for the aggregate, in the space of two 32-bit keys, apart from floors."""
        function = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
        statement = f"SELECT {function}(hashtext(%s), hashtext(%s))"
        self.fetch(connection, statement, (table.name, str(originator_id)))

    def is_over(self, connection: Connection) -> bool:
        """Ask the driver, without a round trip."""
        driver: Any = connection.connection.driver_connection
        status = getattr(getattr(driver, "info", None), "transaction_status", None)
        return status is not None and int(status) == IDLE

    def is_aborted(self, connection: Connection) -> bool:
        """Ask the driver, without a round trip, whether the transaction has failed."""
        driver: Any = connection.connection.driver_connection
        info = getattr(driver, "info", None)
        status = getattr(info, "transaction_status", None)
        return status is not None and int(status) == INERROR

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
        if not self.options.postgres_notify:
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
                    quoted = self.engine.dialect.identifier_preparer.quote(renamed(part))
                    what = "SEQUENCE" if kind in ("S", b"S") else "INDEX"
                    connection.exec_driver_sql(f"ALTER {what} {self.qualified(table, part)} RENAME TO {quoted}")


def _receive(driver: Any, seconds: float) -> bool:
    return any(True for _ in driver.notifies(timeout=seconds, stop_after=1))


def _poll(driver: Any, seconds: float) -> bool:
    readable, _, _ = select.select([driver], [], [], seconds)
    if not readable:
        return False
    driver.poll()
    heard = bool(driver.notifies)
    driver.notifies.clear()
    return heard


def _channel(table: EventTable) -> str:
    return str(table.table.name)


class _Floor:
    """The floor that a transaction published first; later appends hold on to the same one.

    A lock taken within a savepoint goes when that is rolled back. Taking the same lock again is always safe, as a
    lower floor only makes readers more careful, and costs no new entry in the server's lock table.
    """

    KEY = "flask_eventsourcing.floor"

    def __init__(self, transaction: Any) -> None:
        self.transaction = weakref.ref(transaction)
        self.position: int | None = None

    @classmethod
    def of(cls, connection: Connection, table_name: str) -> _Floor:
        transaction = connection.get_transaction() or connection
        floors: dict[str, _Floor] = connection.info.setdefault(cls.KEY, {})
        floor = floors.get(table_name)
        if floor is None or floor.transaction() is not transaction:
            floor = floors[table_name] = cls(transaction)
        return floor


LOCK_NOT_AVAILABLE = "55P03"

_PARTS = """
SELECT c.relname, c.relkind FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s::regclass
UNION ALL
SELECT c.relname, c.relkind FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'
WHERE d.refobjid = %s::regclass AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')"""


class AdvisoryLock(SessionLock):
    """An advisory lock of a connection, in the space of two 32-bit keys."""

    take = "SELECT pg_try_advisory_lock(hashtext(:namespace), hashtext(:name))"
    give = "SELECT pg_advisory_unlock_all()"
    look = (
        "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
        "AND classid::bigint = hashtext(:namespace)::bigint & 4294967295 "
        "AND objid::bigint = hashtext(:name)::bigint & 4294967295)"
    )

    def parameters(self) -> dict[str, Any]:
        """The two keys are hashes, made by the server."""
        return {"namespace": NAMESPACE, "name": self.name}
