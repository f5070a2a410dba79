"""Tables beside the live ones: made, written instead of them, and put in their place.

What a session executes on a shadow connection names the shadow tables, because the statements are compiled by a
dialect of its own. Handlers need not know.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex, CreateTable

from ..exceptions import HandlerError, RebuildError
from .consumers import ProjectionHost

NEW, OLD, TRIAL = "__new", "__old", "__trial"
LONGEST_NAME = 63
MYSQL = ("mysql", "mariadb")


def shadow_tables(tables: Sequence[sa.Table], suffix: str, dialect_name: str) -> dict[str, sa.Table]:
    """Return copies of tables with other names, by the keys of the originals.

    :raises RebuildError: when a table that is not among them refers to one of them, or a name gets too long.
    """
    _check(tables, suffix)
    owned = {table.key for table in tables}
    metadata = sa.MetaData()
    shadows = {table.key: table.to_metadata(metadata, name=table.name + suffix) for table in tables}
    for table in tables:
        shadow = shadows[table.key]
        _name_parts(table, shadow, suffix, dialect_name)
        for constraint in list(shadow.foreign_key_constraints):
            _redirect(shadow, constraint, owned, suffix)
        _add_targets(table, owned, metadata)
    return shadows


def _name_parts(table: sa.Table, shadow: sa.Table, suffix: str, dialect_name: str) -> None:
    """Name indexes after those of the original, whose names may be made of the table's, and with the suffix."""
    originals = {(index.unique, *index.columns.keys()): index.name for index in table.indexes}
    for index in shadow.indexes:
        original = originals.get((index.unique, *index.columns.keys()), index.name)
        # On MySQL they are unique within the table, elsewhere in the schema.
        name = original if dialect_name in MYSQL else f"{original}{suffix}"
        index.name = sa.sql.quoted_name(str(name), None)
    for constraint in shadow.constraints:
        # With the names of checks it is the other way round.
        if dialect_name in MYSQL and isinstance(constraint, sa.CheckConstraint):
            constraint.name = None
        # On PostgreSQL a key that has a name has an index of that name; renamed with it when the tables are swapped.
        key = isinstance(constraint, sa.PrimaryKeyConstraint | sa.UniqueConstraint)
        if key and dialect_name == "postgresql" and constraint.name is not None:
            constraint.name = sa.sql.quoted_name(f"{constraint.name}{suffix}", None)


def _check(tables: Sequence[sa.Table], suffix: str) -> None:
    for table in tables:
        if len(table.name) + len(suffix) > LONGEST_NAME:
            raise RebuildError(f"The name of table {table.name!r} is too long to be rebuilt beside: shorten it.")
        for other in table.metadata.tables.values():
            if other not in tables and any(key.column.table is table for key in other.foreign_keys):
                raise RebuildError(
                    f"Table {other.name!r} has a foreign key to {table.name!r}, whose place a rebuilt table will take: "
                    "remove the foreign key, or add its model to the projection's models."
                )


def _redirect(shadow: sa.Table, constraint: sa.ForeignKeyConstraint, owned: set[str], suffix: str) -> None:
    """Let a foreign key refer to the shadow of its target; names are left to the database, where they are unique."""
    targets = []
    for element in constraint.elements:
        table, _, column = element.target_fullname.rpartition(".")
        targets.append(f"{table}{suffix if table in owned else ''}.{column}")
    columns = [column.name for column in constraint.columns]
    shadow.constraints.discard(constraint)
    for element in constraint.elements:
        element.parent.foreign_keys.discard(element)
        shadow.foreign_keys.discard(element)
    options = {name: getattr(constraint, name) for name in ("onupdate", "ondelete", "deferrable", "initially")}
    shadow.append_constraint(sa.ForeignKeyConstraint(columns, targets, **options))


