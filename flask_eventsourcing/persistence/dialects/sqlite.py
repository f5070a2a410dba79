"""SQLite: writers queue, first among the threads of the process and then, with SQLite's own lock, among processes.

SQLite's busy handler sleeps up to 0.1 s between tries, so that threads which only rely on it spend most of their time
asleep. A write transaction begins with ``BEGIN IMMEDIATE``: one that began by reading could not be upgraded after
another writer's commit and would end with "database is locked". Reads take no lock and, in the journal mode WAL, never
wait for a writer. An in-memory database has a single connection, which the threads take in turns.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection, Engine

from ...exceptions import AbortedTransactionError, WriteTimeoutError
from ..forks import in_memory
from .base import Dialect, EventTable
from .gate import Gate, gate_for

WRITES = re.compile(r"\s*(?:--[^\n]*\n\s*|/\*.*?\*/\s*)*(INSERT|UPDATE|DELETE|REPLACE|SAVEPOINT|WITH)\b", re.I | re.S)
INSERTS_IN_WITH = re.compile(r"\b(INSERT|UPDATE|DELETE|REPLACE)\b", re.I)
IMMEDIATE = "BEGIN IMMEDIATE"
ROWS_AT_ONCE = 200
"""Rows of one statement: SQLite before 3.32 takes 999 parameters."""


def writes(statement: str) -> bool:
    """Whether a statement needs SQLite's write lock; a savepoint does, because what follows it may."""
    found = WRITES.match(statement)
    return found is not None and (found[1].upper() != "WITH" or INSERTS_IN_WITH.search(statement) is not None)


class GatedConnection(sqlite3.Connection):
    """A driver connection that gives its turn back as soon as its transaction has ended."""

    gate: Gate | None = None
    shared = False
    pid = 0
    began = False
    """Whether a write transaction was begun that was neither committed nor rolled back by the client."""
    aborted = False
    """Whether SQLite has rolled such a transaction back by itself, as it does when the disk is full."""

    def note_failure(self) -> None:
        """After a statement that failed."""
        if self.began and not self.in_transaction:
            self.aborted = True

    def own_gate(self) -> Gate | None:
        """Return the gate of this process; only a copy of an in-memory database is ever used after a fork."""
        if self.gate is not None and self.pid != os.getpid():
            self.gate, self.pid = gate_for(self.gate.name), os.getpid()
            if self.shared:
                # What the parent had not committed is not to be committed here.
                super().rollback()
        return self.gate

    def take_turn(self, timeout: float) -> None:
        """Wait for the turn to use the database."""
        gate = self.own_gate()
        if gate is not None:
            gate.acquire(self, timeout)

    def end_turn(self) -> None:
        """Give the turn back unless a transaction is open."""
        gate = self.own_gate()
        if gate is not None and not self.in_transaction:
            gate.release(self)

    def _ends_mine(self) -> bool:
        # On a shared connection, the pool's "rollback on return" of one thread must not end another's transaction;
        # a thread whose own transaction is open has the turn.
        gate = self.own_gate()
        return not self.shared or gate is None or gate.is_mine()

    def commit(self) -> None:
        """Commit, and let the next one in."""
        if self._ends_mine():
            super().commit()
            self.began = self.aborted = False
            self.end_turn()

    def rollback(self) -> None:
        """Roll back, and let the next one in."""
        if self._ends_mine():
            super().rollback()
            self.began = self.aborted = False
            self.end_turn()

    def close(self) -> None:
        """Close, and let the next one in."""
        super().close()
        if self.gate is not None and self.pid == os.getpid():
            self.gate.release(self)


