"""Reads the databases' catalogs: whether a table is still the same one, and what the database checks in its rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...exceptions import MissingRightError, MissingTableError, UnsafeTableError
from .driver import Driver
from .event_values import as_parameter

EXACT = {"postgresql"}
"""Where a table has another identity only after it was made again; elsewhere also after it was altered."""

UNDEFINED_COLUMN = frozenset({"42703", 1054})
"""The servers' codes for a missing column."""


def table_ids(connection: Connection, tables: Sequence[sa.Table]) -> dict[str, str]:
    """Return the identities of the tables that exist, by their keys. A table that is made again gets another one."""
    find = _FINDERS.get(connection.dialect.name)
    return {} if find is None or not tables else find(connection, tables)


@contextmanager
def naming_lack(dialect: Driver, *tables: sa.Table) -> Iterator[None]:
    """Read or make tables within it: if a table, a column or a right is missing, the error names it.

    :raises MissingTableError: when a table was not created.
    :raises MissingRightError: when the role may not do it.
    :raises UnsafeTableError: when one of the tables lacks a column.
    """
    try:
        yield
    except sa.exc.DBAPIError as error:
        translated = dialect.translate(error)
        if isinstance(translated, MissingTableError | MissingRightError):
            raise translated from error
        if dialect.code(error.orig) not in UNDEFINED_COLUMN and "no such column" not in str(error.orig):
            raise
        raise UnsafeTableError(
            f"Table {' or '.join(table.fullname for table in tables)} lacks a column of this version: let a migration "
            f"add what {dialect.command('check')} names."
        ) from error


def made_of(table_id: str) -> str:
    """Return the part of a table's identity that changes only when the table is made again, unlike that of its file."""
    return table_id.partition("/")[0]


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
    # A table that was truncated or rewritten has another file.
    places = [sa.func.to_regclass(name(table)) for table in tables]
    query = sa.select(*(sa.cast(at, OID) for at in places), *(sa.func.pg_relation_filenode(at) for at in places))
    found = connection.execute(query).one()
    ids = zip(tables, found[: len(tables)], found[len(tables) :], strict=True)
    return {table.key: f"{oid}/{file or ''}" for table, oid, file in ids if oid is not None}


class OID(sa.types.UserDefinedType[int]):
    """The type of identities in PostgreSQL's catalogs."""

    cache_ok: bool | None = True

    def get_col_spec(self, **_: Any) -> str:
        """Return its name."""
        return "OID"


def _mysql(connection: Connection, tables: Sequence[sa.Table]) -> dict[str, str]:
    # Only administrators of the server may read the storage engine's identity of a table.
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
    # Pages are used again, so the number of the schema's last change is part of the identity.
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


def views_of(connection: Connection, tables: Sequence[sa.Table]) -> set[str]:
    """Return the names of the views that read some tables, or other such views, as far as definitions can be read."""
    inspector, found = sa.inspect(connection), set[str]()
    for schema in {table.schema for table in tables}:
        views = _definitions(inspector, schema)
        reached = {table.name for table in tables if table.schema == schema}
        while reached:
            names = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, reached))})(?!\w)", re.I)
            reached = {view for view, text in views.items() if view not in found and names.search(text)}
            found |= reached
    return found


def _definitions(inspector: Any, schema: str | None) -> dict[str, str]:
    names = inspector.get_view_names(schema=schema)
    with suppress(NotImplementedError):
        names += inspector.get_materialized_view_names(schema=schema)
    found = dict.fromkeys(names, "")
    for name in names:
        # A role may not see every view, nor read the definition of one.
        with suppress(sa.exc.SQLAlchemyError):
            found[name] = inspector.get_view_definition(name, schema=schema) or ""
    return found


# ------------------------------------------------------------------------------------------------ what is checked


class Checks(NamedTuple):
    """What a database does with the rows of some tables, beside checking types and primary keys."""

    tables: Mapping[str, frozenset[str] | None] = MappingProxyType({})
    """By the keys of those with further constraints: the columns that these are about, in lower case, or None where the
    database may do more with a row than to store or to refuse it."""
    deferrable: tuple[str, ...] = ()
    """The quoted names of constraints that the commit may look at, where a statement can have it done before."""
    deferred: tuple[str, ...] = ()
    """Those of them that are, unless a handler says otherwise for its own event."""
    at_commit: bool = False
    """Whether there are constraints that only the commit checks."""


