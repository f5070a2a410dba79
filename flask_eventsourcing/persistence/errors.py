"""Turns SQLAlchemy's exceptions into those of the ``eventsourcing`` library."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

from eventsourcing import persistence
from sqlalchemy import exc

from ..exceptions import MissingTableError

# SQLSTATE: unique_violation, serialization_failure, deadlock_detected. MySQL: 1062 duplicate, 1213 deadlock or, in a
# Galera cluster, a failed certification. All of them mean that another writer was first and the unit may be re-run.
SERIALIZATION_FAILURES: frozenset[object] = frozenset({"40001", "40P01", 1213})
CONFLICTS: frozenset[object] = SERIALIZATION_FAILURES | {"23505", 1062}
MISSING_TABLE = re.compile(
    r"no such table: (?P<sqlite>\S+)"
    r"|relation \"(?P<postgresql>[^\"]+)\" does not exist"
    r"|Table '(?P<mysql>[^']+)' doesn't exist"
)

_CLASSES: tuple[tuple[type[exc.SQLAlchemyError], type[persistence.PersistenceError]], ...] = (
    (exc.IntegrityError, persistence.IntegrityError),
    (exc.DataError, persistence.DataError),
    (exc.OperationalError, persistence.OperationalError),
    (exc.InternalError, persistence.InternalError),
    (exc.ProgrammingError, persistence.ProgrammingError),
    (exc.NotSupportedError, persistence.NotSupportedError),
    (exc.DatabaseError, persistence.DatabaseError),
    (exc.InterfaceError, persistence.InterfaceError),
    (exc.TimeoutError, persistence.OperationalError),
    (exc.PendingRollbackError, persistence.OperationalError),
)

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


def translate(error: exc.SQLAlchemyError) -> persistence.PersistenceError:
    """Return the library's exception for one of SQLAlchemy's."""
    driver_error: Any = getattr(error, "orig", None)
    text = str(driver_error if driver_error is not None else error).strip()
    special = _special(driver_error, text)
    if special is not None:
        return special
    for ours, theirs in _CLASSES:
        if isinstance(error, ours):
            return theirs(text)
    return persistence.PersistenceError(text)


def is_conflict(driver_error: Any) -> bool:
    """Whether a driver's exception means that another transaction was first."""
    return _code(driver_error) in CONFLICTS


def is_serialization_failure(driver_error: Any) -> bool:
    """Whether a driver's exception means that the whole transaction may be tried again."""
    return _code(driver_error) in SERIALIZATION_FAILURES


def _code(driver_error: Any) -> object:
    state = getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)
    arguments = getattr(driver_error, "args", None) or (None,)
    return state or arguments[0]


def translate_driver(error: Exception, driver: Any) -> persistence.PersistenceError:
    """Return the library's exception for one of a driver's, by the classes of PEP 249.

    :param driver: the driver's module.
    """
    special = _special(error, str(error).strip())
    if special is not None:
        return special
    for name in _PEP_249:
        if isinstance(error, getattr(driver, name)):
            translated_class: type[persistence.PersistenceError] = getattr(persistence, name)
            return translated_class(str(error).strip())
    return persistence.PersistenceError(str(error).strip())


def _special(driver_error: Any, text: str) -> persistence.PersistenceError | None:
    missing = MISSING_TABLE.search(text)
    if missing:
        return MissingTableError(
            f"Table {missing[missing.lastgroup or 0]!r} does not exist: run 'flask eventsourcing init-db', "
            "db.create_all() or your migrations."
        )
    if is_conflict(driver_error):
        return persistence.IntegrityError(f"Another writer was first: {text}")
    return None


class Translated:
    """Context manager within which SQLAlchemy's exceptions, and the driver's, become the library's.

    SQLAlchemy lets the driver's through when it resets a connection.

    :param driver: the driver's module.
    """

    def __init__(self, driver: Any = None) -> None:
        self.driver = driver
        self.driver_error: Any = getattr(driver, "Error", ())

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, exc.SQLAlchemyError):
            raise translate(error) from error
        if isinstance(error, self.driver_error):
            raise translate_driver(error, self.driver) from error


translated = Translated()
