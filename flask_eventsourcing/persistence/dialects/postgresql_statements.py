"""The statements that keep PostgreSQL's log in order: floors, positions, the gate of blocks, the high-water mark.

``docs/ordering.md`` has the argument. In short: the floor is read before its lock is taken, and positions are drawn
after that. ``CASE`` and materialised CTEs force the order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from eventsourcing.persistence import StoredEvent

from .event_tables import (
    EVENT_COLUMNS,
    LATEST_FIRST_VERSION,
    POSITION,
    VERSION_KEY,
    Beside,
    EventTable,
    KnownLog,
    Shape,
    Snapshot,
    snapshot_in,
    transposed,
)

BLOCK_TRIES = 20
SHARED_TRIES = 5
"""Tries of a small block in which it keeps only large ones out."""
SMALL_BLOCK = 100
"""The most events whose positions are drawn beside others, in the statement that inserts them."""
UUID_LENGTH = 36
"""The characters of a UUID as text, with its hyphens."""
GATE = 0x67617465
"""The first of the two 32-bit keys of the gate; the second is the oid of the sequence."""

# A name without a schema means what the search path says, a tenant's table perhaps. What is known of a table holds for
# the one with its identity: if the name means another now, nothing is drawn.
# The key of the floor's lock: the table in its high 16 bits, as the low bits of the sequence's oid, and the floor in
# its low 48 bits.
_FLOOR = """pg_advisory_xact_lock_shared(
        (s.tableoid::bigint & 65535) << 48
        | coalesce(%s::bigint, CASE WHEN is_called THEN last_value ELSE last_value - 1 END)
    )"""

# Whether nobody draws a large block. The lock is given back within the expression, in which nothing else happens: no
# error, no end of a timeout and no cancellation can come between. It waits for nobody.
_CLOSED = """WHEN NOT pg_try_advisory_lock_shared({gate}, s.tableoid::int) THEN false
    WHEN NOT pg_advisory_unlock_shared({gate}, s.tableoid::int) THEN false"""

# What was drawn is inserted, also into an identity column that takes the server's own numbers only.
_DRAWN = "OVERRIDING SYSTEM VALUE"

_IF_ALLOWED = f"""CASE
    WHEN {{named}} <> %s::oid THEN false
    WHEN NOT ({{allowed}}) THEN false
    WHEN {_FLOOR} IS NULL THEN false
    {_CLOSED}
    {{notify}}
    ELSE true END
RETURNING {{position}}"""

# Where the driver prepares nothing, as Django's does, the server plans it each time: it has as few subqueries and
# comparisons as the usual cases need. What it refuses, the next one looks at more closely.
_APPEND_SOON = f"""
INSERT INTO {{table}} ({{position}}, {{columns}}) {_DRAWN}
SELECT nextval({{regclass}}), {{marks}} FROM {{sequence}} AS s WHERE {_IF_ALLOWED}"""

_APPEND_ONE = f"""
INSERT INTO {{table}} ({{position}}, {{columns}}) {_DRAWN}
SELECT nextval({{regclass}}), e.* FROM {{sequence}} AS s, (SELECT {{values}}) AS e WHERE {_IF_ALLOWED}"""

_HELD = f"""
WITH held AS MATERIALIZED (
    SELECT s.tableoid, {_FLOOR} FROM {{sequence}} AS s WHERE {{named}} = %s::oid
), gap AS MATERIALIZED (
    SELECT e.place FROM held, unnest({{key_arrays}}) WITH ORDINALITY AS e ({{key}}, place)
    WHERE NOT CASE WHEN e.originator_version <= {{latest_first}} THEN {{follows_or_begins}} ELSE {{follows}} END LIMIT 1
)"""

DROPPED = re.compile(r"flask_eventsourcing_dropped (.+) \d+")
"""What the server's error has if a statement has inserted fewer events than it was given, with the table's name."""


def _complete(first: str) -> str:
    """Return an expression that ends the statement with an error if it did not insert all of its events.

    A trigger that returns NULL keeps a row out and raises nothing. It is the server that is to fail, as what the
    statement did insert must not be kept either. A text that is known before the rows would be cast too early.
    """
    return f"""CASE WHEN {first} IS NOT NULL AND (SELECT count(*) FROM inserted) < %s::bigint
    THEN ('flask_eventsourcing_dropped ' || {{named}}::text || ' ' || {first})::int END"""


_PLACE = "flask_eventsourcing_place"
"""A name that no column of a user's record class has."""

