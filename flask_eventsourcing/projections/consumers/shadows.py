"""Shadow tables beside the live ones, and connections that write to them instead.

A shadow connection compiles statements with a dialect of its own, so they name the shadow tables. Handlers need not
know this. Statements that would write to another table are refused.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex, CreateTable, SetColumnComment, SetTableComment

from ...exceptions import HandlerError, RebuildError
from ...host import Host
from ...persistence import Datastore, Dialect
from ...persistence.dialects.swapping import OWN
from . import Consumer

FIRST_WORD = re.compile(r"\s*(?:--[^\n]*\n\s*|/\*.*?\*/\s*)*(\w+)", re.S)
WRITES = {"INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "TRUNCATE", "COPY", "LOAD"}
WRITES_IN_WITH = re.compile(
    r"\b(?:INSERT\s+INTO|DELETE\s+FROM|MERGE\s+INTO|UPDATE(?=\s+(?:ONLY\s+)?\S+\s+SET\b))\s+(?:ONLY\s+)?([^\s(,;]+)",
    re.I,
)
TARGET = re.compile(r"\b(?:INTO|FROM|UPDATE|TABLE|TRUNCATE)\s+(?:ONLY\s+)?([^\s(,;]+)", re.I)
logger: logging.Logger = logging.getLogger(__name__)

QUOTES = re.compile(r"[\"`\[\]]")


def shadows_of(consumer: Consumer, suffix: str) -> ShadowTables:
    """Return the tables with a suffix beside those of a projection."""
    return ShadowTables(consumer.application.datastore, consumer.tables, suffix, own_tables(consumer))


def own_tables(consumer: Consumer) -> Callable[[], set[str]]:
    """Return a function for the names of this package's own tables that were met so far."""
    application = consumer.application
    own = {table.name for table in application.models.tables.values()}
    own |= {table.name for table in (application.datastore.tables(application.name) or {}).values()}

    def names() -> set[str]:
        # Those of other applications are met when their recorders are made.
        return own | application.log.table_names()

    return names


@dataclass(frozen=True)
class ShadowTables:
    """The tables whose names are those of some live tables with a suffix."""

    datastore: Datastore
    live: Sequence[sa.Table]
    suffix: str
    own: Callable[[], Collection[str]] = tuple

    @cached_property
    def tables(self) -> dict[str, sa.Table]:
        """Copies of the live tables with other names, by the keys of the live ones."""
        owned = {table.key for table in self.live}
        metadata = sa.MetaData()
        shadows = {table.key: table.to_metadata(metadata, name=table.name + self.suffix) for table in self.live}
        for table in self.live:
            shadow = shadows[table.key]
            self.datastore.dialect.name_shadow(table, shadow, self.suffix)
            for constraint in list(shadow.foreign_key_constraints):
                _redirect(shadow, constraint, owned, self.suffix, self.datastore.dialect)
            _add_targets(table, owned, metadata)
        return shadows

    def check(self) -> None:
        """Check that there can be such tables.

        :raises RebuildError: when a table that is not among them refers to one of them, or a name gets too long.
        """
        _check(self.live, self.suffix, self.datastore.dialect)

    def create(self, connection: Connection) -> None:
        """Create the tables; types, such as those of enumerations, are there already."""
        for shadow in sa.schema.sort_tables(self.tables.values()):
            connection.execute(CreateTable(shadow))
            for index in sorted(shadow.indexes, key=lambda index: str(index.name)):
                connection.execute(CreateIndex(index))
            _comment(connection, shadow)

    def drop(self, connection: Connection) -> list[str]:
        """Drop the tables that exist, and return their names. Only tables are dropped."""
        dropped = [table for table in reversed(sa.schema.sort_tables(self.live)) if self.exists(connection, table)]
        for table in dropped:
            connection.exec_driver_sql(f"DROP TABLE {self._quoted(table)}")
        return [table.name + self.suffix for table in dropped]

    def any_exist(self, connection: Connection) -> bool:
        """Whether at least one of the tables exists."""
        return any(self.exists(connection, table) for table in self.live)

    def all_exist(self, connection: Connection) -> bool:
        """Whether all the tables exist."""
        return all(self.exists(connection, table) for table in self.live)

    def count_rows(self, connection: Connection) -> list[int]:
        """Count the rows of each, in the order of the live tables."""
        query = "SELECT count(*) FROM {}"
        return [connection.exec_driver_sql(query.format(self._quoted(t))).scalar_one() for t in self.live]

    @contextmanager
    def session(self, host: Host) -> Iterator[orm.Session]:
        """Within the host's context, a current session that writes these tables instead of the live ones."""
        with _connect(self.datastore, self.tables, self.own) as connection, host.using(connection) as session:
            yield session

    def exists(self, connection: Connection, table: sa.Table) -> bool:
        """Whether the shadow of a live table exists."""
        return sa.inspect(connection).has_table(table.name + self.suffix, schema=table.schema)

    def _quoted(self, table: sa.Table) -> str:
        return self.datastore.dialect.qualified(table, table.name + self.suffix)


def _check(tables: Sequence[sa.Table], suffix: str, dialect: Dialect) -> None:
    for table in tables:
        if len(table.name) + len(suffix) > dialect.longest_name:
            raise RebuildError(f"The name of table {table.name!r} is too long for a copy with a suffix: shorten it.")
        for other in table.metadata.tables.values():
            if other not in tables and any(key.column.table is table for key in other.foreign_keys):
                raise RebuildError(REFERS.format(other.name, table.name))
    # Without ALTER TABLE there is no order in which keys are looked at.
    if dialect.engine.dialect.supports_alter:
        _check_order(tables)