def checks_of(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str = "") -> Checks:
    """Return what is checked in the rows of tables, and of their shadows with a suffix."""
    find = _CHECKS.get(connection.dialect.name, _checks_of_others)
    return find(connection, dialect, tables, suffix)


def check_now(connection: Connection, checks: Checks) -> None:
    """Make the database check now what it would check at the commit, and then restore the modes of the constraints."""
    for names, when in ((checks.deferrable, "IMMEDIATE"), (checks.deferred, "DEFERRED")):
        if names:
            connection.exec_driver_sql(f"SET CONSTRAINTS {', '.join(names).replace('%', '%%')} {when}")


def _both(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    return None if one is None or other is None else one | other


def _lower(names: Iterable[str | None], table: sa.Table) -> frozenset[str]:
    """Return names of columns; one that is None stands for all columns."""
    found = [[each.name for each in table.columns] if name is None else [name] for name in names]
    return frozenset(name.lower() for each in found for name in each)


def _checks_of_others(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str) -> Checks:
    """Use the models, because the catalogs of this database are not known."""
    checked = (
        table.key
        for table in tables
        if any(not isinstance(each, sa.PrimaryKeyConstraint) for each in table.constraints)
        or any(index.unique for index in table.indexes)
    )
    return Checks(dict.fromkeys(checked))


def _checks_of_postgresql(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str) -> Checks:
    checked: dict[str, frozenset[str] | None] = {}
    constraints: dict[str, bool] = {}
    for table in tables:
        for name in {table.name, table.name + suffix}:
            qualified = as_parameter(dialect.qualified(table, name))
            for does_more, refuses_any, names in connection.exec_driver_sql(_CHECKED, (qualified,)):
                found = None if does_more else _lower([None] if refuses_any else names, table)
                checked[table.key] = _both(found, checked.get(table.key, frozenset()))
            for name_of, is_deferred in connection.exec_driver_sql(_DEFERRABLE, (qualified, qualified)):
                constraints[name_of] = is_deferred or constraints.get(name_of, False)
    deferred = tuple(each for each, is_deferred in constraints.items() if is_deferred)
    return Checks(checked, tuple(constraints), deferred)


def _checks_of_mysql(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str) -> Checks:
    checked: dict[str, frozenset[str] | None] = {}
    for table in tables:
        place = (table.schema, table.name)
        if connection.exec_driver_sql(_MORE_BY_MYSQL, place * 3).scalar():
            checked[table.key] = None
            continue
        checked[table.key] = _lower(connection.exec_driver_sql(_CHECKED_BY_MYSQL, place * 3).scalars(), table)
    return Checks(checked)


def _checks_of_sqlite(connection: Connection, dialect: Any, tables: Sequence[sa.Table], suffix: str) -> Checks:
    keys = bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())
    checked: dict[str, frozenset[str] | None] = {}
    at_commit = False
    for schema in {table.schema for table in tables}:
        own = {table.name.lower(): table for table in tables if table.schema == schema}
        quoted = f"{connection.dialect.identifier_preparer.quote(schema)}." if schema else ""
        rows = connection.exec_driver_sql(f"SELECT tbl_name, sql FROM {quoted}sqlite_master WHERE sql IS NOT NULL")
        for owner, sql in rows.all():
            table = own.get(owner.lower())
            if table is not None:
                found = _columns_of_sqlite(connection, table, owner, sql)
                checked[table.key] = _both(found, checked.get(table.key, frozenset()))
            # A trigger or key of another table may refer to one of these tables.
            named = [each.key for name, each in own.items() if name in sql.lower()]
            if keys and (table is not None or named) and COMMITTING.search(sql):
                at_commit = True
            if CASCADING.search(sql):
                checked |= dict.fromkeys(named)
    return Checks(checked, at_commit=at_commit)


def _columns_of_sqlite(connection: Connection, table: sa.Table, name: str, sql: str) -> frozenset[str] | None:
    """Return the columns that keys and indexes are about, all where there is a check, or None where more is done."""
    place = (name, table.schema or "main")
    if (
        CHANGING.search(sql)
        or connection.exec_driver_sql("SELECT 1 FROM pragma_table_xinfo(?, ?) WHERE hidden <> 0", place).first()
    ):
        return None
    names = connection.exec_driver_sql(_CHECKED_BY_SQLITE, (*place, place[1], *place)).scalars()
    return _lower([*names, None] if CHECK.search(sql) else names, table)


