"""Reads the databases' catalogs: whether a table is still the same one, or was created again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...exceptions import MissingTableError, UnsafeTableError
from .driver import Driver

EXACT = {"postgresql"}
"""Where a table has another identity only after it was made again; elsewhere also after it was altered."""

UNDEFINED_COLUMN = frozenset({"42703", 1054})
"""The servers' codes that mean: there is no column of this name."""


def table_ids(connection: Connection, tables: Sequence[sa.Table]) -> dict[str, str]:
    """Return what tells tables from those that are made in their place, by their keys; only of those that there are."""
    find = _FINDERS.get(connection.dialect.name)
    return {} if find is None or not tables else find(connection, tables)


@contextmanager
def naming_lack(dialect: Driver, *tables: sa.Table) -> Iterator[None]:
    """Within it, tables are read, and a statement that fails as one is missing, or a column, says which.

    :raises MissingTableError: when a table was not created.
    :raises UnsafeTableError: when one of the tables lacks a column.
    """
    try:
        yield
    except sa.exc.DBAPIError as error:
        translated = dialect.translate(error)
        if isinstance(translated, MissingTableError):
            raise translated from error
        if dialect.code(error.orig) not in UNDEFINED_COLUMN and "no such column" not in str(error.orig):
            raise
        raise UnsafeTableError(
            f"Table {' or '.join(table.fullname for table in tables)} lacks a column of this version: let a migration "
            f"add what {dialect.command('check')} names."
        ) from error


def is_exact(connection: Connection) -> bool:
    """Whether only a table that was made again has another identity."""
    return connection.dialect.name in EXACT


def are_filled(connection: Connection, tables: Sequence[sa.Table]) -> list[bool]:
    """Return for each table whether it has a row."""
    if not tables:
        return []
    query = sa.select(*(sa.exists(sa.select(sa.literal(1)).select_from(table)) for table in tables))
    return [bool(each) for each in connection.execute(query).one()]


def _postgresql(connection: Connection, tables: Sequence[sa.Table]) -> dict[str, str]:
    name = connection.dialect.identifier_preparer.format_table
    query = sa.select(*(sa.cast(sa.func.to_regclass(name(table)), OID) for table in tables))
    found = connection.execute(query).one()
    return {table.key: str(oid) for table, oid in zip(tables, found, strict=True) if oid is not None}


class OID(sa.types.UserDefinedType[int]):
    """The type of identities in PostgreSQL's catalogs."""

    cache_ok: bool | None = True

    def get_col_spec(self, **_: Any) -> str:
        """Return its name."""
        return "OID"


def _mysql(connection: Connection, tables: Sequence[sa.Table]) -> dict[str, str]:
    # Only administrators of the server may read the identity that the storage engine has.
    query = sa.text(
        "SELECT table_name, create_time FROM information_schema.tables "
        "WHERE table_schema = coalesce(:schema, database()) AND table_name IN :names"
    ).bindparams(sa.bindparam("names", expanding=True))
    found: dict[str, str] = {}
    for schema in {table.schema for table in tables}:
        keys = {table.name: table.key for table in tables if table.schema == schema}
        rows = connection.execute(query, {"schema": schema, "names": list(keys)})
        found.update((keys[name], str(time)) for name, time in rows if name in keys)
    return found


def _sqlite(connection: Connection, tables: Sequence[sa.Table]) -> dict[str, str]:
    # Pages are used again, so it is the number of the schema's last change that tells.
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    rows = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")
    names = set(rows.scalars())
    return {table.key: str(version) for table in tables if table.name in names}


_FINDERS: dict[str, Callable[[Connection, Sequence[sa.Table]], dict[str, str]]] = {
    "postgresql": _postgresql,
    "mysql": _mysql,
    "mariadb": _mysql,
    "sqlite": _sqlite,
}
