"""Checks before the first append or read: the server's settings, and the tables as they are in the database.

Each look uses the current connection, and statements that do not fail if something is missing: a failing statement
would end the user's transaction, and a pool may have no second connection. A server's settings are looked at once for
each connection of the driver, tables once, and both again after any error. The command ``check`` makes the same looks.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...exceptions import UnsafeTableError
from .driver import Driver
from .event_tables import COLUMN_VALUES, EVENT_COLUMNS, METADATA_COLUMNS, POSITION, VERSION, VERSION_KEY, EventTable

Use = Literal["read", "append", "describe", "recall"]
"""``describe`` is to append with what is stored beside an event's state, and ``recall`` to read that."""
USES: tuple[Use, ...] = ("read", "append", "describe", "recall")
APPEND: tuple[Use, ...] = ("append", "describe")
BESIDE: tuple[Use, ...] = ("describe", "recall")

FAMILIES = {
    "text": "char character varchar nchar nvarchar text tinytext mediumtext longtext clob",
    "bytes": "binary varbinary blob tinyblob mediumblob longblob bytea",
    "integer": "tinyint smallint mediumint int integer bigint int2 int4 int8 serial bigserial",
    "uuid": "uuid",
    "time": "datetime timestamp",
    "json": "json jsonb",
    "number": "numeric decimal real float double",
    "truth": "boolean bool",
}
FAMILY = {word: family for family, words in FAMILIES.items() for word in words.split()}
SAME = {"integer": "int", "int4": "int", "int8": "bigint", "character": "char"}
LOOK_LASTS = 1.0
"""Seconds for which the result of a look is used."""
KIND = re.compile(r"([a-z0-9]+)( varying)?\s*(?:\((\d+)[^)]*\))?")


class FoundColumn(NamedTuple):
    """A column in the database."""

    name: str
    kind: str
    """The type, as the database writes it."""
    nullable: bool
    is_given: bool
    """Whether the database provides a value: a default, or the next number."""
    collation: str | None = None


class FoundTable(NamedTuple):
    """A table in the database."""

    columns: Mapping[str, FoundColumn]
    engine: str | None = None
    lacking: frozenset[str] = frozenset()
    """The rights that the role of the connection lacks."""
    role: str = ""
    keys: Collection[frozenset[str]] = ()
    """The columns of each unique key that the database checks at once and for all rows."""


class Finding(NamedTuple):
    """A difference from what the package expects, with the remedy."""

    text: str
    refuses: Sequence[Use] = ()
    """The error of a use that would lose events, and is refused."""
    error: type[Exception] = UnsafeTableError
    is_fault: bool = True
    """Whether ``check`` fails because of it. Other differences are only named."""
    leaves_out: bool = False
    """Whether appends leave the columns of metadata out: the table is one of the library's, which has none of them."""
    may_grow: bool = False
    """Whether a migration that is adding these columns to such a table may be under way."""


class MissingOptions(NamedTuple):
    """The options that a connection lacks, in the settings of another framework that makes it."""

    text: str
    lines: str
    """To be pasted."""


class Kind(NamedTuple):
    """A type of the database, taken apart."""

    family: str
    word: str
    length: int | None

    @classmethod
    def of(cls, text: str) -> Kind:
        """Take a type apart as any of the databases writes it; PostgreSQL can be set to quote every name."""
        found = KIND.match(text.lower().replace('"', ""))
        if found is None:
            return cls("", text, None)
        word = ("varchar" if found[2] else SAME.get(found[1], found[1])) or ""
        return cls(FAMILY.get(word, ""), word, int(found[3]) if found[3] else None)


class Seen:
    """The results of the looks on a connection of the driver."""

    KEY = "flask_eventsourcing.seen"

    def __init__(self, scope: Any = None) -> None:
        self.names: dict[Use, set[str]] = {use: set() for use in USES}
        self.scope = scope
        """What the connection's names are names in: its database, or the version of its schema."""
        self.findings: list[Finding] = []
        """The findings about the settings."""
        self.until: float = 0.0
        self.there: set[str] = set()
        """Tables that exist, as long as the rest holds."""
        self.longest = 0
        """How many bytes a statement may have, or 0 where there is no limit."""


