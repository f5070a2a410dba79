"""One file for each database: how it appends in order, reads and waits for events, and which errors are transient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from eventsourcing import persistence
from sqlalchemy.engine import URL, Engine

from ...config import DialectOptions
from ...exceptions import AbortedTransactionError, ConfigurationError, MissingTableError, WriteTimeoutError
from .base import Dialect
from .calls import AUTOCOMMIT, in_autocommit
from .driver import COMMITS_BY_ITSELF
from .mysql import MySQLDialect
from .mysql_looks import ExactText
from .postgresql import PostgreSQLDialect
from .sqlite import SQLiteDialect
from .sqlite_files import closing_threads, descriptor_id, note_inherited_files, open_sockets

DIALECTS: dict[str, type[Dialect]] = {
    "mariadb": MySQLDialect,
    "mysql": MySQLDialect,
    "postgresql": PostgreSQLDialect,
    "sqlite": SQLiteDialect,
}


LIBRARY_SETTINGS = ("POSTGRES_", "SQLITE_")
"""The prefixes of the settings of the library's own modules for these databases."""
ASYNCHRONOUS = {"aiomysql", "aiosqlite", "asyncmy", "asyncpg", "psycopg_async"}
SHARED_CACHE = (
    'With cache=shared in its address, SQLite answers "table is locked" at once where it waits otherwise, so requests '
    "would fail beside others: leave it out, or write 'sqlite://' for a database in memory, whose one connection all "
    "threads of a process share."
)


def dialect_for(engine: Engine, options: DialectOptions) -> Dialect:
    """Return the dialect of an engine's database.

    :raises ConfigurationError: for a database on which the order of events is not known to be safe, a driver that
        cannot be used, an engine that commits each statement by itself, and SQLite's shared cache.
    """
    name = engine.dialect.name
    if name not in DIALECTS:
        raise ConfigurationError(
            f"Database {name!r} is not supported: the order of events would not be safe there. "
            f"Use one of {', '.join(sorted(DIALECTS))}, with EVENTSOURCING_BIND_KEY if it is not the default."
        )
    refusal = why_not(engine.url, is_async=engine.dialect.is_async)
    if refusal is not None:
        raise ConfigurationError(refusal)
    levels = (
        engine.get_execution_options().get("isolation_level"),
        getattr(engine.dialect, "_on_connect_isolation_level", None),
    )
    if AUTOCOMMIT in levels:
        raise ConfigurationError(COMMITS_BY_ITSELF)
    if engine.url.query.get("cache") == "shared" and not isinstance(engine.pool, sa.pool.StaticPool):
        raise ConfigurationError(SHARED_CACHE)
    return DIALECTS[name](engine, options)


def why_not(url: URL, *, is_async: bool = False) -> str | None:
    """Return why the driver of an address cannot be used, and which one can, or None."""
    dialect = DIALECTS.get(url.get_backend_name())
    if dialect is None or (not is_async and _driver_of(url) in dialect.drivers):
        return None
    names = [f"{url.get_backend_name()}+{name}" for name in dialect.drivers]
    kind = "asynchronous" if is_async or _driver_of(url) in ASYNCHRONOUS else "not known to work here"
    return f"The driver {_driver_of(url)!r} is {kind}: write {' or '.join(names)} in the address of the database."


def _driver_of(url: URL) -> str:
    try:
        return url.get_driver_name()
    except sa.exc.NoSuchModuleError:
        return url.drivername.partition("+")[2]


@contextmanager
def readable_address_errors(setting: str, error_class: type[Exception]) -> Iterator[None]:
    """Turn errors about the address of a database into one line without the address, which may have a password.

    :param setting: the name of the setting with the address.
    """
    try:
        yield
    except ImportError as error:
        raise error_class(
            f"{setting} cannot be used: its driver is not installed ({error.name}). {_proposal()}"
        ) from error
    except sa.exc.NoSuchModuleError as error:
        raise error_class(
            f"{setting} cannot be used: SQLAlchemy has no such database or driver. {_proposal()}"
        ) from error
    except RuntimeError as error:
        raise error_class(f"{setting} cannot be used: {error}") from error
    except (sa.exc.ArgumentError, ValueError):
        # The text of these errors may have a part of the address.
        raise error_class(
            f"{setting} cannot be used: it is no address such as postgresql+psycopg://user:password@host/database. "
            "In a password, write %40 for @, %3A for : and %2F for /."
        ) from None


def _proposal() -> str:
    known = {name: each for name, each in DIALECTS.items() if name != "mariadb"}
    return (
        "Write "
        + ", ".join(
            f"{name}+{driver}://" + (f" (pip install '{package}')" if package else "")
            for name, each in known.items()
            for driver, package in each.drivers.items()
        )
        + "."
    )


