"""PostgreSQL: reads the catalog for a table's columns, its sequence, and the role's rights on them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from typing import Any, NamedTuple

import sqlalchemy as sa
from eventsourcing.persistence import OperationalError, PersistenceError
from sqlalchemy.engine import Connection

from ...exceptions import (
    MissingRightError,
    MissingTableError,
    UnsafeSequenceError,
    UnsafeSettingError,
    UnsafeTableError,
)
from .base import Dialect
from .event_tables import POSITION, VERSION
from .looks import APPEND, USES, Finding, FoundColumn, FoundTable, Seen
from .postgresql_drivers import is_outdated, search_path_of
from .postgresql_statements import DROPPED

CONFORMING = "standard_conforming_strings"
NOT_CONFORMING = (
    f"With the server's setting {CONFORMING} = off, psycopg would change the states of events that are saved together: "
    f"set it to on, for the database or with SQLALCHEMY_ENGINE_OPTIONS = "
    f"{{'connect_args': {{'options': '-c {CONFORMING}=on'}}}}."
)
ONLY_READS = (
    "Transactions may only read here, as on a standby or with default_transaction_read_only = on, so no event can be "
    "saved."
)
KEPT_OUT = (
    "A trigger or rule of table {} has kept events out of it, as one that returns NULL does, so none of them were "
    "saved: drop it, or let it raise an error."
)
RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")

# A name that means nothing is NULL here, where ``::regclass`` would end the transaction.
NAMED = """
(SELECT CASE WHEN %s::text IS NULL THEN to_regclass(quote_ident(%s::text))::oid ELSE (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s
) END AS oid)"""

SEQUENCE = f"""
pg_depend d JOIN pg_attribute p ON p.attrelid = d.refobjid AND p.attnum = d.refobjsubid AND p.attname = '{POSITION}'
JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S' JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_sequence s ON s.seqrelid = c.oid
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')"""

LOOK = f"""
SELECT t.oid::bigint, (
    SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = t.oid
) AS qualified, s.name, s.short, s.is_found, (
    SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = to_regclass(%s) AND (SELECT source FROM pg_settings WHERE name = 'search_path') <> 'session'
) AS elsewhere
FROM {NAMED} AS t LEFT JOIN (
    SELECT d.refobjid, format('%%I.%%I', n.nspname, c.relname) AS name, c.relname AS short,
           to_regclass(quote_ident(c.relname)) = c.oid AS is_found
    FROM {SEQUENCE}
) AS s ON s.refobjid = t.oid"""

TABLE = f"""
SELECT t.oid::bigint, current_user::text, (
    SELECT json_agg(json_build_array(a.attname, format_type(a.atttypid, a.atttypmod), NOT a.attnotnull,
                                     a.atthasdef OR a.attidentity <> ''))
    FROM pg_attribute a WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
)::text AS columns, {", ".join(f"has_any_column_privilege(t.oid, '{right}') AS has_{right}" for right in RIGHTS[:3])},
       has_table_privilege(t.oid, 'DELETE') AS has_DELETE, (
    SELECT json_agg((SELECT json_agg(a.attname) FROM pg_attribute a
                     WHERE a.attrelid = t.oid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])))
    FROM pg_index i WHERE i.indrelid = t.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
                      AND i.indpred IS NULL AND i.indexprs IS NULL
)::text AS keys, (SELECT relpersistence::text FROM pg_class c WHERE c.oid = t.oid) AS persistence
FROM {NAMED} AS t"""

PROPERTIES = f"""
SELECT format('%%I.%%I', n.nspname, c.relname), s.seqcache, s.seqincrement, s.seqcycle,
       has_sequence_privilege(c.oid, 'USAGE') OR has_sequence_privilege(c.oid, 'UPDATE') AS may_draw,
       has_sequence_privilege(c.oid, 'SELECT') AS may_look, current_user::text
FROM {SEQUENCE} AND d.refobjid = {NAMED}"""


class Sequence(NamedTuple):
    """The sequence of the positions."""

    name: str
    cache: int
    increment: int
    cycle: bool
    may_draw: bool
    may_look: bool
    role: str


def as_found(row: Any) -> FoundTable | None:
    """Return a table of a row of :data:`TABLE`."""
    if row[0] is None or row[2] is None:
        return None
    columns = {name: FoundColumn(name, kind, nullable, given) for name, kind, nullable, given in json.loads(row[2])}
    lacking = frozenset(right for right, has in zip(RIGHTS, row[3:7], strict=True) if not has)
    keys = [frozenset(each) for each in json.loads(row[7] or "[]")]
    return FoundTable(columns, engine=row[8], lacking=lacking, role=row[1], keys=keys)


def rights(table: sa.Table, name: str, found: FoundTable) -> Iterable[Finding]:
    """Return the findings for rights that the role lacks, of which an append or a read needs some."""
    is_of_events, is_tracking = VERSION in table.c, "application_name" in table.c
    for right in RIGHTS[: 2 if is_of_events else 3 if is_tracking else 4]:
        if right in found.lacking:
            refuses = () if not is_of_events else USES if right == "SELECT" and POSITION in table.c else APPEND
            grant = f"GRANT {right} ON {name} TO {found.role}"
            text = f"Role {found.role} lacks {right} on table {name}: {grant}"
            text += "." if is_of_events else ", if it is a worker's."
            yield Finding(text, refuses, MissingRightError, is_fault=is_of_events)


