"""Aggregates that had conflicts lately."""

from __future__ import annotations

from uuid import uuid4

import pytest

from flask_eventsourcing.uow import contended
from flask_eventsourcing.uow.contended import ContendedAggregates


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
