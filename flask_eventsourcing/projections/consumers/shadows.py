"""Shadow tables beside the live ones, and connections that write to them instead.

A shadow connection compiles statements with a dialect of its own, so they name the shadow tables. Handlers need not
know this. Statements that would write to another table are refused.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex, CreateTable, SetColumnComment, SetTableComment

from ..._patches import connection_dialect
from ...exceptions import HandlerError, RebuildError
from ...host import Host
from ...models import is_of_rebuild
from ...persistence import Datastore, Dialect
from ...persistence.dialects.catalogs import naming_lack, views_of
from ...persistence.dialects.swapping import OWN, written_tables
from . import Consumer

logger: logging.Logger = logging.getLogger(__name__)


def shadows_of(consumer: Consumer, suffix: str) -> ShadowTables:
    """Return the tables with a suffix beside those of a projection."""
    return ShadowTables(consumer.application.datastore, consumer.tables, suffix, own_tables(consumer))


def own_tables(consumer: Consumer) -> Callable[[], set[str]]:
    """Return a function that returns the names of this package's own tables that are known so far."""
    application = consumer.application
    own = {table.name for table in application.models.tables.values()}
    own |= {table.name for table in (application.datastore.tables(application.name) or {}).values()}

    def names() -> set[str]:
        # The tables of other applications are known when their recorders are made.
        return own | application.log.table_names()

    return names


@dataclass(frozen=True)
class ShadowTables:
    """The tables whose names are those of some live tables with a suffix."""

    datastore: Datastore
    live: Sequence[sa.Table]
    suffix: str
    own: Callable[[], Collection[str]] = tuple

    @property
    def tables(self) -> dict[str, sa.Table]:
        """Copies of the live tables with other names, by the keys of the live ones."""
        return self._copied[0]

    @cached_property
    def _copied(self) -> tuple[dict[str, sa.Table], dict[str, str]]:
        metadata = sa.MetaData()
        shadows = {table.key: table.to_metadata(metadata, name=table.name + self.suffix) for table in self.live}
        names: dict[str, str] = {}
        for table in self.live:
            shadow = shadows[table.key]
            before = {constraint: constraint.name for constraint in shadow.constraints}
            self.datastore.dialect.name_shadow(table, shadow, self.suffix)
            named = ((name, each.name) for each, name in before.items() if each.name is not None)
            names |= {str(name): str(other) for name, other in named if name != other}
            _redirect(table, shadows, self.datastore.dialect)
        return shadows, names

    def name_of_constraint(self, name: str) -> str:
        """Return the name that a constraint of a live table has at its shadow."""
        if name in self._copied[1]:
            return self._copied[1][name]
        # The database names a constraint without a name, and begins with the name of its table.
        owners = [table.name for table in self.live if name.startswith(f"{table.name}_")]
        owner = max(owners, key=len, default=None)
        return name if owner is None else f"{owner}{self.suffix}{name[len(owner) :]}"

    def check(self) -> None:
        """Check that there can be such tables.

        :raises RebuildError: when a table that is not among them refers to one of them, or a name gets too long.
        """
        _refuse_taken(self.live)
        _check(self.live, self.suffix, self.datastore.dialect)

    def create(self, connection: Connection) -> None:
        """Create the tables; types, such as those of enumerations, are there already.

        :raises MissingRightError: when the role may not create tables.
        """
        with naming_lack(self.datastore.dialect, *self.live):
            for shadow in sa.schema.sort_tables(self.tables.values()):
                connection.execute(CreateTable(shadow))
                for index in sorted(shadow.indexes, key=lambda index: str(index.name)):
                    connection.execute(CreateIndex(index))
                _comment(connection, shadow)

    def gather_statistics(self) -> None:
        """Gather the planner's statistics of the tables, before the swap lets queries read them."""
        try:
            with self.datastore.engine.begin() as connection:
                for table in self.live:
                    self.datastore.dialect.gather_statistics(connection, table, table.name + self.suffix)
        except sa.exc.DBAPIError as error:
            # Queries may be slow until the database gathers them by itself.
            logger.warning("Statistics of tables with %s could not be gathered: %s", self.suffix, error)

    def drop(self, connection: Connection) -> list[str]:
        """Drop the tables that exist, and return their names. Only tables are dropped.

        :raises RebuildError: when another table has the name of one.
        """
        _refuse_taken(self.live)
        dropped = [table for table in reversed(sa.schema.sort_tables(self.live)) if self.exists(connection, table)]
        self.datastore.dialect.put_off_keys(connection)
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
        with _connect(self) as connection, host.using(connection) as session:
            yield session

    def exists(self, connection: Connection, table: sa.Table) -> bool:
        """Whether the shadow of a live table exists."""
        return sa.inspect(connection).has_table(table.name + self.suffix, schema=table.schema)

    def _quoted(self, table: sa.Table) -> str:
        return self.datastore.dialect.qualified(table, table.name + self.suffix)


