"""The protocol of the log, over a cluster that times out, reads stale and whose processes crash at every step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import IntegrityError, OperationalError, StoredEvent, Tracking
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_eventsourcing.cassandra import memory, queueing, rows
from flask_eventsourcing.cassandra.memory import Memory
from flask_eventsourcing.cassandra.queueing import Queue, Ticket
from flask_eventsourcing.cassandra.reading import Reader
from flask_eventsourcing.cassandra.rows import Append, Horizon, Key, MaybeDoneError, NotDoneError, Row
from flask_eventsourcing.cassandra.writing import Writer
from flask_eventsourcing.exceptions import CommitOutcomeUnknownError, UnreadableEventError
from tests.cassandra.sabotage import TOUCHING, WITHOUT, LeavesUnindexed, leave_gaps, without
from tests.cassandra.simulation import Cluster, Crash, QuickWriter, SimulatedStore, Simulation
from tests.length import examples


@pytest.fixture(autouse=True, scope="module")
def small_buckets() -> Iterator[None]:
    """Let a log have several buckets."""
    with pytest.MonkeyPatch.context() as patch:
        set_buckets(patch, 7)
        yield


def set_buckets(patch: pytest.MonkeyPatch, positions: int) -> None:
    """Let buckets, and rows, have so many positions at most."""
    patch.setattr(rows, "BUCKET", positions)
    patch.setattr(queueing, "MOST_EVENTS", positions)


@given(seed=st.integers(min_value=0, max_value=2**48))
@settings(max_examples=examples(400), deadline=None)
def test_log_keeps_its_promises_whatever_fails(seed: int) -> None:
    """Nothing acknowledged is lost, doubled or skipped, nothing refused is recorded, every aggregate stays usable."""
    Simulation(seed).run()


@pytest.mark.parametrize("protection", [*WITHOUT, TOUCHING])
def test_each_protection_is_needed(protection: str) -> None:
    """Without any one of its protections the log breaks a promise, so these tests would notice."""
    prepare = leave_gaps if protection == TOUCHING else id
    for seed in range(300):
        try:
            Simulation(seed, without(protection, QuickWriter), prepare).run()
        except AssertionError:
            return
    pytest.fail("nothing was found missing")


class CalmCluster(Cluster):
    """A cluster on which nothing fails."""

    def __init__(self) -> None:
        super().__init__(random.Random(1), 0.0)

    def step(self) -> None:
        """Go on."""


def calm_store() -> SimulatedStore:
    """Return a store on which nothing fails."""
    return SimulatedStore(CalmCluster())


def event(key: Key, version: int) -> StoredEvent:
    """Make an event."""
    return StoredEvent(key, version, "topic", b"state")


class DyingStore(SimulatedStore):
    """What a process sees that is killed before it can index."""

    def index(self, row: Row) -> None:
        """Be killed."""
        raise Crash


def left_unindexed() -> tuple[SimulatedStore, Key]:
    """Return a store, and an aggregate whose second event is in the log only, as its writer died."""
    cluster, key = CalmCluster(), uuid4()
    Writer(SimulatedStore(cluster), 5.0).append(Append(events=[event(key, 1)]))
    with pytest.raises(Crash):
        Writer(DyingStore(cluster), 5.0).append(Append(events=[event(key, 2)]))
    return SimulatedStore(cluster), key


def change(store: SimulatedStore, writer: Writer, key: Key) -> None:
    """Save the next version of an aggregate."""
    writer.append(Append(events=[event(key, (store.last_version(key) or 0) + 1)]))


def test_aggregate_of_a_writer_that_died_can_be_changed() -> None:
    """If a writer died between log and stream, the next one has a conflict, and succeeds after it has read again."""
    store, key = left_unindexed()
    writer = Writer(store, 5.0)
    with pytest.raises(IntegrityError):
        change(store, writer, key)
    change(store, writer, key)
    assert sorted(store._cluster.streams[key]) == [1, 2, 3]


def test_aggregate_is_blocked_without_indexing_before_a_refusal() -> None:
    """Without that protection its aggregate could never be changed again, so the test above would notice."""
    store, key = left_unindexed()
    writer = LeavesUnindexed(store, 5.0)
    for _ in range(5):
        with pytest.raises(IntegrityError):
            change(store, writer, key)


@pytest.mark.parametrize("key", ["\0upstream other", "other", ""])
def test_aggregate_is_never_taken_for_an_upstream_application(key: str) -> None:
    """The versions of an aggregate are checked whatever text its id is; upstream positions are kept apart."""
    cluster = CalmCluster()
    Writer(SimulatedStore(cluster), 5.0).append(Append(events=[event(key, 1)]))
    cluster.horizon = Horizon(2, 1)
    with pytest.raises(IntegrityError):
        Writer(SimulatedStore(cluster), 5.0).append(Append(events=[event(key, 1)]))
    writer = Writer(SimulatedStore(cluster), 5.0)
    assert writer.append(Append(events=[event(key, 2)])) == 2
    assert writer.append(Append(tracking=Tracking("other", 1))) == 3
    assert writer.append(Append(events=[event(key, 3)], tracking=Tracking("other", 2))) == 4


def test_stream_is_read_where_the_log_does_not_tell() -> None:
    """A process that starts after an aggregate's events reads them; otherwise it would record a version twice."""
    cluster, key = CalmCluster(), uuid4()
    writer = QuickWriter(SimulatedStore(cluster), 5.0)
    for version in range(1, 10):
        writer.append(Append(events=[event(key, version)]))
    cluster.horizon = Horizon(10, 9)
    with pytest.raises(IntegrityError):
        QuickWriter(SimulatedStore(cluster), 5.0).append(Append(events=[event(key, 9)]))
    assert (
        without("read of the stream", QuickWriter)(SimulatedStore(cluster), 5.0).append(Append(events=[event(key, 9)]))
        == 10
    )


