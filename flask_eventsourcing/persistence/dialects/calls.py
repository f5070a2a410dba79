"""Counts the calls of a driver's connection, to notice when it is used without SQLAlchemy, and asks with it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ..._patches import driver_method

OWN = "flask_eventsourcing"
"""The execution option of the recorders' own statements."""
# Taken over as it is, and not copied, by a connection without options of its own.
OPTIONS = sa.util.immutabledict({OWN: True})


def is_own(context: Any) -> bool:
    """Whether a statement, by the context that SQLAlchemy's events have of it, is one of the recorders' own."""
    return context is not None and OWN in context.execution_options


def root_engine(engine: Engine) -> Engine:
    """Return the engine that was created; that of ``execution_options()`` has its listeners and its pool."""
    while (parent := getattr(engine, "_proxied", None)) is not None:
        engine = parent
    return engine


@dataclass(slots=True)
class Calls:
    """How often methods of a driver's connection were called: those that end transactions, and ``cursor()``."""

    KEY: ClassVar[str] = "flask_eventsourcing.calls"
    ends: int = 0
    cursors: int = 0


CURSOR = "cursor"
COUNTED = ("commit", "rollback", "begin", CURSOR)
"""The methods; where ``begin()`` begins a transaction, it commits the one before."""


class _Counted:
    """Stands for a method of a driver's connection, which it does not keep alive."""

    def __init__(self, driver: Any, name: str, calls: Calls) -> None:
        self._driver = weakref.ref(driver)
        self._method = getattr(type(driver), name)
        self._calls, self._ends = calls, name != CURSOR

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A call that fails may have ended the transaction or not, as another's cursor may have.
        self._calls.cursors += 1
        answer = self._method(self._driver(), *args, **kwargs)
        if self._ends:
            self._calls.cursors -= 1
            self._calls.ends += 1
        return answer


def count_calls(driver: Any, record: Any) -> None:
    """Listen to the event "connect" of an engine: count how often transactions are ended, and cursors made.

    One that is ended past SQLAlchemy, with another one begun since, looks like the one in which events were saved. A
    cursor that is none of SQLAlchemy's may have done that, or have rolled a savepoint back.
    """
    _count(driver, record, COUNTED)


def count_cursors(driver: Any, record: Any) -> None:
    """Listen to the same event, and count how often cursors are made."""
    _count(driver, record, (CURSOR,))


def _count(driver: Any, record: Any, names: Iterable[str]) -> None:
    calls = record.info[Calls.KEY] = Calls()
    for name in names:
        if hasattr(type(driver), name):
            # Some drivers' connections are not made to have attributes.
            with suppress(AttributeError, TypeError):
                driver_method(driver, name, _Counted(driver, name, calls))


def ask(driver: Any, statement: str) -> list[Any]:
    """Run a query on a driver's connection, and return its rows, as the driver gives them.

    SQLAlchemy would refuse it where it takes the transaction for failed, whatever the database takes it for.
    """
    # Past what counts the cursors of others.
    with closing(type(driver).cursor(driver)) as cursor:
        cursor.execute(statement)
        return list(cursor.fetchall())


_NO_CALLS = Calls()


def calls_of(connection: Connection) -> Calls:
    """Return what was counted of a connection's driver connection; nothing where that is not counted."""
    found: Calls = connection.info.get(Calls.KEY, _NO_CALLS)
    return found
