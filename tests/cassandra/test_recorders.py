"""The library's contract for recorders, on a real node."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    IntegrityError,
    ProcessRecorder,
    StoredEvent,
    Tracking,
    TrackingRecorder,
)
from eventsourcing.tests import persistence

from flask_eventsourcing.exceptions import EventValueError, IdentifierTypeError
from tests.length import IS_LONG

if TYPE_CHECKING:
    from flask_eventsourcing.cassandra import (
        CassandraApplicationRecorder,
        CassandraProcessRecorder,
        CassandraSnapshotRecorder,
    )
    from flask_eventsourcing.cassandra.recording import Log

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.xdist_group("cassandra-cluster")

NewLog = Callable[..., "Log"]


class OnNode:
    """Makes recorders, on fresh tables where it has to be."""

    needs_fresh: frozenset[str] = frozenset()
    """The tests that begin with position 1, or with upstream applications that are not known."""
    new_log: NewLog
    shared_log: Log

    @pytest.fixture(autouse=True)
    def _take(self, new_log: NewLog, shared_log: Log) -> None:
        self.new_log, self.shared_log = new_log, shared_log

    def log(self) -> Log:
        """A log."""
        return self.new_log() if self._testMethodName in self.needs_fresh else self.shared_log  # type: ignore[attr-defined]


class TestAggregates(OnNode, persistence.AggregateRecorderTestCase):
    """Events without a position."""

    def create_recorder(self) -> AggregateRecorder:
        """A recorder of the application."""
        from flask_eventsourcing.cassandra import CassandraAggregateRecorder

        return CassandraAggregateRecorder(self.log())


class TestApplications(OnNode, persistence.ApplicationRecorderTestCase):
    """Events in the application's log."""

    needs_fresh = frozenset({"test_insert_select", "test_insert_subscribe"})

    def create_recorder(self) -> ApplicationRecorder:
        """A recorder of the application."""
        return application_recorder(self.log())

    def test_insert_subscribe(self) -> None:
        """A subscription yields what was recorded before and what is recorded later, and stops when it is told."""
        self.optional_test_insert_subscribe()


class TestNonInterleaving(OnNode, persistence.NonInterleavingNotificationIDsBaseCase):
    """The events of one save are contiguous."""

    def create_recorder(self) -> ApplicationRecorder:
        """A recorder of the application."""
        return application_recorder(self.log())


class TestTrackings(OnNode, persistence.TrackingRecorderTestCase):
    """Positions in the logs of others."""

    needs_fresh = frozenset({"test_insert_tracking", "test_wait"})

    def create_recorder(self) -> TrackingRecorder:
        """A recorder of the application."""
        from flask_eventsourcing.cassandra import CassandraTrackingRecorder

        return CassandraTrackingRecorder(self.log())


class TestProcesses(OnNode, persistence.ProcessRecorderTestCase):
    """Events together with positions."""

    needs_fresh = frozenset({"test_insert_select", "test_has_tracking_id", "test_raises_when_lower_inserted_later"})

    def create_recorder(self) -> ProcessRecorder:
        """A recorder of the application."""
        return process_recorder(self.log())


if IS_LONG:

    class OnCluster(OnNode):
        """Makes recorders on three nodes."""

        @pytest.fixture(autouse=True)
        def _take(self, new_cluster_log: NewLog, shared_cluster_log: Log) -> None:
            self.new_log, self.shared_log = new_cluster_log, shared_cluster_log

    class TestAggregatesOnCluster(OnCluster, TestAggregates):
        """Events without a position, on three nodes."""

    class TestApplicationsOnCluster(OnCluster, TestApplications):
        """Events in the application's log, on three nodes."""

    class TestNonInterleavingOnCluster(OnCluster, TestNonInterleaving):
        """The events of one save are contiguous, on three nodes."""

    class TestTrackingsOnCluster(OnCluster, TestTrackings):
        """Positions in the logs of others, on three nodes."""

    class TestProcessesOnCluster(OnCluster, TestProcesses):
        """Events together with positions, on three nodes."""


def application_recorder(log: Log) -> CassandraApplicationRecorder:
    """Make a recorder of an application."""
    from flask_eventsourcing.cassandra import CassandraApplicationRecorder

    return CassandraApplicationRecorder(log)


def process_recorder(log: Log) -> CassandraProcessRecorder:
    """Make a recorder of an application that processes the events of others."""
    from flask_eventsourcing.cassandra import CassandraProcessRecorder

    return CassandraProcessRecorder(log)