def passing(name: str, found: FoundTable) -> Iterable[Finding]:
    """Return what is wrong with a table that the server does not keep; tests use such ones, so nothing is refused."""
    if found.engine == "u":
        yield Finding(
            f"Table {name} is UNLOGGED, and the server empties it after a crash: ALTER TABLE {name} SET LOGGED."
        )
    if found.engine == "t":
        yield Finding(f"Table {name} is temporary, and goes with the connection: drop it, or change the search path.")


def sequence_findings(table_name: str, sequence: Sequence | None, *, needs_look: bool) -> Iterable[Finding]:
    """Return what is wrong with the sequence of a log."""
    if sequence is None:
        text = f"Column {POSITION} of table {table_name} has no sequence: make it a bigserial or identity column."
        yield Finding(text, USES, MissingTableError)
        return
    name, role = sequence.name, sequence.role
    if (sequence.cache, sequence.increment, sequence.cycle) != (1, 1, False):
        # Each connection would draw a range of positions in advance, below what others have committed by then.
        text = (
            f"Sequence {name} has CACHE {sequence.cache}, INCREMENT {sequence.increment}"
            f"{' and CYCLE' if sequence.cycle else ''}, with which readers could miss events: "
            f"ALTER SEQUENCE {name} INCREMENT 1 CACHE 1 NO CYCLE."
        )
        yield Finding(text, USES, UnsafeSequenceError)
    has = {"USAGE": sequence.may_draw, "SELECT": sequence.may_look or not needs_look}
    lacking = [right for right in has if not has[right]]
    if lacking:
        what = f"Role {role} lacks {' and '.join(lacking)} on sequence {name}, from which positions are drawn"
        yield Finding(f"{what}: GRANT USAGE, SELECT ON SEQUENCE {name} TO {role}.", APPEND, MissingRightError)


def behind(table_name: str, sequence: str, last: int | None, position: int | None) -> Iterable[Finding]:
    """Return what is wrong with the next number of a sequence, whose last one and the table's last are given."""
    if position is not None and position > (last or 0):
        text = (
            f"Sequence {sequence} stands at {last or 0}, behind position {position} of table {table_name}, so that "
            f"positions would be given twice: SELECT setval('{sequence}', {position})."
        )
        yield Finding(text, APPEND, UnsafeSequenceError)


class CatalogLooks(Dialect):
    """The part of PostgreSQL's dialect that looks."""

    def _special(self, driver_error: Any, text: str) -> PersistenceError | None:
        if (dropped := DROPPED.search(str(driver_error))) is not None:
            return UnsafeTableError(f"{KEPT_OUT.format(dropped[1])} To divide a large table, use PARTITION BY.")
        # Not what the server calls it: the same statement is prepared again, and succeeds.
        return OperationalError(text) if is_outdated(driver_error) else super()._special(driver_error, text)

    @classmethod
    def search_path(cls, driver_connection: Any) -> str | None:
        """Return its schemas, or None if it is closed."""
        return search_path_of(driver_connection)

    @classmethod
    def set_search_path(cls, driver_connection: Any, path: str) -> None:
        """Set it for the session."""
        with closing(driver_connection.cursor()) as cursor:
            cursor.execute("SELECT set_config('search_path', %s, false)", (path,))

    def found_settings(self, connection: Connection, seen: Seen) -> Iterable[Finding]:
        """Look at how psycopg would escape bytes within an array; the server tells it without being asked."""
        driver: Any = connection.connection.dbapi_connection
        if self.engine.driver == "psycopg" and driver.info.parameter_status(CONFORMING) == "off":
            yield Finding(NOT_CONFORMING, APPEND, UnsafeSettingError)

    def check_settings(self, connection: Connection) -> list[Finding]:
        """Look at whether anything can be written, too; that fails by itself, and tells no more."""
        findings = super().check_settings(connection)
        if self.fetch(connection, "SELECT current_setting('transaction_read_only')")[0][0] == "on":
            findings.append(Finding(ONLY_READS))
        return findings

    def place(self, connection: Connection, table: sa.Table) -> tuple[str | None, str, str | None, str]:
        """Return the parameters of :data:`NAMED`."""
        schema = self.schema_of(connection, table)
        return schema, table.name, schema, table.name

    def found_table(self, connection: Connection, table: sa.Table) -> FoundTable | None:
        """Return a table as the catalog has it."""
        return as_found(self.fetch(connection, TABLE, self.place(connection, table))[0])

    def found_more(self, connection: Connection, table: sa.Table, found: FoundTable) -> list[Finding]:
        """Look at rights and the sequence."""
        is_log = POSITION in table.c and VERSION in table.c
        name = self.name_of(connection, table)
        findings = [*rights(table, name, found), *passing(name, found)]
        if not is_log or POSITION not in found.columns:
            return findings
        rows = self.fetch(connection, PROPERTIES, self.place(connection, table))
        sequence = Sequence(*rows[0]) if rows else None
        needs = self.options.postgres_order == "advisory-lock"
        findings += sequence_findings(table.fullname, sequence, needs_look=needs)
        if sequence is not None and sequence.may_look and "SELECT" not in found.lacking:
            # The snapshot is taken first, so that what is drawn meanwhile is not taken for more than was drawn.
            last = "CASE WHEN is_called THEN last_value ELSE last_value - 1 END"
            statement = f"SELECT {last}, (SELECT max({POSITION}) FROM {self.name_of(connection, table)})"
            row = self.fetch(connection, f"{statement} FROM {sequence.name.replace('%', '%%')}")[0]
            findings += behind(table.fullname, sequence.name, *row)
        return findings

    def check_rights(self, connection: Connection, table: sa.Table) -> list[Finding]:
        """Return nothing more: the catalog has said it."""
        return []
