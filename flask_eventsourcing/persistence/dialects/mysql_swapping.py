"""MariaDB and MySQL: reads the catalogs for the tables of a projection, and swaps them.

Views and privileges are theirs by the table's name, so that they stay when tables are renamed. Triggers go with the
renamed table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .calls import ask_on
from .mysql_looks import ORDER
from .swapping import OWN, ForSwaps, Part

COUNTER = re.compile(r" AUTO_INCREMENT=\d+")
QUOTED = re.compile(r"`((?:[^`]|``)+)`")
KEY = re.compile(r"(?:(?:UNIQUE |FULLTEXT |SPATIAL )?KEY|CONSTRAINT) `((?:[^`]|``)+)`")


class MySQLSwaps(ForSwaps):
    """The part of the dialect that rebuilds use."""

    clock: ClassVar[str] = "(utc_timestamp(6) + INTERVAL {:g} SECOND)"
    swaps_in_transaction = False
    refuses_old_snapshot = True

    def free_connections(self, connection: Connection) -> int | None:
        """Return what is left of ``max_connections``."""
        used = ask_on(connection, "SHOW GLOBAL STATUS LIKE 'Threads_connected'")
        return int(ask_on(connection, "SELECT @@max_connections")[0][0]) - int(used[0][1])

    def limit_ddl_waiting(self, connection: Connection, seconds: int) -> None:
        """Limit the waiting to the end of the connection."""
        connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {seconds}")

    def shadow_index_name(self, name: str, suffix: str) -> str:
        """Leave the name as it is: it is unique within the table."""
        return self.fitting(name, "")

    def name_shadow_constraint(self, constraint: sa.Constraint, suffix: str) -> None:
        """Take the names of checks away: they are unique in the schema."""
        if isinstance(constraint, sa.CheckConstraint):
            constraint.name = None

    def shadow_key_name(self, name: Any) -> Any:
        """Leave the name of a foreign key to the server: it is unique in the schema."""
        return None

    def parts_of(self, connection: Connection, table: sa.Table, name: str) -> Collection[Part]:
        """Read what the server says to make the table of, and what the catalogs say of its columns and triggers."""
        quoted = self.qualified(table, name)
        statement = connection.exec_driver_sql(f"SHOW CREATE TABLE {quoted}").one()[1]
        columns = connection.exec_driver_sql(_COLUMNS, (table.schema, name)).all()
        names = {column for column, *_ in columns}
        found = set(_of_statement(statement, names))
        for column, default, extra, collation, comment in columns:
            about = frozenset({column})
            values = {"default": default, "extras": extra, "collation": collation, "comment": comment}
            found |= {Part(f"the {what} of column {column}", str(v), about) for what, v in values.items() if v}
        triggers = connection.exec_driver_sql(_TRIGGERS, (table.schema, name)).all()
        return found | {Part(f"trigger {trigger}", acts=True) for (trigger,) in triggers}

    def referrers(self, connection: Connection, table: sa.Table) -> Collection[str]:
        """Return the names of the tables that have a foreign key to a table, in whatever schema."""
        return {name for (name,) in connection.exec_driver_sql(_REFERRERS, (table.schema, table.name))}

    def holders(self, tables: Sequence[sa.Table], seconds: int) -> Sequence[str]:
        """Return the connections with open transactions: the server does not say by default which tables these use."""
        with self.engine.connect() as connection:
            try:
                rows = connection.exec_driver_sql(_HOLDERS, (seconds,)).all()
            except sa.exc.DBAPIError:
                # A role without the right to see all processes is told nothing.
                return ()
        return [f"perhaps connection {number}, in a transaction since {since}" for number, since in rows]

    def swap_tables(self, connection: Connection, tables: Sequence[sa.Table], new: str, old: str) -> None:
        """Rename all tables in one statement, which commits."""
        renames = [
            f"{self.qualified(table, table.name)} TO {self.qualified(table, table.name + old)}, "
            f"{self.qualified(table, table.name + new)} TO {self.qualified(table, table.name)}"
            for table in tables
        ]
        connection.exec_driver_sql("RENAME TABLE " + ", ".join(renames))

    def copy_rows(self, connection: Connection, tables: Sequence[sa.Table], new: str, where: str = "") -> None:
        """Copy rows, which refer to each other as those of the new tables did: keys are looked at row by row."""
        connection.exec_driver_sql("SET @flask_eventsourcing_checks = @@SESSION.foreign_key_checks")
        connection.exec_driver_sql("SET SESSION foreign_key_checks = 0")
        try:
            super().copy_rows(connection, tables, new, where)
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SET SESSION foreign_key_checks = @flask_eventsourcing_checks")

    def broken_keys(self, connection: Connection, tables: Sequence[sa.Table]) -> Collection[str]:
        """Look at the keys of the live tables, which new ones may not have had, row by row."""
        quote, broken = self.engine.dialect.identifier_preparer.quote, []
        for table in tables:
            keys: dict[str, list[tuple[str, ...]]] = {}
            for name, *columns in connection.exec_driver_sql(_KEYS, (table.schema, table.name)):
                keys.setdefault(name, []).append(tuple(map(quote, columns)))
            for name, columns in keys.items():
                (schema, target), pairs = columns[0][2:], [each[:2] for each in columns]
                there = " AND ".join(f"t.{theirs} = r.{own}" for own, theirs in pairs)
                whole = " AND ".join(f"r.{own} IS NOT NULL" for own, _ in pairs)
                statement = _BROKEN.format(self.qualified(table, table.name), whole, f"{schema}.{target}", there)
                if connection.exec_driver_sql(statement).first() is not None:
                    broken.append(f"{table.name}: {name}")
        return broken

    def go_on_behind(self, connection: Connection, events: sa.Table, tracking: sa.Table, position: int) -> None:
        """Raise the row that counts; where there is none yet, it will begin where the table ends."""
        counter = self.qualified(tracking, tracking.name)
        connection.exec_driver_sql(_RAISED.format(counter), (position, ORDER), execution_options=OWN)


def _of_statement(statement: str, columns: set[str]) -> Iterator[Part]:
    """What stands in a CREATE TABLE beside the columns, each in a line of its own."""
    for line in map(str.strip, statement.splitlines()[1:]):
        text = line.rstrip(",")
        if text.startswith("`"):
            column, _, check = text[1:].partition("` ")[0], *text.partition(" CHECK (")[1:]
            if check:
                yield Part(f"the check of column {column}", check, frozenset({column}))
            continue
        key = KEY.match(text)
        if key is not None:
            about = frozenset(QUOTED.findall(text[key.end() :])) & columns
            yield Part(("constraint " if text.startswith("CONSTRAINT") else "index ") + key[1], text, about)
        else:
            yield Part("the primary key" if text.startswith("PRIMARY") else "the storage", COUNTER.sub("", text))


_RAISED = "UPDATE {} SET notification_id = greatest(notification_id, %s) WHERE application_name = %s"

_COLUMNS = """
SELECT column_name, column_default, extra, collation_name, column_comment FROM information_schema.columns
WHERE table_schema = coalesce(%s, database()) AND table_name = %s"""

_TRIGGERS = """
SELECT trigger_name FROM information_schema.triggers
WHERE event_object_schema = coalesce(%s, database()) AND event_object_table = %s"""

_REFERRERS = """
SELECT DISTINCT table_name FROM information_schema.key_column_usage
WHERE referenced_table_schema = coalesce(%s, database()) AND referenced_table_name = %s"""

_KEYS = """
SELECT constraint_name, column_name, referenced_column_name, referenced_table_schema, referenced_table_name
FROM information_schema.key_column_usage
WHERE table_schema = coalesce(%s, database()) AND table_name = %s AND referenced_table_name IS NOT NULL
ORDER BY constraint_name, ordinal_position"""

_BROKEN = "SELECT 1 FROM {} r WHERE {} AND NOT EXISTS (SELECT 1 FROM {} t WHERE {}) LIMIT 1"

_HOLDERS = """
SELECT trx_mysql_thread_id, trx_started FROM information_schema.innodb_trx
WHERE trx_mysql_thread_id <> connection_id() AND trx_started < now() - INTERVAL %s SECOND ORDER BY trx_started"""