CHANGING = re.compile(r"\b(COLLATE|GENERATED|TRIGGER|ON\s+CONFLICT)\b", re.I)
"""Words in the definition of a table, an index or a trigger that do more than store a row."""
CHECK = re.compile(r"\bCHECK\b", re.I)
CASCADING = re.compile(r"\bON\s+UPDATE\s+(CASCADE|SET)\b", re.I)
COMMITTING = re.compile(r"\bINITIALLY\s+DEFERRED\b", re.I)

# A check that is not valid for the rows there are, or that calls a function of the user's, may fail at any change. So
# may an expression in an index; and an index takes no text of any length.
_CHECKED = """
SELECT relkind <> 'r' OR relrowsecurity
    OR EXISTS (SELECT FROM pg_constraint WHERE confrelid = r.oid AND contype = 'f' AND confupdtype NOT IN ('a', 'r'))
    OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = r.oid AND NOT tgisinternal)
    OR EXISTS (SELECT FROM pg_rewrite WHERE ev_class = r.oid)
    OR EXISTS (SELECT FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
        WHERE attrelid = r.oid AND (typtype = 'd' OR attgenerated <> '')),
EXISTS (SELECT FROM pg_constraint WHERE conrelid = r.oid AND contype NOT IN ('p', 'n')
        AND (contype NOT IN ('c', 'f', 'u') OR NOT convalidated OR coalesce(cardinality(conkey), 0) = 0))
    OR EXISTS (SELECT FROM pg_constraint k JOIN pg_depend d ON d.objid = k.oid AND d.classid = 'pg_constraint'::regclass
        WHERE conrelid = r.oid AND contype = 'c' AND refclassid <> 'pg_class'::regclass)
    OR EXISTS (SELECT FROM pg_index WHERE indrelid = r.oid AND (indexprs IS NOT NULL OR indpred IS NOT NULL)),
ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = r.oid AND attnum > 0 AND (
    EXISTS (SELECT FROM pg_constraint WHERE conrelid = r.oid AND contype IN ('c', 'f', 'u') AND attnum = ANY (conkey))
    OR EXISTS (SELECT FROM pg_index WHERE indrelid = r.oid AND NOT indisprimary AND attnum = ANY (indkey)
        AND (indisunique OR attlen < 0))))
FROM pg_class r WHERE oid = to_regclass(%s)"""

_DEFERRABLE = """
SELECT format('%%I.%%I', nspname, conname), condeferred
FROM pg_constraint k JOIN pg_namespace n ON n.oid = connamespace
WHERE condeferrable AND (conrelid = to_regclass(%s) OR confrelid = to_regclass(%s))"""

_MORE_BY_MYSQL = """
SELECT EXISTS (SELECT 1 FROM information_schema.triggers WHERE event_object_schema = coalesce(%s, database())
    AND event_object_table = %s)
OR EXISTS (SELECT 1 FROM information_schema.columns WHERE table_schema = coalesce(%s, database())
    AND table_name = %s AND extra NOT IN ('', 'auto_increment'))
OR EXISTS (SELECT 1 FROM information_schema.referential_constraints WHERE unique_constraint_schema =
    coalesce(%s, database()) AND referenced_table_name = %s AND update_rule NOT IN ('RESTRICT', 'NO ACTION'))"""

_CHECKED_BY_MYSQL = """
SELECT column_name AS name FROM information_schema.statistics WHERE table_schema = coalesce(%s, database())
    AND table_name = %s AND non_unique = 0 AND index_name <> 'PRIMARY'
UNION SELECT column_name FROM information_schema.key_column_usage WHERE table_schema = coalesce(%s, database())
    AND table_name = %s AND referenced_table_name IS NOT NULL
UNION SELECT NULL FROM information_schema.table_constraints WHERE table_schema = coalesce(%s, database())
    AND table_name = %s AND constraint_type NOT IN ('PRIMARY KEY', 'UNIQUE', 'FOREIGN KEY')"""

_CHECKED_BY_SQLITE = """
SELECT CASE WHEN l.partial THEN NULL ELSE i.name END
FROM pragma_index_list(?, ?) AS l, pragma_index_xinfo(l.name, ?) AS i
WHERE i.key AND (l.partial OR i.cid = -2 OR (l."unique" AND l.origin <> 'pk'))
UNION SELECT "from" FROM pragma_foreign_key_list(?, ?)"""

_CHECKS: dict[str, Callable[[Connection, Any, Sequence[sa.Table], str], Checks]] = {
    "postgresql": _checks_of_postgresql,
    "mysql": _checks_of_mysql,
    "mariadb": _checks_of_mysql,
    "sqlite": _checks_of_sqlite,
}
