"""The recorders of the ``eventsourcing`` library, on the log of an application in Cassandra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    IntegrityError,
    Notification,
    ProcessRecorder,
    StoredEvent,
    Subscription,
    Tracking,
    TrackingRecorder,
)

from ..exceptions import EventValueError, IdentifierTypeError
from ..lifecycle import PerProcess
from ..metadata import Metadata, MetadataBlock, Recorded, caused_by
from ..metadata.values import new_block, uuids_of
from ..tailing import LogSubscription, Waiter
from .connecting import Connection
from .reading import Reader
from .rows import Append, Key
from .store import CassandraStore
from .walking import Walker
from .writing import Writer

LARGEST = 2**63 - 1
MOST_ROWS = 2**31 - 1
"""What a limit can be."""
LONGEST_ID = 65_535
"""The most bytes of a key that the nodes accept."""
IdType = Literal["uuid", "text"]
OnRecorded = Callable[[str, Append, Sequence[int]], None]


class Parts:
    """The objects with which one process uses an application's log.

    :param connection: how the nodes are reached.
    :param prefix: what the names of the tables begin with.
    """

    def __init__(self, connection: Connection, prefix: str) -> None:
        patience = connection.settings.patience
        self.store: CassandraStore = CassandraStore(connection, prefix)
        self.walker: Walker = Walker(self.store, patience)
        self.writer: Writer = Writer(self.store, patience)
        self.reader: Reader = Reader(self.store, self.writer, patience)


class Log:
    """The log of one application, for all of its recorders.

    :param connection: how the nodes are reached.
    :param name: the application's.
    :param id_type: the type of the aggregates' ids.
    :param collect: returns the current metadata; None if no metadata are stored.
    :param on_recorded: called after each save with the application's name, what was saved, and its positions.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        *,
        id_type: IdType = "uuid",
        collect: Callable[[], Metadata] | None = None,
        on_recorded: OnRecorded | None = None,
    ) -> None:
        self.name: str = name
        self.id_type: IdType = id_type
        self._collect = collect
        self._on_recorded = on_recorded
        self._parts = PerProcess(lambda: Parts(connection, name.lower()))

    @property
    def parts(self) -> Parts:
        """The objects of this process."""
        return self._parts.get()

    def has(self, originator_id: Key) -> bool:
        """Whether an id has the type of the ids in the tables."""
        return isinstance(originator_id, UUID if self.id_type == "uuid" else str)

    def select(
        self, purpose: str, originator_id: Key, gt: int | None, lte: int | None, *, desc: bool, limit: int | None
    ) -> Sequence[StoredEvent]:
        """Read the rows of an aggregate in a table."""
        if not self.has(originator_id) or originator_id == "" or (limit is not None and limit <= 0):
            return []
        parts, limit = self.parts, None if limit is None else min(limit, MOST_ROWS)
        return parts.walker.repeat(
            lambda: parts.store.select(purpose, originator_id, _bounded(gt), _bounded(lte), desc=desc, limit=limit)
        )

    def append(self, events: Sequence[StoredEvent], tracking: Tracking | None = None) -> list[int]:
        """Append events, and return their positions.

        :raises IntegrityError: when another writer was first.
        :raises CommitOutcomeUnknownError: when it is unknown whether they were recorded.
        """
        for event in events:
            self.check(event)
        # Before it is queued: providers may read.
        append = Append(events, tracking) if self._collect is None else self._described(events, tracking)
        first = self.parts.writer.append(append)
        positions = list(range(first, first + len(events)))
        if self._on_recorded is not None:
            self._on_recorded(self.name, append, positions)
        return positions

    def _described(self, events: Sequence[StoredEvent], tracking: Tracking | None) -> Append:
        now = datetime.now(UTC)
        return Append(
            events=events,
            tracking=tracking,
            event_ids=uuids_of(new_block(), len(events)),
            # The nodes keep milliseconds.
            time=now.replace(microsecond=now.microsecond // 1000 * 1000),
            metadata=self._collect() if self._collect is not None and events else {},
        )

    def check(self, event: StoredEvent) -> None:
        """Check that an event can be stored, and read back unchanged.

        :raises IdentifierTypeError: for an id of another type than the tables'.
        :raises EventValueError: for a value that the nodes do not accept.
        """
        if not self.has(event.originator_id):
            raise IdentifierTypeError(
                f"The id {event.originator_id!r} is a {type(event.originator_id).__name__}, but the tables have ids of "
                f"type {self.id_type!r}: use such ids, or set ORIGINATOR_ID_TYPE before you create the tables."
            )
        if not 0 <= event.originator_version <= LARGEST:
            raise EventValueError(
                f"Version {event.originator_version} of aggregate {event.originator_id} cannot be stored: a version is "
                f"from 0 to {LARGEST}."
            )
        if not isinstance(event.state, bytes):
            raise EventValueError(
                f"The state of an event of aggregate {event.originator_id} is of type {type(event.state).__name__}: "
                "let the transcoder, or the mapper, return bytes."
            )
        _check_text(event.topic)
        if isinstance(event.originator_id, str):
            _check_text(event.originator_id)


def _check_text(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise EventValueError("A topic, an id or a name has an unpaired surrogate: use another one.") from None
    if not 0 < size <= LONGEST_ID:
        raise EventValueError(f"A topic, an id or a name takes {size} bytes: use one of 1 to {LONGEST_ID} bytes.")


class CassandraAggregateRecorder(AggregateRecorder):
    """Records events of aggregates; they are in the log too."""

    def __init__(self, log: Log) -> None:
        self.log: Log = log

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Insert all of the events, or none.

        :raises IntegrityError: when another writer has recorded one of these versions.
        """
        if stored_events:
            self.log.append(stored_events)
        return None

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        """Read the events of an aggregate."""
        if not self.log.has(originator_id) or originator_id == "":
            return []
        writer = self.log.parts.writer
        horizon = writer.horizon()
        found = self.log.select("events", originator_id, gt, lte, desc=desc, limit=limit)
        if lte is None and (desc or limit is None):
            writer.offer(found[:1] if desc else found, horizon)
        return found


class CassandraSnapshotRecorder(AggregateRecorder):
    """Records snapshots. A snapshot of the same version is replaced."""

    def __init__(self, log: Log) -> None:
        self.log: Log = log

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Store snapshots."""
        parts = self.log.parts
        for each in stored_events:
            self.log.check(each)
            parts.walker.repeat(lambda each=each: parts.store.write_snapshot(each))  # type: ignore[misc]
        return None

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        """Read the snapshots of an aggregate."""
        return self.log.select("snapshots", originator_id, gt, lte, desc=desc, limit=limit)


def _bounded(version: int | None) -> int | None:
    return None if version is None else max(-LARGEST, min(version, LARGEST))


class CassandraApplicationRecorder(CassandraAggregateRecorder, ApplicationRecorder):
    """Records events in aggregate sequences and in the application's log."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Append all of the events to the log, or none, and return their positions.

        :raises IntegrityError: when another writer has recorded one of these versions.
        :raises CommitOutcomeUnknownError: when it is unknown whether they were recorded.
        """
        return self.log.append(stored_events) if stored_events else []

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        """Read the log by position; no event can appear later at or before the last one that is returned."""
        first = 1 if start is None else start + (not inclusive_of_start)
        return self.log.parts.reader.page(min(max(first, 1), LARGEST), limit, stop, topics)

    def read_log(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
        join: bool = False,
        damaged: bool = False,
    ) -> Sequence[Notification]:
        """As :meth:`select_notifications`, since there is no session to join."""
        return self.select_notifications(start, limit, stop, topics, inclusive_of_start=inclusive_of_start)

    def read_page(self, after: int, limit: int, stop: int) -> tuple[Sequence[Notification], int]:
        """Read events behind a position, no more bytes than fit into memory at once.

        :return: the events, and the position up to which they are complete.
        """
        return self.log.parts.reader.page_to(after + 1, limit, stop)

    def fitting(self, after: int, limit: int, stop: int | None = None, topics: Sequence[str] = ()) -> int:
        """Return how many of the next events to read at once because of their size, up to *limit*."""
        return self.log.parts.reader.fitting(after + 1, limit, stop, topics)

    def find_recorded(self, positions: Sequence[int], connection: object = None) -> dict[int, Recorded]:
        """Return what was recorded of events beside their state, by position."""
        return self.log.parts.reader.recorded(positions)

    def cause(self, position: int, is_over: Callable[[], bool] = bool) -> MetadataBlock:
        """Return a context for saves that an event of this log has caused."""
        return caused_by(lambda: self.find_recorded([position]).get(position), is_over)

    def max_notification_id(self) -> int | None:
        """Return the position of the last event, or None for an empty log."""
        row = self.log.parts.reader.last_row()
        return (row.last_event or None) if row is not None else None

    def high_water_mark(self) -> int:
        """Return the position up to which the log is complete; 0 for an empty log."""
        row = self.log.parts.reader.last_row()
        return row.end - 1 if row is not None else 0

    def write_streams(self) -> int:
        """Write the streams of all aggregates again from the log, after their table was emptied or restored.

        No other process may save meanwhile.

        :return: how many rows the log has.
        """
        return self.log.parts.reader.write_streams()

    def subscribe(self, gt: int | None = None, topics: Sequence[str] = ()) -> Subscription[ApplicationRecorder]:
        """Iterate over the log from a position on, waiting for new events at its end."""
        return LogSubscription(recorder=self, gt=gt, topics=topics)

    def waiter(self) -> Waiter:
        """Return an object that waits for new events of this log."""
        return Waiter()

    def shared_waiter(self) -> Waiter:
        """Return such an object for one of many that wait in this process."""
        return Waiter()


class CassandraTrackingRecorder(TrackingRecorder):
    """Records how far the logs of upstream applications have been processed, in rows of the log without events."""

    def __init__(self, log: Log) -> None:
        self.log: Log = log

    def insert_tracking(self, tracking: Tracking) -> None:
        """Record a position.

        :raises IntegrityError: when it is not above the recorded one.
        """
        self.log.append((), _checked(tracking))

    def max_tracking_id(self, application_name: str) -> int | None:
        """Return the recorded position of an upstream application, or None."""
        parts = self.log.parts
        return parts.walker.repeat(lambda: parts.store.tracked(application_name))


class CassandraProcessRecorder(CassandraTrackingRecorder, CassandraApplicationRecorder, ProcessRecorder):
    """Records events together with the position of the event that caused them."""

    def __init__(self, log: Log) -> None:
        CassandraTrackingRecorder.__init__(self, log)
        self.upstream: dict[str, CassandraApplicationRecorder] = {}
        """The recorders of the applications whose events are processed, by their names."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Append events and record the position given as ``tracking``, both or neither.

        :raises IntegrityError: when another writer was first with either.
        :raises CommitOutcomeUnknownError: when it is unknown whether they were recorded.
        """
        tracking: Tracking | None = kwargs.get("tracking")
        if tracking is None:
            return super().insert_events(stored_events)
        upstream = self.upstream.get(tracking.application_name)
        if upstream is None:
            return self.log.append(stored_events, _checked(tracking))
        with upstream.cause(tracking.notification_id):
            return self.log.append(stored_events, _checked(tracking))


def _checked(tracking: Tracking) -> Tracking:
    _check_text(tracking.application_name)
    if not 0 < tracking.notification_id <= LARGEST:
        raise IntegrityError(
            f"Position {tracking.notification_id} of {tracking.application_name} cannot be recorded: "
            f"a position is from 1 to {LARGEST}."
        )
    return tracking
