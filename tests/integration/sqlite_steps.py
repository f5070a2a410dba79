"""Steps on the connections of one SQLite database, each in a thread of its choice, and what they are to do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import StaticPool

from flask_eventsourcing import WriteTimeoutError
from flask_eventsourcing.persistence import DialectOptions
from flask_eventsourcing.persistence.dialects.sqlite import SQLiteDialect

INSERT, SELECT = "INSERT INTO number (value) VALUES (?)", "SELECT value FROM number ORDER BY id"
SAME_THREAD, WAITED = "the same thread's transaction is in the way", "waited"


@contextmanager
def sqlite_database(path: Path | None, timeout: float) -> Iterator[SQLiteDialect]:
    """A database with a table of numbers: a file, or in memory without one."""
    options: dict[str, Any] = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    engine = sa.create_engine("sqlite://", **options) if path is None else sa.create_engine(f"sqlite:///{path}")
    dialect = SQLiteDialect(engine, DialectOptions(lock_timeout=timeout))
    dialect.prepare_engine()
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE number (id INTEGER PRIMARY KEY AUTOINCREMENT, value INTEGER)")
        yield dialect
    finally:
        engine.dispose()


def numbers(connection: Connection) -> list[int]:
    """Return the numbers that a connection sees."""
    return list(connection.exec_driver_sql(SELECT).scalars())


def insert(connection: Connection, number: int) -> None:
    """Insert a number."""
    connection.exec_driver_sql(INSERT, (number,))


def stored(engine: Engine) -> list[int]:
    """Return the numbers that a new connection sees."""
    with engine.connect() as connection:
        return numbers(connection)


@dataclass(frozen=True)
class Step:
    """What one connection does, and in which thread."""

    kind: str
    connection: int
    thread: int
    own: bool = False
    """Whether the statement is one of the recorders' own."""


KINDS = ("insert", "read", "savepoint", "ddl", "commit", "rollback", "close", "drop", "visit")


@dataclass
class Model:
    """What steps are to do."""

    in_memory: bool
    committed: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    owner: int | None = None
    thread: int | None = None

    def expected(self, step: Step, number: int) -> Any:
        """Return what a step is to answer, and take it."""
        if step.kind in ("insert", "savepoint", "ddl"):
            return self._write(step, number)
        if step.kind == "read":
            return self._read(step)
        if step.kind != "visit" and self.owner == step.connection:
            if step.kind == "commit":
                self.committed += self.pending
            self.pending, self.owner = [], None
        return None

    def _write(self, step: Step, number: int) -> Any:
        refused = self._refused(step)
        # On a file, DDL does not queue, and SQLite says that the file is locked.
        if refused is not None:
            return "locked" if step.kind == "ddl" and not self.in_memory else refused
        if step.kind == "ddl" and self.owner is None:
            # The driver begins no transaction for it.
            return None
        if self.owner is None or self.in_memory:
            self.owner, self.thread = step.connection, step.thread
        if step.kind == "insert":
            self.pending.append(number)
        return None

    def _refused(self, step: Step) -> str | None:
        if self.owner in (None, step.connection):
            return None
        return SAME_THREAD if self.thread == step.thread else WAITED

    def _read(self, step: Step) -> Any:
        if self.owner == step.connection:
            if self.in_memory:
                self.thread = step.thread
            return self.committed + self.pending
        if not self.in_memory or self.owner is None:
            return self.committed
        return WAITED if self._refused(step) == WAITED else self.committed + self.pending


class Stage:
    """Connections to one database, and threads in which they are used."""

    def __init__(self, dialect: SQLiteDialect, connections: int, threads: int) -> None:
        self.dialect = dialect
        self.engine = dialect.engine
        self.connections = [self.engine.connect() for _ in range(connections)]
        self._stack = ExitStack()
        self._threads = [self._stack.enter_context(ThreadPoolExecutor(1)) for _ in range(threads)]

    def close(self) -> None:
        """Close the connections and end the threads."""
        for connection in self.connections:
            connection.close()
        self._stack.close()

    def take(self, step: Step, number: int) -> Any:
        """Take a step in its thread, and return what it answers; an error is told, as it would keep connections."""
        return self._threads[step.thread].submit(self._told, getattr(self, f"_{step.kind}"), step, number).result(30)

    def _told(self, method: Callable[[Step, int], Any], step: Step, number: int) -> Any:
        try:
            return method(step, number)
        except WriteTimeoutError as error:
            return SAME_THREAD if str(error).startswith("This thread has") else WAITED
        except sa.exc.OperationalError as error:
            return "locked" if "is locked" in str(error) else str(error)

    def _insert(self, step: Step, number: int) -> None:
        connection = self.connections[step.connection]
        if step.own:
            self.dialect.modify(connection, INSERT, (number,))
        else:
            insert(connection, number)

    def _read(self, step: Step, _: int) -> list[int]:
        connection = self.connections[step.connection]
        if step.own:
            return [value for (value,) in self.dialect.fetch(connection, SELECT)]
        return numbers(connection)

    def _savepoint(self, step: Step, number: int) -> None:
        connection = self.connections[step.connection]
        with connection.begin_nested() as savepoint:
            insert(connection, number)
            savepoint.rollback()

    def _ddl(self, step: Step, number: int) -> None:
        self.connections[step.connection].exec_driver_sql(f"CREATE TABLE t{number} (a)")

    def _commit(self, step: Step, _: int) -> None:
        self.connections[step.connection].commit()

    def _rollback(self, step: Step, _: int) -> None:
        self.connections[step.connection].rollback()

    def _close(self, step: Step, _: int) -> None:
        self.connections[step.connection].close()
        self.connections[step.connection] = self.engine.connect()

    def _drop(self, step: Step, _: int) -> None:
        self.connections[step.connection] = self.engine.connect()
        gc.collect()

    def _visit(self, step: Step, _: int) -> None:
        # The pool rolls back what it gets returned, without an event.
        self.engine.connect().close()
        self.engine.raw_connection().close()
