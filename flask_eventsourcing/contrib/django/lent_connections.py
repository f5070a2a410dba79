"""Gives Django's cursors and connections the interface of a driver, with the driver's own errors."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar

from django.db import Error
from django.db.transaction import TransactionManagementError
from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection

from ...persistence.dialects import DIALECTS
from ...persistence.dialects.calls import DirectConnection

T = TypeVar("T")

MARK = "?"
"""The parameter style of the one database whose statements Django converts."""
_QUOTED_OR_MARK = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\?(\d*)|%")


class _DriverErrors:
    """Raises the driver's error instead of the one that Django has made of it.

    It is entered several times in each statement, and a generator would take four times as long.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The error of a broken transaction is Django's own. Its cause is the error that has broken it.
        if isinstance(error, TransactionManagementError):
            return
        if isinstance(error, Error) and error.__cause__ is not None:
            raise error.__cause__


_driver_errors = _DriverErrors()


def driver_errors() -> _DriverErrors:
    """Return a context that raises the driver's own error instead of Django's."""
    return _driver_errors


@lru_cache(500)
def formatted(statement: str) -> tuple[str, Sequence[int]]:
    """Return a statement with the placeholders of Django's cursors, and the number of the parameter for each."""
    order: list[int] = []

    def replace(found: re.Match[str]) -> str:
        text = found[0]
        if not text.startswith("?"):
            return text.replace("%", "%%")
        # The database counts them like this: one more than the largest number so far.
        order.append(int(found[1]) - 1 if found[1] else max(order, default=-1) + 1)
        return "%s"

    return _QUOTED_OR_MARK.sub(replace, statement), order


class LentCursor:
    """A cursor of Django's, with the methods that SQLAlchemy calls.

    :param cursor: the one of ``connection.cursor()``.
    :param marks: whether statements have placeholders that Django's cursors do not take.
    :param before: called with each statement before it is run.
    """

    format: Any = None
    """Set by callers that want binary values. Django's cursor decides by itself."""

    def __init__(self, cursor: Any, *, marks: bool, before: Callable[[str], None] | None = None) -> None:
        self._cursor = cursor
        self._marks = marks
        self._before = before

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """Run a statement.

        :raises TransactionManagementError: where Django refuses one.
        """
        if self._before is not None:
            self._before(statement)
        if self._marks:
            statement, order = formatted(statement)
            parameters = tuple(parameters[number] for number in order)
        if isinstance(parameters, dict):
            # Wrappers of statements may change the parameters, and SQLAlchemy's must stay as they are.
            parameters = dict(parameters)
        with driver_errors():
            return self._cursor.execute(statement, parameters)

    def executemany(self, statement: str, rows: Sequence[Any]) -> Any:
        """Run a statement for each row of parameters."""
        if self._before is not None:
            self._before(statement)
        if self._marks:
            statement, order = formatted(statement)
            rows = [tuple(row[number] for number in order) for row in rows]
        with driver_errors():
            return self._cursor.executemany(statement, rows)

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        with driver_errors():
            return self._cursor.fetchone()

    def fetchmany(self, *size: int) -> Any:
        """Return the next rows."""
        with driver_errors():
            return self._cursor.fetchmany(*size)

    def fetchall(self) -> Any:
        """Return the rows that are left."""
        with driver_errors():
            return self._cursor.fetchall()

    def close(self) -> None:
        """Close the cursor. An error of a lost connection is ignored, as Django does."""
        with suppress(self._cursor.db.Database.Error):
            self._cursor.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def _alive(reference: Callable[[], Any]) -> Any:
    wrapper = reference()
    if wrapper is None:
        raise ReferenceError("The thread or task that owned this connection has ended: open another connection.")
    return wrapper


