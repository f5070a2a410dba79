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

# The classes of PEP 249, which SQLAlchemy, every driver and the library have; each stands before those it derives from.
_NAMES = (
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
    if isinstance(error, exc.TimeoutError | exc.PendingRollbackError):
        # Of SQLAlchemy's own: the pool is exhausted, or the session waits for a rollback.
        return persistence.OperationalError(text)
    return _counterpart(error, exc, text)


def is_conflict(driver_error: Any) -> bool:
    """Whether a driver's exception means that another transaction was first."""
    return not CONFLICTS.isdisjoint(_codes(driver_error))


def is_serialization_failure(driver_error: Any) -> bool:
    """Whether a driver's exception means that the whole transaction may be tried again."""
    return not SERIALIZATION_FAILURES.isdisjoint(_codes(driver_error))


def _codes(driver_error: Any) -> tuple[object, ...]:
    # PyMySQL has the server's number, and newer versions a SQLSTATE beside it that tells less: 23000 for a duplicate.
    arguments = getattr(driver_error, "args", None) or (None,)
    first = arguments[0] if isinstance(arguments[0], int) else None
    return getattr(driver_error, "sqlstate", None), getattr(driver_error, "pgcode", None), first


def translate_driver(error: Exception, driver: Any) -> persistence.PersistenceError:
    """Return the library's exception for one of a driver's, by the classes of PEP 249.

    :param driver: the driver's module.
    """
    text = str(error).strip()
    return _special(error, text) or _counterpart(error, driver, text)


def _counterpart(error: Exception, module: Any, text: str) -> persistence.PersistenceError:
    """Return the library's exception of the same name as the class of PEP 249, in *module*, that an error is of."""
    for name in _NAMES:
        if isinstance(error, getattr(module, name)):
            theirs: type[persistence.PersistenceError] = getattr(persistence, name)
            return theirs(text)
    return persistence.PersistenceError(text)


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