class SlowStore(SimulatedStore):
    """A store on which the first insert takes as long as others need to queue."""

    def __init__(self) -> None:
        super().__init__(CalmCluster())
        self.writer = Writer(self, 5.0)

    def insert(self, row: Row) -> Row | None:
        """Insert a row when they are there."""
        while row.position == 1 and len(self.writer._queue._waiting) < 16:
            time.sleep(0.001)
        return super().insert(row)


def test_threads_share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that save at the same time are committed together, and each is told its own position."""
    set_buckets(monkeypatch, 10_000)
    store = SlowStore()
    with ThreadPoolExecutor(17) as pool:
        first = pool.submit(store.writer.append, Append(events=[event(uuid4(), 1)]))
        while not store.writer._queue._is_led:
            time.sleep(0.001)
        others = [Append(events=[event(uuid4(), 1), event(uuid4(), 1)]) for _ in range(16)]
        positions = sorted(pool.map(store.writer.append, others))
    assert first.result() == 1
    assert positions == list(range(2, 34, 2))
    assert len(store._cluster.rows) == 2


def test_of_threads_with_one_version_one_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of threads that save one version of an aggregate exactly one succeeds; the others have a conflict."""
    set_buckets(monkeypatch, 10_000)
    writer = Writer(calm_store(), 5.0)
    key = uuid4()

    def save(_: int) -> bool:
        try:
            writer.append(Append(events=[event(key, 1)]))
        except IntegrityError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(save, range(8))) == [False] * 7 + [True]


@pytest.mark.parametrize("versions", [[1, 3], [2, 1], [1, 1]])
def test_save_has_no_gap_in_itself(versions: list[int]) -> None:
    """A save whose versions of one aggregate do not follow each other is refused as a whole."""
    key = uuid4()
    with pytest.raises(IntegrityError):
        Writer(calm_store(), 5.0).append(Append(events=[event(key, version) for version in versions]))


def test_version_that_would_leave_a_gap_is_refused() -> None:
    """An event whose predecessor is missing is refused, as nobody could read its aggregate any more."""
    writer = Writer(calm_store(), 5.0)
    key = uuid4()
    writer.append(Append(events=[event(key, 1)]))
    with pytest.raises(IntegrityError):
        writer.append(Append(events=[event(key, 3)]))
    with pytest.raises(IntegrityError):
        writer.append(Append(events=[event(uuid4(), 2)]))


class SilentStore(SimulatedStore):
    """A store whose nodes never take an insert; the first one fails when others have queued."""

    def __init__(self) -> None:
        super().__init__(CalmCluster())
        self.writer = Writer(self, 5.0)
        self.tried: set[UUID] = set()

    def insert(self, row: Row) -> Row | None:
        """Fail."""
        while not self.tried and len(self.writer._queue._waiting) < 7:
            time.sleep(0.001)
        self.tried.add(row.id)
        raise NotDoneError("no answer")


def test_saves_do_not_fail_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that save one aggregate while no node answers wait as long as one of them would, not one by one."""
    set_buckets(monkeypatch, 10_000)
    store, key = SilentStore(), uuid4()

    def save(_: int) -> None:
        with pytest.raises(OperationalError, match=r"nothing was saved|did not answer"):
            store.writer.append(Append(events=[event(key, 1)]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(8)))
    assert len(store.tried) == 1


def test_leader_that_is_gone_is_not_waited_for() -> None:
    """If the thread that saves for others disappears, the others get an error after some time."""
    queue = Queue()
    assert queue.join(Ticket(Append(events=[event(uuid4(), 1)])), 1.0)
    waiting = Ticket(Append(events=[event(uuid4(), 1)]))
    with pytest.raises(CommitOutcomeUnknownError, match=r"did not answer a save for 0\.01 s"):
        queue.join(waiting, 0.01)
    assert queue.take([]) != [waiting]


def test_what_is_read_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that reads many aggregates keeps a limited number of last versions beside those of the log's rows."""
    monkeypatch.setattr(memory, "OFFERED", 3)
    known, changed = Memory(Horizon()), uuid4()
    known.meet(rows.row_of(1, 0, [Append(events=[event(changed, 1)])]))
    keys = [uuid4() for _ in range(5)]
    for key in keys:
        known.offer(key, 7, 1)
        known.offer(changed, 0, 1)
    assert [known.known(key) for key in keys] == [None, None, 7, 7, 7]
    assert known.known(changed) == 1
    known.forget(2)
    assert [known.known(key) for key in [*keys, changed]] == [None] * 6


