"""Tables beside the live ones: made, written instead of them, and at the end of a rebuild put in their place.

What a session executes on a shadow connection names the shadow tables, because the statements are compiled by a
dialect of its own. Handlers need not know.

At the end, with the live row locked, what the live projection has applied by then is applied, and the tables change
their names: where the database can, in one transaction. Where renaming commits, the state ``swapping`` is committed
before, and the next process that looks sees by the tables whether the renaming came to pass.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex, CreateTable

from ..exceptions import HandlerError, RebuildError
from ..host import Host
from ..persistence import Datastore, Dialect
from ..persistence.dialects import is_outage
from .applying import Applier
from .checkpoint import ACTIVE, SWAPPING, CheckpointRow
from .consumers import Consumer
from .pages import LogPages

logger = logging.getLogger(__name__)

NEW, OLD, TRIAL = "__new", "__old", "__trial"
TRIES = 30
PATIENCE = 2
"""Seconds for which the swap waits for readers of the live tables, as others queue behind it meanwhile."""
NEAR = 1000
"""How many positions before the end of the log the swap may begin; the rest is applied while the live one waits."""


@dataclass(frozen=True)
class ShadowTables:
    """The tables whose names are those of some live tables with a suffix."""

    datastore: Datastore
    live: Sequence[sa.Table]
    suffix: str

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
                _redirect(shadow, constraint, owned, self.suffix)
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

    def drop(self, connection: Connection) -> list[str]:
        """Drop those that there are, and return their names; nothing but tables is dropped."""
        dropped = [table for table in reversed(sa.schema.sort_tables(self.live)) if self._exists(connection, table)]
        for table in dropped:
            connection.exec_driver_sql(f"DROP TABLE {self._quoted(table)}")
        return [table.name + self.suffix for table in dropped]

    def any_exist(self, connection: Connection) -> bool:
        """Whether there is one of them."""
        return any(self._exists(connection, table) for table in self.live)

    def all_exist(self, connection: Connection) -> bool:
        """Whether there is each of them."""
        return all(self._exists(connection, table) for table in self.live)

    def count_rows(self, connection: Connection) -> list[int]:
        """Count the rows of each, in the order of the live tables."""
        query = "SELECT count(*) FROM {}"
        return [connection.exec_driver_sql(query.format(self._quoted(t))).scalar_one() for t in self.live]

    @contextmanager
    def session(self, host: Host) -> Iterator[orm.Session]:
        """Within the host's context, a current session that writes these tables instead of the live ones."""
        with _connect(self.datastore, self.tables) as connection, host.using(connection) as session:
            yield session

    def _exists(self, connection: Connection, table: sa.Table) -> bool:
        return sa.inspect(connection).has_table(table.name + self.suffix, schema=table.schema)

    def _quoted(self, table: sa.Table) -> str:
        return self.datastore.dialect.qualified(table, table.name + self.suffix)


def _check(tables: Sequence[sa.Table], suffix: str, dialect: Dialect) -> None:
    for table in tables:
        if len(table.name) + len(suffix) > dialect.longest_name:
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


def _connect(datastore: Datastore, shadows: Mapping[str, sa.Table]) -> Connection:
    connection = datastore.engine.connect()
    connection.dialect = _redirected(datastore.engine.dialect, shadows)
    text = re.compile("|".join(rf"\b{re.escape(key.rpartition('.')[2])}\b" for key in shadows))

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


@dataclass(frozen=True)
class Swapped:
    """What a swap has done: the events that were missing, and the rows of each table before and after."""

    position: int
    events: int
    rows: dict[str, tuple[int, int]]


