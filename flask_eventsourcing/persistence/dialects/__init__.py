"""One file a database: how events are appended in order, read, and waited for."""

from __future__ import annotations

from sqlalchemy.engine import Engine

from ...exceptions import ConfigurationError
from .base import Dialect, DialectOptions
from .mysql import MySQLDialect
from .postgresql import PostgreSQLDialect
from .sqlite import SQLiteDialect

DIALECTS: dict[str, type[Dialect]] = {
    "mariadb": MySQLDialect,
    "mysql": MySQLDialect,
    "postgresql": PostgreSQLDialect,
    "sqlite": SQLiteDialect,
}


def dialect_for(engine: Engine, options: DialectOptions) -> Dialect:
    """Return the dialect of an engine's database.

    :raises ConfigurationError: for a database on which the order of events is not known to be safe.
    """
    name = engine.dialect.name
    if name not in DIALECTS:
        raise ConfigurationError(
            f"Database {name!r} is not supported: the order of events would not be safe there. "
            f"Use one of {', '.join(sorted(DIALECTS))}, with EVENTSOURCING_BIND_KEY if it is not the default."
        )
    return DIALECTS[name](engine, options)


__all__ = ["DIALECTS", "Dialect", "DialectOptions", "dialect_for"]