class Looks(Driver):
    """Looks at settings and tables; part of every dialect."""

    equal_families: ClassVar[frozenset[frozenset[str]]] = frozenset()
    """Pairs of families of types that hold each other's values."""
    compares_lengths: ClassVar[bool] = True
    every_table_options: ClassVar[Mapping[str, Any]] = {}
    """Keyword arguments of each ``Table``."""

    looks_again: bool = True
    """Whether a look may be repeated after a time, so that the number of statements differs."""

    @cached_property
    def looked_at(self) -> dict[tuple[Any, str], list[Finding]]:
        """What was found, by what a name was a name in and the name."""
        return {}

    @cached_property
    def _grow_until(self) -> dict[tuple[Any, str], float]:
        """Until when tables without columns of metadata may have some of them, in seconds of the monotonic clock."""
        return {}

    @classmethod
    def missing_options(cls, name: str, options: Mapping[str, Any]) -> Iterable[MissingOptions]:
        """Return the settings for connections that another framework makes.

        :param name: of the database, and the *options* of its connections as that framework takes them.
        """
        return ()

    @classmethod
    def needs_transaction(cls, statement: str) -> bool:
        """Whether a statement needs a transaction. One that only reads does not where a transaction would lock."""
        return True

    def found_table(self, connection: Connection, table: sa.Table) -> FoundTable | None:
        """Return a table as it is in the database, or None where there is none of that name."""
        raise NotImplementedError

    def is_there(self, connection: Connection, table: sa.Table) -> bool:
        """Whether a table's name means one on a connection."""
        return self.found_table(connection, table) is not None

    def found_settings(self, connection: Connection, seen: Seen) -> Iterable[Finding]:
        """Look at the settings of the server, or the session, and return what would lose events."""
        return ()

    def found_more(self, connection: Connection, table: sa.Table, found: FoundTable) -> Iterable[Finding]:
        """Return what else is wrong with a table."""
        return ()

    def scope(self, connection: Connection) -> Any:
        """Return what the connection's names are names in."""
        return None

    def lasting(self, scope: Any) -> Any:
        """Return what of a scope stays the same when the schema changes."""
        return scope

    # ------------------------------------------------------------------------------------------------- the looks

    def look(self, connection: Connection, table: EventTable, use: Use) -> None:
        """Look at the tables of a log, unless that was done on this connection before.

        :raises PersistenceError: where an event would be lost, with the remedy.
        """
        seen = connection.info.get(Seen.KEY)
        if seen is None or table.name not in seen.names[use]:
            self._look(connection, table, use)

    def _look(self, connection: Connection, table: EventTable, use: Use) -> None:
        seen = self._seen(connection)
        refuse(seen.findings, use)
        findings = self.looked_at.get((seen.scope, table.name))
        # After a refusal, each use looks again, so that a correction is noticed.
        if findings is None or any(use in each.refuses for each in findings):
            findings = self._growing((self.lasting(seen.scope), table.name), self.findings_of(connection, table))
        refuse(findings, use)
        self.looked_at[seen.scope, table.name] = findings
        seen.names[use].add(table.name)
        connection.info[Seen.KEY] = seen

    def _growing(self, key: tuple[Any, str], findings: list[Finding]) -> list[Finding]:
        """Go on without the columns of metadata until a table that had none of them has all, in every thread's look."""
        now, until = time.monotonic(), self._grow_until
        if any(each.leaves_out for each in findings):
            until[key] = math.inf
        elif key in until and not any(each.may_grow for each in findings):
            until[key] = min(until[key], now + LOOK_LASTS)
        elif now < until.get(key, 0):
            return [each._replace(refuses=(), leaves_out=True) if each.may_grow else each for each in findings]
        return findings

    def _seen(self, connection: Connection) -> Seen:
        seen: Seen | None = connection.info.get(Seen.KEY)
        if seen is None:
            seen = Seen(self.scope(connection))
            seen.findings = list(self.found_settings(connection, seen))
        return seen

    def leaves_out_metadata(self, connection: Connection, table: EventTable) -> bool:
        """Whether the table has none of the columns of metadata, as its look has found."""
        if not self._grow_until:
            return False
        return any(each.leaves_out for each in self.looked_at.get((self._seen(connection).scope, table.name), ()))

    def look_again(self, connection: Connection, table: EventTable, use: Use) -> None:
        """Look at the tables of a log again."""
        self.looked_at.pop((self._seen(connection).scope, table.name), None)
        self._look(connection, table, use)

    def forget_looks(self, connection: Connection) -> None:
        """Look again before the next append or read: there was an error."""
        self.looked_at.clear()
        if not (connection.closed or connection.invalidated):
            connection.info.pop(Seen.KEY, None)

    def findings_of(self, connection: Connection, table: EventTable) -> list[Finding]:
        """Look at the tables of a log.

        :raises MissingTableError: when the table itself is not there.
        """
        found = self.found_table(connection, table.table)
        if found is None:
            raise self.missing(table.table.fullname)
        findings = [*self.differences(table.table, found), *self.found_more(connection, table.table, found)]
        for other in self.others_of(table):
            there = self.found_table(connection, other)
            if there is not None:
                findings += [*self.differences(other, there), *self.found_more(connection, other, there)]
        return findings

    def schema_of(self, connection: Connection, table: sa.Table) -> str | None:
        """Return the schema that a connection's ``schema_translate_map`` gives a table."""
        translate = connection.get_execution_options().get("schema_translate_map") or {}
        schema: str | None = translate.get(table.schema, table.schema)
        return schema

    def is_same_table(self, one: Connection, other: Connection, table: EventTable) -> bool:
        """Whether a table has one and the same meaning on two connections."""
        is_database = one.engine.pool is other.engine.pool or one.engine.url == other.engine.url
        return is_database and self.schema_of(one, table.table) == self.schema_of(other, table.table)

    def check_settings(self, connection: Connection) -> list[Finding]:
        """Return the findings of ``check`` about the settings."""
        return list(self.found_settings(connection, Seen()))

    def check_table(self, connection: Connection, table: sa.Table) -> list[Finding] | None:
        """Return the findings of ``check`` about a table, or None if it is missing."""
        found = self.found_table(connection, table)
        if found is None:
            return None
        findings = [*self.differences(table, found), *self.found_more(connection, table, found)]
        return findings or list(self.check_rights(connection, table))

    def check_rights(self, connection: Connection, table: sa.Table) -> Iterable[Finding]:
        """Try the statements of an append, without a row."""
        columns = [table.columns[name] for name in sorted(needed_columns(table))]
        if not columns:
            return
        nothing = sa.select(*columns).where(sa.false())
        statements: list[sa.Executable] = [sa.insert(table).from_select(columns, nothing)]
        if "application_name" in table.c:
            statements.append(sa.update(table).values({POSITION: table.c[POSITION]}).where(sa.false()))
        for statement in statements:
            try:
                connection.execute(statement)
            except sa.exc.DBAPIError as error:
                yield Finding(str(error.orig))

    def check_log(self, connection: Connection, table: EventTable) -> Iterable[Finding]:
        """Return the findings of ``check`` about the source of positions."""
        return ()

    def others_of(self, table: EventTable) -> list[sa.Table]:
        """Return the tables that an append reads or writes beside its own."""
        return [self.tables[name] for name in (table.counter, table.snapshots) if name is not None]

    def differences(self, table: sa.Table, found: FoundTable) -> list[Finding]:
        """Compare the columns of a table, as its class has them, with those in the database."""
        needed = needed_columns(table)
        refused = USES if needed else ()
        findings = []
        for column in table.columns:
            if column.name not in found.columns:
                lost = column.name in needed or not needed
                text = f"{table.fullname}.{column.name} is missing: {self._remedy(column, found)}"
                findings.append(Finding(text, refused, is_fault=True) if lost else _further(table, column, found, text))
        for column in table.columns:
            if column.name in found.columns:
                findings += self._difference(table, column, found.columns[column.name], column.name in needed)
        known = set(table.columns.keys()) | {column.name for column in table.columns}
        for each in found.columns.values():
            if needed and each.name not in known and not each.nullable and not each.is_given:
                text = (
                    f"{table.fullname}.{each.name} is NOT NULL and has no default, and events are inserted without it"
                )
                findings.append(Finding(f"{text}: give it a default in the database."))
        return [*findings, *keyless(table, found, needed)]

    def _remedy(self, column: sa.Column[Any], found: FoundTable) -> str:
        if column.name == POSITION and "id" in found.columns:
            return f"as in tables of eventsourcing-sqlalchemy; let a migration rename its id to {POSITION}."
        return f"let a migration add it, as {self._type_of(column)}."

    def _type_of(self, column: sa.Column[Any]) -> str:
        return str(column.type.compile(self.engine.dialect))

    def _difference(
        self, table: sa.Table, column: sa.Column[Any], found: FoundColumn, needed: bool
    ) -> Iterable[Finding]:
        wanted, there = Kind.of(self._type_of(column)), Kind.of(found.kind)
        text = f"{table.fullname}.{column.name} is {found.kind}, and not {self._type_of(column)}"
        if wanted.family != there.family:
            if wanted.family and frozenset((wanted.family, there.family)) not in self.equal_families:
                remedy = "make the table as the record class has it, or give the class the type of the column"
                yield Finding(f"{text}: {remedy}.", USES if needed else (), is_fault=needed)
        elif self.compares_lengths and self._is_shorter(wanted, there):
            yield Finding(f"{text}, which holds less.", is_fault=False)

    @staticmethod
    def _is_shorter(wanted: Kind, there: Kind) -> bool:
        if wanted.family == "integer":
            return wanted.word == "bigint" != there.word
        if wanted.word.endswith(("text", "blob")):
            return wanted.word != there.word and (there.length is not None or wanted.word.startswith("long"))
        return wanted.length is not None and there.length is not None and there.length < wanted.length


