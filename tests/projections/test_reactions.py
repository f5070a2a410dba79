"""Reactions: side effects, at least once, after the commit and after the projection's own models.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.exceptions import ProjectionHaltedError
from flask_eventsourcing.projections import ModelProjection, checkpoint, on, reaction, runners
from flask_eventsourcing.projections.applying import Applier
from flask_eventsourcing.projections.checkpoint import FencedError
from tests.domain import until
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Created, Deposited, Desk

NAME = "Reacting:reactions"
on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)


class KilledError(BaseException):
    """Ends a worker's thread as a signal would end its process."""


@contextmanager
def killed_before_commit(desk: Desk) -> Iterator[None]:
    """Within it, a worker dies instead of committing."""

    def kill(session: orm.Session) -> None:
        raise KilledError

    sa.event.listen(desk.sessions, "before_commit", kill)
    try:
        yield
    finally:
        sa.event.remove(desk.sessions, "before_commit", kill)


def test_each_event_once_in_order_with_its_key(desk: Desk) -> None:
    """In the normal case a reaction is called once for each event, also across workers."""
    desk.reacting()
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    desk.deposit(account_id, 3)
    assert not desk.run_once()
    assert not desk.run_once()
    assert [call[:2] for call in desk.calls] == [(account_id, version) for version in (2, 3, 4)]
    with desk.context():
        c = desk.events_table.c
        query = sa.select(c.event_id).where(c.originator_version > 1).order_by(c.notification_id)
        assert [key for _, _, key in desk.calls] == [f"Bank/Reacting/{each}" for each in desk.session.scalars(query)]
    assert len({key for _, _, key in desk.calls}) == 3


def test_an_event_without_an_id_has_a_key_too(desk: Desk) -> None:
    """If an event has no id, its key is made from its log, aggregate, version and content."""
    desk.reacting()
    account_id = desk.open(1, 2)
    with desk.engine.begin() as connection:
        connection.execute(sa.update(desk.events_table).values(event_id=None, correlation_id=None))
    assert not desk.run_once()
    log = desk.any_consumer().application.log.identity()
    for _, version, key in desk.calls:
        assert key.startswith(f"Bank/Reacting/{log}/{account_id}/{version}/")
    assert len({key for _, _, key in desk.calls}) == 2


def test_a_kill_between_call_and_commit(desk: Desk) -> None:
    """A reaction that was called before its worker was killed is called again with the same key, and then no more."""
    desk.reacting()
    account_id = desk.open(1, 2)
    with killed_before_commit(desk), pytest.raises(KilledError):
        desk.worker(once=True).runners[0].run(once=True)
    assert not desk.run_once()
    keys = [key for _, _, key in desk.calls]
    assert keys[0] == keys[1] or len(keys) == 2
    assert {call[:2] for call in desk.calls} == {(account_id, 2), (account_id, 3)}
    assert len(set(keys)) == 2


def test_reactions_come_after_the_models(desk: Desk) -> None:
    """When a reaction is called, the projection's own models have its event, committed."""
    found: list[int] = []

    class Watch(ModelProjection):
        models = (desk.Balance,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            session.get_one(desk.Balance, event.originator_id).amount += event.amount

        @reaction(Deposited)
        def watched(self, event: Any, key: str) -> None:
            with desk.consumer("Watch").application.engine.connect() as connection:
                query = sa.select(desk.Balance.amount).where(desk.Balance.account_id == event.originator_id)
                found.append(connection.scalar(query) or 0)

    desk.register(Watch)
    account_id = desk.open(*[1] * 20)
    # On its own it waits for the models.
    assert not desk.run_once("Watch:reactions")
    assert found == []
    # In one run both come to the end.
    assert not desk.run_once()
    assert found == [20] * 20
    with desk.running():
        desk.deposit(account_id, 5)
        until(lambda: len(found) == 21)
    assert found[-1] == 25


def test_reactions_of_an_inline_projection(desk: Desk) -> None:
    """An inline projection may have reactions; a worker calls them after the commit."""
    told: list[str] = []

    class Watch(ModelProjection):
        models = (desk.Balance,)
        inline = True

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))

        @reaction(Created)
        def welcome(self, event: Any, key: str) -> None:
            told.append(key)

    desk.register(Watch)
    with desk.context() as bank:
        bank.open_account()
        desk.session.rollback()
        bank.open_account()
        desk.session.commit()
    assert not desk.run_once()
    assert len(told) == 1