def _refuse_taken(tables: Sequence[sa.Table]) -> None:
    for table in tables:
        for other in table.metadata.tables.values():
            if other.schema == table.schema and is_of_rebuild(other.name, (table.name,)):
                raise RebuildError(TAKEN.format(other.name, table.name))


def _check(tables: Sequence[sa.Table], suffix: str, dialect: Dialect) -> None:
    for table in tables:
        if not dialect.fits(f"{table.name}{suffix}"):
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


TAKEN = "A rebuild calls a copy of table {1!r} {0!r}, as another table is called: give that another name."

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


def _redirect(table: sa.Table, shadows: Mapping[str, sa.Table], dialect: Dialect) -> None:
    """Let the foreign keys of a shadow refer to the shadows of their targets."""
    shadow = shadows[table.key]
    for constraint in list(shadow.foreign_key_constraints):
        shadow.constraints.discard(constraint)
        for element in constraint.elements:
            element.parent.foreign_keys.discard(element)
            shadow.foreign_keys.discard(element)
    for constraint in sorted(table.foreign_key_constraints, key=lambda each: list(each.column_keys)):
        columns = [shadow.c[key] for key in constraint.column_keys]
        # By their objects, because a name may have a dot in it.
        targets = [
            _copy_of(each.column.table, shadows, shadow.metadata).c[each.column.key] for each in constraint.elements
        ]
        options = {
            name: getattr(constraint, name) for name in ("onupdate", "ondelete", "deferrable", "initially", "match")
        }
        options["name"] = dialect.shadow_key_name(constraint.name)
        shadow.append_constraint(sa.ForeignKeyConstraint(columns, targets, **options))


def _copy_of(target: sa.Table, shadows: Mapping[str, sa.Table], metadata: sa.MetaData) -> sa.Table:
    """Return the shadow of a table, or a copy of one that has none."""
    found = shadows.get(target.key, metadata.tables.get(target.key))
    return target.to_metadata(metadata) if found is None else found


