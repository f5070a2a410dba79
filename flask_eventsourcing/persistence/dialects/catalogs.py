"""Reads the databases' catalogs: whether a table is still the same one, and what the database checks in its rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...exceptions import MissingTableError, UnsafeTableError
from .driver import Driver
from .event_values import as_parameter

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


# ------------------------------------------------------------------------------------------------ what is checked


class Checks(NamedTuple):
    """What a database does with the rows of some tables, beside looking at types and primary keys."""

    tables: frozenset[str] = frozenset()
    """The keys of those with further constraints, or with triggers."""
    deferrable: tuple[str, ...] = ()
    """The quoted names of constraints that the commit may look at, where a statement can have it done before."""
    deferred: tuple[str, ...] = ()
    """Those of them that are, unless a handler says otherwise for its own event."""
    at_commit: bool = False
    """Whether there are constraints that only the commit looks at."""


def checks_of(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str = "") -> Checks:
    """Return what is checked in the rows of tables, and of their shadows with a suffix."""
    find = _CHECKS.get(connection.dialect.name)
    return Checks() if find is None or not tables else find(connection, dialect, tables, suffix)


def check_now(connection: Connection, checks: Checks) -> None:
    """Have the database look now at what it would look at with the commit, and then as at its beginning."""
    for names, when in ((checks.deferrable, "IMMEDIATE"), (checks.deferred, "DEFERRED")):
        if names:
            connection.exec_driver_sql(f"SET CONSTRAINTS {', '.join(names).replace('%', '%%')} {when}")


def _checks_of_postgresql(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str) -> Checks:
    checked, found = set(), dict[str, bool]()
    for table in tables:
        for name in {table.name, table.name + suffix}:
            qualified = as_parameter(dialect.qualified(table, name))
            if connection.exec_driver_sql(_CHECKED, (qualified,)).scalar():
                checked.add(table.key)
            for name_of, is_deferred in connection.exec_driver_sql(_DEFERRABLE, (qualified, qualified)):
                found[name_of] = is_deferred or found.get(name_of, False)
    return Checks(frozenset(checked), tuple(found), tuple(each for each, is_deferred in found.items() if is_deferred))


def _checks_of_mysql(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str) -> Checks:
    checked = {
        table.key
        for table in tables
        if connection.exec_driver_sql(_CHECKED_BY_MYSQL, (table.schema, table.name) * 3).scalar()
    }
    return Checks(frozenset(checked))


def _checks_of_sqlite(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str) -> Checks:
    keys = bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())
    checked, at_commit = set(), False
    for schema in {table.schema for table in tables}:
        own = {table.name.lower(): table for table in tables if table.schema == schema}
        quoted = f"{connection.dialect.identifier_preparer.quote(schema)}." if schema else ""
        rows = connection.exec_driver_sql(f"SELECT tbl_name, sql FROM {quoted}sqlite_master WHERE sql IS NOT NULL")
        for owner, sql in rows.all():
            table = own.get(owner.lower())
            if table is not None and CHECKING.search(sql):
                checked.add(table.key)
            # One of another table may refer to one of these.
            is_about = table is not None or any(name in sql.lower() for name in own)
            at_commit = at_commit or (keys and is_about and COMMITTING.search(sql) is not None)
    return Checks(frozenset(checked), at_commit=at_commit)


CHECKING = re.compile(r"\b(UNIQUE|CHECK|REFERENCES|COLLATE|GENERATED|TRIGGER)\b", re.I)
"""What stands in the definition of a table, an index or a trigger by which rows may be refused or changed."""
COMMITTING = re.compile(r"\bINITIALLY\s+DEFERRED\b", re.I)

_CHECKED = """
SELECT relkind <> 'r' OR relrowsecurity
    OR EXISTS (SELECT FROM pg_constraint WHERE conrelid = r.oid AND contype NOT IN ('p', 'n'))
    OR EXISTS (SELECT FROM pg_index WHERE indrelid = r.oid AND indisunique AND NOT indisprimary)
    OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = r.oid AND NOT tgisinternal)
    OR EXISTS (SELECT FROM pg_rewrite WHERE ev_class = r.oid)
    OR EXISTS (SELECT FROM pg_attribute JOIN pg_type t ON t.oid = atttypid WHERE attrelid = r.oid AND typtype = 'd')
FROM pg_class r WHERE oid = to_regclass(%s)"""

_DEFERRABLE = """
SELECT format('%%I.%%I', nspname, conname), condeferred
FROM pg_constraint k JOIN pg_namespace n ON n.oid = connamespace
WHERE condeferrable AND (conrelid = to_regclass(%s) OR confrelid = to_regclass(%s))"""

_CHECKED_BY_MYSQL = """
SELECT EXISTS (SELECT 1 FROM information_schema.table_constraints WHERE table_schema = coalesce(%s, database())
    AND table_name = %s AND constraint_type <> 'PRIMARY KEY')
OR EXISTS (SELECT 1 FROM information_schema.triggers WHERE event_object_schema = coalesce(%s, database())
    AND event_object_table = %s)
OR EXISTS (SELECT 1 FROM information_schema.columns WHERE table_schema = coalesce(%s, database())
    AND table_name = %s AND extra NOT IN ('', 'auto_increment'))"""

_CHECKS: dict[str, Callable[[Connection, Any, Sequence[sa.Table], str], Checks]] = {
    "postgresql": _checks_of_postgresql,
    "mysql": _checks_of_mysql,
    "mariadb": _checks_of_mysql,
    "sqlite": _checks_of_sqlite,
}
