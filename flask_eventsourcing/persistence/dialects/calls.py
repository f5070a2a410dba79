"""Calls that SQLAlchemy does not see: of a driver's connection, which are counted, and of a host's cursors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ..._patches import driver_method

T = TypeVar("T")

OWN = "flask_eventsourcing"
"""The execution option of the recorders' own statements."""
AUTOCOMMIT = "AUTOCOMMIT"
INTRANS = 2
"""``PQTRANS_INTRANS`` of libpq: there is a transaction, which has not failed."""
BLOCK = f"/* {OWN} */ BEGIN NOT ATOMIC"
"""The beginning of a block of the recorders' own. The block ends no transaction, though its words look like it."""
WHOLE: dict[str, bool | None] = {"stream_results": False, "yield_per": None}
"""Execution options by which a result is read at once: PostgreSQL can stream nothing but queries in a transaction."""
# A connection without options of its own uses this object itself, without a copy.
OPTIONS = sa.util.immutabledict({OWN: True, **WHOLE})


class DirectConnection(Connection):
    """SQLAlchemy's connection on a connection that a host lends, whose transactions SQLAlchemy does not control.

    SQLAlchemy need not see the recorders' statements, so they go to the host's own cursors.
    """

    @property
    def is_heard(self) -> bool:
        """Whether there are listeners for statements, which must get these too."""
        return self._has_events or self.engine._has_events

    def run(self, statement: str, parameters: Sequence[Any], take: Callable[[Any], T]) -> T:
        """Run a statement on a new cursor, and return what *take* returns for the cursor.

        :raises: the driver's errors.
        """
        raise NotImplementedError


class Modified(NamedTuple):
    """The result of a modifying statement."""

    rowcount: int
    lastrowid: Any


def all_rows(cursor: Any) -> list[Any]:
    """Return the rows of a driver's cursor."""
    rows: list[Any] = cursor.fetchall()
    return rows


def modified(cursor: Any) -> Modified:
    """Return the result of the statement on a driver's cursor. Not every driver has the last id."""
    return Modified(cursor.rowcount, getattr(cursor, "lastrowid", None))


def in_autocommit(connection: Connection) -> Connection:
    """Make a new connection commit each statement.

    The drivers of PostgreSQL refuse that within a transaction, which a listener of the user's may have begun, for
    example to set a value at each checkout. Its work is committed, as it would be if each statement were.
    """
    driver: Any = connection.connection.dbapi_connection
    # A transaction of a host is not ended.
    if not isinstance(connection, DirectConnection) and status_of(driver) == INTRANS:
        driver.commit()
    return connection.execution_options(isolation_level=AUTOCOMMIT, **WHOLE)


def status_of(driver_connection: Any) -> Any:
    """Return libpq's state of the transaction, without a round trip, or None for another database."""
    return getattr(getattr(driver_connection, "info", None), "transaction_status", None)


@lru_cache(64)
def of_rows(statement: str, mark: str, own: int, shared: int, count: int) -> str:
    """Return the statement that inserts many rows, from that for one: the same object each time, for the drivers."""
    again = [f"{mark}{own + number}" for number in range(1, shared + 1)]
    return statement + f", ({', '.join([mark] * own + again)})" * (count - 1)


def is_own(context: Any) -> bool:
    """Whether a statement is one of the recorders' own, by its context in SQLAlchemy's events."""
    return context is not None and OWN in context.execution_options


def root_engine(engine: Engine) -> Engine:
    """Return the engine that was created; that of ``execution_options()`` has its listeners and its pool."""
    while (parent := getattr(engine, "_proxied", None)) is not None:
        engine = parent
    return engine


@dataclass(slots=True)
class Calls:
    """Counts the calls of some methods of a driver's connection: those that end transactions, and ``cursor()``."""

    KEY: ClassVar[str] = "flask_eventsourcing.calls"
    ends: int = 0
    cursors: int = 0


CURSOR = "cursor"
COUNTED = ("commit", "rollback", "begin", CURSOR)
"""The methods. If a driver has ``begin()``, it commits the transaction before."""


class _Counted:
    """Stands for a method of a driver's connection, which it does not keep alive."""

    def __init__(self, driver: Any, name: str, calls: Calls) -> None:
        self._driver = weakref.ref(driver)
        self._method = getattr(type(driver), name)
        self._calls, self._ends = calls, name != CURSOR

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A call that fails may have ended the transaction, and so may a cursor of other code.
        self._calls.cursors += 1
        answer = self._method(self._driver(), *args, **kwargs)
        if self._ends:
            self._calls.cursors -= 1
            self._calls.ends += 1
        return answer


def count_calls(driver: Any, record: Any) -> None:
    """Listen to the event "connect" of an engine: count how often transactions are ended, and cursors made.

    If other code ends a transaction and begins another one, this looks like the transaction in which events were saved.
    A cursor of other code may have done that, or may have rolled back a savepoint.
    """
    _count(driver, record, COUNTED)


def count_cursors(driver: Any, record: Any) -> None:
    """Listen to the same event, and count how often cursors are made."""
    _count(driver, record, (CURSOR,))


def _count(driver: Any, record: Any, names: Iterable[str]) -> None:
    calls = record.info[Calls.KEY] = Calls()
    for name in names:
        if hasattr(type(driver), name):
            # The connections of some drivers cannot have attributes.
            with suppress(AttributeError, TypeError):
                driver_method(driver, name, _Counted(driver, name, calls))


def ask(driver: Any, statement: str) -> list[Any]:
    """Run a query on a driver's connection, and return its rows, as the driver gives them.

    SQLAlchemy would refuse it if it takes the transaction for failed, even if the database does not.
    """
    # Without the function that counts the cursors of other code.
    cursor = type(driver).cursor(driver)
    cursor.execute(statement)
    rows = list(cursor.fetchall())
    # Not after an error, which a second error could replace: some drivers then read the rest of the answer.
    cursor.close()
    return rows


def ask_on(connection: Connection, statement: str) -> list[Any]:
    """Do the same on a connection of SQLAlchemy's, which is given up after an interruption, such as by a signal
    handler.

    Otherwise the rest of the answer would be taken for the answer to the next statement.
    """

    def interrupted(kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is not None and not isinstance(error, connection.dialect.dbapi.Error):  # type: ignore[union-attr]
            connection.invalidate()
        return False

    with ExitStack() as stack:
        stack.push(interrupted)
        return ask(connection.connection.dbapi_connection, statement)


_NO_CALLS = Calls()


def calls_of(connection: Connection) -> Calls:
    """Return the counted calls of a connection's driver connection, or an empty result if none are counted."""
    found: Calls = connection.info.get(Calls.KEY, _NO_CALLS)
    return found