@pytest.mark.parametrize("others", [0, 1, 9])
def test_end_of_a_log_that_was_emptied(others: int) -> None:
    """After a log was emptied, a reader that knew its old end finds the end of the new rows."""
    cluster = CalmCluster()
    store, writer = SimulatedStore(cluster), Writer(SimulatedStore(cluster), 5.0)
    reader = Reader(store, writer, 5.0)
    for events in (2, 1):
        writer.append(Append(events=[event(uuid4(), 1) for _ in range(events)]))
    last = reader.last_row()
    assert last is not None
    assert last.end == 4
    cluster.rows.clear()
    again = Writer(store, 5.0)
    for number in range(others):
        # Rows that end elsewhere than those before.
        again.append(Append(events=[event(uuid4(), 1) for _ in range(2 if number == 1 else 1)]))
    last = reader.last_row()
    assert (last.end if last else 1) == others + 1 + (others > 1)
    assert len(reader.page(1, 100, None, ())) == others + (others > 1)


def test_rows_of_a_log_that_was_restored() -> None:
    """After a log was restored, a reader that knew the old rows reads on although the new ones begin elsewhere."""
    cluster = CalmCluster()
    store = SimulatedStore(cluster)
    reader = Reader(store, Writer(store, 5.0), 5.0)
    for sizes in ((1, 1, 1, 1, 1, 1), (1, 3, 1, 1, 1)):
        cluster.rows.clear()
        writer = Writer(store, 5.0)
        for events in sizes:
            writer.append(Append(events=[event(uuid4(), 1) for _ in range(events)]))
        for position in range(1, sum(sizes) + 1):
            assert next(each.id for each in reader.page(position, 2, None, ())) == position
    del cluster.rows[5]
    with pytest.raises(UnreadableEventError):
        reader.page(5, 2, None, ())


class CountingStore(SimulatedStore):
    """A store that counts what is read of the log, and on which each insert takes 20 ms."""

    def __init__(self) -> None:
        super().__init__(CalmCluster())
        self.reads = 0

    def read_rows(self, position: int, limit: int, *, states: bool) -> Sequence[Row]:
        """Count it."""
        self.reads += 1
        return super().read_rows(position, limit, states=states)

    def insert(self, row: Row) -> Row | None:
        """Take its time."""
        self._cluster.clock += 0.02
        return super().insert(row)


def test_steady_writer_reads_no_log() -> None:
    """A process that saves again and again reads the end of the log at its first save only, and after a pause."""
    store = CountingStore()
    writer = Writer(store, 5.0)
    for number in range(50):
        writer.append(Append(events=[event(uuid4(), 1)]))
        assert store.reads == 1, number
    store._cluster.clock += writer.pause
    writer.append(Append(events=[event(uuid4(), 1)]))
    assert store.reads == 2


class BusyStore(SimulatedStore):
    """A store that does not send many rows with states in time."""

    def read_rows(self, position: int, limit: int, *, states: bool) -> Sequence[Row]:
        """Take too long, or answer."""
        self._cluster.clock += 0.5
        if limit > 3:
            raise MaybeDoneError("timed out")
        return super().read_rows(position, limit, states=states)


def test_large_rows_are_read_some_at_a_time() -> None:
    """If nodes do not send the requested rows in time, fewer are requested, down to one."""
    store = calm_store()
    writer = Writer(store, 5.0)
    for _ in range(40):
        writer.append(Append(events=[event(uuid4(), 1)]))
    reader = Reader(BusyStore(store._cluster), writer, 5.0)
    assert [each.id for each in reader.page(1, 100, None, ())] == list(range(1, 41))


def test_rows_are_not_larger_than_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves of many small events are not put into one row that would reach over a whole bucket of the log."""
    set_buckets(monkeypatch, 10_000)
    queue = Queue()
    tickets = [Ticket(Append(events=[event(uuid4(), 1)] * size)) for size in (6000, 6000, 10_001, 3000)]
    queue._waiting.extend(tickets)
    assert queue.take([]) == [tickets[0], tickets[3]]
    assert queue.take([tickets[0]]) == []
    assert queue.take([]) == [tickets[1]]
    assert queue.take([]) == [tickets[2]]


def test_reader_far_behind_the_end() -> None:
    """A reader whose position is far behind the end of a log, which was emptied, does not read all of it each time."""
    store = CountingStore()
    writer = Writer(store, 5.0)
    for _ in range(50):
        writer.append(Append(events=[event(uuid4(), 1)]))
    reader, store.reads = Reader(store, writer, 5.0), 0
    assert reader.page(1000, 10, None, ()) == []
    assert store.reads <= 2
    assert [each.id for each in reader.page(50, 10, None, ())] == [50]