def _check_order(tables: Sequence[sa.Table]) -> None:
    targets = {table: {key.column.table for key in table.foreign_keys} - {table} for table in tables}
    try:
        TopologicalSorter(targets).prepare()
    except CycleError as error:
        names = ", ".join(sorted({repr(table.name) for table in error.args[1]}))
        raise RebuildError(CIRCLE.format(names)) from error


REFERS = (
    "Table {!r} has a foreign key to {!r}, whose place a rebuilt table will take: "
    "remove the foreign key, or add its model to the projection's models."
)

CIRCLE = (
    "The foreign keys of tables {} form a cycle, so a rebuild cannot create and fill the tables in order: remove one "
    "of these foreign keys."
)


def _comment(connection: Connection, shadow: sa.Table) -> None:
    """Set the comments of a table, where its CREATE has not done it."""
    dialect = connection.dialect
    if not dialect.supports_comments or dialect.inline_comments:
        return
    if shadow.comment is not None:
        connection.execute(SetTableComment(shadow))
    for column in shadow.columns:
        if column.comment is not None:
            connection.execute(SetColumnComment(column))


def _redirect(
    shadow: sa.Table, constraint: sa.ForeignKeyConstraint, owned: set[str], suffix: str, dialect: Dialect
) -> None:
    """Let a foreign key refer to the shadow of its target."""
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
    options["name"] = dialect.shadow_key_name(constraint.name)
    shadow.append_constraint(sa.ForeignKeyConstraint(columns, targets, **options))


def _add_targets(table: sa.Table, owned: set[str], metadata: sa.MetaData) -> None:
    for key in table.foreign_keys:
        target = key.column.table
        if target.key not in owned and target.key not in metadata.tables:
            target.to_metadata(metadata)


def _connect(datastore: Datastore, shadows: Mapping[str, sa.Table], own: Callable[[], Collection[str]]) -> Connection:
    connection = datastore.engine.connect()
    if isinstance(datastore.engine.pool, sa.pool.QueuePool):
        # Out of the pool, which may have no second one for the checkpoint and the log.
        connection.detach()
    connection.dialect = _redirected(datastore.engine.dialect, shadows)
    text = re.compile("|".join(rf"\b{re.escape(key.rpartition('.')[2])}\b" for key in shadows))

    def refuse(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if OWN.items() <= getattr(context, "execution_options", {}).items():
            return
        written = getattr(getattr(context, "compiled", None), "statement", None)
        if isinstance(written, sa.TextClause) and (found := text.search(statement)):
            raise HandlerError(
                f"A handler names table {found[0]!r} in textual SQL, so that it cannot be rebuilt: use the model's "
                "attributes, or select(), insert(), update() and delete()."
            )
        for table in written_tables(statement, context):
            if isinstance(table, sa.Table) and table.key in shadows:
                continue
            name = table.name if isinstance(table, sa.Table) else table
            if name not in own():
                raise HandlerError(UNDECLARED.format(name))

    sa.event.listen(connection, "before_cursor_execute", refuse)
    return connection.execution_options(compiled_cache={})


UNDECLARED = (
    "A handler writes table {!r}, which is not among the projection's models, so that a rebuild would write it "
    "again: add its model to models=[…], and leave textual SQL."
)


class Undeclared:
    """Warns once of a table that a live projection writes although it is not one of its models."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._own = own_tables(consumer)
        self._is_told = consumer.kind != "projection"

    def look(self, statement: str, context: Any) -> None:
        """Look at a statement before it is executed."""
        if self._is_told:
            return
        for table in written_tables(statement, context):
            if self._is_told or table in self._consumer.tables:
                continue
            name = table if isinstance(table, str) else table.name
            if name not in self._own() and name not in {each.name for each in self._consumer.tables}:
                self._is_told = True
                logger.warning("%s: %s", self._consumer.name, UNDECLARED.format(name))


def written_tables(statement: str, context: Any) -> Iterator[sa.Table | str]:
    """The tables that a statement writes, as far as it shows; in textual SQL, the name after the first words."""
    compiled = getattr(context, "compiled", None)
    written = getattr(compiled, "statement", None)
    if compiled is None or isinstance(written, sa.TextClause):
        found = FIRST_WORD.match(statement)
        word = found[1].upper() if found is not None else ""
        if word == "WITH":
            yield from map(_plain_name, WRITES_IN_WITH.findall(statement))
        elif word in WRITES:
            target = TARGET.search(statement)
            yield word if target is None else _plain_name(target[1])
        return
    for element in (written, *(cte.element for cte in getattr(compiled, "ctes", None) or ())):
        if isinstance(element, sa.UpdateBase) and isinstance(element.table, sa.Table):
            yield element.table


def _plain_name(name: str) -> str:
    return QUOTES.sub("", name).rpartition(".")[2]


def _redirected(dialect: Any, shadows: Mapping[str, sa.Table]) -> Any:
    """Return a copy of a dialect that names shadow tables instead of the live ones; all else stays as it is."""
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

    shadowing = copy.copy(dialect)
    shadowing.statement_compiler = ShadowCompiler
    # With what it has learned of the server; SQLAlchemy makes its own copies of one in the same way.
    shadowing.identifier_preparer = ShadowPreparer.__new__(ShadowPreparer)
    vars(shadowing.identifier_preparer).update(vars(plain))
    return shadowing
