"""Dead letters that are retried or discarded.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from uuid import UUID

import pytest

from flask_eventsourcing.exceptions import DeadLetterError
from flask_eventsourcing.projections.dead_letters import DeadLetter
from flask_eventsourcing.projections.upkeep.repair import discard, retry
from tests.domain import until
from tests.projections.desk import Desk


def letters(desk: Desk) -> list[DeadLetter]:
    """Return all dead letters."""
    application = desk.consumer().application
    with application.engine.connect() as connection:
        return list(application.dead_letters.select(connection, ["Balances"]))


@pytest.fixture
def broken(desk: Desk) -> tuple[Desk, UUID, UUID]:
    """A desk with two accounts, of which the first has a dead letter with two events behind it."""
    desk.balances(on_failure="dead-letter", retries=0)
    desk.poison = {13}
    first, second = desk.open(1, 13, 100, 1000), desk.open(5)
    assert desk.run_once() == []
    assert desk.amounts() == {first: 1, second: 5}
    return desk, first, second


def test_retry_after_the_fix_applies_in_order(broken: tuple[Desk, UUID, UUID]) -> None:
    """After the fix, a retry applies the failed event and then those that waited, and nothing is left of them."""
    desk, first, second = broken
    assert [(letter.error is None, letter.attempts) for letter in letters(desk)] == [(False, 1), (True, 0), (True, 0)]
    desk.poison.clear()
    result = retry(desk.consumer())
    assert [letter.originator_version for letter in result.applied] == [3, 4, 5]
    assert desk.amounts() == {first: 1114, second: 5}
    assert letters(desk) == []
    desk.deposit(first, 1)
    desk.run_once()
    assert desk.amounts()[first] == 1115


def test_retry_before_the_fix_changes_nothing(broken: tuple[Desk, UUID, UUID]) -> None:
    """A retry that fails again counts one try more, and those behind it go on waiting."""
    desk, first, _ = broken
    (failed, *_) = letters(desk)
    result = retry(desk.consumer(), [failed.id])
    assert [letter.id for letter in result.failed] == [failed.id]
    assert result.failed[0].attempts == 2
    assert "cannot digest 13" in (result.failed[0].traceback or "")
    assert len(letters(desk)) == 3
    assert desk.amounts()[first] == 1


def test_discard_applies_what_waited(broken: tuple[Desk, UUID, UUID]) -> None:
    """A discarded event is skipped, and those that waited behind it are applied."""
    desk, first, _ = broken
    failed = letters(desk)[0]
    result = discard(desk.consumer(), failed.id)
    assert [letter.id for letter in result.discarded] == [failed.id]
    assert desk.amounts()[first] == 1101
    assert letters(desk) == []


def test_an_event_that_waits_cannot_be_discarded(broken: tuple[Desk, UUID, UUID]) -> None:
    """Only an event that failed can be discarded, not one that waits behind it; unknown ids are named."""
    desk, _, _ = broken
    waiting = letters(desk)[1]
    with pytest.raises(DeadLetterError, match=f"{waiting.id} only waits"):
        discard(desk.consumer(), waiting.id)
    with pytest.raises(DeadLetterError, match="no dead letter 4711"):
        discard(desk.consumer(), 4711)
    with pytest.raises(DeadLetterError, match="no dead letter 4711"):
        retry(desk.consumer(), [4711])
    assert len(letters(desk)) == 3


def test_retry_while_a_worker_runs(broken: tuple[Desk, UUID, UUID]) -> None:
    """A retry and a worker that gets new events of the same aggregate keep their order, and lose none."""
    desk, first, _ = broken
    with desk.running():
        for _ in range(5):
            desk.deposit(first, 1, 1)
            desk.poison.clear()
            retry(desk.consumer())
        until(lambda: desk.row().position >= desk.head(), "the worker")
    retry(desk.consumer())
    assert desk.amounts()[first] == 1114 + 10
    assert letters(desk) == []