class Swap:
    """Ends a rebuild.

    :param stop: ends the tries.
    """

    def __init__(self, live: Consumer, stop: threading.Event) -> None:
        self.live = live
        self.rebuild = live.of_kind("rebuild")
        self.stop = stop
        self.application = live.application
        self.new, self.old = (ShadowTables(self.application.datastore, live.tables, suffix) for suffix in (NEW, OLD))

    def run(self) -> Swapped:
        """Swap, and try again where readers of the live tables keep them locked.

        :raises RebuildError: when the counts of events differ.
        """
        at_once = self.application.datastore.dialect.swaps_in_transaction
        tries = 1
        while True:
            try:
                return self._at_once() if at_once else self._in_steps()
            except Exception as error:
                # An outage ends; anything else is raised, and the live tables are as they were.
                settle(self.live)
                if not is_outage(error) or tries == TRIES or self.stop.wait(1):
                    raise
                logger.warning("%s: the swap is tried again: %s", self.rebuild.name, error)
            tries += 1

    def _at_once(self) -> Swapped:
        host = self.application.host
        with host.context(), self.new.session(host) as session, host.transaction():
            connection = host.unit_of(session).connection()
            if self.live.projection_class.inline:
                self._lock_log(connection)
            swapped = self._finish(connection)
            self._rename(connection)
            hand_over(self.live, self.rebuild, connection)
            return swapped

    def _in_steps(self) -> Swapped:
        host, engine = self.application.host, self.application.engine
        with engine.connect() as lock, lock.begin():
            if self.live.projection_class.inline:
                # Held over all of the steps, so that no event is saved that only the old tables have.
                self._lock_log(lock)
            with host.context(), self.new.session(host) as session, host.transaction():
                connection = host.unit_of(session).connection()
                swapped = self._finish(connection)
                self.live.checkpoint.set_state(connection, SWAPPING)
            with engine.connect() as connection:
                connection.detach()
                self._rename(connection)
            with engine.begin() as connection:
                hand_over(self.live, self.rebuild, connection)
        return swapped

    def _lock_log(self, connection: Connection) -> None:
        recorder = self.application.recorder
        recorder.dialect.lock_log(connection, recorder.events_table)

    def _rename(self, connection: Connection) -> None:
        dialect = self.application.datastore.dialect
        dialect.limit_ddl_waiting(connection, PATIENCE)
        self.old.drop(connection)
        dialect.swap_tables(connection, self.live.tables, NEW, OLD)

    def _finish(self, connection: Connection) -> Swapped:
        """Lock the live row, apply what is missing, and compare the counts."""
        live = self.live.checkpoint.lock(connection)
        row = self.rebuild.checkpoint.read(connection)
        if row is None:
            raise RebuildError(f"Another process has finished the rebuild of {self.live.name}.")
        end = self.application.high_water_mark()
        if not self.live.projection_class.inline:
            # The live one may be ahead of a log that was restored.
            end = min(end, live.position)
        applier, pages, events = Applier(self.rebuild), LogPages(self.rebuild, row), 0
        while row.position < end:
            page = pages.read(row.position, NEAR, end)
            row = applier.apply(row, page.events, page.position)
            events += len(page.events)
        self._verify(connection, row)
        before = ShadowTables(self.application.datastore, self.live.tables, "").count_rows(connection)
        counts = zip(before, self.new.count_rows(connection), strict=True)
        names = (table.name for table in self.live.tables)
        return Swapped(row.position, events, dict(zip(names, counts, strict=True)))

    def _verify(self, connection: Connection, row: CheckpointRow) -> None:
        found = self.live.count_events(connection, 0, row.position)
        failed, _ = self.application.dead_letters.count(connection, self.rebuild.name)
        if found != row.applied + failed:
            raise RebuildError(
                f"The rebuild of {self.live.name} has applied {row.applied} events and set {failed} aside, but the "
                f"log has {found} up to position {row.position}: the live tables stay as they are; begin anew, with "
                "--restart."
            )


def hand_over(live: Consumer, rebuild: Consumer, connection: Connection) -> None:
    """Give the live projection the position and the dead letters of its rebuild, which ends with that."""
    row = rebuild.checkpoint.read(connection)
    if row is None:
        raise RebuildError(f"The rebuild of {live.name} has no row.")
    letters = live.application.dead_letters
    letters.remove_all(connection, live.name)
    letters.rename(connection, rebuild.name, live.name)
    live.checkpoint.take_from(connection, live.checkpoint.lock(connection), row)
    rebuild.checkpoint.remove(connection)


def settle(live: Consumer) -> None:
    """Finish, or take back, a swap in steps that was interrupted."""
    row = live.checkpoint.read()
    if row is None or row.state != SWAPPING:
        return
    with live.application.engine.begin() as connection:
        if live.checkpoint.lock(connection).state != SWAPPING:
            return
        if ShadowTables(live.application.datastore, live.tables, NEW).any_exist(connection):
            live.checkpoint.set_state(connection, ACTIVE)
        else:
            hand_over(live, live.of_kind("rebuild"), connection)