_ROWS = f"""unnest({{arrays}}) WITH ORDINALITY AS e ({{each}}, {_PLACE})"""

# The ids of one append must be contiguous. They are drawn in one go, and if another writer drew one in between,
# nothing is inserted and the caller goes to the gate: a gap in the positions does no harm. A gap in a stream does: ids
# are drawn only if each event whose predecessor is not among those to be inserted finds it in the tables.
_APPEND_BLOCK = f"""{_HELD}, allowed AS MATERIALIZED (
    SELECT FROM held AS s WHERE CASE
    WHEN EXISTS (SELECT FROM gap) THEN false
    {_CLOSED}
    {{notify}}
    ELSE true END
), drawn AS MATERIALIZED (
    SELECT nextval({{regclass}}) AS id FROM allowed, generate_series(1, %s::int)
), block AS MATERIALIZED (
    SELECT min(id) AS first FROM drawn HAVING max(id) - min(id) = count(*) - 1
), inserted AS (
    INSERT INTO {{table}} ({{position}}, {{columns}}) {_DRAWN}
    SELECT block.first + e.{_PLACE} - 1, {{selected}} FROM block, {_ROWS}
    RETURNING 1
)
SELECT (SELECT first FROM block), {_complete("(SELECT first FROM block)")} FROM held"""

_LOOK_FOR_GAP = f"{_HELD} SELECT (SELECT place FROM gap) FROM held"

# The lock of the gate goes with the inner block, which is rolled back at once; what was drawn stays drawn. Whatever
# ends the statement, an error, a timeout, a cancellation or the end of the connection, gives the lock back too, as it
# is the transaction's. Writers that draw few positions do not lock each other out.
_DRAW = """
DO $flask_eventsourcing$
DECLARE
    lowest bigint;
    highest bigint;
    drawn text := '';
BEGIN
    FOR attempt IN 1..{tries} LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '{milliseconds}', true);
            IF attempt <= {shared_tries} THEN
                PERFORM pg_advisory_xact_lock_shared({gate}, {regclass}::oid::int);
            ELSE
                PERFORM pg_advisory_xact_lock({gate}, {regclass}::oid::int);
            END IF;
            SELECT min(id), max(id) INTO lowest, highest
            FROM (SELECT nextval({regclass}) AS id FROM generate_series(1, {count})) AS ids;
            RAISE SQLSTATE 'FE001';
        EXCEPTION WHEN SQLSTATE 'FE001' THEN
            IF highest - lowest = {count} - 1 THEN
                drawn := lowest::text;
            END IF;
        END;
        EXIT WHEN drawn <> '';
    END LOOP;
    PERFORM set_config('flask_eventsourcing.drawn', drawn, true);
END
$flask_eventsourcing$"""

_INSERT_DRAWN = f"""
WITH block AS MATERIALIZED (
    SELECT nullif(current_setting('flask_eventsourcing.drawn'), '')::bigint AS first
), allowed AS MATERIALIZED (
    SELECT first FROM block WHERE CASE WHEN first IS NULL THEN false {{notify}} ELSE true END
), inserted AS (
    INSERT INTO {{table}} ({{position}}, {{columns}}) {_DRAWN}
    SELECT allowed.first + e.{_PLACE} - 1, {{selected}} FROM allowed, {_ROWS}
    RETURNING 1
)
SELECT first, {_complete("first")} FROM block"""

# The order matters: ``high`` is read first, then the locks; the rows are read by a later statement. A writer that
# slips in between the two draws ids above ``high``.
_HIGH_WATER_MARK = """
WITH high AS MATERIALIZED (
    SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END AS position,
           tableoid::bigint & 65535 AS key
    FROM {sequence}
)
SELECT least(high.position, (
    SELECT min(((l.classid::bigint & 65535) << 32) | l.objid::bigint)
    FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.classid::bigint >> 16 = high.key
      {own}
)), current_setting('transaction_isolation'), pg_is_in_recovery(), {named}::oid::bigint
FROM high"""

