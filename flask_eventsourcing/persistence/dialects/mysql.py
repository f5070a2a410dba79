"""MariaDB and MySQL: appends are serialised by one row, which also counts the positions.

InnoDB draws the ids of ``AUTO_INCREMENT`` before the commit and shows nobody which transactions hold uncommitted
ones, so there is no way to tell a reader where to stop. Positions are therefore counted in a row of the tracking
table, called ``__order__``: its lock lasts to the end of the transaction, so that positions are committed in their
order and without gaps. It is taken by the append and not before. In a Galera cluster the row makes the
certification fail for all but the first of the transactions that append on different nodes at a time, and they are
told to try again.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from traceback import walk_tb
from typing import Any, ClassVar

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, PersistenceError, StoredEvent, Tracking
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Connection, Engine

from ..._patches import dialect_rollback
from ...config import DialectOptions
from ...exceptions import WriteTimeoutError
from .calls import ask_on, count_calls
from .event_tables import NOTHING, POSITION, Beside, ConflictError, EventTable, begins, columns_of, heads
from .event_values import check_tracking
from .locks import Lease, RunnerLock
from .mysql_looks import APPEND_ONE, EXACT, ORDER, ExactText, MySQLLooks, surely_follows
from .mysql_swapping import MySQLSwaps
from .session_locks import NamedLock

LOCK_WAIT_TIMEOUT = 1205
OPTION_PREVENTS_STATEMENT, READ_ONLY_MODE = 1290, 1836
SERVER_STATUS_IN_TRANS = 1
DEADLOCK, CHANGED_SINCE_SNAPSHOT = 1213, 1020
IMPLICIT = re.compile(
    r"\s*(ALTER|ANALYZE|CREATE(?!\s+TEMPORARY)|DROP(?!\s+TEMPORARY)|FLUSH|GRANT|LOCK|OPTIMIZE|RENAME|REVOKE|TRUNCATE)\b",
    re.I,
)
"""What commits a transaction that is open."""
VALUES = re.compile(r"(entry|value:?) '.*' for (key|column|function)", re.S)
NEAR = re.compile(r"(near|value:) '.*'", re.S)
"""Where a message has a part of the statement, in which the driver has put the parameters."""
QUOTED, QUOTES_VALUES = re.compile(r"'.*'", re.S), frozenset({1062, 1064, 1292, 1366, 1411})
"""The same in the server's other languages: all that is between quotes, in messages with these numbers."""
KEY = re.compile(r"for key '(.+)'|'([^']+)'[^']*\Z", re.S)
"""The name of a key, which stands last in every language."""
SNAPSHOT_ISOLATION = "innodb_snapshot_isolation"
DRIVER_MODULES = ("pymysql.connections", "MySQLdb.cursors", "MySQLdb.connections")
ABORTED = "flask_eventsourcing.aborted"