def snapshot_recorder(log: Log) -> CassandraSnapshotRecorder:
    """Make a recorder of snapshots."""
    from flask_eventsourcing.cassandra import CassandraSnapshotRecorder

    return CassandraSnapshotRecorder(log)


def event(key: UUID | str, version: int, state: bytes = b"state") -> StoredEvent:
    """Make an event."""
    return StoredEvent(key, version, "topic", state)


def test_snapshots_are_replaced_and_begin_a_stream(shared_log: Log) -> None:
    """A snapshot of the same version is replaced, and events may follow one where none are before it."""
    key = uuid4()
    snapshots, events = snapshot_recorder(shared_log), application_recorder(shared_log)
    with pytest.raises(IntegrityError):
        events.insert_events([event(key, 8)])
    snapshots.insert_events([event(key, 7, b"first")])
    snapshots.insert_events([event(key, 7, b"second")])
    assert [each.state for each in snapshots.select_events(key, desc=True, limit=1)] == [b"second"]
    assert events.insert_events([event(key, 8)])
    assert snapshots.select_events(uuid4()) == []


def test_ids_are_of_one_type(new_log: NewLog) -> None:
    """Text ids are stored where the tables are made for them; an id of another type is refused, and read as unknown."""
    texts = application_recorder(new_log("text"))
    assert texts.insert_events([event("account-1", 1), event("account-2", 1)]) == [1, 2]
    assert [each.originator_id for each in texts.select_events("account-1")] == ["account-1"]
    assert [each.originator_id for each in texts.select_notifications(1, 10)] == ["account-1", "account-2"]
    with pytest.raises(IdentifierTypeError):
        texts.insert_events([event(uuid4(), 1)])
    assert texts.select_events(uuid4()) == []
    assert texts.select_events("") == []


@pytest.mark.parametrize(
    "bad",
    [event("\ud800", 1), event("", 1), event("a", -1), event("a", 2**63), StoredEvent("a", 1, "\ud800", b"")],
    ids=["surrogate", "empty id", "negative", "too large", "topic"],
)
def test_what_cannot_be_read_again_is_refused(bad: StoredEvent) -> None:
    """A value that the nodes do not take is refused before anything is sent."""
    pytest.importorskip("cassandra.cluster", reason="cassandra-driver is not installed")
    from flask_eventsourcing.cassandra.recording import Log

    unused = Log(None, "unused", id_type="text")  # type: ignore[arg-type]
    with pytest.raises(EventValueError):
        application_recorder(unused).insert_events([bad])


def test_empty_states_and_zeros_are_kept(shared_log: Log) -> None:
    """Empty states and those of any bytes are read as they were saved."""
    recorder, key = application_recorder(shared_log), uuid4()
    states = [b"", bytes(range(256)), b"\0"]
    positions = recorder.insert_events([event(key, number, state) for number, state in enumerate(states)])
    assert positions is not None
    assert [each.state for each in recorder.select_events(key)] == states
    assert [each.state for each in recorder.select_notifications(positions[0], 10)] == states


def test_tracking_takes_a_position_and_is_no_event(new_log: NewLog) -> None:
    """A position that was processed without events adds no notification, and the last notification is an event."""
    recorder, key = process_recorder(new_log()), uuid4()
    assert recorder.insert_events([event(key, 1)], tracking=Tracking("upstream", 1)) == [1]
    recorder.insert_events([], tracking=Tracking("upstream", 5))
    recorder.insert_tracking(Tracking("upstream", 6))
    assert recorder.max_notification_id() == 1
    assert recorder.high_water_mark() == 3
    assert recorder.insert_events([event(key, 2)]) == [4]
    assert [each.id for each in recorder.select_notifications(1, 10)] == [1, 4]
    assert [each.id for each in recorder.select_notifications(2, 10)] == [4]
    assert recorder.max_tracking_id("upstream") == 6


def test_log_goes_on_in_the_next_bucket(new_log: NewLog) -> None:
    """A log is read, and written, across the end of a bucket, also from within a save that spans it."""
    log = new_log()
    recorder = application_recorder(log)
    keys = [uuid4() for _ in range(3)]
    recorder.insert_events([event(keys[0], version, b"") for version in range(9_995)])
    assert recorder.insert_events([event(keys[1], version) for version in range(20)])[-1:] == [10_015]  # type: ignore[index]
    assert recorder.insert_events([event(keys[2], 0)]) == [10_016]
    again = application_recorder(type(log)(recorder.log.parts.store.connection, log.name))
    assert [each.id for each in again.select_notifications(9_994, 100)] == list(range(9_994, 10_017))
    assert [each.id for each in again.select_notifications(10_010, 3)] == [10_010, 10_011, 10_012]
    assert again.max_notification_id() == 10_016
    assert again.insert_events([event(keys[2], 1)]) == [10_017]


