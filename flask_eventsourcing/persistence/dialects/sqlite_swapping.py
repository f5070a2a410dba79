"""SQLite: reads the catalog, for the log and for the tables of a projection, and swaps these."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex

from ...exceptions import UnsafeSequenceError, UnsafeTableError
from .looks import APPEND, Finding
from .swapping import OWN, ForSwaps, Part

SPACE = re.compile(r"\s+")
NAMED = re.compile(r"\bCONSTRAINT\s+(\"[^\"]+\"|\S+)", re.I)
COLLATED = re.compile(r"\bCOLLATE\s+\"?(\w+)", re.I)
NAMES = re.compile(r"[\"`\[\]]")
IGNORES = re.compile(r"\bINSERT\s+ON\b.*\bRAISE\s*\(\s*IGNORE\s*\)", re.I | re.S)
"""What a trigger has that keeps rows out of its table without an error."""
WITHOUT_AUTOINCREMENT = (
    "Table {0} has lost its AUTOINCREMENT, so the position of a deleted event would be used again, and readers could "
    "miss events: let a migration create the table again, in Alembic's batch mode with batch_alter_table({0!r}, "
    "recreate='always', table_kwargs={{'sqlite_autoincrement': True}})."
)
IGNORED = (
    "Trigger {} of table {} may keep events out of it without an error, by RAISE(IGNORE), so that they would be lost: "
    "drop it, or let it raise an error, by RAISE(ABORT, '…')."
)


def texts_of(schema: str) -> str:
    """Return the query for the texts of a table and its triggers, in a schema of that quoted name."""
    kinds = "type IN ('table', 'trigger')"
    return f"SELECT type, name, sql FROM {schema}.sqlite_master WHERE {kinds} AND tbl_name = ? COLLATE NOCASE"


def log_findings(table_name: str, texts: Iterable[Any]) -> Iterator[Finding]:
    """Return what is wrong with a log, as the rows of :func:`texts_of` tell."""
    for kind, name, text in texts:
        if kind == "trigger" and IGNORES.search(text) is not None:
            yield Finding(IGNORED.format(name, table_name), APPEND, UnsafeTableError)
        elif kind == "table" and "AUTOINCREMENT" not in text.upper():
            yield Finding(WITHOUT_AUTOINCREMENT.format(table_name), APPEND, UnsafeSequenceError)


class SQLiteSwaps(ForSwaps):
    """The part of the dialect that rebuilds use."""

    def parts_of(self, connection: Connection, table: sa.Table, name: str) -> Collection[Part]:
        """Ask the catalog; *name* is that of the table or of a shadow."""
        inspector = sa.inspect(connection)
        found = {*_constraints(inspector, name), *self._unique(connection, name)}
        mentioned = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.I)
        for kind, part, owner, sql in connection.exec_driver_sql(_CATALOG).all():
            if kind == "trigger" and owner.lower() == name.lower():
                found.add(Part(f"trigger {part}", sql, acts=True))
            elif kind in ("trigger", "view") and mentioned.search(sql):
                found.add(Part(f"{kind} {part}", dependent=True))
            elif kind == "index" and owner.lower() == name.lower():
                text = SPACE.sub("", NAMES.sub("", sql)).lower()
                found.add(Part(f"index {part}", text, self._about(connection, part)))
        for column in inspector.get_columns(name):
            if column["default"] is not None:
                about = frozenset({column["name"]})
                found.add(Part(f"the default of column {column['name']}", str(column["default"]), about))
        return found

    def _unique(self, connection: Connection, name: str) -> Iterator[Part]:
        """Unique keys and the names of constraints; SQLAlchemy's way to them warns of indexes on expressions."""
        quoted = self.engine.dialect.identifier_preparer.quote_identifier(name)
        for _, index, _, origin, *_ in connection.exec_driver_sql(f"PRAGMA index_list({quoted})").all():
            if origin == "u":
                columns = self._about(connection, index)
                yield Part(f"unique key ({', '.join(sorted(columns))})", columns=columns)
        for kind, part, _, sql in connection.exec_driver_sql(_CATALOG).all():
            if kind == "table" and part.lower() == name.lower():
                yield from (Part(f"constraint {NAMES.sub('', called)}") for called in NAMED.findall(sql))
                yield Part("the storage", sql.rpartition(")")[2].strip().upper())
                yield Part("collations", " ".join(sorted(map(str.upper, COLLATED.findall(sql)))))

    def _about(self, connection: Connection, index: str) -> frozenset[str]:
        quoted = self.engine.dialect.identifier_preparer.quote_identifier(index)
        rows = connection.exec_driver_sql(f"PRAGMA index_info({quoted})")
        return frozenset(column for *_, column in rows if column is not None)

    def rename_parts(self, connection: Connection, table: sa.Table, new: str, old: str) -> None:
        """Make the indexes again: they cannot be renamed, and their names are unique in the database."""
        quote = self.engine.dialect.identifier_preparer.quote
        for index in table.indexes:
            connection.exec_driver_sql(f"DROP INDEX IF EXISTS {quote(str(index.name))}")
            connection.exec_driver_sql(f"DROP INDEX IF EXISTS {quote(f'{index.name}{new}')}")
            # The engine's dialect, as the connection's own may name the new table, which is the live one now.
            connection.exec_driver_sql(str(CreateIndex(index).compile(dialect=self.engine.dialect)))

    def copy_rows(self, connection: Connection, tables: Sequence[sa.Table], new: str, where: str = "") -> None:
        """Copy rows, which refer to each other as those of the new tables did: keys are looked at afterwards."""
        self.put_off_keys(connection)
        super().copy_rows(connection, tables, new, where)

    def put_off_keys(self, connection: Connection) -> None:
        """Do so to the end of the transaction, which otherwise begins with the first write."""
        driver: Any = connection.connection.dbapi_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")

    def broken_keys(self, connection: Connection, tables: Sequence[sa.Table]) -> Collection[str]:
        """Look at the keys of the live tables, if the connection does."""
        if not connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
            return ()
        quote = self.engine.dialect.identifier_preparer.quote_identifier
        found = (
            connection.exec_driver_sql(f"PRAGMA foreign_key_check({quote(table.name)})").first() for table in tables
        )
        return [f"{row[0]}: the key that refers to {row[2]}" for row in found if row is not None]

    def go_on_counting(self, connection: Connection, table: sa.Table, new: str) -> None:
        """Raise what ``AUTOINCREMENT`` has counted to."""
        if connection.exec_driver_sql(_HAS_COUNTERS).first() is not None:
            names = (table.name + new, table.name)
            connection.exec_driver_sql(_SET_COUNTER, names, execution_options=OWN)


def _constraints(inspector: sa.Inspector, name: str) -> Iterator[Part]:
    found: list[tuple[str, Any]] = [
        *(("foreign key", key) for key in inspector.get_foreign_keys(name)),
        *(("check", key) for key in inspector.get_check_constraints(name)),
        ("primary key", inspector.get_pk_constraint(name)),
    ]
    for what, key in found:
        columns = key.get("constrained_columns", key.get("column_names", ()))
        called = key.get("name") or ", ".join(columns) or key.get("sqltext", "")
        definition = {part: value for part, value in key.items() if part != "name"}
        yield Part(f"{what} {called}", repr(sorted(definition.items())), frozenset(columns))


_CATALOG = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL"
_HAS_COUNTERS = "SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'"
_SET_COUNTER = """
UPDATE sqlite_sequence SET seq = max(seq, coalesce((SELECT n.seq FROM sqlite_sequence n WHERE n.name = ?), 0))
WHERE name = ?"""
