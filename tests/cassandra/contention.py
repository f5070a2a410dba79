"""Processes with threads that save on one log, in a time that is simulated."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from uuid import UUID, uuid4

import greenlet
from eventsourcing.persistence import StoredEvent

from flask_eventsourcing.cassandra.queueing import Pace, Queue, Ticket
from flask_eventsourcing.cassandra.rows import Append, Horizon, Key, Row, row_of
from flask_eventsourcing.cassandra.writing import Writer

INSERT, READ, INDEX = 0.03, 0.006, 0.008
"""Seconds for a conditional insert that meets no other one, and for the rest."""


class World:
    """Lets greenlets wait for a time.

    :param seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now = 0.0
        self.hub = greenlet.getcurrent()
        self._due: list[tuple[float, int, greenlet.greenlet]] = []
        self._numbers = itertools.count()
        self.rows: dict[int, Row] = {}
        self.inserting = 0
        self.flags = True
        """Whether rows are flagged."""

    def start(self, work: Callable[[], None]) -> None:
        """Let something run beside the others."""
        self.wake(greenlet.greenlet(work, self.hub), self.draw.uniform(0, INSERT))

    def wake(self, waiter: greenlet.greenlet, seconds: float = 0.0) -> None:
        """Go on with it in some seconds."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), waiter))

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self.wake(greenlet.getcurrent(), seconds)
        self.hub.switch()

    def run(self, seconds: float) -> None:
        """Run for some time, and drop the writers that still wait."""
        while self._due and self._due[0][0] < seconds:
            self.now, _, waiter = heapq.heappop(self._due)
            waiter.switch()
        for _, _, waiter in self._due:
            waiter.throw(greenlet.GreenletExit)

    def insert(self, row: Row) -> Row | None:
        """Insert a row at its position; it takes longer while others insert."""
        self.inserting += 1
        took = INSERT * self.draw.uniform(0.7, 1.3) * (1 + 0.3 * (self.inserting - 1))
        self.sleep(took * 0.6)
        found = self.rows.get(row.position)
        if found is None:
            self.rows[row.position] = row
        self.sleep(took * 0.4)
        self.inserting -= 1
        return found


class TimedStore:
    """What a process sees of the nodes: nothing fails, and everything takes its time."""

    def __init__(self, world: World) -> None:
        self._world = world

    def insert(self, row: Row) -> Row | None:
        """Insert a row."""
        return self._world.insert(row)

    def read_rows(self, position: int, limit: int, *, states: bool) -> Sequence[Row]:
        """Read rows."""
        self._world.sleep(READ)
        found: list[Row] = []
        while (row := self._world.rows.get(position)) is not None and len(found) < limit:
            found.append(replace(row, indexed=True) if self._world.flags else row)
            position = row.end
        return found

    def read_row(self, position: int) -> Row | None:
        """Read a row."""
        self._world.sleep(READ)
        return self._world.rows.get(position)

    def row_before(self, position: int) -> int | None:
        """Nobody asks."""
        raise NotImplementedError

    def last_version(self, originator_id: Key) -> int | None:
        """There is none."""
        self._world.sleep(READ)
        return None

    def last_versions(self, originator_ids: Sequence[Key]) -> Mapping[Key, int]:
        """There are none."""
        self._world.sleep(READ)
        return {}

    def tracked(self, name: str) -> int | None:
        """There is none."""
        return None

    def has_snapshot(self, originator_id: Key, version: int) -> bool:
        """There is none."""
        return False

    def index(self, row: Row) -> None:
        """Write what is derived."""
        self._world.sleep(INDEX)

    def flag(self, row: Row) -> None:
        """Nobody waits for it."""

    def read_horizon(self) -> Horizon:
        """Read it."""
        self._world.sleep(READ)
        return Horizon()

    def move_horizon(self, horizon: Horizon) -> None:
        """Move it."""
        self._world.sleep(READ)

    def now(self) -> float:
        """Return the time."""
        return self._world.now

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self._world.sleep(seconds)


class Woken:
    """An event for which a greenlet waits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiter: greenlet.greenlet | None = None
        self._is_set = False

    def set(self) -> None:
        """Let it go on."""
        self._is_set = True
        if self._waiter is not None:
            self._world.wake(self._waiter)
            self._waiter = None

    def wait(self, seconds: float) -> bool:
        """Wait for it, however long."""
        if not self._is_set:
            self._waiter = greenlet.getcurrent()
            self._world.hub.switch()
        return True


class TimedQueue(Queue):
    """A queue of greenlets."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def join(self, ticket: Ticket, longest: float) -> bool:
        """Queue."""
        ticket.woken = Woken(self._world)  # type: ignore[assignment]
        return super().join(ticket, longest)


class Contention:
    """Processes that save from some threads each.

    :param think: seconds between two saves of a thread, at most.
    :param pace: the class of what waits.
    """

    def __init__(self, seed: int, processes: int, threads: int, think: float = 0.0, pace: type[Pace] = Pace) -> None:
        self.world = World(seed)
        self.think = think
        self.done: list[float] = []
        """How long each save took."""
        self._begun: dict[int, float] = {}
        numbers = itertools.count()
        for _ in range(processes):
            store = TimedStore(self.world)
            writer = Writer(store, 60.0, pace(store, self.world.draw))
            writer._queue = TimedQueue(self.world)
            for _ in range(threads):
                self.world.start(partial(self._save, writer, next(numbers)))

    def _save(self, writer: Writer, number: int) -> None:
        while True:
            began = self._begun[number] = self.world.now
            writer.append(new_append())
            self.done.append(self.world.now - began)
            self._begun[number] = self.world.now + self.think
            self.world.sleep(self.world.draw.uniform(0.001, 0.002 + self.think))

    def run(self, seconds: float) -> float:
        """Run for some time, and return the longest that a save took, or is taking."""
        self.world.run(seconds)
        return max(*self.done, *(seconds - began for began in self._begun.values()))


def new_append() -> Append:
    """Return the first save of an aggregate."""
    key: UUID = uuid4()
    return Append([StoredEvent(key, 1, "topic", b"state")])


def bare(seed: int, processes: int, seconds: float) -> int:
    """Let processes insert at the head, each again at once where it lost; return how many rows they wrote."""
    world = World(seed)
    done = []

    def work() -> None:
        position = 1
        while True:
            row = row_of(position, 0, [new_append()])
            winner = world.insert(row)
            position = (winner or row).end
            done.append(winner is None)

    for _ in range(processes):
        world.start(work)
    world.run(seconds)
    return sum(done)