def column_type(use: str, general: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    """Return a column type, with variants for databases where the general type is not right.

    :param use: the key in a dialect's ``column_types``.
    """
    for name, dialect in DIALECTS.items():
        if use in dialect.column_types:
            general = general.with_variant(dialect.column_types[use], name)
    return general


def table_options() -> dict[str, Any]:
    """Return the keyword arguments of the ``Table`` of events, for all databases together."""
    return {key: value for dialect in DIALECTS.values() for key, value in dialect.table_options.items()}


def keep_transactions(tables: Iterable[sa.Table]) -> None:
    """Make tables use a storage engine that can roll back, unless they name one."""
    for table in tables:
        for dialect in DIALECTS.values():
            for key, value in dialect.every_table_options.items():
                table.dialect_kwargs.setdefault(key, value)


def is_in_memory(url: URL) -> bool:
    """Whether an address is that of a database in this process's memory."""
    dialect = DIALECTS.get(url.get_backend_name())
    return dialect is not None and dialect.is_in_memory(url)


def guard_forks(engine: Engine) -> bool:
    """Make an engine refuse what is unsafe after a fork. Returns whether to close idle connections before a fork."""
    dialect = DIALECTS.get(engine.url.get_backend_name())
    return dialect is not None and dialect.guard_forks(engine)


CONNECTION_LOST = "8s2b"
"""SQLAlchemy's code of "can't reconnect until invalid transaction is rolled back"."""


class PassingError(Exception):
    """An error of this package after which another try may succeed."""


MAY_PASS = (PassingError, sa.exc.SQLAlchemyError, persistence.OperationalError, persistence.InterfaceError)
"""The classes of errors for which :func:`is_outage` may be true."""


def is_outage(error: BaseException) -> bool:
    """Whether an error passes by itself: no statement is at fault, and another try may succeed."""
    if isinstance(error, PassingError | sa.exc.TimeoutError | sa.exc.DisconnectionError):
        return True
    if isinstance(error, sa.exc.PendingRollbackError):
        # Either after a lost connection, or after an error of a flush that a handler has ignored.
        return error.code == CONNECTION_LOST
    if isinstance(error, sa.exc.DBAPIError):
        return _passes(error)
    if isinstance(error, MissingTableError | AbortedTransactionError):
        return False
    # The recorders' errors. A conflict of an event that a handler saves is not among them.
    return isinstance(error, persistence.OperationalError | persistence.InterfaceError)


def without_values(driver_error: BaseException) -> str:
    """Return what a driver's exception says, without ids, states and other values of a statement."""
    return _text(driver_error, driver_error)


def _text(driver_error: BaseException, said: object) -> str:
    for dialect in DIALECTS.values():
        if (code := dialect.code(driver_error)) is not None:
            return dialect.text(said, code)
    return str(said).strip()


def hide_values(error: BaseException) -> None:
    """Remove the values of statements from an error, and from the errors that led to it, before it is shown."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, sa.exc.StatementError):
            # As the engine's option of that name.
            each.hide_parameters = True
        if isinstance(each, sa.exc.DBAPIError) and each.orig is not None:
            said, told = str(each.orig).strip(), without_values(each.orig)
            each.args = tuple(arg.replace(said, told) if isinstance(arg, str) else arg for arg in each.args)
            # Some drivers put the server's number before the text.
            number, last = each.orig.args[:-1], each.orig.args[-1:]
            each.orig.args = (*number, *(_text(each.orig, arg) for arg in last)) if number else (told,)
        left += [cause for cause in (each.__cause__, each.__context__) if cause is not None]
        left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def _passes(error: sa.exc.DBAPIError) -> bool:
    if error.connection_invalidated or _passes_by_code(error.orig):
        return True
    # Without a statement, the connection could not be made.
    return error.statement is None and isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)


def _passes_by_code(driver_error: BaseException | None) -> bool:
    """Whether another try may succeed after a driver's error, for example after a lock that was not obtained."""
    return driver_error is not None and any(
        dialect.passes(driver_error)
        or dialect.is_serialization_failure(driver_error)
        or dialect.is_read_only(driver_error)
        or dialect.code(driver_error) in dialect.full
        for dialect in DIALECTS.values()
    )


def is_read_only(error: BaseException) -> bool:
    """Whether a server has refused to write, for example after a failover. A new connection may lead elsewhere."""
    driver_error = _driver_error(error)
    return driver_error is not None and any(each.is_read_only(driver_error) for each in DIALECTS.values())


def is_full(error: BaseException) -> bool:
    """Whether a database has no room to write, for example because its disk is full."""
    driver_error = _driver_error(error)
    return driver_error is not None and any(each.code(driver_error) in each.full for each in DIALECTS.values())


def is_canceled(error: BaseException) -> bool:
    """Whether a server has ended a statement that took longer than a setting of the server allows."""
    driver_error = _driver_error(error)
    return driver_error is not None and any(each.code(driver_error) in each.canceled for each in DIALECTS.values())


def is_serialization_failure(error: BaseException) -> bool:
    """Whether a database has ended this transaction because it collided with others."""
    driver_error = _driver_error(error)
    return driver_error is not None and any(each.is_serialization_failure(driver_error) for each in DIALECTS.values())


def has_waited(error: BaseException) -> bool:
    """Whether a lock was not obtained in time."""
    driver_error = _driver_error(error)
    by_code = driver_error is not None and any(each.passes(driver_error) for each in DIALECTS.values())
    return by_code or isinstance(error, WriteTimeoutError)


def _driver_error(error: BaseException) -> BaseException | None:
    if isinstance(error, sa.exc.DBAPIError):
        return error.orig
    # The cause of a library's error is the driver's, or SQLAlchemy's with the driver's in it.
    cause = error.__cause__ if isinstance(error, persistence.PersistenceError) else None
    return _driver_error(cause) or cause if cause is not None else None


__all__ = [
    "DIALECTS",
    "LIBRARY_SETTINGS",
    "Dialect",
    "DialectOptions",
    "ExactText",
    "PassingError",
    "closing_threads",
    "column_type",
    "descriptor_id",
    "dialect_for",
    "guard_forks",
    "has_waited",
    "hide_values",
    "in_autocommit",
    "is_canceled",
    "is_full",
    "is_in_memory",
    "is_outage",
    "is_read_only",
    "is_serialization_failure",
    "keep_transactions",
    "note_inherited_files",
    "open_sockets",
    "readable_address_errors",
    "table_options",
    "without_values",
]