def test_from_the_end_on(desk: Desk) -> None:
    """With ``start="end"`` events from before the first run are passed over, those from between two runs are not."""
    desk.reacting(start="end")
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    assert desk.calls == []
    desk.deposit(account_id, 3, 4)
    assert not desk.run_once()
    assert [version for _, version, _ in desk.calls] == [4, 5]


def test_a_failing_reaction_is_retried_then_halts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reaction that keeps failing is called again with the same key, and then halts at its event."""
    monkeypatch.setattr(runners, "FIRST_PAUSE", 0.01)
    desk.reacting(retries=2)
    desk.poison.add(13)
    desk.open(1, 13, 2)
    (error,) = desk.run_once()
    assert isinstance(error, ProjectionHaltedError)
    assert [version for _, version, _ in desk.calls] == [2, 3, 3, 3]
    assert desk.status(NAME).failed_position == 3
    desk.poison.clear()
    desk.consumer(NAME).checkpoint.resume()
    assert not desk.run_once()
    assert [version for _, version, _ in desk.calls] == [2, 3, 3, 3, 3, 4]


def test_a_slow_reaction_keeps_nobody_from_writing(new_desk: MakeDesk) -> None:
    """While a slow reaction runs, other transactions of the app go on, on SQLite too."""
    desk = new_desk(EVENTSOURCING_LOCK_TIMEOUT=2.0)
    called, go_on = threading.Event(), threading.Event()

    class Slow(ModelProjection):
        @reaction(Created)
        def call(self, event: Any, key: str) -> None:
            called.set()
            assert go_on.wait(60)

    desk.register(Slow)
    desk.open()
    with desk.running():
        try:
            assert called.wait(30)
            desk.open(1, 2)
        finally:
            go_on.set()
        until(lambda: desk.position("Slow:reactions") == 4)


def test_a_slow_reaction_keeps_its_lease(new_desk: MakeDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reaction may take longer than a lease lasts: another worker does not call it meanwhile."""
    monkeypatch.setattr(checkpoint, "LEASE", 1.5)
    monkeypatch.setattr(checkpoint, "BEAT", 0.3)
    monkeypatch.setattr(runners, "STANDBY_PAUSE", 0.05)
    desk, other = (new_desk(EVENTSOURCING_PROJECTION_LOCK="lease") for _ in range(2))
    calls: list[str] = []

    def slow() -> Any:
        class Slow(ModelProjection):
            @reaction(Created)
            def call(self, event: Any, key: str) -> None:
                calls.append(key)
                time.sleep(3)

        return Slow

    for each in (desk, other):
        each.register(slow())
    desk.open()
    with desk.running(), other.running():
        until(lambda: desk.position("Slow:reactions") == 1)
    assert len(calls) == 1


def test_a_reaction_is_called_with_no_transaction_open(desk: Desk) -> None:
    """While a slow reaction runs, no transaction of the worker is open."""
    open_ones: list[bool] = []

    class Slow(ModelProjection):
        models = (desk.Balance,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))

        @reaction(Created)
        def told(self, event: Any, key: str) -> None:
            open_ones.append(desk.session.in_transaction())
            row = desk.session.get(desk.Balance, event.originator_id)
            assert row is not None
            row.amount = 7

    desk.register(Slow)
    account_id = desk.open()
    assert not desk.run_once()
    assert open_ones == [False]
    assert desk.amounts() == {account_id: 7}


def test_a_reaction_whose_claim_was_lost_is_not_called(desk: Desk) -> None:
    """Before a reaction is called, its runner looks whether another one has taken over."""
    desk.reacting()
    desk.open(1)
    consumer = desk.consumer("Reacting:reactions")
    consumer.checkpoint.ensure()
    claimed = consumer.checkpoint.claim(lease=False)
    assert claimed is not None
    with consumer.application.host.context():
        applier = Applier(consumer)
        (event,) = [each for each in consumer.application.read_log(0, 10, None, ()) if each.id == 2]
        assert consumer.checkpoint.claim(lease=False) is not None
        with pytest.raises(FencedError):
            applier.apply(claimed, [event], 2)
    assert desk.calls == []