def needed_columns(table: sa.Table) -> frozenset[str]:
    """Return the columns that statements name in a table of events, snapshots or positions; else none."""
    columns = {column.name for column in table.columns}
    if set(EVENT_COLUMNS) <= columns:
        return frozenset((*EVENT_COLUMNS, POSITION)) & columns
    return frozenset(("application_name", POSITION)) if {"application_name", POSITION} <= columns else frozenset()


def _further(table: sa.Table, column: sa.Column[Any], found: FoundTable, text: str) -> Finding:
    """Return what a missing column means that is none of those without which there is no event."""
    if not {POSITION, *EVENT_COLUMNS} <= set(table.columns.keys()):
        return Finding(text, is_fault=False)
    if column.name in METADATA_COLUMNS:
        is_of_library = found.columns.keys().isdisjoint(METADATA_COLUMNS)
        if is_of_library:
            return Finding(text, is_fault=False, leaves_out=True)
        return Finding(text, BESIDE, may_grow=True)
    return Finding(text, BESIDE, is_fault=True) if COLUMN_VALUES in table.info else Finding(text, is_fault=False)


def keys_of(rows: Iterable[Sequence[Any]]) -> list[frozenset[str]]:
    """Return the columns of each key, of rows with the key's name and one of its columns."""
    found: dict[str, set[str]] = {}
    for name, column in rows:
        found.setdefault(name, set()).add(column)
    return [frozenset(columns) for columns in found.values()]


def keyless(table: sa.Table, found: FoundTable, needed: Collection[str]) -> Iterable[Finding]:
    """Return the finding if a version could be stored twice."""
    is_there = VERSION in needed and found.columns.keys() >= set(VERSION_KEY)
    if is_there and frozenset(VERSION_KEY) not in found.keys:
        key = f"UNIQUE ({', '.join(VERSION_KEY)})"
        text = f"Table {table.fullname} has no key {key}, so that a conflict of two writers would not be noticed"
        yield Finding(f"{text}: let a migration add it.", APPEND)


def refuse(findings: Iterable[Finding], use: Use) -> None:
    """Raise the error of a finding that refuses a use."""
    for each in findings:
        if use in each.refuses:
            raise each.error(each.text)