def test_last_versions_of_many_streams_are_read_at_once(new_log: NewLog) -> None:
    """A save of many aggregates, new ones among them, is checked against the last version of each in few requests."""
    log = new_log()
    recorder = application_recorder(log)
    keys = [uuid4() for _ in range(120)]
    recorder.insert_events([event(key, version) for key in keys[:60] for version in range(1, 4)])
    store = log.parts.store
    assert store.last_versions(keys) == dict.fromkeys(keys[:60], 3)

    again = application_recorder(type(log)(store.connection, log.name))
    again.insert_events([event(keys[119], 1)])
    with pytest.raises(IntegrityError, match=str(keys[40])):
        again.insert_events([event(key, 3 if key == keys[40] else 4) for key in keys[:60]])
    positions = again.insert_events([event(key, 4 if key in keys[:60] else 1) for key in keys[:119]])
    assert len(positions or ()) == 119


def test_long_streams_are_read_in_pages(new_log: NewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream is read whole, in both directions and up to a limit; no answer is too large to come in time."""
    from flask_eventsourcing.cassandra import Connection

    log, key = new_log(), uuid4()
    sizes: list[int] = []
    recorder = application_recorder(log)
    for first in range(1, 401, 80):
        recorder.insert_events([event(key, first + each, bytes(20_000)) for each in range(80)])
    execute = Connection.execute

    def counted(self: Connection, *arguments: Any, **others: Any) -> Any:
        found = execute(self, *arguments, **others)
        sizes.append(sum(len(each.state) for each in found.current_rows if hasattr(each, "state")))
        return found

    monkeypatch.setattr(Connection, "execute", counted)
    versions = list(range(1, 401))
    assert [each.originator_version for each in recorder.select_events(key)] == versions
    assert sum(sizes) == 400 * 20_000
    assert max(sizes) < 4 * 2**20
    assert [each.originator_version for each in recorder.select_events(key, desc=True)] == versions[::-1]
    assert [each.originator_version for each in recorder.select_events(key, gt=10, limit=150)] == versions[10:160]


@pytest.mark.parametrize("batch_bytes", [None, 2**20], ids=["usual batches", "too large batches"])
def test_events_with_much_metadata(batch_bytes: int | None, new_log: NewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save whose metadata are many times its states is written to the streams, whatever batches the nodes take."""
    from flask_eventsourcing.cassandra import store

    if batch_bytes is not None:
        monkeypatch.setattr(store, "BATCH_BYTES", batch_bytes)
    log, key = new_log(), uuid4()
    log = type(log)(log.parts.store.connection, log.name, collect=lambda: {"note": "x" * 4000})
    recorder = application_recorder(log)
    events = [event(key, version) for version in range(1, 41)]
    assert recorder.insert_events(events) == list(range(1, 41))
    assert recorder.select_events(key) == events
    assert len(recorder.find_recorded([40])[40].metadata["note"]) == 4000


def test_nothing_expires(new_log: NewLog) -> None:
    """What is saved stays, also where an operator has given the tables a default lifetime."""
    from flask_eventsourcing.cassandra.rows import Horizon
    from flask_eventsourcing.cassandra.schema import TABLES, table

    log, key = new_log(), uuid4()
    connection = log.parts.store.connection
    names = {purpose: table(connection.settings, log.name.lower(), purpose) for purpose in TABLES}
    for name in names.values():
        connection.execute(f"ALTER TABLE {name} WITH default_time_to_live = 3600", timeout=60)
    process_recorder(log).insert_events([event(key, 1)], tracking=Tracking("upstream", 1))
    snapshot_recorder(log).insert_events([event(key, 1)])
    log.parts.store.move_horizon(Horizon(2, 1))
    for purpose, column in (
        ("log", "row_id"),
        ("log", "indexed"),
        ("events", "topic"),
        ("tracking", "notification_id"),
        ("snapshots", "topic"),
        ("state", "horizon"),
    ):
        assert connection.execute(f"SELECT TTL({column}) FROM {names[purpose]}").one()[0] is None


@pytest.mark.parametrize("others_save", [False, True])
def test_log_that_was_emptied_begins_again(others_save: bool, new_log: NewLog) -> None:
    """If the tables are emptied under a running process, its next save is the first of the log and can be read."""
    from flask_eventsourcing.cassandra.schema import TABLES, table

    log = new_log()
    recorder = application_recorder(log)
    kept = uuid4()
    for version in range(1, 4):
        recorder.insert_events([event(kept, version)])
    assert recorder.max_notification_id() == 3
    connection = log.parts.store.connection
    for purpose in TABLES:
        connection.execute(f"TRUNCATE {table(connection.settings, log.name.lower(), purpose)}", timeout=60)
    expected = 5 if others_save else 1
    other = application_recorder(type(log)(connection, log.name))
    for _ in range(expected - 1):
        other.insert_events([event(uuid4(), 1)])
    # Only what comes at once would be taken for the next one.
    log.parts.writer.pause = 0.0
    assert recorder.insert_events([event(kept, 1)]) == [expected]
    assert recorder.max_notification_id() == expected
    assert [each.id for each in recorder.select_notifications(1, 10)] == list(range(1, expected + 1))
    assert [each.originator_version for each in recorder.select_events(kept)] == [1]


def test_flags_of_a_log_that_was_emptied(new_log: NewLog) -> None:
    """Flags that arrive after a log was emptied stop neither saves nor readers, wherever the new rows begin."""
    log = new_log()
    store, recorder = log.parts.store, application_recorder(log)
    log.parts.writer._patience = 2.0
    for position in (1, 2, 4, 5, 20):
        store.connection.execute(store._bind(store._cql.flag, (0, position)))
    assert recorder.max_notification_id() is None
    assert recorder.insert_events([event(uuid4(), 1)]) == [1]
    assert recorder.insert_events([event(uuid4(), 1) for _ in range(5)]) == list(range(2, 7))
    again = application_recorder(type(log)(store.connection, log.name))
    assert [each.id for each in again.select_notifications(5, 10)] == [5, 6]
    assert [each.id for each in again.select_notifications(1, 10)] == list(range(1, 7))
    assert again.select_notifications(30, 10) == []
    assert again.max_notification_id() == 6
    assert again.insert_events([event(uuid4(), 1)]) == [7]


@pytest.mark.torture
def test_process_that_starts_behind_100_000_appends(new_log: NewLog) -> None:
    """Where the horizon lies 100,000 appends back, a new process reads these once, and then saves."""
    from cassandra.concurrent import execute_concurrent_with_args

    from flask_eventsourcing.cassandra.rows import Append, bucket_of, row_of

    log = new_log()
    store, connection = log.parts.store, log.parts.store.connection
    plainly = connection.prepare(store._cql.insert.replace(" IF NOT EXISTS", ""))
    rows = [row_of(at, at - 1, [Append([event(uuid4(), 1)])]) for at in range(1, 100_001)]
    values = [
        (bucket_of(at), at, row.id, 1, row.last_event, [*map(tuple, row.parts)], row.versions, row.contents)
        for at, row in enumerate(rows, 1)
    ]
    while values:
        # A node that is busy may not answer in time; the same row again changes nothing.
        done = execute_concurrent_with_args(
            connection.session, plainly, values, concurrency=16, raise_on_first_error=False
        )
        values = [each for each, (is_done, _) in zip(values, done, strict=True) if not is_done]
    again = type(log)(connection, log.name)
    began = time.monotonic()
    assert sum(1 for _ in again.parts.walker.rows(1)) == 100_000
    read = time.monotonic()
    assert application_recorder(again).insert_events([event(uuid4(), 1)]) == [100_001]
    saved = time.monotonic()
    assert application_recorder(again).insert_events([event(uuid4(), 1)]) == [100_002]
    logger.info(
        "read in %.1f s, first save %.1f s, second %.1f s", read - began, saved - read, time.monotonic() - saved
    )


def test_large_saves(shared_log: Log) -> None:
    """A save of 3 MB works, one that the nodes do not take is one clear error, and the session goes on."""
    from flask_eventsourcing.cassandra import SaveTooLargeError

    recorder, key = application_recorder(shared_log), uuid4()
    positions = recorder.insert_events([event(key, 1, b"x" * 3_000_000)])
    assert positions is not None
    with pytest.raises(SaveTooLargeError, match="save less"):
        recorder.insert_events([event(key, 2, b"x" * 20_000_000)])
    many = [event(key, version, b"y" * 1000) for version in range(2, 500)]
    recorder.insert_events(many)
    assert recorder.select_events(key, gt=1) == many
    assert recorder.fitting(positions[0], 100) == 100
    assert len(recorder.select_notifications(positions[0], 10)) == 10
    with pytest.raises(EventValueError, match="10000"):
        recorder.insert_events([event(key, version) for version in range(500, 10_501)])
