"""``es.wait_for``: reading your own writes.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from flask_eventsourcing import UncommittedEventsError
from flask_eventsourcing.exceptions import ConfigurationError, OldSnapshotError, ProjectionHaltedError
from flask_eventsourcing.persistence.subscriptions import ListenWaiter
from flask_eventsourcing.projections.upkeep import following
from tests.domain import Account, until
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Desk

on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)
on_mariadb = pytest.mark.parametrize("uri", ["mariadb"], indirect=True)
on_postgresql = pytest.mark.parametrize("uri", ["postgresql"], indirect=True)


def test_what_was_committed_can_be_read(desk: Desk) -> None:
    """After wait_for the read model has what save() has recorded, given as recordings or as a position."""
    balances = desk.balances()
    with desk.running(), desk.context() as bank:
        account = Account("Ada")
        account.deposit(5)
        recordings = bank.save(account)
        desk.session.commit()
        desk.wait_for(balances, recordings, timeout=20)
        assert desk.session.get_one(desk.Balance, account.id).amount == 5
        desk.wait_for("Balances", recordings[-1].notification.id, timeout=0)
        desk.wait_for("Balances", [])


def test_a_projection_that_nobody_runs(desk: Desk) -> None:
    """Without a worker there is a TimeoutError that asks for one, and no connection stays in use."""
    desk.balances()
    desk.open()
    with desk.context():
        for _ in range(20):
            with pytest.raises(TimeoutError, match=r"Balances has not reached position 1 within 0.01 s: is .* running"):
                desk.wait_for("Balances", 1, timeout=0.01)


@on_sqlite
def test_a_timeout_that_is_no_number(desk: Desk) -> None:
    """A timeout that never comes, as that of a computation with no result, is over at once."""
    desk.balances()
    desk.open()
    with desk.context(), pytest.raises(TimeoutError, match="within nan s"):
        desk.wait_for("Balances", 1, timeout=math.nan)


@on_sqlite
def test_uncommitted_events(desk: Desk) -> None:
    """Waiting for events that are not committed would not end, and is refused at once."""
    desk.balances()
    with desk.context() as bank:
        account = Account("Ada")
        recordings = bank.save(account)
        with pytest.raises(UncommittedEventsError, match=r"call (db\.session|session|transaction)\.commit\(\) before"):
            desk.wait_for("Balances", recordings)
        desk.session.rollback()


def test_a_halted_projection(desk: Desk) -> None:
    """Waiting for an event behind one that cannot be applied ends at once, and names that one."""
    desk.balances(retries=0)
    desk.poison.add(13)
    desk.open(1, 13)
    assert desk.run_once()
    with desk.context():
        desk.wait_for("Balances", 2)
        with pytest.raises(ProjectionHaltedError, match="halted before position 3"):
            desk.wait_for("Balances", 3, timeout=20)


@on_sqlite
@pytest.mark.parametrize("recordings", [None, "1", 1.5, ["a"], object()])
def test_what_cannot_be_waited_for(desk: Desk, recordings: Any) -> None:
    """Something else than recordings or positions is a TypeError."""
    desk.balances()
    with desk.context(), pytest.raises(TypeError, match="takes the recordings that save"):
        desk.wait_for("Balances", recordings)


@on_sqlite
def test_an_unknown_projection(desk: Desk) -> None:
    """A projection that is not registered is named, with those that are."""
    desk.balances()
    with desk.context(), pytest.raises(ConfigurationError, match=r"no projection 'Nobody' \(registered: Bal"):
        desk.wait_for("Nobody", 1)


@on_postgresql
def test_a_notification_wakes_a_waiting_caller(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PostgreSQL a notification that the position has moved ends the wait, without polling."""
    monkeypatch.setattr(following, "SHORTEST_WAIT", 1000.0)
    monkeypatch.setattr(following, "LONGEST_WAIT", 1000.0)
    desk.balances()
    account_id = desk.open(1)
    done: list[bool] = []

    def wait() -> None:
        with desk.context():
            desk.wait_for("Balances", 2, timeout=900)
            done.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: listeners(desk))
    assert not done
    assert not desk.run_once()
    thread.join(30)
    assert done
    assert desk.amounts() == {account_id: 1}


@on_postgresql
def test_a_kept_connection_does_not_hold_up_the_servers_queue(desk: Desk) -> None:
    """A connection that is kept for a later wait listens to nothing, as the server would keep its notifications."""
    desk.balances()
    desk.open(1)
    with desk.context():
        with pytest.raises(TimeoutError):
            desk.wait_for("Balances", 2, timeout=0.2)
        waiters = desk.projections.waiters_of(desk.consumer())
        ((_, kept),) = waiters._idle
        assert isinstance(kept, ListenWaiter)
        assert kept._driver.execute("SELECT count(*) FROM pg_listening_channels()").fetchone() == (0,)
        assert not desk.run_once()
        desk.wait_for("Balances", 2, timeout=20)


@on_postgresql
def test_without_notifications(new_desk: MakeDesk) -> None:
    """With notifications switched off, waiting polls."""
    desk = new_desk(EVENTSOURCING_POSTGRES_NOTIFY=False)
    desk.balances()
    account_id = desk.open(1)
    with desk.running(), desk.context():
        desk.wait_for("Balances", 2, timeout=20)
        assert not listeners(desk)
    assert desk.amounts() == {account_id: 1}


def listeners(desk: Desk) -> int:
    """Count the connections that listen for moved positions."""
    with desk.consumer().application.engine.connect() as connection:
        query = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query = 'LISTEN \"bank_projections\"'"
        )
        return int(connection.scalar(sa.text(query)) or 0)


def test_many_wait_at_a_time(desk: Desk) -> None:
    """Many threads may wait for the same position."""
    desk.balances()
    account_id = desk.open(1)
    done: list[int] = []

    def wait(number: int) -> Callable[[], None]:
        def run() -> None:
            with desk.context():
                desk.wait_for("Balances", 2, timeout=25)
                done.append(number)

        return run

    threads = [threading.Thread(target=wait(number)) for number in range(10)]
    for thread in threads:
        thread.start()
    assert not desk.run_once()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == list(range(10))
    assert desk.amounts() == {account_id: 1}


@on_mariadb
def test_transaction_with_an_older_snapshot_is_told(desk: Desk) -> None:
    """Waiting with a session that reads from an older snapshot is an error."""
    desk.balances()
    account_id = desk.open(1)
    with desk.context():
        assert desk.session.scalars(sa.select(desk.Balance.amount)).all() == []
        assert not desk.run_once()
        with pytest.raises(OldSnapshotError, match="rollback"):
            desk.wait_for("Balances", 2, timeout=20)
        desk.session.rollback()
        assert desk.session.scalars(sa.select(desk.Balance.amount)).all() == [1]
        desk.wait_for("Balances", 2, timeout=20)
        desk.session.rollback()
    assert desk.amounts() == {account_id: 1}