def _add_targets(table: sa.Table, owned: set[str], metadata: sa.MetaData) -> None:
    for key in table.foreign_keys:
        target = key.column.table
        if target.key not in owned and target.key not in metadata.tables:
            target.to_metadata(metadata)


def create(connection: Connection, shadows: Mapping[str, sa.Table]) -> None:
    """Create shadow tables; types, such as those of enumerations, are there already."""
    for shadow in sa.schema.sort_tables(shadows.values()):
        connection.execute(CreateTable(shadow))
        for index in sorted(shadow.indexes, key=lambda index: str(index.name)):
            connection.execute(CreateIndex(index))


def drop(connection: Connection, tables: Sequence[sa.Table], suffix: str) -> list[str]:
    """Drop the tables with a suffix that there are, and return their names; nothing but tables is dropped."""
    dropped = []
    for table in reversed(sa.schema.sort_tables(tables)):
        if exists(connection, table, suffix):
            connection.exec_driver_sql(f"DROP TABLE {_quoted(connection, table, table.name + suffix)}")
            dropped.append(table.name + suffix)
    return dropped


def exists(connection: Connection, table: sa.Table, suffix: str) -> bool:
    """Whether there is a table with a suffix."""
    return sa.inspect(connection).has_table(table.name + suffix, schema=table.schema)


def count_rows(connection: Connection, table: sa.Table, suffix: str = "") -> int:
    """Count the rows of a table with a suffix."""
    name = _quoted(connection, table, table.name + suffix)
    return int(connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one())  # noqa: S608


def limit_waiting(connection: Connection, seconds: int) -> None:
    """Limit how long a statement waits for those who read a table, to the end of the transaction or connection."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{seconds}s'")
    elif connection.dialect.name in MYSQL:
        connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {seconds}")


def swap(connection: Connection, tables: Sequence[sa.Table]) -> None:
    """Give the live tables the suffix of old ones, and the new ones the names of the live ones."""
    if connection.dialect.name in MYSQL:
        # One statement, as it cannot be in a transaction.
        connection.exec_driver_sql("RENAME TABLE " + ", ".join(_mysql_renames(connection, tables)))
        return
    for table in tables:
        live = _quoted(connection, table, table.name)
        old, new = (_quoted(connection, table, table.name + suffix) for suffix in (OLD, NEW))
        connection.exec_driver_sql(f"ALTER TABLE {live} RENAME TO {_quote(connection, table.name + OLD)}")
        connection.exec_driver_sql(f"ALTER TABLE {new} RENAME TO {_quote(connection, table.name)}")
        if connection.dialect.name == "postgresql":
            _rename_parts(connection, table, old, lambda name: f"{name[: LONGEST_NAME - len(OLD)]}{OLD}")
            _rename_parts(connection, table, live, lambda name: name.replace(NEW, ""))
        else:
            _remake_indexes(connection, table)


def _mysql_renames(connection: Connection, tables: Sequence[sa.Table]) -> Iterator[str]:
    for table in tables:
        live, old, new = (_quoted(connection, table, table.name + suffix) for suffix in ("", OLD, NEW))
        yield f"{live} TO {old}, {new} TO {live}"


_PARTS = """
SELECT c.relname, c.relkind FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s::regclass
UNION ALL
SELECT c.relname, c.relkind FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'
WHERE d.refobjid = %s::regclass AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')"""


def _rename_parts(connection: Connection, table: sa.Table, name: str, renamed: Any) -> None:
    """Rename a table's indexes and sequences, whose names are unique in the schema; constraints go with them."""
    for part, kind in connection.exec_driver_sql(_PARTS, (name, name)).all():
        if renamed(part) != part:
            kinds = "SEQUENCE" if kind in ("S", b"S") else "INDEX"
            statement = f"ALTER {kinds} {_quoted(connection, table, part)} RENAME TO "
            connection.exec_driver_sql(statement + _quote(connection, renamed(part)))