class MySQLDialect(MySQLSwaps, MySQLLooks):
    """Order by one counting row for each log."""

    # 1213 is a deadlock or, in a Galera cluster, a failed certification; 1020 the same of a row that was changed since
    # the transaction's snapshot; 1062 a duplicate.
    serialization_failures: ClassVar[frozenset[object]] = frozenset({DEADLOCK, CHANGED_SINCE_SNAPSHOT})
    duplicates: ClassVar[frozenset[object]] = frozenset({1062})
    # Of a database, a table, a column; not to the server, which is no matter of tables.
    rights_lacking: ClassVar[frozenset[object]] = frozenset({1044, 1142, 1143})
    canceled: ClassVar[frozenset[object]] = frozenset({1317, 1969, 3024})
    full: ClassVar[frozenset[object]] = frozenset({1021, 1114})
    title = "MySQL"
    appends_one_by_one = True
    drivers: ClassVar[dict[str, str]] = {
        "pymysql": "Flask-EventSourcing[mysql]",
        "mysqldb": "Flask-EventSourcing[mysqlclient]",
    }
    missing_table_code: ClassVar[object] = 1146
    missing_table: ClassVar[re.Pattern[str]] = re.compile(r"'(?P<name>[^']+)'")
    column_types: ClassVar[dict[str, Any]] = {
        "text id": ExactText(),
        "topic": mysql.TEXT(collation=EXACT),
        "state": mysql.LONGBLOB(),
        "correlation": mysql.VARCHAR(128, collation=EXACT),
        "time": mysql.DATETIME(fsp=6),
    }
    # The server's default may keep what was rolled back, as Aria does.
    every_table_options: ClassVar[dict[str, Any]] = {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}
    aborts_transactions = True
    driver_knows_end = False
    reads_in_autocommit = True
    locks_what_it_compares = True
    rows_at_once = 500

    @classmethod
    def code(cls, driver_error: Any) -> object:
        """Return the server's number; the SQLSTATE beside it tells less, 23000 for a duplicate."""
        arguments = getattr(driver_error, "args", None) or (None,)
        return arguments[0] if isinstance(arguments[0], int) else None

    @classmethod
    def text(cls, driver_error: Any, code: object = None) -> str:
        """Return what the server says, without the values in it."""
        text = NEAR.sub(r"\1 …", VALUES.sub(r"\1 for \2", told := str(driver_error)))
        in_english = text != told or (code or cls.code(driver_error)) not in QUOTES_VALUES
        return (text if in_english else QUOTED.sub("…", told)).strip()

    def violated(self, connection: Connection, error: Any, table: sa.Table) -> Collection[str] | None:
        """Return the columns of the key in the message; of a key that the record class does not have, the server's."""
        found = KEY.search(str(error.args[-1]))
        # MySQL says the table's name too.
        key = "" if found is None else (found[1] or found[2]).removeprefix(f"{table.name}.")
        if not key or key == "PRIMARY":
            return table.primary_key.columns.keys() if key else None
        known = columns_of(table, key)
        if known is not None:
            return known
        name = self.name_of(connection, table)
        rows = self.fetch(connection, f"SHOW INDEX FROM {name} WHERE Key_name = %s", (key,))
        return [row[4] for row in rows] or None

    def __init__(self, engine: Engine, options: DialectOptions) -> None:
        super().__init__(engine, options)
        self._counters: set[str] = set()
        self._prefix: str | None = None

    def install(self, engine: Engine) -> None:
        """Limit how long a lock is waited for, on each new connection, and make rollbacks in a cluster succeed."""
        seconds = max(1, round(self.options.lock_timeout))

        def limit_waiting(driver: Any, record: Any) -> None:
            cursor = driver.cursor()
            cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {seconds}")
            cursor.close()

        sa.event.listen(engine, "connect", limit_waiting)
        sa.event.listen(engine, "connect", count_calls)
        # Idle connections from before have the server's limit.
        engine.dispose()
        sa.event.listen(engine, "handle_error", _after_error)
        _tolerate_rolled_back(engine)

    def append(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], beside: Beside = NOTHING
    ) -> list[int]:
        """Draw a block of positions from the counting row, which locks it, and insert the events with them."""
        try:
            return self._append(connection, table, events, beside)
        except ConflictError:
            self.note_places(connection, table, events)
            raise

    def _append(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], beside: Beside
    ) -> list[int]:
        values = beside.completed([table.row(event) for event in events])
        first = heads(events)
        self.refuse_padded(connection, table, [event.originator_id for event in events])
        work: Callable[[bool], tuple[int, bool]] = partial(self._draw, connection, table, len(events))
        into = f"INSERT INTO {table.name} ({POSITION}, {beside.shape.columns})"
        if len(values) == 1 and self.chunks(connection, values):
            work = partial(self._append_one, connection, table, into, values[0], begins(events[0]))
        snapshots, (last, is_inserted) = self.beside_snapshots(connection, table, first, work)
        positions = list(range(last - len(events) + 1, last + 1))
        if not is_inserted:
            self.check_gap(connection, table, first, len(events), snapshots=snapshots)
            rows = [(each, *row) for each, row in zip(positions, values, strict=True)]
            self.insert_rows(connection, f"{into} VALUES (%s{', %s' * len(values[0])})", rows)
        return positions

    def _append_one(
        self, connection: Connection, table: EventTable, into: str, row: Sequence[Any], begun: bool, snapshots: bool
    ) -> tuple[int, bool]:
        """Draw a position, and insert an event with it if that surely follows; return the position, and if it did."""
        condition, known = surely_follows(table, row, first=begun, snapshots=snapshots)
        marks = ", %s" * len(row)
        if self.runs_blocks(connection):
            draw = self._drawing(connection, table, snapshots)
            statement = APPEND_ONE.format(draw=draw, condition=condition, into=into, marks=marks)
            last, is_inserted = self.fetch(connection, statement, (1, ORDER, *known, *row))[0]
            if is_inserted is not None:
                return last, bool(is_inserted)
            # Somebody has emptied the table since.
            self._counters.discard(self.counter_of(table))
        last, _ = self._draw(connection, table, 1, snapshots)
        if not (begun or self.reads_latest(connection)):
            return last, False
        statement = f"{into} SELECT %s{marks} FROM (SELECT 1 AS one) AS o WHERE {condition}"
        return last, self.modify(connection, statement, (last, *row, *known)).rowcount == 1

    def insert(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Insert events that have no position, all or none of them."""
        self.insert_rows(connection, self.insert_statement(table), [table.row(event) for event in events])

    def insert_new(self, connection: Connection, table: EventTable, row: tuple[Any, ...]) -> bool:
        """Insert it and see: what would pass a duplicate by would pass other errors by as well."""
        try:
            self.modify(connection, self.insert_statement(table), row)
        except ConflictError:
            raise
        except IntegrityError:
            # A duplicate of its key: the statement alone is undone.
            return False
        return True

    def _drawing(self, connection: Connection, table: EventTable, snapshots: bool) -> str:
        """Return the statement that draws positions; its parameters are their number and the name of the row."""
        counter = self.counter_of(table)
        if counter not in self._counters:
            self._ensure_counter(connection, table, counter)
        opened, condition = self.opening(table, snapshots=snapshots)
        return (
            f"{self._latest(connection)}UPDATE {counter} AS c{opened} "
            f"SET c.notification_id = LAST_INSERT_ID(c.notification_id + %s) WHERE c.application_name = %s{condition}"
        )

    def _draw(self, connection: Connection, table: EventTable, count: int, snapshots: bool) -> tuple[int, bool]:
        """Draw positions; return the last one, and that no event was inserted."""
        counter = self.counter_of(table)
        update = self._drawing(connection, table, snapshots)
        drawn = self.modify(connection, update, (count, ORDER))
        if drawn.rowcount == 0:
            # Somebody has emptied the table since.
            self._counters.discard(counter)
            self._ensure_counter(connection, table, counter)
            drawn = self.modify(connection, update, (count, ORDER))
        return int(drawn.lastrowid), False

    def _latest(self, connection: Connection) -> str:
        """Return what lets a statement change a row that others have changed since the transaction's snapshot.

        Where ``innodb_snapshot_isolation`` is set, as by default since MariaDB 11.6.2, that would end the transaction.
        Positions are counted and not read, so that nobody's change is lost; the setting holds for all else.
        """
        if self._prefix is None:
            found = self.fetch(connection, f"SHOW VARIABLES LIKE '{SNAPSHOT_ISOLATION}'")
            self._prefix = f"SET STATEMENT {SNAPSHOT_ISOLATION} = OFF FOR " if found else ""
        return self._prefix

    def _ensure_counter(self, connection: Connection, table: EventTable, counter: str) -> None:
        # A locking statement that looks for a missing row would lock the gap where others insert theirs, and a plain
        # INSERT of an existing row would share a lock that all then want for themselves: both end in deadlocks.
        if self.fetch(connection, f"SELECT 1 FROM {counter} WHERE application_name = %s", (ORDER,)):
            self._counters.add(counter)
            return
        # It begins where a table that another package has written ends.
        last = self.fetch(connection, f"SELECT coalesce(max(notification_id), 0) FROM {table.name}")[0][0]
        self.modify(
            connection,
            f"INSERT INTO {counter} (application_name, notification_id) VALUES (%s, %s) "
            "ON DUPLICATE KEY UPDATE notification_id = notification_id",
            (ORDER, last),
        )

    def insert_tracking(self, connection: Connection, table: sa.Table, tracking: Tracking) -> None:
        """Record a position, which must be above the recorded one.

        :raises IntegrityError: when it is not.
        """
        check_tracking(tracking)
        name = self.name_of(connection, table)
        position, application_name = tracking.notification_id, tracking.application_name
        key = f"{name} {application_name}"
        select = f"SELECT 1 FROM {name} WHERE application_name = %s"
        # As for the counting row: no locking statement is to look for a row that is not there.
        if key in self._counters or self.fetch(connection, select, (application_name,)):
            self._counters.add(key)
            update = f"UPDATE {name} SET notification_id = %s WHERE application_name = %s AND notification_id < %s"
            if self.modify(connection, update, (position, application_name, position)).rowcount:
                return
        insert = f"INSERT INTO {name} (application_name, notification_id) VALUES (%s, %s)"
        try:
            self.modify(connection, insert, (application_name, position))
        except IntegrityError as error:
            raise IntegrityError(f"Position {position} of {application_name} is not above the recorded one.") from error

    def lock_log(self, connection: Connection, table: EventTable) -> None:
        """Lock the counting row, which every append takes."""
        table = self.located(connection, table)
        counter = self.counter_of(table)
        self._ensure_counter(connection, table, counter)
        opened, condition = self.opening(table, snapshots=False)
        select = f"SELECT 1 FROM {counter} AS c{opened} WHERE c.application_name = %s{condition} FOR UPDATE"
        self.fetch(connection, f"{self._latest(connection)}{select}", (ORDER,))

    def commits_implicitly(self, statement: str) -> bool:
        """Whether it is one that changes tables, users or the like."""
        return IMPLICIT.match(statement) is not None

    def is_aborted(self, connection: Connection) -> bool:
        """Whether the server has rolled the transaction back, as it does to end a deadlock.

        A Galera node does it where another node was first, and some servers are set to after too long a wait.
        """
        aborted = connection.info.get(ABORTED)
        return aborted is not None and aborted() is connection.get_transaction()

    def driver_commits(self, connection: Connection) -> bool:
        """Ask the driver, which knows it from the server's last answer."""
        driver: Any = connection.connection.dbapi_connection
        return hasattr(driver, "get_autocommit") and bool(driver.get_autocommit())

    def is_over(self, connection: Connection) -> bool:
        """Ask the driver for the status in the server's last answer, or the server."""
        if self.is_aborted(connection):
            return True
        driver: Any = connection.connection.dbapi_connection
        status = getattr(driver, "server_status", None)
        if status is None:
            return bool(getattr(self.engine.dialect, "is_mariadb", False)) and not _answer(
                connection, "@@in_transaction"
            )
        return not status & SERVER_STATUS_IN_TRANS

    def own_error(self, connection: Connection, error: Any, statement: str) -> PersistenceError:
        """Return the library's exception; one that names the setting for a lock that was not obtained in time."""
        if self.code(error) == LOCK_WAIT_TIMEOUT:
            return WriteTimeoutError(
                f"Waited {self.options.lock_timeout:g} s for another transaction's lock: keep transactions short, or "
                f"raise {self.options.named('lock_timeout')}."
            )
        return super().own_error(connection, error, statement)

    @classmethod
    def is_left_midway(cls, driver_connection: Any, error: BaseException) -> bool:
        """Whether the error came while the driver spoke with the server; a value that it cannot take is told before."""
        if isinstance(error, ValueError | TypeError):
            return False
        frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
        return any(name in DRIVER_MODULES for name in frames)

    # ------------------------------------------------------------------------------------- what projections need

    @staticmethod
    def passes(driver_error: BaseException) -> bool:
        """Whether a lock was not obtained in time."""
        return MySQLDialect.code(driver_error) == LOCK_WAIT_TIMEOUT

    @staticmethod
    def is_read_only(driver_error: BaseException) -> bool:
        """Whether the server's option keeps it from writing, or InnoDB's does."""
        code = MySQLDialect.code(driver_error)
        return code == READ_ONLY_MODE or (code == OPTION_PREVENTS_STATEMENT and "read" in str(driver_error))

    def runner_lock(self, name: str) -> RunnerLock:
        """Return a lock of the server's by a name."""
        return NamedLock(self.engine, Lease(self.engine, name, self.time_in), self.is_node)


def _after_error(context: Any) -> None:
    connection, error = context.connection, context.original_exception
    # Without an answer of the server to the statement, none would come to a question either.
    if connection is None or context.is_disconnect or not isinstance(error, connection.dialect.dbapi.Error):
        return
    if not connection.closed:
        _note_failure(connection, error)


def _note_failure(connection: Connection, error: BaseException) -> None:
    """Remember when an error has ended the whole transaction: a caught one must not lead to half a commit."""
    transaction = connection.get_transaction()
    if transaction is not None and not connection.invalidated and _has_ended(connection, error):
        connection.info[ABORTED] = weakref.ref(transaction)


def _has_ended(connection: Connection, error: BaseException) -> bool:
    if MySQLDialect.is_serialization_failure(error):
        return True
    driver: Any = connection.connection.dbapi_connection
    status = getattr(driver, "server_status", None)
    if status is None:
        # The driver keeps none of what the server tells with each answer.
        return MySQLDialect.code(error) == LOCK_WAIT_TIMEOUT and _answer(connection, "@@innodb_rollback_on_timeout")
    if not status & SERVER_STATUS_IN_TRANS:
        return False
    with suppress(connection.dialect.dbapi.Error):  # type: ignore[union-attr]  # a result is still being read
        # That was the last answer before the error, which comes without a status.
        driver.ping(reconnect=False)
        return not driver.server_status & SERVER_STATUS_IN_TRANS
    return False


def _answer(connection: Connection, expression: str) -> bool:
    return bool(ask_on(connection, f"SELECT {expression}")[0][0])


def _tolerate_rolled_back(engine: Engine) -> None:
    """Let a rollback succeed where a Galera node has done it already.

    The node tells a client at its next statement, be it ROLLBACK, that another one has overtaken it. SQLAlchemy, which
    has no event around rollbacks, would raise that in place of the error that led to it.
    """
    rollback = engine.dialect.do_rollback

    def do_rollback(driver_connection: Any) -> None:
        try:
            rollback(driver_connection)
        except engine.dialect.dbapi.Error as error:  # type: ignore[union-attr]
            if not MySQLDialect.is_serialization_failure(error):
                raise
            rollback(driver_connection)

    dialect_rollback(engine.dialect, do_rollback)