# What has no process is prepared: it is found by the lock of its transaction id. Of the processes of other roles, only
# one with the rights of pg_read_all_stats is told the time.
_WRITER = """
SELECT l.pid, p.gid, extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8,
       a.usename::text, a.state
FROM {sequence} AS s JOIN pg_locks l ON l.classid::bigint >> 16 = s.tableoid::bigint & 65535
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
LEFT JOIN pg_locks x ON l.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
    AND x.virtualtransaction = l.virtualtransaction
LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
ORDER BY 3 DESC NULLS LAST LIMIT 1"""

ARRAY = "[]"
"""The end of the names of arrays' types."""

_MADE = {
    "first": _APPEND_SOON,
    "next": _APPEND_SOON,
    "begin": _APPEND_ONE,
    "follow": _APPEND_ONE,
    "block": _APPEND_BLOCK,
    "gap": _LOOK_FOR_GAP,
    "drawn": _INSERT_DRAWN,
    "mark": _HIGH_WATER_MARK,
    "joined mark": _HIGH_WATER_MARK,
    "writer": _WRITER,
}


def make_statement(
    table: EventTable, log: KnownLog, how: str, compiled: Callable[[Any], str], shape: Shape, *, quiet: bool
) -> str:
    """Return the statement of a use, which is a key of ``_MADE``.

    :param compiled: makes the name of a column's type.
    :param shape: the columns that it fills beside those of an event; the values that all of its events have come first.
    :param quiet: whether no notification is sent.
    """
    snapshot = None
    if table.snapshots is not None:
        snapshot = snapshot_in(log.snapshots) if log.snapshots is not None else _snapshot_if_there(table.snapshots)
    kinds = {name: compiled(table.table.c[name].type) for name in EVENT_COLUMNS}
    each = dict(zip(shape.each, shape.kinds, strict=False))
    shared = dict(zip(shape.shared, shape.kinds[len(each) :], strict=True))
    event = ("e.originator_id", "e.originator_version")
    follows = table.follows(*event, begins=how == "begin", snapshot=snapshot)
    return _MADE[how].format(
        table=table.name,
        position=POSITION,
        columns=shape.columns,
        each=", ".join([*kinds, *each]),
        selected=", ".join([*map(_selected, (kinds | each).items()), *(f"%s::{kind}" for kind in shared.values())]),
        marks=", ".join(f"%s::{kind}" for kind in (*kinds.values(), *shape.kinds)),
        allowed=_surely_follows(table, how, snapshot, kinds) if how in ("first", "next") else follows,
        values=", ".join(f"%s::{kind} AS {name}" for name, kind in {**kinds, **each, **shared}.items()),
        arrays=", ".join(f"%s::{_row_kind(kind)}[]" for kind in (*kinds.values(), *each.values())),
        key=", ".join(VERSION_KEY),
        key_arrays=", ".join(f"%s::{kinds[name]}[]" for name in VERSION_KEY),
        latest_first=LATEST_FIRST_VERSION,
        follows=follows,
        follows_or_begins=table.follows(*event, begins=True, snapshot=snapshot),
        sequence=log.sequence,
        regclass=regclass(log.sequence),
        named=regclass(table.name),
        gate=GATE,
        # The channel has the name that the library's own module gives it, so that its subscribers are woken too.
        notify="" if quiet else f"WHEN pg_notify({literal(_doubled(table.table.name))}, '') IS NULL THEN false",
        own="AND l.pid IS DISTINCT FROM pg_backend_pid()" if how == "joined mark" else "",
    )


def _row_kind(kind: str) -> str:
    # Of arrays of arrays there would be no row for each.
    return "TEXT" if kind.endswith(ARRAY) else kind


def _selected(column: tuple[str, str]) -> str:
    name, kind = column
    return f"e.{name}::{kind}" if kind.endswith(ARRAY) else f"e.{name}"