def _remake_indexes(connection: Connection, table: sa.Table) -> None:
    """SQLite cannot rename an index, and their names are unique in the database."""
    for index in table.indexes:
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS {_quote(connection, str(index.name))}")
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS {_quote(connection, f'{index.name}{NEW}')}")
        # The connection's own dialect would name the new table, which is the live one now.
        connection.exec_driver_sql(str(CreateIndex(index).compile(dialect=connection.engine.dialect)))


def _quote(connection: Connection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote(name)


def _quoted(connection: Connection, table: sa.Table, name: str) -> str:
    quoted = _quote(connection, name)
    return f"{_quote(connection, table.schema)}.{quoted}" if table.schema else quoted


@contextmanager
def shadow_session(host: ProjectionHost, shadows: Mapping[str, sa.Table]) -> Iterator[orm.Session]:
    """Within an application context, a ``db.session`` that writes shadow tables instead of the live ones."""
    database = host.binding.database
    connection = _connect(host, shadows)
    try:
        session = database.new_session(host.app)
        find = session.get_bind

        def get_bind(*args: Any, **kwargs: Any) -> Any:
            found = find(*args, **kwargs)
            return connection if found is host.engine else found

        session.get_bind = get_bind  # type: ignore[method-assign]
        database.use_session(session)
        host.binding.unit(session).bind_arguments = {"bind": connection}
        try:
            yield session
        finally:
            session.close()
    finally:
        connection.close()


def _connect(host: ProjectionHost, shadows: Mapping[str, sa.Table]) -> Connection:
    connection = host.engine.connect()
    dialect = copy.copy(host.engine.dialect)
    _redirect_names(dialect, shadows)
    connection.dialect = dialect
    text = re.compile("|".join(rf"\b{re.escape(shadow_name(key))}\b" for key in shadows))

    def refuse_text(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        compiled = getattr(context, "compiled", None)
        written = getattr(compiled, "statement", None)
        if isinstance(written, sa.TextClause) and (found := text.search(statement)):
            raise HandlerError(
                f"A handler names table {found[0]!r} in textual SQL, so that it cannot be rebuilt: use the model's "
                "attributes, or select(), insert(), update() and delete()."
            )

    sa.event.listen(connection, "before_cursor_execute", refuse_text)
    return connection.execution_options(compiled_cache={})


def shadow_name(key: str) -> str:
    """Return the name of a table without its schema."""
    return key.rpartition(".")[2]


def _redirect_names(dialect: Any, shadows: Mapping[str, sa.Table]) -> None:
    """Have a dialect, which must be a copy, name shadow tables instead of the live ones; all else stays as it is."""
    plain = dialect.identifier_preparer

    def redirected(table: Any, text: str, end: str) -> str:
        shadow = shadows.get(table.key) if isinstance(table, sa.Table) else None
        if shadow is None:
            return text
        for name, other in (
            (plain.format_table(table), plain.format_table(shadow)),
            (plain.quote(table.name), plain.quote(shadow.name)),
        ):
            if text == name or text.startswith((name + end, name + " ")):
                return f"{other}{text[len(name) :]}"
        return text

    class ShadowPreparer(type(plain)):  # type: ignore[misc]
        def format_table(self, table: Any, *args: Any, **kwargs: Any) -> str:
            return redirected(table, super().format_table(table, *args, **kwargs), " ")

    class ShadowCompiler(dialect.statement_compiler):  # type: ignore[misc]
        def visit_table(self, table: Any, *args: Any, **kwargs: Any) -> str:
            return redirected(table, super().visit_table(table, *args, **kwargs), " ")

        def visit_column(self, column: Any, *args: Any, **kwargs: Any) -> str:
            return redirected(column.table, super().visit_column(column, *args, **kwargs), ".")

    dialect.statement_compiler = ShadowCompiler
    dialect.identifier_preparer = copy.copy(plain)
    dialect.identifier_preparer.__class__ = ShadowPreparer
