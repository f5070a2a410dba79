"""A worker keeps nothing of the claims that it has lost.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event as sqlalchemy_event

from flask_eventsourcing.projections import checkpoint
from tests.domain import Account, until
from tests.projections.desk import Desk
from tests.projections.test_locks import end_locks

EVENTS = 40
"""What is saved between two losses."""


@pytest.fixture(autouse=True)
def short_leases(short_pauses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let tests wait for the end of a lease, nor for pauses between tries."""
    monkeypatch.setattr(checkpoint, "BEAT", 0.05)
    monkeypatch.setattr(checkpoint, "LEASE", 0.3)


def save(desk: Desk) -> None:
    """Save events in one transaction."""
    with desk.context() as bank:
        account = Account("Ada")
        for _ in range(EVENTS - 1):
            account.deposit(1)
        bank.save(account)
        desk.session.commit()


def kept(desk: Desk) -> Counter[str]:
    """Count what the process has of the package's and of the read model's objects, and of listeners at SQLAlchemy."""
    gc.collect()
    found = Counter[str]()
    for each in gc.get_objects():
        kind = type(each)
        module = str(kind.__module__)
        if kind is desk.Seen or module.startswith(("flask_eventsourcing.", "eventsourcing.persistence")):
            found[f"{module}.{kind.__qualname__}"] += 1
    found["listeners"] = len(sqlalchemy_event.registry._key_to_collection)
    return found


def save_and_wait(desk: Desk, after: str | None = None) -> None:
    """Save, and wait until that is applied, under another claim than the one before."""
    save(desk)
    head = desk.head()
    until(lambda: (row := desk.row("Listing")).position == head and row.token not in (None, after))


def lose(desk: Desk, lose_claim: Callable[[], Any], times: int) -> Counter[str]:
    """Have a worker lose its claim so many times while events come; return of what it has more in the end."""
    desk.listing()
    save(desk)
    assert desk.run_once() == []
    with desk.running():
        save_and_wait(desk)
        before = kept(desk)
        for _ in range(times):
            token = desk.row("Listing").token
            lose_claim()
            save_and_wait(desk, token)
        more = grown(desk, before, times)
        for _ in range(50):
            if not more:
                break
            # The worker may be in the midst of a page: what it leaves behind is there later too.
            time.sleep(0.1)
            more = grown(desk, before, times)
    assert desk.position("Listing") == (2 + times) * EVENTS
    return more


def grown(desk: Desk, before: Counter[str], times: int) -> Counter[str]:
    """Return what there is more of than before, by at least one for each loss."""
    return Counter({name: number for name, number in (kept(desk) - before).items() if number >= times})


@pytest.mark.parametrize(
    ("uri", "times"),
    [
        ("sqlite-file", 8),
        pytest.param("postgresql", 8, marks=pytest.mark.long),
        pytest.param("mariadb", 8, marks=pytest.mark.long),
        pytest.param("postgresql", 20, marks=pytest.mark.torture),
    ],
    indirect=["uri"],
)
def test_claims_that_others_took(desk: Desk, times: int) -> None:
    """A worker that loses its claim again and again keeps no row, listener or other object of it."""
    assert lose(desk, lambda: desk.consumer("Listing").checkpoint.claim(lease=False), times) == {}


@pytest.mark.parametrize(
    ("uri", "times"),
    [
        pytest.param("postgresql", 6, marks=pytest.mark.long),
        pytest.param("mariadb", 6, marks=pytest.mark.long),
        pytest.param("postgresql", 20, marks=pytest.mark.torture),
    ],
    indirect=["uri"],
)
def test_claims_whose_connection_was_lost(desk: Desk, times: int, caplog: pytest.LogCaptureFixture) -> None:
    """The same where the connection with the lock ends, and the worker takes it again."""
    caplog.set_level(logging.CRITICAL, logger="flask_eventsourcing")
    assert lose(desk, lambda: end_locks(desk, "Listing"), times) == {}
