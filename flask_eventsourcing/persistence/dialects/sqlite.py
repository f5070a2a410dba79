"""SQLite: writers queue, first within the process and then, with SQLite's own lock, among processes.

SQLite's busy handler sleeps up to 0.1 s between tries, so that threads which only rely on it spend most of their time
asleep. A write transaction begins with ``BEGIN IMMEDIATE``: one that began by reading could not be upgraded after
another writer's commit and would end with "database is locked". Reads take no lock and, in the journal mode WAL, never
wait for a writer. An in-memory database has a single connection of the driver, which all that use it share.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection, Engine

from ...exceptions import ConfigurationError
from .base import Dialect
from .calls import count_calls, count_cursors
from .event_tables import METADATA_COLUMNS, NOTHING, POSITION, VERSION, Beside, EventTable, Shape, begins, gap, heads
from .looks import Finding, FoundColumn, FoundTable, MissingOptions, Seen, Use, keys_of
from .sqlite_connections import Kind, QueuedConnection, SharedConnection, announce
from .sqlite_files import JournalMode, file_of, leave_replaced, note_file, path_of, refuse_inherited, refuse_opened
from .sqlite_swapping import SQLiteSwaps, log_findings, texts_of
from .swapping import FIRST_WORD

NOT_UNIQUE = re.compile(r"UNIQUE constraint failed: (.+)", re.S)
WRITES = {"INSERT", "UPDATE", "DELETE", "REPLACE", "SAVEPOINT"}
READS = {"SELECT", "VALUES", "EXPLAIN", "PRAGMA"}
SCOPE = "SELECT s.schema_version, d.name, d.file FROM pragma_schema_version AS s, pragma_database_list AS d"
SCHEMA_HOLDS_FOR = 0.05
"""Seconds within which no code is assumed to change the schema and delete the last event."""
FILE_IN_MEMORY = (
    "The engine's creator has opened {0}, and the engine's address is that of a database in memory, whose one "
    "connection a forked process shares: make the address 'sqlite:///{0}'."
)
DEFERRED = (
    'of several that read and then write at once, most end with "database is locked", as transactions begin without '
    "the lock to write; and in another journal mode than WAL, readers keep writers waiting."
)
LOCKED = ("database is locked", "database table is locked")
MOST_PARAMETERS = 32_766 if sqlite3.sqlite_version_info >= (3, 32) else 999
LONGEST_KNOWN = 1000
"""The characters of a statement whose kind is remembered, at most."""
TAKES_LOCK = re.compile(r"\b(IMMEDIATE|EXCLUSIVE)\b", re.I)
WRITES_IN_WITH = re.compile(r"\b(INSERT|UPDATE|DELETE|REPLACE)\b", re.I)


def kind_of(statement: str) -> Kind:
    """Whether a statement needs SQLite's write lock, is known to do no more than read, or may do anything, as DDL does.

    A transaction begins with the lock, or without it.

    A savepoint needs the lock, because what follows it may.
    """
    found = FIRST_WORD.match(statement)
    word = found[1].upper() if found is not None else ""
    if word == "BEGIN":
        return "lock" if TAKES_LOCK.search(statement) is not None else "begin"
    if word == "WITH":
        return "write" if WRITES_IN_WITH.search(statement) is not None else "read"
    return "read" if word in READS else "write" if word in WRITES else "other"


class SQLiteDialect(SQLiteSwaps, Dialect):
    """Order by SQLite's single writer; positions come from ``AUTOINCREMENT``."""

    mark = "?"
    title = "SQLite"
    clock: ClassVar[str] = "strftime('%Y-%m-%d %H:%M:%f000', 'now', '{:+g} seconds')"
    drivers: ClassVar[dict[str, str]] = {"pysqlite": ""}
    missing_table: ClassVar[re.Pattern[str]] = re.compile(r"no such table: (?P<name>\S+)")
    # SQLITE_BUSY_SNAPSHOT, for a transaction that has read what others have changed since.
    serialization_failures: ClassVar[frozenset[object]] = frozenset({517})
    # SQLITE_CONSTRAINT_UNIQUE, SQLITE_CONSTRAINT_PRIMARYKEY and SQLITE_CONSTRAINT_ROWID.
    duplicates: ClassVar[frozenset[object]] = frozenset({2067, 1555, 2579})
    column_types: ClassVar[dict[str, Any]] = {
        "position": sa.Integer(),
        # A BLOB, as the library's own module has it; JSON's storage class is TEXT.
        "metadata": sa.LargeBinary(),
    }
    # Without AUTOINCREMENT, the next event would get the position of a deleted last event.
    table_options: ClassVar[dict[str, Any]] = {"sqlite_autoincrement": True}
    has_schemas = False
    aborts_transactions = True
    survives_forks = False
    rows_at_once = 200

    @classmethod
    def is_in_memory(cls, url: sa.URL) -> bool:
        """Whether an address names no file."""
        return url.database in (None, "", ":memory:") or "mode=memory" in str(url)

    @classmethod
    def guard_forks(cls, engine: Engine) -> bool:
        """Make a forked process refuse a file that was open at the fork, and close idle connections before it."""
        sa.event.listen(engine, "do_connect", refuse_inherited, insert=True)
        # There is no such event where the engine was made with a function that connects.
        sa.event.listen(engine, "connect", refuse_opened, insert=True)
        return True

    def ended_past(self, connection: Connection) -> None:
        """Release the write queue."""
        _after_statement(connection)

    @cached_property
    def is_memory(self) -> bool:
        """Whether the database is in memory, so that all threads share one connection."""
        return self.is_in_memory(self.engine.url)

    def install(self, engine: Engine) -> None:
        """Listen for connections, statements and the ends of transactions."""
        memory = self.is_memory
        arguments, parameters = engine.dialect.create_connect_args(engine.url)
        name = f"in-memory database {id(engine):x}" if memory else str(path_of(arguments, parameters))
        journal = JournalMode(self.options.sqlite_wal, self.options.lock_timeout)

        @sa.event.listens_for(engine, "do_connect")
        def use_queued_connection(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
            parameters.setdefault("factory", SharedConnection if memory else QueuedConnection)
            if not memory:
                journal.settle(arguments, parameters)

        @sa.event.listens_for(engine, "connect")
        def configure(driver: Any, record: Any) -> None:
            if memory and isinstance(driver, sqlite3.Connection) and (path := file_of(driver)):
                driver.close()
                raise ConfigurationError(FILE_IN_MEMORY.format(path))
            self._configure(driver, name)

        if not memory:
            sa.event.listen(engine, "connect", note_file)
            sa.event.listen(engine, "checkout", leave_replaced)
        sa.event.listen(engine, "before_cursor_execute", _before_statement)
        # In memory no other process ends a transaction, and the driver's connection is asked for it all the time.
        sa.event.listen(engine, "connect", count_cursors if memory else count_calls)
        if memory:
            sa.event.listen(engine, "after_cursor_execute", _after_statement)
            sa.event.listen(engine, "commit", announce("commit"))
            sa.event.listen(engine, "rollback", announce("rollback"))
        sa.event.listen(engine, "handle_error", _after_error)
        _replace_connections(engine, memory)

    def _configure(self, driver: Any, name: str) -> None:
        if not isinstance(driver, QueuedConnection):
            return
        timeout = self.options.lock_timeout
        driver.configure(name, timeout)
        driver.execute(f"PRAGMA busy_timeout = {int(timeout * 1000)}").close()

    def append(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], beside: Beside = NOTHING
    ) -> list[int]:
        """Insert events; SQLite's write lock, held to the commit, makes the positions contiguous and in order."""
        rows = [table.row(event) for event in events]
        first = heads(events)
        if len(events) == 1:
            row = beside.first(rows[0])
            position = self._insert_next(connection, table, row, beside.shape, begins=begins(first[0]))
            if position is not None:
                return [position]
        if len(events) == 1 or len(first) > 1 or begins(first[0]) or not self._has_previous(connection, table, rows[0]):
            # With the lock to write, so that no other writer comes between the check and the rows.
            self.queue_for(connection, table, first[0].originator_id, wait=True)
            snapshots = self.needs_snapshots(connection, table, first)
            missing = self.find_gap(connection, table, first, "", snapshots=snapshots)
            if missing is not None:
                raise gap(missing)
        last = int(self.insert_rows(connection, self.insert_statement(table, beside.shape), rows, beside))
        return list(range(last - len(events) + 1, last + 1))

    def _insert_next(
        self, connection: Connection, table: EventTable, row: tuple[Any, ...], shape: Shape, *, begins: bool
    ) -> int | None:
        """Insert an event whose predecessor is among the events, or the first of its aggregate, or return None."""
        others = [table.snapshots] if begins and self.has_snapshots(connection, table) else []
        use = f"first {others}{shape.key}" if begins else f"next{shape.key}"
        statement = table.statements.get(use)
        if statement is None:
            marks = ", ".join("?" * len(row))
            condition = f"EXISTS ({self._previous_statement(table)})"
            if begins:
                names = [table.name, *others]
                condition = " AND ".join(f"NOT EXISTS (SELECT 1 FROM {each} WHERE originator_id = ?)" for each in names)
            statement = f"INSERT INTO {table.name} ({shape.columns}) SELECT {marks} WHERE {condition}"
            table.statements[use] = statement
        known = [row[0]] * (1 + len(others)) if begins else [row[0], row[1] - 1]
        done = self.modify(connection, statement, (*row, *known))
        return int(done.lastrowid) if done.rowcount == 1 else None

    def _has_previous(self, connection: Connection, table: EventTable, row: tuple[Any, ...]) -> bool:
        return bool(self.fetch(connection, self._previous_statement(table), (row[0], row[1] - 1)))

    @staticmethod
    def _previous_statement(table: EventTable) -> str:
        return f"SELECT 1 FROM {table.name} WHERE originator_id = ? AND originator_version = ?"

    def chunks(
        self, connection: Connection, rows: Sequence[tuple[Any, ...]], more: int = 0
    ) -> Sequence[Sequence[tuple[Any, ...]]]:
        """Return the rows by the statements that insert them, with no more parameters than SQLite takes."""
        size = max(1, min(self.rows_at_once, (MOST_PARAMETERS - len(METADATA_COLUMNS)) // (len(rows[0]) + more)))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def insert(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Insert events that have no position, all or none of them."""
        self.insert_rows(connection, self.insert_statement(table), [table.row(event) for event in events])

    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Begin the write transaction now: it is the only queue that SQLite has."""
        driver = connection.connection.driver_connection
        if isinstance(driver, QueuedConnection):
            driver.before(connection, "write")

    def is_aborted(self, connection: Connection) -> bool:
        """Whether SQLite has rolled the transaction back, as it does when the disk is full."""
        driver = connection.connection.driver_connection
        return isinstance(driver, QueuedConnection) and driver.has_aborted(connection)

    def driver_commits(self, connection: Connection) -> bool:
        """Whether the driver begins no transactions, and no other code has begun this one."""
        driver: Any = connection.connection.dbapi_connection
        return not self.is_memory and driver.isolation_level is None and not driver.in_transaction

    def is_over(self, connection: Connection) -> bool:
        """Ask the driver whether there is a transaction, and whose it is."""
        driver = connection.connection.driver_connection
        return isinstance(driver, sqlite3.Connection) and (
            not driver.in_transaction or (isinstance(driver, QueuedConnection) and not driver.is_in_use_by(connection))
        )

    @classmethod
    def code(cls, driver_error: Any) -> object:
        """Return SQLite's extended code."""
        return getattr(driver_error, "sqlite_errorcode", None)

    def violated(self, connection: Connection, error: Any, table: sa.Table) -> Collection[str] | None:
        """Read the columns in the message: the names of constraints do not reach the driver."""
        found = NOT_UNIQUE.search(str(error))
        owner, *columns = found[1].split(f"{table.name}.") if found is not None else ["?"]
        return None if owner else [column.removesuffix(", ") for column in columns]

    # ------------------------------------------------------------------------------------- what is looked at

    compares_lengths = False

    @classmethod
    def needs_transaction(cls, statement: str) -> bool:
        """Whether it may write: a transaction may have to begin with the lock to write."""
        return kind_of(statement) != "read"

    @classmethod
    def missing_options(cls, name: str, options: Mapping[str, Any]) -> list[MissingOptions]:
        """Look whether transactions begin with the lock to write, in the journal mode WAL."""
        if not name or ":memory:" in name or "mode=memory" in name:
            return []
        mode, command = str(options.get("transaction_mode")).upper(), str(options.get("init_command")).lower()
        lines = [] if mode in ("IMMEDIATE", "EXCLUSIVE") else ['"transaction_mode": "IMMEDIATE",']
        lines += (
            [] if "journal_mode=wal" in command.replace(" ", "") else ['"init_command": "PRAGMA journal_mode=WAL;",']
        )
        return [MissingOptions(DEFERRED, " ".join(lines))] if lines else []

    def look(self, connection: Connection, table: EventTable, use: Use) -> None:
        """Look again, too, when the schema has changed; that is asked once in a while, as it reads the file."""
        if use != "read" and self.looks_again:
            seen: Seen | None = connection.info.get(Seen.KEY)
            if seen is not None and seen.until < time.monotonic():
                seen.until = time.monotonic() + SCHEMA_HOLDS_FOR
                if seen.scope != self.scope(connection):
                    del connection.info[Seen.KEY]
        super().look(connection, table, use)

    def scope(self, connection: Connection) -> Any:
        """Return the version of the schema, and the files: an engine of the user's may have several."""
        return tuple(self.fetch(connection, SCOPE))

    def lasting(self, scope: Any) -> Any:
        """Return the files."""
        return tuple((name, file) for _, name, file in scope)

    def is_there(self, connection: Connection, table: sa.Table) -> bool:
        """Remember one that is, for as long as the schema has not changed."""
        seen: Seen | None = connection.info.get(Seen.KEY)
        name = self.name_of(connection, table)
        if seen is not None and name in seen.there:
            return True
        there = super().is_there(connection, table)
        if there and seen is not None:
            seen.there.add(name)
        return there

    def found_table(self, connection: Connection, table: sa.Table) -> FoundTable | None:
        """Return a table as SQLite knows it."""
        # Generated columns are hidden, and have their values from the database.
        value = "CASE WHEN hidden = 0 THEN dflt_value ELSE '' END"
        statement = f'SELECT name, type, "notnull", {value}, pk FROM pragma_table_xinfo(?, ?) WHERE hidden <> 1'
        place = (table.name, self.schema_of(connection, table))
        rows = self.fetch(connection, statement, place)
        keys = [name for name, kind, _, _, key in rows if key]
        alias = keys[0] if len(keys) == 1 else None
        columns = {
            name: FoundColumn(
                name, kind, not required, default is not None or (name == alias and kind.upper() == "INTEGER")
            )
            for name, kind, required, default, _ in rows
        }
        statement = (
            "SELECT l.name, i.name FROM pragma_index_list(?, ?) AS l, pragma_index_info(l.name, ?) AS i "
            'WHERE l."unique" AND NOT l.partial'
        )
        unique = keys_of(self.fetch(connection, statement, (*place, place[1])))
        return FoundTable(columns, keys=unique) if columns else None

    def found_more(self, connection: Connection, table: sa.Table, found: FoundTable) -> list[Finding]:
        """Look for AUTOINCREMENT, and for triggers that keep rows out: the texts of the schema alone tell it."""
        if POSITION not in table.c or VERSION not in table.c:
            return []
        schema = self.quote(self.schema_of(connection, table) or "main")
        rows = self.fetch(connection, texts_of(schema), (table.name,))
        return list(log_findings(table.name, rows))

    # ------------------------------------------------------------------------------------- what projections need

    # A batch keeps every other writer waiting.
    batch_seconds: float = 0.1
    keeps_microseconds = True
    full: ClassVar[frozenset[object]] = frozenset({sqlite3.SQLITE_FULL})
    has_one_writer = True

    def file_beside(self, connection: Connection) -> Path | None:
        """Return the file; a database in memory has none."""
        rows = connection.exec_driver_sql("PRAGMA database_list").all()
        return next((Path(path) for _, name, path in rows if name == "main" and path), None)

    @staticmethod
    def passes(driver_error: BaseException) -> bool:
        """Whether another connection has locked the database for too long, or a table of one in memory just now."""
        return any(text in str(driver_error) for text in LOCKED)


_known_kind = lru_cache(256)(kind_of)


def _replace_connections(engine: Engine, memory: bool) -> None:
    """Give up connections from before, which do not queue; the content of an in-memory database is copied."""
    pool = engine.pool
    if not memory or (isinstance(pool, sa.pool.StaticPool) and "connection" not in vars(pool)):
        # Nothing to copy: its one connection does not exist yet, and this must not make it.
        engine.dispose()
        return
    before = engine.raw_connection()
    driver: Any = before.driver_connection
    with closing(before):
        if isinstance(driver, QueuedConnection):
            return
        # The pool makes another, and this one stays open for so long.
        before.detach()
        engine.dispose()
        with closing(engine.raw_connection()) as after:
            copy: Any = after.driver_connection
            driver.backup(copy)


def _before_statement(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
    # As ``driver_connection``, which takes longer to find.
    driver: Any = connection.connection.dbapi_connection
    if isinstance(driver, QueuedConnection):
        driver.before(connection, _known_kind(statement) if len(statement) <= LONGEST_KNOWN else kind_of(statement))


def _after_statement(connection: Connection, *_: Any) -> None:
    driver = connection.connection.driver_connection
    if isinstance(driver, QueuedConnection):
        driver.after(connection)


def _after_failure(connection: Connection) -> None:
    driver = connection.connection.driver_connection
    if isinstance(driver, QueuedConnection):
        driver.failed(connection)


def _after_error(context: Any) -> None:
    if context.connection is not None and not context.connection.closed:
        _after_failure(context.connection)
