"""The protocol of the log, over a cluster that times out, reads stale and whose processes crash at every step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from eventsourcing.persistence import IntegrityError, StoredEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_eventsourcing.cassandra import rows
from flask_eventsourcing.cassandra.rows import Append, Horizon, Key, Row
from flask_eventsourcing.cassandra.writing import Writer
from tests.cassandra.sabotage import TOUCHING, WITHOUT, LeavesUnindexed, leave_gaps, without
from tests.cassandra.simulation import Cluster, Crash, QuickWriter, SimulatedStore, Simulation
from tests.length import examples


@pytest.fixture(autouse=True, scope="module")
def small_buckets() -> Iterator[None]:
    """Let a log have several buckets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BUCKET", 7)
        yield


@given(seed=st.integers(min_value=0, max_value=2**48))
@settings(max_examples=examples(400), deadline=None)
def test_log_keeps_its_promises_whatever_fails(seed: int) -> None:
    """Nothing acknowledged is lost, doubled or skipped, nothing refused is recorded, every aggregate stays usable."""
    Simulation(seed).run()


@pytest.mark.parametrize("protection", [*WITHOUT, TOUCHING])
def test_each_protection_is_needed(protection: str) -> None:
    """Without any one of its protections the log breaks a promise, so that these tests would tell."""
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
    """Where a writer died between log and stream, the next one has a conflict, and succeeds when it has read again."""
    store, key = left_unindexed()
    writer = Writer(store, 5.0)
    with pytest.raises(IntegrityError):
        change(store, writer, key)
    change(store, writer, key)
    assert sorted(store._cluster.streams[key]) == [1, 2, 3]


def test_aggregate_is_blocked_without_indexing_before_a_refusal() -> None:
    """Without that protection its aggregate could never be changed again, so that the test above would tell."""
    store, key = left_unindexed()
    writer = LeavesUnindexed(store, 5.0)
    for _ in range(5):
        with pytest.raises(IntegrityError):
            change(store, writer, key)


def test_stream_is_read_where_the_log_does_not_tell() -> None:
    """A process that starts behind an aggregate's events knows them; without the read it would record one twice."""
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
    monkeypatch.setattr(rows, "BUCKET", 10_000)
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
    monkeypatch.setattr(rows, "BUCKET", 10_000)
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
