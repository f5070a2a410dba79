"""Rows of the log, and the store that keeps them: the few operations that the protocol needs of a database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import NamedTuple, Protocol
from uuid import UUID, uuid4

from eventsourcing.persistence import IntegrityError, StoredEvent, Tracking

BUCKET = 10_000
"""Positions in a partition of the log."""
MOST_EVENTS = BUCKET
"""Events in one save, and positions of one row: the row behind it begins in this bucket or in the next one."""

Key = UUID | str


class Upstream(NamedTuple):
    """An upstream application, whose position is checked like a version. No aggregate has a key of this type."""

    name: str


Subject = Key | Upstream
"""What a save is about."""


def bucket_of(position: int) -> int:
    """Return the bucket of a position."""
    return position // BUCKET


class NotDoneError(Exception):
    """The database has certainly not done the work."""


class MaybeDoneError(Exception):
    """It is unknown whether the database has done the work, or will do it."""


class Span(NamedTuple):
    """The versions of one aggregate in an append."""

    originator_id: Key
    first: int
    last: int


class Part(NamedTuple):
    """One append in a row."""

    id: UUID
    events: int
    """How many it has; without any it takes one position."""
    time: datetime | None = None
    metadata: Mapping[str, str] = {}
    upstream: str | None = None
    upstream_position: int | None = None

    @property
    def size(self) -> int:
        """How many positions it takes."""
        return max(1, self.events)


class Content(NamedTuple):
    """The content of an event without its aggregate and version."""

    topic: str
    state: bytes
    event_id: UUID | None = None


@dataclass(frozen=True)
class Append:
    """The events and the position that one save records."""

    events: Sequence[StoredEvent] = ()
    tracking: Tracking | None = None
    event_ids: Sequence[UUID | None] = ()
    time: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    id: UUID = field(default_factory=uuid4)

    @property
    def size(self) -> int:
        """How many positions it takes."""
        return max(1, len(self.events))

    def spans(self) -> list[Span]:
        """Return the versions of each aggregate.

        :raises IntegrityError: when the versions of one do not follow each other.
        """
        found: dict[Key, Span] = {}
        for event in self.events:
            key, version = event.originator_id, event.originator_version
            span = found.get(key) or Span(key, version, version - 1)
            if version != span.last + 1:
                raise IntegrityError(
                    f"In one save, version {version} of aggregate {key} comes after version {span.last}."
                )
            found[key] = span._replace(last=version)
        return list(found.values())

    @property
    def keys(self) -> set[Subject]:
        """The aggregates, and an upstream application, that it is about."""
        keys: set[Subject] = {event.originator_id for event in self.events}
        if self.tracking is not None:
            keys.add(Upstream(self.tracking.application_name))
        return keys

    @property
    def part(self) -> Part:
        """Its part of the row, without the events."""
        tracking = self.tracking
        upstream = (None, None) if tracking is None else (tracking.application_name, tracking.notification_id)
        return Part(self.id, len(self.events), self.time, self.metadata, *upstream)

    @property
    def contents(self) -> Iterator[Content]:
        """The rest of its events."""
        ids = self.event_ids or [None] * len(self.events)
        for event, event_id in zip(self.events, ids, strict=True):
            yield Content(event.topic, event.state, event_id)


@dataclass(frozen=True)
class Row:
    """A row of the log: one append, or several that threads of one process commit together."""

    position: int
    id: UUID
    size: int
    last_event: int
    """The position of the last event up to the end of this row, 0 if there is none yet."""
    parts: Sequence[Part]
    versions: Sequence[tuple[Key, int]]
    contents: Sequence[Content] | None = None
    """None where they were not read."""
    indexed: bool = False

    @property
    def end(self) -> int:
        """The position of the next row."""
        return self.position + self.size

    @property
    def keys(self) -> set[Subject]:
        """The aggregates and the upstream applications that it is about."""
        keys: set[Subject] = {key for key, _ in self.versions}
        return keys | {Upstream(part.upstream) for part in self.parts if part.upstream is not None}

    def located(self) -> Iterator[tuple[int, Key, int, int]]:
        """Yield the position, aggregate and version of each event, with the number of its part."""
        position, number = self.position, 0
        for at, part in enumerate(self.parts):
            for offset in range(part.events):
                yield position + offset, *self.versions[number], at
                number += 1
            position += part.size


def row_of(position: int, last_event: int, appends: Sequence[Append]) -> Row:
    """Return the row that records appends at a position."""
    at = position
    for append in appends:
        at += append.size
        if append.events:
            last_event = at - 1
    return Row(
        position=position,
        id=uuid4(),
        size=at - position,
        last_event=last_event,
        parts=[append.part for append in appends],
        versions=[(event.originator_id, event.originator_version) for append in appends for event in append.events],
        contents=[content for append in appends for content in append.contents],
    )


class StreamRow(NamedTuple):
    """A row of the table of streams."""

    originator_id: Key
    version: int
    position: int
    content: Content
    part: Part


def stream_rows(row: Row) -> Iterator[list[StreamRow]]:
    """Yield the events of a row, those of each aggregate together."""
    found = [
        StreamRow(key, version, position, content, row.parts[at])
        for (position, key, version, at), content in zip(row.located(), row.contents or (), strict=True)
    ]
    found.sort(key=lambda each: str(each.originator_id))
    for _, together in groupby(found, key=lambda each: each.originator_id):
        yield list(together)


class Horizon(NamedTuple):
    """A position below which every row is indexed, and that of the last event below it."""

    position: int = 1
    last_event: int = 0


class Store(Protocol):
    """Keeps the tables. It raises ``NotDoneError``, ``MaybeDoneError``, or an error that makes another try useless."""

    def insert(self, row: Row) -> Row | None:
        """Insert a row of the log, and return None; if its key is there, return the row that has it."""

    def read_rows(self, position: int, limit: int, *, states: bool) -> Sequence[Row]:
        """Read rows at or behind a position, without SERIAL: those of its bucket, or of the next one if it has none."""

    def read_row(self, position: int) -> Row | None:
        """Read one row of the log with SERIAL, which sees inserts whose outcome is still open."""

    def row_before(self, position: int) -> int | None:
        """Find the last row at or before a position, without SERIAL."""

    def last_version(self, originator_id: Key) -> int | None:
        """Read the last version in the table of streams."""

    def last_versions(self, originator_ids: Sequence[Key]) -> Mapping[Key, int]:
        """Read the last versions of several streams; a stream without events is left out."""

    def tracked(self, name: str) -> int | None:
        """Read the position up to which an upstream application was processed."""

    def has_snapshot(self, originator_id: Key, version: int) -> bool:
        """Whether there is a snapshot of a version."""

    def index(self, row: Row) -> None:
        """Write the rows that are derived from a row of the log."""

    def flag(self, row: Row) -> None:
        """Note that the derived rows are written, without waiting for the nodes."""

    def read_horizon(self) -> Horizon:
        """Read the horizon."""

    def move_horizon(self, horizon: Horizon) -> None:
        """Write the horizon, unless a later one is written already."""

    def now(self) -> float:
        """Return the seconds of a monotonic clock."""

    def sleep(self, seconds: float) -> None:
        """Wait."""