def _surely_follows(table: EventTable, how: str, snapshot: Snapshot | None, kinds: dict[str, str]) -> str:
    """Return a condition that needs fewer looks; one of another use lets the rest follow.

    A new aggregate has neither events nor snapshots. Any other event mostly has the one before it.
    """
    originator_id, version = (f"%s::{kinds[name]}" for name in VERSION_KEY)
    exists = f"EXISTS (SELECT FROM {table.name} AS p WHERE p.originator_id = {originator_id}"
    if how == "next":
        return f"{exists} AND p.originator_version = {version} - 1)"
    return f"NOT {exists})" if snapshot is None else f"NOT {exists}) AND NOT {snapshot(originator_id, None)}"


def _snapshot_if_there(name: str) -> Snapshot:
    """Return what makes the condition for a snapshot in a table that may be missing.

    A statement that names a missing table fails, and one tenant of a search path may have it where another has not. The
    only function of every server that runs a query given as a text, and only where the name means something, is one
    that counts words.
    """

    def condition(originator_id: str, version: str | None) -> str:
        query = "SELECT ''a''::tsvector FROM %%s WHERE originator_id = %%L"
        values = f"to_regclass({literal(name)}), {originator_id}"
        if version is not None:
            query, values = f"{query} AND originator_version = %%s", f"{values}, {version}"
        found = f"EXISTS (SELECT FROM ts_stat(format('{query} LIMIT 1', {values})))"
        return f"CASE WHEN to_regclass({literal(name)}) IS NULL THEN false ELSE {found} END"

    return condition


def key_arrays(table: EventTable, events: Sequence[StoredEvent]) -> list[Any]:
    """Return the parameters of the columns of ``VERSION_KEY``."""
    ids, versions = transposed(table.row(event)[: len(VERSION_KEY)] for event in events)
    return [_of_uuids(ids) if table.accepted.id_class is UUID else ids, versions]


def row_arrays(table: EventTable, values: Beside) -> list[Any]:
    """Return the parameters of the columns that have a value of each event."""
    columns: list[Any] = list(values.columns)
    if table.accepted.id_class is UUID:
        columns[0] = _of_uuids(columns[0])
    for number, kind in zip(range(len(EVENT_COLUMNS), len(columns)), values.shape.kinds, strict=False):
        if kind == "UUID":
            columns[number] = _of_uuids(columns[number])
        elif kind.endswith(ARRAY):
            columns[number] = [None if value is None else _array_text(value) for value in columns[number]]
    return columns


def _array_text(value: Any) -> str:
    """Return an array, or what is in it, as PostgreSQL reads it."""
    if isinstance(value, list | tuple):
        return f"{{{','.join(map(_array_text, value))}}}"
    if value is None:
        return "NULL"
    # Drivers have wrappers for bytes.
    raw = getattr(value, "obj", getattr(value, "adapted", value))
    text = f"\\x{bytes(raw).hex()}" if isinstance(raw, bytes | bytearray | memoryview) else str(value)
    return '"{}"'.format(text.replace("\\", "\\\\").replace('"', '\\"'))


def _of_uuids(column: list[Any]) -> Any:
    """Return UUIDs as the text of an array: the driver would look into each of a list for what is to be quoted.

    A text of this length has no second UUID in it, whatever else it has.
    """
    is_plain = set(map(type, column)) == {str} and set(map(len, column)) == {UUID_LENGTH}
    return f"{{{','.join(column)}}}" if is_plain else column


def make_draw(log: KnownLog, count: int, lock_timeout: float) -> str:
    """Return what draws contiguous positions at the gate, waiting up to *lock_timeout* seconds for it."""
    return _DRAW.format(
        tries=BLOCK_TRIES,
        shared_tries=SHARED_TRIES if count <= SMALL_BLOCK else 0,
        milliseconds=max(1, int(lock_timeout * 1000)),
        gate=GATE,
        regclass=regclass(log.sequence),
        count=count,
    )


def regclass(name: str) -> str:
    """Return what names a table or a sequence in an expression."""
    return f"{literal(name)}::regclass"


def literal(text: str) -> str:
    """Return a text as a literal."""
    return "'" + text.replace("'", "''") + "'"


def _doubled(name: str) -> str:
    # As in the quoted names: the drivers' placeholders begin with it.
    return name.replace("%", "%%")