def _connect(tables: ShadowTables) -> Connection:
    datastore, shadows, own = tables.datastore, tables.tables, tables.own
    connection = datastore.engine.connect()
    if isinstance(datastore.engine.pool, sa.pool.QueuePool):
        # The connection leaves the pool, which may have no second one for the checkpoint and the log.
        connection.detach()
    connection_dialect(connection, _redirected(datastore.engine.dialect, tables, _views(datastore, tables.live)))

    def refuse(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if OWN.items() <= getattr(context, "execution_options", {}).items():
            return
        for table in written_tables(statement, context):
            if isinstance(table, sa.TableClause) and table.fullname in shadows:
                continue
            name = table if isinstance(table, str) else table.name
            if name not in own():
                raise HandlerError((TEXTUAL if name in live else UNDECLARED).format(name))

    live = {table.name for table in tables.live}
    sa.event.listen(connection, "before_cursor_execute", refuse)
    return connection.execution_options(compiled_cache={})


def _views(datastore: Datastore, live: Sequence[sa.Table]) -> set[str]:
    with datastore.engine.connect() as connection:
        return views_of(connection, live)


TEXTUAL = (
    "A handler names table {!r} in textual SQL, so that it cannot be rebuilt: use the model's attributes, or select(), "
    "insert(), update() and delete()."
)
VIEW = (
    "A handler reads view {!r}, which has the rows of live tables, so that it cannot be rebuilt: read the tables "
    "instead."
)
UNDECLARED = (
    "A handler writes table {!r}, which is not among the projection's models, so that a rebuild would write it "
    "again: add its model to models=[…], and leave textual SQL."
)


class Names:
    """The names of live tables, as they stand in textual SQL."""

    def __init__(self, names: Iterable[str]) -> None:
        either = "|".join(map(re.escape, names))
        name, part = rf"(?<!\w)({either})(?!\w)", r"[\w\"`\[\]]+"
        self._any, self._any_case = re.compile(name), re.compile(name, re.I)
        others = rf"(?:{part}(?:\.{part})?(?:\s+(?:AS\s+)?\w+)?\s*,\s*)*"
        # A column, or a word in a string, may have the name of a table, so only some places count.
        self._read = re.compile(rf"\b(?:FROM|JOIN|USING)\s+{others}(?:ONLY\s+)?(?:{part}\.)?[\"`\[]?{name}", re.I)

    def refuse(self, text: str, *, read: bool, names: bool = False) -> None:
        """Refuse a text.

        :param read: whether to refuse only a text that reads a table.
        :param names: whether it has nothing but names of tables.
        :raises HandlerError: when it names one.
        """
        found = (self._any_case if names else self._read).search(text) or (None if read else self._any.search(text))
        if found is not None:
            raise HandlerError(TEXTUAL.format(found[1]))


class Undeclared:
    """Warns once of a table that a live projection writes although it is not one of its models."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._own = own_tables(consumer)
        self._is_told = consumer.kind != "projection"
        self._names = Names(table.name for table in consumer.tables) if consumer.kind == "rebuild" else None

    def look(self, statement: str, context: Any) -> None:
        """Look at a statement before it is executed.

        :raises HandlerError: in a rebuild, if the driver would be sent the name of a live table.
        """
        if self._names is not None and getattr(context, "compiled", None) is None:
            self._names.refuse(statement, read=True)
        if self._is_told:
            return
        for table in written_tables(statement, context):
            if self._is_told or table in self._consumer.tables:
                continue
            name = table if isinstance(table, str) else table.name
            if name not in self._own() and name not in {each.name for each in self._consumer.tables}:
                self._is_told = True
                logger.warning("%s: %s", self._consumer.name, UNDECLARED.format(name))


def _redirecting(plain: Any, shadows: Mapping[str, sa.Table]) -> Callable[[Any, str, str], str]:
    """Return what puts the name of a shadow into the place of a live table's, before some end."""

    def redirected(table: Any, text: str, end: str) -> str:
        # Also of a table that a handler names as table("…").
        shadow = shadows.get(table.fullname) if isinstance(table, sa.TableClause) else None
        if shadow is None:
            return text
        for name, other in (
            (plain.format_table(table), plain.format_table(shadow)),
            (plain.quote(table.name), plain.quote(shadow.name)),
        ):
            if text == name or text.startswith((name + end, name + " ")):
                return f"{other}{text[len(name) :]}"
        return text

    return redirected


def _redirected(dialect: Any, tables: ShadowTables, views: Collection[str]) -> Any:
    """Return a copy of a dialect that names shadow tables instead of the live ones; all else stays as it is."""
    plain = dialect.identifier_preparer
    redirected, names = _redirecting(plain, tables.tables), Names([*(table.name for table in tables.live), *views])

    class ShadowPreparer(type(plain)):  # type: ignore[misc]
        def format_table(self, table: Any, *args: Any, **kwargs: Any) -> str:
            return redirected(table, super().format_table(table, *args, **kwargs), " ")

        def truncate_and_render_constraint_name(self, name: Any, *args: Any, **kwargs: Any) -> Any:
            # An upsert may name a constraint.
            shadowed = sa.sql.quoted_name(tables.name_of_constraint(str(name)), None)
            return super().truncate_and_render_constraint_name(shadowed, *args, **kwargs)

    class ShadowCompiler(dialect.statement_compiler):  # type: ignore[misc]
        def visit_table(self, table: Any, *args: Any, **kwargs: Any) -> str:
            if table.name in views and table.fullname not in tables.tables:
                raise HandlerError(VIEW.format(table.name))
            return redirected(table, super().visit_table(table, *args, **kwargs), " ")

        def visit_textclause(self, textclause: Any, *args: Any, **kwargs: Any) -> str:
            names.refuse(textclause.text, read=bool(self.stack), names=bool(kwargs.get("asfrom")))
            return str(super().visit_textclause(textclause, *args, **kwargs))

        def visit_column(self, column: Any, *args: Any, **kwargs: Any) -> str:
            if column.is_literal:
                names.refuse(column.name, read=True)
            return redirected(column.table, super().visit_column(column, *args, **kwargs), ".")

    shadowing = copy.copy(dialect)
    shadowing.statement_compiler = ShadowCompiler
    # The copy keeps what the dialect knows of the server. SQLAlchemy copies a dialect in the same way.
    shadowing.identifier_preparer = ShadowPreparer.__new__(ShadowPreparer)
    vars(shadowing.identifier_preparer).update(vars(plain))
    return shadowing
