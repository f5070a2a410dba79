"""What a rebuild needs of a database: shadow tables, what belongs to the live tables, and the swap.

Tables change their names only where the catalogs say that nothing is lost with that. Otherwise the rows of the live
tables are replaced in one transaction.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

NEW, OLD, TRIAL = "__new", "__old", "__trial"
"""What rebuilds append to the names of tables: for those that they build, have replaced, and try something with."""
LEFT = re.compile(rf"(?P<live>.+)(?P<suffix>{NEW}|{OLD}|{TRIAL}[0-9a-f]{{4}})")
"""The names of the tables that rebuilds make."""
OWN = {"flask_eventsourcing_own": True}
"""Execution options of textual statements that are this package's own."""
FIRST_WORD = re.compile(r"\s*(?:--[^\n]*\n\s*|/\*.*?\*/\s*)*(\w+)", re.S)
WRITES = {"INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "TRUNCATE", "COPY", "LOAD"}
WRITES_IN_WITH = re.compile(
    r"\b(?:INSERT\s+INTO|DELETE\s+FROM|MERGE\s+INTO|UPDATE(?=\s+(?:ONLY\s+)?\S+\s+SET\b))\s+(?:ONLY\s+)?([^\s(,;]+)",
    re.I,
)
TARGET = re.compile(r"\b(?:INTO|FROM|UPDATE|TABLE|TRUNCATE)\s+(?:ONLY\s+)?([^\s(,;]+)", re.I)
QUOTES = re.compile(r"[\"`\[\]]")


class Part(NamedTuple):
    """What a table has beside its columns and rows, as the catalogs say it.

    :param what: what messages call it.
    :param definition: what must be the same.
    :param columns: those that it is about, if it is about some.
    :param acts: whether it would do something of its own when rows are replaced.
    :param dependent: whether it is something else that depends on the table.
    """

    what: str
    definition: str = ""
    columns: frozenset[str] = frozenset()
    acts: bool = False
    dependent: bool = False

    def without(self, suffix: str) -> Part:
        """Return it as it would be called at a table without a suffix."""
        return self._replace(what=self.what.replace(suffix, ""), definition=self.definition.replace(suffix, ""))


class ForSwaps:
    """The part of a dialect that rebuilds use."""

    engine: Engine
    longest_name = 63
    """The longest name of a table, a constraint or an index."""
    counts = "characters"
    """What that limit counts."""
    swaps_in_transaction = True
    """Whether tables change their names in a transaction that does other things too."""
    refuses_old_snapshot = False
    """Whether a transaction that began before tables were swapped sees the new ones as they were at its beginning."""
    overriding: ClassVar[str] = ""
    """What lets an INSERT give values to columns that the database fills."""

    def limit_ddl_waiting(self, connection: Connection, seconds: int) -> None:
        """Limit how long DDL waits for users of a table, until the transaction or the connection ends."""

    def qualified(self, table: sa.Table, name: str) -> str:
        """Return the quoted name of what is in the schema of a table."""
        quote = self.engine.dialect.identifier_preparer.quote
        return f"{quote(table.schema)}.{quote(name)}" if table.schema else quote(name)

    # ------------------------------------------------------------------------------------- shadow tables

    def name_shadow(self, table: sa.Table, shadow: sa.Table, suffix: str) -> None:
        """Name the indexes and constraints of a copy of a table after those of the original, with a suffix."""
        names, copied = {index.name for index in table.indexes}, {index.name for index in shadow.indexes}
        # By their columns, where the copy has a name that is made of the table's: a column has one such index.
        made = {(i.unique, *i.columns.keys()): i.name for i in table.indexes if i.name not in copied}
        for index in shadow.indexes:
            of_table = index.name not in names
            original = made.get((index.unique, *index.columns.keys()), index.name) if of_table else index.name
            index.name = sa.sql.quoted_name(self.shadow_index_name(str(original), suffix), None)
        for constraint in shadow.constraints:
            self.name_shadow_constraint(constraint, suffix)

    def shadow_index_name(self, name: str, suffix: str) -> str:
        """Return the name of an index of a shadow table; here they are unique in the schema."""
        return f"{name}{suffix}"

    def fitting(self, name: str, suffix: str) -> str:
        """Return a name with a suffix; one that would be too long is shortened, and differs from any other."""
        if self.fits(f"{name}{suffix}"):
            return f"{name}{suffix}"
        end = f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}{suffix}"
        while not self.fits(f"{name}{end}"):
            name = name[:-1]
        return f"{name}{end}"

    def fits(self, name: str) -> bool:
        """Whether a name is not too long."""
        return len(name.encode() if self.counts == "bytes" else name) <= self.longest_name

    def name_shadow_constraint(self, constraint: sa.Constraint, suffix: str) -> None:
        """Name a constraint of a shadow table; here its name may be that of the original."""

    def shadow_key_name(self, name: Any) -> Any:
        """Return the name of a foreign key of a shadow table; here it may be that of the original."""
        return name

    # ------------------------------------------------------------------------------------- what there is

    def columns_of(self, connection: Connection, table: sa.Table) -> set[str]:
        """Return the columns that a table has in the database."""
        query = f"SELECT * FROM {self.qualified(table, table.name)} WHERE 1 = 0"
        return set(connection.exec_driver_sql(query).keys())

    def parts_of(self, connection: Connection, table: sa.Table, name: str) -> Collection[Part]:
        """Return what a table has that is not in a new one by itself; *name* is that of the table or of a shadow."""
        raise NotImplementedError

    def referrers(self, connection: Connection, table: sa.Table) -> Collection[str]:
        """Return the names of the tables that have a foreign key to a table."""
        found = sa.inspect(connection).get_multi_foreign_keys(schema=table.schema)
        return {name for (_, name), keys in found.items() if any(key["referred_table"] == table.name for key in keys)}

    def holders(self, tables: Sequence[sa.Table], seconds: int) -> Sequence[str]:
        """Return the sessions that have used some tables for longer than some seconds, if the database shows them."""
        return ()

    # ------------------------------------------------------------------------------------- the end

    def swap_tables(self, connection: Connection, tables: Sequence[sa.Table], new: str, old: str) -> None:
        """Give tables the suffix *old*, and those with the suffix *new* their names."""
        for table in tables:
            self._rename_table(connection, table, table.name, table.name + old)
            self._rename_table(connection, table, table.name + new, table.name)
            self.rename_parts(connection, table, new, old)

    def _rename_table(self, connection: Connection, table: sa.Table, name: str, renamed: str) -> None:
        quoted = self.engine.dialect.identifier_preparer.quote(renamed)
        connection.exec_driver_sql(f"ALTER TABLE {self.qualified(table, name)} RENAME TO {quoted}")

    def rename_parts(self, connection: Connection, table: sa.Table, new: str, old: str) -> None:
        """Give what belongs to swapped tables, and has not changed its name with them, the names to be expected."""

    def replace_rows(self, connection: Connection, tables: Sequence[sa.Table], new: str) -> None:
        """Replace the rows of tables, which stand in the order of their foreign keys, by those of the new ones."""
        self.copy_rows(connection, tables, new)
        for table in tables:
            self.go_on_counting(connection, table, new)

    def copy_rows(self, connection: Connection, tables: Sequence[sa.Table], new: str, where: str = "") -> None:
        """Delete rows, and insert those of the new tables.

        :param where: a condition, to see whether it could be done.
        """
        for table in reversed(tables):
            statement = f"DELETE FROM {self.qualified(table, table.name)}{where}"
            connection.exec_driver_sql(statement, execution_options=OWN)
        quote = self.engine.dialect.identifier_preparer.quote
        for table in tables:
            columns = ", ".join(quote(column.name) for column in table.columns if column.computed is None)
            statement = (
                f"INSERT INTO {self.qualified(table, table.name)} ({columns}){self.overriding} "
                f"SELECT {columns} FROM {self.qualified(table, table.name + new)}{where}"
            )
            connection.exec_driver_sql(statement, execution_options=OWN)

    def put_off_keys(self, connection: Connection) -> None:
        """Have foreign keys looked at with the commit, where tables may refer to each other in a circle."""

    def broken_keys(self, connection: Connection, tables: Sequence[sa.Table]) -> Collection[str]:
        """Return the foreign keys that copied rows break, if the database has not checked them; here it has."""
        return ()

    def gather_statistics(self, connection: Connection, table: sa.Table, name: str) -> None:
        """Have the planner know the rows of a shadow table; here it does by itself."""

    def go_on_counting(self, connection: Connection, table: sa.Table, new: str) -> None:
        """Let a table give no value again that the new one has given; where it sees what is inserted, it does so."""

    # ------------------------------------------------------------------------------------- taken from elsewhere

    def go_on_behind(self, connection: Connection, events: sa.Table, tracking: sa.Table, position: int) -> None:
        """Let a log give only positions behind one; here its table sees what is inserted."""


# --------------------------------------------------------------------------------------------- what statements write


def written_tables(statement: str, context: Any) -> Iterator[sa.TableClause | str]:
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
        if isinstance(element, sa.UpdateBase) and isinstance(element.table, sa.TableClause):
            yield element.table


def _plain_name(name: str) -> str:
    return QUOTES.sub("", name).rpartition(".")[2]
