"""Aggregates that had conflicts lately."""

from __future__ import annotations

from uuid import uuid4

import pytest

from flask_eventsourcing import hot
from flask_eventsourcing.hot import HotAggregates


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
    monkeypatch.setattr(hot, "time", clock)
    return clock


def test_conflict_heats_its_aggregate_only(clock: Clock) -> None:
    """Only an aggregate that had a conflict is queued for, in its own table."""
    aggregates = HotAggregates()
    key = ("bank_events", uuid4())
    aggregates.heat(key)
    assert aggregates.is_hot(key)
    assert not aggregates.is_hot(("shop_events", key[1]))
    assert not aggregates.is_hot(("bank_events", uuid4()))


def test_aggregate_cools_down(clock: Clock) -> None:
    """An aggregate without further conflicts is soon not queued for any more."""
    aggregates = HotAggregates(seconds=1)
    aggregates.heat(("bank_events", "a"))
    clock.now += 0.9
    assert aggregates.is_hot(("bank_events", "a"))
    clock.now += 0.2
    assert not aggregates.is_hot(("bank_events", "a"))


def test_memory_is_bounded(clock: Clock) -> None:
    """Conflicts on very many aggregates do not fill the memory: the oldest are forgotten."""
    aggregates = HotAggregates(most=3)
    for name in "abcde":
        aggregates.heat(("bank_events", name))
    assert [name for name in "abcde" if aggregates.is_hot(("bank_events", name))] == ["c", "d", "e"]
