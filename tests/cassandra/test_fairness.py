"""How long writers of several processes wait for each other, in a time that is simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flask_eventsourcing.cassandra.queueing import Pace
from flask_eventsourcing.cassandra.rows import Row, row_of
from flask_eventsourcing.cassandra.writing import Writer
from tests.cassandra.contention import Contention, TimedStore, World, bare, new_append
from tests.length import IS_LONG

SECONDS = 15.0
ROWS = 100_000 if IS_LONG else 10_000


class BacksOff(Pace):
    """Waits the longer the more often it lost."""

    def before(self, losses: int) -> None:
        """Wait for nobody."""

    def lost(self, losses: int) -> None:
        """Wait."""
        self._store.sleep(self._typical * self._draw.random() * 2 ** min(losses, 6))


@pytest.mark.parametrize("seed", range(2))
def test_nobody_starves(seed: int) -> None:
    """While four processes save all the time, none of their threads waits as long as exponential back-off lets some."""
    fair = Contention(seed, 4, 4, 0.03)
    assert fair.run(SECONDS) < 1.0
    assert Contention(seed, 4, 4, 0.03, BacksOff).run(SECONDS) > 3.0
    assert len(fair.done) > 2 * bare(seed, 4, SECONDS)


def test_a_writer_alone_does_not_wait() -> None:
    """Without others nothing is waited for, and threads that share rows save more than bare inserts in turn."""
    alone = Contention(1, 1, 4)
    assert alone.run(SECONDS) < 0.2
    assert len(alone.done) > 1.5 * bare(1, 1, SECONDS)


class Started(TimedStore):
    """Notes when the first insert began."""

    began: float | None = None

    def insert(self, row: Row) -> Row | None:
        """Insert a row."""
        self.began = self.began or self._world.now
        return super().insert(row)


def test_process_that_starts_behind_a_long_log_is_ready_soon() -> None:
    """If many rows since the horizon have no flag, a save continues as soon as they are read."""
    world = World(1)
    world.flags = False
    one = row_of(1, 1, [new_append()])
    world.rows = {at: replace(one, position=at, last_event=at) for at in range(1, ROWS + 1)}
    store = Started(world)
    position = []
    world.start(lambda: position.append(Writer(store, 60.0).append(new_append())))
    world.run(600.0)
    assert position == [ROWS + 1]
    assert store.began is not None
    assert world.now - store.began < 1.0
