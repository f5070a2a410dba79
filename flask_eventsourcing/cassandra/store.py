"""The tables of an application in Cassandra, as the protocol uses them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC
from typing import Any, NamedTuple

from cassandra.query import UNSET_VALUE, BatchStatement, BatchType
from eventsourcing.persistence import StoredEvent

from ..metadata import CORRELATION_ID
from .connecting import Connection
from .errors import SaveTooLargeError, translated
from .rows import Content, Horizon, Key, MaybeDoneError, NotDoneError, Part, Row, StreamRow, bucket_of, stream_rows
from .schema import TABLES, table

BATCH_BYTES = 40 * 1024
"""The most bytes that are written to a stream at once: nodes refuse batches of 50 KiB."""
MOST_BYTES = 64 * 2**20
"""The most bytes of one save: nodes end the connection after 128 MiB, and the outcome would be unknown."""
AT_ONCE = 256
"""How many writes are sent together: the nodes must answer each of them in time."""
FIRST_PAGE, LONGEST_PAGE = 64, 128
"""Rows of a stream in one answer, at first and at most: a node holds all of them in memory, and each may be large."""
PAGE_BYTES = 2 * 2**20
"""The bytes of states after which the next answer has fewer rows."""
FEWER = 8
"""After an answer that was late, the next one has this many times fewer rows, because they may be large."""
EVENT_BYTES = 200
"""The bytes of an event beside its state and texts, roughly. The correlation id is stored twice."""


class Statements(NamedTuple):
    """The statements for the tables of an application."""

    insert: str
    read_rows: str
    read_rows_with_states: str
    read_row: str
    row_before: str
    flag: str
    unflag: str
    write_event: str
    last_version: str
    last_versions: str
    write_tracking: str
    tracked: str
    read_horizon: str
    move_horizon: str
    snapshot: str
    write_snapshot: str
    select: str


LIGHT = "position, row_id, size, last_event, appends, versions, indexed"
STREAM = "originator_id, originator_version, topic, state"
CQL = Statements(
    insert=(
        "INSERT INTO {log} (bucket, position, row_id, size, last_event, appends, versions, events) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) IF NOT EXISTS USING TTL 0"
    ),
    read_rows="SELECT {light} FROM {log} WHERE bucket = ? AND position >= ? LIMIT ?",
    read_rows_with_states="SELECT {light}, events FROM {log} WHERE bucket = ? AND position >= ? LIMIT ?",
    read_row="SELECT {light}, events FROM {log} WHERE bucket = ? AND position = ?",
    row_before="SELECT position, row_id FROM {log} WHERE bucket = ? AND position <= ? ORDER BY position DESC LIMIT 1",
    flag="UPDATE {log} USING TTL 0 SET indexed = true WHERE bucket = ? AND position = ?",
    unflag="DELETE indexed FROM {log} WHERE bucket = ? AND position = ? IF row_id = null",
    write_event=(
        "INSERT INTO {events} ({stream}, notification_id, event_id, recorded_at, metadata, correlation_id) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) USING TTL 0 AND TIMESTAMP ?"
    ),
    last_version=(
        "SELECT originator_version FROM {events} WHERE originator_id = ? ORDER BY originator_version DESC LIMIT 1"
    ),
    last_versions=(
        "SELECT originator_id, originator_version FROM {events} WHERE originator_id IN ? "
        "ORDER BY originator_version DESC PER PARTITION LIMIT 1"
    ),
    write_tracking=(
        "INSERT INTO {tracking} (application_name, notification_id) VALUES (?, ?) USING TTL 0 AND TIMESTAMP ?"
    ),
    tracked="SELECT notification_id FROM {tracking} WHERE application_name = ?",
    read_horizon="SELECT horizon, last_event FROM {state} WHERE id = 'log'",
    move_horizon="INSERT INTO {state} (id, horizon, last_event) VALUES ('log', ?, ?) USING TTL 0 AND TIMESTAMP ?",
    snapshot="SELECT originator_version FROM {snapshots} WHERE originator_id = ? AND originator_version = ?",
    write_snapshot="INSERT INTO {snapshots} ({stream}) VALUES (?, ?, ?, ?) USING TTL 0",
    select="SELECT {stream} FROM {purpose} WHERE originator_id = ?",
)
"""What is derived has the position as its time: a write, however late, never replaces what is newer. Nothing expires,
whatever the tables have as their default."""


class CassandraStore:
    """Keeps the log of one application and what is derived from it.

    :param connection: how the nodes are reached.
    :param prefix: what the names of the tables begin with.
    """

    def __init__(self, connection: Connection, prefix: str) -> None:
        self.connection = connection
        self._names = {each: table(connection.settings, prefix, each) for each in TABLES}
        names = self._names | {"light": LIGHT, "stream": STREAM, "purpose": "{purpose}"}
        self._cql = Statements(*(each.format(**names) for each in CQL))

    def _bind(self, cql: str, values: Sequence[Any]) -> Any:
        return self.connection.prepare(cql).bind(values)

    def _one(self, cql: str, *values: Any, consistency: int | None = None, size: int = 0) -> Any:
        with translated(size):
            statement = self._bind(cql, values)
            return self.connection.execute(statement, consistency=consistency, timeout=self.connection.timeout).one()

    def _all(self, cql: str, *values: Any) -> Any:
        with translated():
            return list(self.connection.execute(self._bind(cql, values), timeout=self.connection.timeout))

    def insert(self, row: Row) -> Row | None:
        """Insert a row of the log, and return None; if its key is there, return the row that has it."""
        contents = row.contents or ()
        size = sum(len(each.state) for each in contents)
        if size > MOST_BYTES:
            raise SaveTooLargeError(f"A save of {size} bytes is too large: {MOST_BYTES} are sent at most. Save less.")
        values = (
            bucket_of(row.position),
            row.position,
            row.id,
            row.size,
            row.last_event,
            [tuple(part) for part in row.parts],
            row.versions,
            contents,
        )
        found = self._one(self._cql.insert, *values, size=size)
        if found.applied:
            return None
        if found.row_id is None:
            # The flag is left of a log that was emptied: it was written after that.
            self._one(self._cql.unflag, bucket_of(row.position), row.position)
            raise NotDoneError(f"position {row.position} had a flag without a row")
        return _row(found)

    def read_rows(self, position: int, limit: int, *, states: bool) -> Sequence[Row]:
        """Read rows at or behind a position, without SERIAL: those of its bucket, or of the next one if it has none."""
        cql = self._cql.read_rows_with_states if states else self._cql.read_rows
        bucket = bucket_of(position)
        found = self._all(cql, bucket, position, limit) or self._all(cql, bucket + 1, position, limit)
        # A node may have the flag of a row, and not yet the row.
        return [_row(each) for each in found if each.row_id is not None]

    def read_row(self, position: int) -> Row | None:
        """Read one row of the log with SERIAL, which sees inserts whose outcome is still open."""
        serial = self.connection.serial_consistency
        found = self._one(self._cql.read_row, bucket_of(position), position, consistency=serial)
        return None if found is None or found.row_id is None else _row(found)

    def row_before(self, position: int) -> int | None:
        """Find the last row at or before a position, without SERIAL."""
        bucket = bucket_of(position)
        for each in (bucket, bucket - 1):
            at = position
            while (found := self._one(self._cql.row_before, each, at)) is not None:
                if found.row_id is not None:
                    return int(found.position)
                # A flag without a row.
                at = found.position - 1
        return None

    def last_version(self, originator_id: Key) -> int | None:
        """Read the last version in the table of streams."""
        found = self._one(self._cql.last_version, originator_id)
        return None if found is None else int(found.originator_version)

    def last_versions(self, originator_ids: Sequence[Key]) -> Mapping[Key, int]:
        """Read the last versions in the table of streams with one request."""
        with translated():
            statement = self._bind(self._cql.last_versions, [list(originator_ids)])
            # Cassandra does not sort an answer in pages.
            statement.fetch_size = None
            found = list(self.connection.execute(statement, timeout=self.connection.timeout))
        return {each.originator_id: int(each.originator_version) for each in found}

    def tracked(self, name: str) -> int | None:
        """Read the position up to which an upstream application was processed."""
        found = self._one(self._cql.tracked, name)
        return None if found is None else int(found.notification_id)

    def has_snapshot(self, originator_id: Key, version: int) -> bool:
        """Whether there is a snapshot of a version."""
        return self._one(self._cql.snapshot, originator_id, version) is not None

    def index(self, row: Row) -> None:
        """Write the rows that are derived from a row of the log; those of one aggregate in their order."""
        try:
            self._write(row, BATCH_BYTES)
        except SaveTooLargeError:
            # These nodes accept only smaller batches. The events are in the log, so they must be written.
            self._write(row, 0)

    def _write(self, row: Row, batch_bytes: int) -> None:
        streams = [list(self._batches(each, batch_bytes)) for each in stream_rows(row)]
        tracking = [
            self._bind(self._cql.write_tracking, (part.upstream, part.upstream_position, part.upstream_position))
            for part in row.parts
            if part.upstream is not None
        ]
        # A batch of a stream is sent after the one before it is written, so that a reader never sees a gap.
        pending: list[Sequence[Any]] = [*streams, *([each] for each in tracking)]
        step = 0
        while pending:
            statements = [each[step] for each in pending]
            for first in range(0, len(statements), AT_ONCE):
                with translated():
                    self.connection.execute_all(statements[first : first + AT_ONCE], self.connection.timeout)
            step += 1
            pending = [each for each in pending if len(each) > step]

    def _batches(self, events: Sequence[StreamRow], batch_bytes: int = BATCH_BYTES) -> Iterator[Any]:
        batch: list[Any] = []
        size = 0
        for each in events:
            weight = _weight(each)
            if batch and size + weight > batch_bytes:
                yield _batch(batch)
                batch, size = [], 0
            batch.append(self._bind(self._cql.write_event, _stream_values(each)))
            size += weight
        if batch:
            yield _batch(batch)

    def flag(self, row: Row) -> None:
        """Note that the derived rows are written. It does not wait for the nodes, and ignores their errors."""
        # To prepare the statement may fail. Without its flag, a row is only indexed again.
        with suppress(NotDoneError, MaybeDoneError), translated():
            self.connection.session.execute_async(self._bind(self._cql.flag, (bucket_of(row.position), row.position)))

    def read_horizon(self) -> Horizon:
        """Read the horizon."""
        found = self._one(self._cql.read_horizon)
        return Horizon() if found is None else Horizon(found.horizon, found.last_event)

    def move_horizon(self, horizon: Horizon) -> None:
        """Write the horizon, unless a later one is written already."""
        self._one(self._cql.move_horizon, *horizon, horizon.position)

    def now(self) -> float:
        """Return the seconds of a monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def select(
        self, purpose: str, originator_id: Key, gt: int | None, lte: int | None, *, desc: bool, limit: int | None
    ) -> list[StoredEvent]:
        """Read events or snapshots of an aggregate."""
        cql = self._cql.select.format(purpose=self._names[purpose])
        values: list[Any] = [originator_id]
        for condition, value in (("> ?", gt), ("<= ?", lte)):
            if value is not None:
                cql += f" AND originator_version {condition}"
                values.append(value)
        if desc:
            cql += " ORDER BY originator_version DESC"
        if limit is not None:
            cql += " LIMIT ?"
            values.append(limit)
        return [StoredEvent(*each) for each in self._pages(cql, values)]

    def _pages(self, cql: str, values: Sequence[Any]) -> Iterator[Any]:
        """Yield rows that have a state, in answers that are small enough to come in time."""
        rows, state = FIRST_PAGE, None
        while True:
            try:
                with translated():
                    statement = self._bind(cql, values)
                    statement.fetch_size = rows
                    found = self.connection.execute(statement, timeout=self.connection.timeout, paging_state=state)
            except (NotDoneError, MaybeDoneError):
                if rows == 1:
                    raise
                rows = max(1, rows // FEWER)
                continue
            page, state = list(found.current_rows), found.paging_state
            yield from page
            if state is None:
                return
            size = sum(len(each.state) for each in page)
            rows = max(1, rows // 2) if size > PAGE_BYTES else min(2 * rows, LONGEST_PAGE)

    def write_snapshot(self, snapshot: StoredEvent) -> None:
        """Write a snapshot; one of the same version is replaced."""
        values = (snapshot.originator_id, snapshot.originator_version, snapshot.topic, snapshot.state)
        self._one(self._cql.write_snapshot, *values, size=len(snapshot.state))


def _batch(statements: Sequence[Any]) -> Any:
    if len(statements) == 1:
        return statements[0]
    batch = BatchStatement(BatchType.UNLOGGED)
    for statement in statements:
        batch.add(statement)
    return batch


def _weight(each: StreamRow) -> int:
    """Return the bytes of an event in a batch, roughly."""
    texts = [each.content.topic, str(each.originator_id), *each.part.metadata, *each.part.metadata.values()]
    return EVENT_BYTES + len(each.content.state) + sum(len(text.encode()) for text in texts)


def _stream_values(each: StreamRow) -> tuple[Any, ...]:
    content, part = each.content, each.part
    return (
        each.originator_id,
        each.version,
        content.topic,
        content.state,
        each.position,
        _set(content.event_id),
        _set(part.time),
        _set(part.metadata or None),
        _set(part.metadata.get(CORRELATION_ID)),
        each.position,
    )


def _set(value: Any) -> Any:
    # Cassandra would write a null as a tombstone.
    return UNSET_VALUE if value is None else value


def _row(found: Any) -> Row:
    contents = getattr(found, "events", None)
    return Row(
        position=found.position,
        id=found.row_id,
        size=found.size,
        last_event=found.last_event,
        parts=[_part(*each) for each in found.appends],
        versions=found.versions or (),
        contents=[Content(*each) for each in contents or ()] if hasattr(found, "events") else None,
        indexed=bool(found.indexed),
    )


def _part(part_id: Any, events: int, moment: Any, metadata: Any, upstream: str | None, position: int | None) -> Part:
    aware = moment if moment is None else moment.replace(tzinfo=UTC)
    return Part(part_id, events, aware, dict(metadata or {}), upstream, position)