class LentConnection:
    """A thread's connection of Django's with the interface of a driver's. Django controls its transactions.

    :param wrapper: ``django.db.connections[alias]``.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._marks = DIALECTS[wrapper.vendor].mark == MARK

    @property
    def wrapper(self) -> Any:
        """The connection of Django's."""
        return _alive(self._wrapper)

    def cursor(self, *_: Any, **__: Any) -> LentCursor:
        """Return a cursor, made by Django."""
        with driver_errors():
            return LentCursor(self.wrapper.cursor(), marks=self._marks)

    def begin(self) -> None:
        """Leave that to Django."""

    def commit(self) -> None:
        """Leave that to Django."""

    def rollback(self) -> None:
        """Leave that to Django."""

    def close(self) -> None:
        """Leave that to Django."""

    def isolate(self, level: str | None) -> None:
        """Leave that to Django."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_alive(self._wrapper).connection, name)


class ThreadConnection(DirectConnection):
    """SQLAlchemy's connection on a thread's connection of Django's.

    :param wrapper: ``django.db.connections[alias]``.
    """

    def __init__(self, engine: Engine, lent: PoolProxiedConnection, wrapper: Any) -> None:
        super().__init__(engine, lent)
        self._lent = weakref.ref(wrapper)
        self._marks = DIALECTS[wrapper.vendor].mark == MARK

    def run(self, statement: str, parameters: Sequence[Any], take: Callable[[Any], T]) -> T:
        """Run a statement on a cursor that Django makes.

        :raises TransactionManagementError: where Django refuses one.
        """
        if self._marks:
            statement, order = formatted(statement)
            parameters = [parameters[number] for number in order]
        with driver_errors(), _alive(self._lent).cursor() as cursor:
            cursor.execute(statement, parameters)
            return take(cursor)


class OwnConnection(LentConnection):
    """Another connection with the settings of a thread's: for what must not be in the thread's transaction."""

    def __init__(self, wrapper: Any) -> None:
        self._copy = wrapper.copy()
        # Not from Django's pool: the project's threads might wait for the connection without an end.
        self._copy.settings_dict["OPTIONS"].pop("pool", None)
        # Several threads may use it, such as the connection with the locks of runners.
        self._copy.inc_thread_sharing()
        super().__init__(self._copy)
        self._commits_each = self._is_begun = False
        self._dialect = DIALECTS[wrapper.vendor]
        with driver_errors():
            self._copy.ensure_connection()
        self._path = self._first_path = self._dialect.search_path(self._copy.connection)

    def cursor(self, *_: Any, **__: Any) -> LentCursor:
        """Return a cursor, whose first statement begins the transaction if it has to be in one."""
        with driver_errors():
            return LentCursor(self._copy.cursor(), marks=self._marks, before=self._begin)

    def follow(self, path: str | None, tenant: Any = None, with_public: object = True) -> None:
        """Look for tables in the same schemas as a thread's connection.

        :param path: its search path, or None for that of a new connection.
        :param tenant: the tenant by which a backend sets the path before each statement.
        """
        if tenant is not None:
            if self._copy.tenant is not tenant or self._copy.include_public_schema != with_public:
                self._copy.set_tenant(tenant, with_public)
            return
        found = path or self._first_path
        if found is not None and found != self._path:
            with driver_errors(), self._copy.wrap_database_errors:
                self._dialect.set_search_path(self._copy.connection, found)
            self._path = found

    def is_usable(self) -> bool:
        """Ask the server whether the connection is there."""
        return self._copy.connection is not None and bool(self._copy.is_usable())

    def isolate(self, level: str | None) -> None:
        """Commit each statement, or not."""
        self._commits_each = level == "AUTOCOMMIT"

    def begin(self) -> None:
        """Begin a transaction with the first statement."""
        self._is_begun = not self._commits_each

    def _begin(self, statement: str) -> None:
        if self._is_begun and self._dialect.needs_transaction(statement) and self._copy.get_autocommit():
            self._is_begun = False
            with driver_errors():
                self._copy.set_autocommit(False, force_begin_transaction_with_broken_autocommit=True)

    def commit(self) -> None:
        """Commit, if there is a transaction."""
        self._end(self._copy.commit)

    def rollback(self) -> None:
        """Roll back, if there is a transaction."""
        self._end(self._copy.rollback)

    def _end(self, end: Callable[[], None]) -> None:
        self._is_begun = False
        if self._copy.connection is not None and not self._copy.get_autocommit():
            with driver_errors():
                end()
                self._copy.set_autocommit(True)

    def close(self) -> None:
        """Close it."""
        with driver_errors():
            self._copy.close()


_fixed: ContextVar[tuple[Any, ...] | None] = ContextVar("flask_eventsourcing.search_path", default=None)


def place_of_tables(wrapper: Any) -> tuple[Any, ...]:
    """Return where a thread's connection looks for tables: the arguments of ``OwnConnection.follow``."""
    fixed = _fixed.get()
    if fixed is not None:
        return fixed
    tenant = getattr(wrapper, "tenant", None)
    if tenant is not None:
        return None, tenant, wrapper.include_public_schema
    known = wrapper.connection
    return (None if known is None else DIALECTS[wrapper.vendor].search_path(known),)


@contextmanager
def looking_for_tables(wrapper: Any) -> Iterator[None]:
    """Keep the place of tables in the block, so that it is asked for once."""
    token = _fixed.set(place_of_tables(wrapper))
    try:
        yield
    finally:
        _fixed.reset(token)