class SQLiteDialect(Dialect):
    """Order by SQLite's single writer; positions come from ``AUTOINCREMENT``."""

    mark = "?"
    aborts_transactions = True

    def before(self, connection: Connection, statement: str) -> None:
        """Take the turn, as the engine's event does for other statements."""
        begin_turn(connection, statement, self.is_memory, self.options.lock_timeout)

    def after(self, connection: Connection) -> None:
        """Give the turn back unless a transaction is open."""
        if self.is_memory:
            _end_turn(connection)

    @cached_property
    def is_memory(self) -> bool:
        """Whether the database is in memory, so that all threads share one connection."""
        return in_memory(self.engine.url)

    def prepare_engine(self) -> None:
        """Make the engine's connections take turns, and switch the file to the journal mode WAL."""
        engine, memory = self.engine, self.is_memory
        # Listeners of our own do what the shorter way to the driver does by itself.
        self.own_listeners = (1, 1 if memory else 0)
        if getattr(engine.dialect, "_flask_eventsourcing", False):
            return
        engine.dialect._flask_eventsourcing = True  # type: ignore[attr-defined]
        name = f"in-memory database {id(engine):x}" if memory else os.path.realpath(engine.url.database or "")
        timeout = self.options.lock_timeout

        @sa.event.listens_for(engine, "do_connect")
        def use_gated_connection(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
            parameters.setdefault("factory", GatedConnection)

        @sa.event.listens_for(engine, "connect")
        def configure(driver: Any, record: Any) -> None:
            self._configure(driver, name, memory)

        @sa.event.listens_for(engine, "before_cursor_execute")
        def take_turn(c: Connection, cursor: Any, statement: str, *_: Any) -> None:
            begin_turn(c, statement, memory, timeout)

        if memory:
            sa.event.listen(engine, "after_cursor_execute", _end_turn)
        sa.event.listen(engine, "handle_error", _after_error)
        _replace_connections(engine, memory)

    def _configure(self, driver: Any, name: str, memory: bool) -> None:
        if not isinstance(driver, GatedConnection):
            return
        driver.gate, driver.shared, driver.pid = gate_for(name), memory, os.getpid()
        driver.execute(f"PRAGMA busy_timeout = {int(self.options.lock_timeout * 1000)}").close()
        if not memory and self.options.sqlite_wal:
            _switch_to_wal(driver, self.options.lock_timeout)

    def append(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> list[int]:
        """Insert events; SQLite's write lock, held to the commit, makes the positions contiguous and in order."""
        last = self._insert_rows(connection, table, events)
        return list(range(last - len(events) + 1, last + 1))

    def insert(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Insert events that have no position, all or none of them."""
        self._insert_rows(connection, table, events)

    def _insert_rows(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> int:
        if len(events) <= ROWS_AT_ONCE:
            return self._insert_chunk(connection, table, events)
        # One statement is all or nothing; several need a savepoint to be so.
        last = 0
        self.modify(connection, "SAVEPOINT flask_eventsourcing")
        try:
            for start in range(0, len(events), ROWS_AT_ONCE):
                last = self._insert_chunk(connection, table, events[start : start + ROWS_AT_ONCE])
        except BaseException:
            # Whatever it was, half of a save must not be committed. An aborted transaction has no savepoint.
            if not self.is_aborted(connection):
                self.modify(connection, "ROLLBACK TO flask_eventsourcing")
                self.modify(connection, "RELEASE flask_eventsourcing")
            raise
        self.modify(connection, "RELEASE flask_eventsourcing")
        return last

    def _insert_chunk(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> int:
        statement = self.insert_statement(table) + ", (?, ?, ?, ?)" * (len(events) - 1)
        parameters: list[Any] = []
        for event in events:
            parameters += (
                self.encode_id(event.originator_id),
                event.originator_version,
                event.topic,
                event.state,
            )
        return int(self.modify(connection, statement, parameters).lastrowid)

    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Begin the write transaction now: it is the only queue that SQLite has."""
        begin_turn(connection, IMMEDIATE, True, self.options.lock_timeout, force=True)

    def is_aborted(self, connection: Connection) -> bool:
        """Whether SQLite has rolled the transaction back, as it does when the disk is full."""
        driver = connection.connection.driver_connection
        return isinstance(driver, GatedConnection) and driver.aborted

    def failed(self, connection: Connection, error: Exception, cursor: Any) -> Exception:
        """Return the error to raise, and remember when it has ended the whole transaction."""
        _note_failure(connection)
        return super().failed(connection, error, cursor)


def _replace_connections(engine: Engine, memory: bool) -> None:
    """Give up connections from before, which take no turns; the content of an in-memory database is copied."""
    pool = engine.pool
    if not memory or (isinstance(pool, sa.pool.StaticPool) and "connection" not in vars(pool)):
        # Nothing to copy: its one connection was not made yet, and is not to be made by looking for it.
        engine.dispose()
        return
    fairy = engine.raw_connection()
    before: Any = fairy.driver_connection
    if isinstance(before, GatedConnection):
        fairy.close()
        return
    with closing(sqlite3.connect(":memory:")) as content:
        before.backup(content)
        fairy.close()
        engine.dispose()
        with closing(engine.raw_connection()) as fresh:
            driver: Any = fresh.driver_connection
            content.backup(driver)


def begin_turn(connection: Connection, statement: str, always: bool, timeout: float, *, force: bool = False) -> None:
    """Before a statement: take the turn, and begin a write transaction if the statement writes."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, GatedConnection):
        return
    needs_lock = force or writes(statement)
    if driver.aborted and needs_lock:
        # A new transaction would be committed without what was lost.
        raise AbortedTransactionError
    own_file = not driver.shared
    if own_file and (driver.in_transaction or driver.isolation_level is None):
        return
    if always or needs_lock:
        driver.take_turn(timeout)
    if needs_lock and not driver.in_transaction and driver.isolation_level is not None:
        _begin_immediate(driver, timeout)


def _begin_immediate(driver: GatedConnection, timeout: float) -> None:
    try:
        driver.execute(IMMEDIATE).close()
        driver.began = True
    except sqlite3.OperationalError as error:
        driver.end_turn()
        raise WriteTimeoutError(
            f"Could not begin a write transaction within {timeout:g} s ({error}): another process holds the "
            "database. Keep transactions short, or raise EVENTSOURCING_LOCK_TIMEOUT."
        ) from error


def _end_turn(connection: Connection, *_: Any) -> None:
    driver = connection.connection.driver_connection
    if isinstance(driver, GatedConnection):
        driver.end_turn()


def _after_error(context: Any) -> None:
    if context.connection is not None and not context.connection.closed:
        _note_failure(context.connection)
        _end_turn(context.connection)


def _note_failure(connection: Connection) -> None:
    driver = connection.connection.driver_connection
    if isinstance(driver, GatedConnection):
        driver.note_failure()


def _switch_to_wal(driver: sqlite3.Connection, timeout: float) -> None:
    # The switch needs the file for itself for a moment, and SQLite does not call its busy handler for it.
    deadline = time.monotonic() + timeout
    while True:
        try:
            driver.execute("PRAGMA journal_mode = WAL").close()
            return
        except sqlite3.OperationalError as error:
            if time.monotonic() > deadline:
                raise WriteTimeoutError(
                    f"Could not switch the database to WAL within {timeout:g} s: {error}."
                ) from error
            time.sleep(0.01)
