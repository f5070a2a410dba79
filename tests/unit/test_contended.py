"""Aggregates that had conflicts lately."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from flask_eventsourcing.uow import contended
from flask_eventsourcing.uow.contended import AggregateQueue, ContendedAggregates


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the module looks at."""
    clock = Clock()
    monkeypatch.setattr(contended, "time", clock)
    return clock


def test_conflict_makes_its_aggregate_contended_and_no_other(clock: Clock) -> None:
    """Only an aggregate that had a conflict is queued for, in its own table."""
    aggregates = ContendedAggregates()
    key = ("bank_events", uuid4())
    aggregates.add(key)
    assert key in aggregates
    assert ("shop_events", key[1]) not in aggregates
    assert ("bank_events", uuid4()) not in aggregates


def test_aggregate_is_contended_for_a_while(clock: Clock) -> None:
    """An aggregate without further conflicts is soon not queued for any more."""
    aggregates = ContendedAggregates(seconds=1)
    aggregates.add(("bank_events", "a"))
    clock.now += 0.9
    assert ("bank_events", "a") in aggregates
    clock.now += 0.2
    assert ("bank_events", "a") not in aggregates


def test_memory_is_bounded(clock: Clock) -> None:
    """Conflicts on very many aggregates do not fill the memory: the oldest are forgotten."""
    aggregates = ContendedAggregates(most=3)
    for name in "abcde":
        aggregates.add(("bank_events", name))
    assert [name for name in "abcde" if ("bank_events", name) in aggregates] == ["c", "d", "e"]


class Turns:
    """A database in which it is always the caller's turn."""

    def queue_for(self, *_: object, wait: bool) -> None:
        """Wait for nobody."""


def test_aggregate_is_contended_while_a_unit_queues(clock: Clock) -> None:
    """However long a unit waits for its turn and has it, the units that begin meanwhile queue behind it."""
    aggregates = ContendedAggregates(seconds=1, most=3)
    turns: Any = Turns()
    table: Any = SimpleNamespace(name="bank_events")
    queues = [AggregateQueue(turns, aggregates) for _ in range(2)]
    key = (table.name, "a")
    aggregates.add(key)
    for queue in queues:
        queue.active = True
        queue.before_read(turns, table, "a", has_written=False)
    clock.now += 60
    assert key in aggregates
    queues[0].left()
    assert key in aggregates
    queues[1].left()
    assert key not in aggregates


def test_memory_of_the_queues_is_bounded(clock: Clock) -> None:
    """Aggregates that nobody queues for any more, and units that are gone, are not remembered."""
    aggregates = ContendedAggregates(seconds=1, most=3)
    turns: Any = Turns()
    table: Any = SimpleNamespace(name="bank_events")

    def queue_and_be_gone(name: str) -> None:
        queue = AggregateQueue(turns, aggregates)
        queue.active = True
        aggregates.add((table.name, name))
        queue.before_read(turns, table, name, has_written=False)

    for name in "abcdef":
        queue_and_be_gone(name)
    clock.now += 60
    assert not any(("bank_events", name) in aggregates for name in "abcdef")
    assert len(aggregates._queues) <= 3
