"""Runs the recorders' statements with ``Connection.exec_driver_sql``, and translates errors into the library's.

SQLAlchemy's pools, listeners, logs and treatment of errors apply, except on a :class:`DirectConnection`. A listener
recognizes these statements by the execution option ``flask_eventsourcing``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from eventsourcing import persistence
from eventsourcing.persistence import StoredEvent
from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine

from ...exceptions import ConfigurationError, ConstraintError, MissingRightError, MissingTableError, UnsafeSequenceError
from .calls import AUTOCOMMIT, OPTIONS, Calls, DirectConnection, Modified, all_rows, calls_of, modified, of_rows
from .event_tables import (
    EVENT_COLUMNS,
    NOTHING,
    PLAIN,
    POSITION,
    VERSION,
    VERSION_KEY,
    Beside,
    ConflictError,
    EventTable,
    Shape,
    is_key,
)

T = TypeVar("T")

# The classes of PEP 249, which SQLAlchemy, every driver and the library have; each stands before those it derives from.
_PEP_249 = (
    "IntegrityError",
    "DataError",
    "OperationalError",
    "InternalError",
    "ProgrammingError",
    "NotSupportedError",
    "DatabaseError",
    "InterfaceError",
)

COMMITS_BY_ITSELF = (
    "This engine commits each statement by itself, so events and models cannot be one transaction: make it "
    "without isolation_level='AUTOCOMMIT' and without its driver's option autocommit."
)


class Driver:
    """Runs statements on the driver's connection of a SQLAlchemy connection, and classifies its errors."""

    mark: ClassVar[str] = "%s"
    """The driver's parameter placeholder."""
    serialization_failures: ClassVar[frozenset[object]] = frozenset()
    """The server's codes after which the whole transaction may be tried again, because another one was first."""
    duplicates: ClassVar[frozenset[object]] = frozenset()
    """The server's codes for a key that exists already."""
    rights_lacking: ClassVar[frozenset[object]] = frozenset()
    """The server's codes for a missing right."""
    missing_table: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    """The server's message for a missing table, with the table's name as the group ``name``."""
    missing_table_code: ClassVar[object] = None
    """The code of that message, if the database has one: the words depend on the server's language."""
    drivers: ClassVar[Mapping[str, str]] = {}
    """SQLAlchemy's names of the drivers that can be used, each with its package. Messages propose the first one."""
    rows_at_once = 1
    """The most rows of one statement of :meth:`insert_rows`."""
    conflict_error: type[ConflictError] = ConflictError
    """The error that is raised when another writer was first."""

    def __init__(self, engine: Engine, program: str | None = None) -> None:
        self.engine = engine
        self._program = program
        dbapi: Any = engine.dialect.dbapi
        self.driver_error: type[Exception] = dbapi.Error
        self.translated: Translated = Translated(self)
        self.tables: dict[str, sa.Table] = {}
        """The tables of events, snapshots and positions by their quoted names."""

    def command(self, words: str) -> str:
        """Return how messages name a command: as the host's user calls it, if the host says how."""
        return f"the command '{words}'" if self._program is None else f"'{self._program} {words}'"

    def missing(self, name: str) -> MissingTableError:
        """Return the error that names a missing table."""
        return MissingTableError(f"Table {name!r} does not exist: run {self.command('init-db')} or your migrations.")

    def quote(self, name: str) -> str:
        """Quote a name if the database needs it."""
        return self.engine.dialect.identifier_preparer.quote(name)

    # ------------------------------------------------------------------------------------------------- statements

    def commits_implicitly(self, statement: str) -> bool:
        """Whether the database commits the transaction before it runs a statement."""
        return False

    def ended_past(self, connection: Connection) -> None:
        """Called when other code has ended the transaction without SQLAlchemy."""

    def fetch(self, connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Run a statement and return its rows, as the driver gives them."""
        if isinstance(connection, DirectConnection) and not connection.is_heard:
            return self._run_directly(connection, statement, tuple(parameters), all_rows)
        try:
            result = connection.exec_driver_sql(statement, tuple(parameters), OPTIONS)
            # The result's way to the driver, by which an error is treated as one of the execution, without its Row.
            rows: list[Any] = result.cursor_strategy.fetchall(result, result.cursor)
        except exc.DBAPIError as error:
            raise self.own_error(connection, error.orig, statement) from error.orig
        return rows

    def modify(self, connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> Modified:
        """Run a statement that returns no rows."""
        if isinstance(connection, DirectConnection) and not connection.is_heard:
            return self._run_directly(connection, statement, tuple(parameters), modified)
        result = self._run(connection, statement, tuple(parameters))
        # Not the result's own id, which only an INSERT has: the UPDATE of a counter has one too.
        return Modified(result.rowcount, getattr(result.context.cursor, "lastrowid", None))

    def modify_many(self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement once for each row of parameters."""
        self._run(connection, statement, list(rows))

    def _run(self, connection: Connection, statement: str, parameters: Any) -> sa.CursorResult[Any]:
        try:
            return connection.exec_driver_sql(statement, parameters, OPTIONS)
        except exc.DBAPIError as error:
            # Not from SQLAlchemy's error, which has the parameters.
            raise self.own_error(connection, error.orig, statement) from error.orig

    def _run_directly(
        self, connection: DirectConnection, statement: str, parameters: tuple[Any, ...], take: Callable[[Any], T]
    ) -> T:
        try:
            return connection.run(statement, parameters, take)
        except self.driver_error as error:
            dialect: Any = self.engine.dialect
            if not connection.invalidated and dialect.is_disconnect(error, connection.connection, None):
                connection.invalidate(error)
            raise self.own_error(connection, error, statement) from error

    def insert_rows(
        self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]], beside: Beside = NOTHING
    ) -> Any:
        """Insert all of the rows, or none, with a statement that would insert one; returns the driver's last id.

        :param beside: the ends of the rows. They share values only if the database can refer to a parameter twice.
        """
        chunks = self.chunks(connection, rows, len(beside.columns))
        if len(chunks) == 1:
            return self._insert_chunk(connection, statement, rows, beside)
        # One statement inserts all or nothing. Several statements need a savepoint for that.
        last = None
        self.modify(connection, "SAVEPOINT flask_eventsourcing")
        # Half of a save must not be committed.
        with ExitStack() as failed:
            failed.callback(self._roll_back_chunks, connection)
            start = 0
            for chunk in chunks:
                last = self._insert_chunk(connection, statement, chunk, beside.part(start, len(chunk)))
                start += len(chunk)
            failed.pop_all()
        self.modify(connection, "RELEASE SAVEPOINT flask_eventsourcing")
        return last

    def _roll_back_chunks(self, connection: Connection) -> None:
        # An aborted transaction has no savepoint.
        if not connection.invalidated and not self.is_aborted(connection):
            self.modify(connection, "ROLLBACK TO SAVEPOINT flask_eventsourcing")
            self.modify(connection, "RELEASE SAVEPOINT flask_eventsourcing")

    def chunks(
        self, connection: Connection, rows: Sequence[tuple[Any, ...]], more: int = 0
    ) -> Sequence[Sequence[tuple[Any, ...]]]:
        """Return the rows by the statements that insert them, with *more* values of each beside them."""
        return [rows[start : start + self.rows_at_once] for start in range(0, len(rows), self.rows_at_once)]

    def _insert_chunk(
        self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]], beside: Beside
    ) -> Any:
        values, own, shared = beside.joined(rows), len(rows[0]) + len(beside.columns), beside.shared
        values[own:own] = shared
        return self.modify(connection, of_rows(statement, self.mark, own, len(shared), len(rows)), values).lastrowid

    def insert_statement(self, table: EventTable, shape: Shape = PLAIN) -> str:
        """The statement that inserts one event."""
        use = f"insert{shape.key}"
        statement = table.statements.get(use)
        if statement is None:
            marks = ", ".join([self.mark] * (len(EVENT_COLUMNS) + len(shape.kinds)))
            statement = f"INSERT INTO {table.name} ({shape.columns}) VALUES ({marks})"
            table.statements[use] = statement
        return statement

    def insert_or_replace(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Insert events that have no position; where there is one of the same version, it is replaced."""
        rows = [table.row(event) for event in events]
        with connection.begin_nested() if len(rows) > 1 else nullcontext():
            for row in rows:
                if not self.insert_new(connection, table, row):
                    key = " AND ".join(f"{name} = {self.mark}" for name in VERSION_KEY)
                    values = ", ".join(f"{name} = {self.mark}" for name in EVENT_COLUMNS[2:])
                    self.modify(connection, f"UPDATE {table.name} SET {values} WHERE {key}", (*row[2:], *row[:2]))

    def insert_new(self, connection: Connection, table: EventTable, row: tuple[Any, ...]) -> bool:
        """Insert a row unless there is one of its aggregate's version, and return whether it was inserted."""
        statement = f"{self.insert_statement(table)} ON CONFLICT ({', '.join(VERSION_KEY)}) DO NOTHING"
        return self.modify(connection, statement, row).rowcount == 1

    def forget_looks(self, connection: Connection) -> None:
        """Called after an error that may be due to a change in the database."""

    # ------------------------------------------------------------------------------------- what state it is in

    @classmethod
    def is_left_midway(cls, driver_connection: Any, error: BaseException) -> bool:
        """Whether an error that is not the driver's, such as a signal handler's, came in the middle of a statement.

        The server's answer would then be taken for the answer to the next statement, or block it.
        """
        return False

    driver_knows_end = True
    """Whether :meth:`is_over` can answer without the server."""

    appends_one_by_one = False
    """Whether an append waits for every transaction that has appended, and not only for one with the same versions."""

    def is_aborted(self, connection: Connection) -> bool:
        """Whether the database would turn a commit of this transaction into a rollback."""
        return False

    def check_transaction(self, connection: Connection) -> None:
        """Refuse a connection of a session that commits each statement by itself.

        :raises ConfigurationError: if it does.
        """
        if connection.get_execution_options().get("isolation_level") == AUTOCOMMIT or self.driver_commits(connection):
            raise ConfigurationError(COMMITS_BY_ITSELF)

    def driver_commits(self, connection: Connection) -> bool:
        """Whether the driver, or the server, commits each statement."""
        return False

    def calls(self, connection: Connection) -> Calls:
        """Return the counted calls of methods of the driver's connection."""
        return calls_of(connection)

    def roll_back(self, connection: Connection) -> bool:
        """Roll the driver's connection back, and return whether that was possible: in two phases it may not be."""
        driver: Any = connection.connection.dbapi_connection
        try:
            driver.rollback()
        except self.driver_error:
            return False
        return True

    def is_over(self, connection: Connection) -> bool:
        """Whether a transaction that has written is over: ended by any code, or aborted.

        The driver or the server is asked, not SQLAlchemy. Before the first write, the transaction may not have begun.
        """
        return self.is_aborted(connection)

    # ------------------------------------------------------------------------------------------------- errors

    @classmethod
    def code(cls, driver_error: Any) -> object:
        """Return the server's code of a driver's exception, or None."""
        return None

    @classmethod
    def text(cls, driver_error: Any, code: object = None) -> str:
        """Return the text of a driver's exception, or of a part of it with that code, without ids and values."""
        return str(driver_error).strip()

    @classmethod
    def is_serialization_failure(cls, driver_error: Any) -> bool:
        """Whether a driver's exception means that the whole transaction may be tried again."""
        return cls.code(driver_error) in cls.serialization_failures

    def is_conflict(self, error: BaseException | None) -> bool:
        """Whether an error means that another writer was first, so that the whole unit may be run again.

        Not every ``IntegrityError`` of the library is one: a gap in a stream, or a position that was processed already,
        would be refused again.
        """
        if isinstance(error, exc.DBAPIError):
            error = error.orig
        if isinstance(error, self.driver_error):
            return self.is_serialization_failure(error)
        return isinstance(error, ConflictError)

    def own_error(self, connection: Connection, error: Any, statement: str) -> persistence.PersistenceError:
        """Return the library's exception for the driver's error of a recorder's statement."""
        found = self.translate_driver(error)
        if not isinstance(found, persistence.IntegrityError):
            self.forget_looks(connection)
        if not isinstance(found, persistence.IntegrityError) or isinstance(found, ConflictError):
            return found
        table = next((table for name, table in self.tables.items() if f"INTO {name} (" in statement), None)
        columns = None
        if table is not None and self.code(error) in self.duplicates:
            columns = self.violated(connection, error, table)
        if table is None or columns is None or not is_key(table, columns):
            return ConstraintError(f"A constraint that is not a key of the events refused an event: {found}")
        return self._not_unique(connection, table, columns, found)

    def _not_unique(
        self, connection: Connection, table: sa.Table, columns: Collection[str], found: Exception
    ) -> persistence.PersistenceError:
        if POSITION not in table.c or VERSION not in table.c:
            return persistence.IntegrityError(f"Another writer was first: {found}")
        if list(columns) != [POSITION]:
            return self.conflict_error(f"Another writer was first: {found}")
        self.forget_looks(connection)
        return UnsafeSequenceError(
            f"A position of table {table.fullname} was given twice: its sequence or counter is behind the table, as "
            "after an import or a restore. The next append, or the command 'check', says what to do."
        )

    def violated(self, connection: Connection, error: Any, table: sa.Table) -> Collection[str] | None:
        """Return the columns of a table that a driver's exception says are not unique, or None if it says otherwise."""
        return None

    def translate(self, error: exc.SQLAlchemyError) -> persistence.PersistenceError:
        """Return the library's exception for one of SQLAlchemy's, in whose statement it may be."""
        driver_error: Any = getattr(error, "orig", None)
        text = self.text(driver_error if driver_error is not None else error)
        special = self._special(driver_error, text)
        if special is not None:
            return special
        if isinstance(error, exc.TimeoutError | exc.PendingRollbackError):
            # An error of SQLAlchemy's own: the pool is exhausted, or the session waits for a rollback.
            return persistence.OperationalError(text)
        return _counterpart(error, exc, text)

    def translate_driver(self, error: Exception) -> persistence.PersistenceError:
        """Return the library's exception for one of the driver's, by the classes of PEP 249."""
        text = self.text(error)
        return self._special(error, text) or _counterpart(error, self.engine.dialect.dbapi, text)

    def _special(self, driver_error: Any, text: str) -> persistence.PersistenceError | None:
        has_code = self.missing_table_code in (None, self.code(driver_error))
        if has_code and (found := self.missing_table.search(text)):
            return self.missing(found["name"])
        if self.is_serialization_failure(driver_error):
            return self.conflict_error(f"Another writer was first: {text}")
        if self.code(driver_error) in self.rights_lacking:
            return MissingRightError(f"{text}: grant what the role needs, as the page on deployment lists it.")
        return persistence.IntegrityError(text) if self.code(driver_error) in self.duplicates else None


def _counterpart(error: Exception, module: Any, text: str) -> persistence.PersistenceError:
    """Return the library's exception of the same name as the class of PEP 249, in *module*, that an error is of."""
    for name in _PEP_249:
        if isinstance(error, getattr(module, name)):
            theirs: type[persistence.PersistenceError] = getattr(persistence, name)
            return theirs(text)
    return persistence.PersistenceError(text)


class Translated:
    """Context manager within which SQLAlchemy's exceptions, and the driver's, become the library's.

    Errors of statements stay as they are: those of the recorders' statements are translated already. When SQLAlchemy
    resets a connection, it lets the driver's errors through.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.check(error)

    def check(self, error: BaseException) -> None:
        """Raise the library's exception for an error that is SQLAlchemy's or the driver's."""
        if isinstance(error, exc.StatementError) and error.statement is not None:
            # Of a statement that is not the recorders' own, as the session's when it flushes; or what a signal handler
            # has raised before a statement was sent.
            return
        if isinstance(error, exc.SQLAlchemyError):
            raise self._driver.translate(error) from error
        if isinstance(error, self._driver.driver_error):
            raise self._driver.translate_driver(error) from error
