"""Drawn histories of a projection that is inline in one process, run by a worker in another, and unknown to a third.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import logging
import threading

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flask_eventsourcing.exceptions import CheckpointMismatchError
from flask_eventsourcing.projections.consumers.inline import merge_ranges
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.upkeep import accept
from tests.domain import PATIENCE, Account, Bank, in_threads
from tests.length import examples
from tests.projections.conftest import MakeDesk

NAME = "Listing"
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["inline", "inline", "inline", "worker", "alone", "rolled back"]), st.integers(1, 3)),
        st.tuples(st.sampled_from(["run", "run", "merge", "merge", "rebuild", "accept"]), st.just(0)),
    ),
    min_size=2,
    max_size=14,
)
FEW = settings(
    max_examples=examples(20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class History:
    """Two processes on one database, a program without Flask, and a model of what is right."""

    def __init__(self, new_desk: MakeDesk) -> None:
        self.inline, self.worker = new_desk(), new_desk()
        self.inline.listing(inline=True)
        self.worker.listing()
        with self.inline.context():
            address = self.inline.engine.url.render_as_string(hide_password=False)
        env = {"PERSISTENCE_MODULE": "flask_eventsourcing.persistence", "SQLALCHEMY_DATABASE_URI": address}
        self.alone = Bank(env=env)
        self.saved: list[tuple[str, int]] = []
        self.base = 0
        """How many of the events are at or below the checkpoint."""
        self.ranges: set[int] = set()
        self.applied: list[int] = []

    def begin(self) -> None:
        """Empty every table."""
        with self.inline.context():
            for table in reversed(self.inline.Model.metadata.sorted_tables):
                self.inline.session.execute(sa.delete(table))
            self.inline.session.commit()
        self.saved, self.base, self.ranges, self.applied = [], 0, set(), []

    def save(self, kind: str, count: int) -> None:
        """Save an aggregate with some events."""
        account = Account("Ada")
        for amount in range(1, count):
            account.deposit(amount)
        if kind == "alone":
            self.alone.save(account)
        else:
            desk = self.worker if kind == "worker" else self.inline
            with desk.context() as bank:
                bank.save(account)
                if kind == "rolled back":
                    desk.session.rollback()
                    return
                desk.session.commit()
        new = range(len(self.saved), len(self.saved) + count)
        self.saved += [(str(account.id), version) for version in range(1, count + 1)]
        if kind == "inline":
            self.ranges.update(new)
            self.applied += new

    def lacks(self, end: int) -> bool:
        """Whether an event above the checkpoint was not applied inline."""
        return any(number not in self.ranges for number in range(self.base, end))

    @property
    def inline_end(self) -> int:
        """One more than the last event that was applied inline."""
        return max(self.ranges, default=-1) + 1

    def take(self, kind: str) -> None:
        """Take a step that saves nothing."""
        head = len(self.saved)
        consumer = self.inline.consumer(NAME)
        if kind == "merge":
            with self.inline.context():
                merge_ranges(consumer.application)
        elif kind == "accept":
            if self.lacks(head):
                self.base = head
            accept(consumer)
        elif kind == "rebuild":
            assert Rebuild(consumer, threading.Event()).run() is not None
            self.base, self.applied = head, list(range(head))
        elif self.lacks(self.inline_end):
            errors = self.worker.run_once(NAME)
            assert [type(error) for error in errors] == [CheckpointMismatchError]
        else:
            assert self.worker.run_once(NAME) == []
            self.applied += [number for number in range(self.base, head) if number not in self.ranges]
            self.base = head

    def count_ranges(self) -> int:
        """Return how many rows there are of what was applied inline."""
        with self.inline.context():
            table = self.inline.consumer(NAME).application.models.tables["inline_ranges"]
            return self.inline.session.scalar(sa.select(sa.func.count()).select_from(table)) or 0

    def check(self) -> None:
        """Compare the read model and both states with what is right."""
        with self.inline.context():
            found = [(row.account_id, row.version) for row in self.inline.session.scalars(sa.select(self.inline.Seen))]
        assert sorted(found) == sorted(self.saved[number] for number in self.applied)
        status = self.inline.status(NAME)
        missing = self.lacks(len(self.saved))
        assert (status.state, status.healthy) == (("not applied inline", False) if missing else ("inline", True))
        assert status.lag_events == sum(n not in self.ranges for n in range(self.base, len(self.saved)))
        refused = self.lacks(self.inline_end)
        assert (self.worker.status(NAME).state == "not applied inline") == refused


@pytest.fixture
def history(new_desk: MakeDesk, caplog: pytest.LogCaptureFixture) -> History:
    """The processes, which log nothing of what they refuse."""
    caplog.set_level(logging.CRITICAL, "flask_eventsourcing")
    return History(new_desk)


@FEW
@given(STEPS)
@example([("inline", 2), ("alone", 1), ("inline", 1), ("merge", 0), ("run", 0), ("accept", 0), ("inline", 1)])
@example([("worker", 1), ("run", 0), ("inline", 2), ("rolled back", 2), ("inline", 1), ("merge", 0), ("run", 0)])
def test_each_event_is_applied_once_or_its_absence_is_told(history: History, steps: list[tuple[str, int]]) -> None:
    """If processes differ in how they run a projection, no event is applied twice, and a missing one is reported."""
    history.begin()
    for kind, count in steps:
        if count:
            history.save(kind, count)
        else:
            history.take(kind)
        history.check()
    history.take("merge")
    history.check()
    above = {number for number in history.ranges if number >= history.base}
    assert history.count_ranges() == sum(number - 1 not in above for number in above)


def test_writers_and_merges_at_once(new_desk: MakeDesk) -> None:
    """While several processes write and two merge ranges, every event counts as applied at each moment."""
    desk = new_desk(EVENTSOURCING_LOCK_TIMEOUT=60)
    desk.listing(inline=True)
    application = desk.consumer(NAME).application
    writing = threading.Event()
    states: list[str] = []
    writing.set()

    def write() -> None:
        for number in range(25):
            with desk.context() as bank:
                bank.open_account()
                bank.open_account()
                if number % 5 == 4:
                    desk.session.rollback()
                desk.session.commit()

    def merge() -> None:
        while writing.is_set():
            with desk.context():
                merge_ranges(application)

    def look() -> None:
        while writing.is_set():
            states.append(desk.status(NAME).state)

    others = [threading.Thread(target=each) for each in (merge, merge, look)]
    for thread in others:
        thread.start()
    try:
        in_threads([write] * 4)
    finally:
        writing.clear()
        for thread in others:
            thread.join(PATIENCE)
    merge_ranges(application)
    with desk.context():
        assert desk.session.scalar(sa.select(sa.func.count()).select_from(desk.Seen)) == 4 * 20 * 2
        ranges = application.models.tables["inline_ranges"]
        assert desk.session.scalar(sa.select(sa.func.count()).select_from(ranges)) == 1
    assert set(states) == {"inline"}
