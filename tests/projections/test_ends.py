"""How runs end: handlers that would end the process, workers that are run again, and runs that happen once.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import orm

from flask_eventsourcing.commands.work import end_if_halted
from flask_eventsourcing.exceptions import HandlerError, ProjectionHaltedError
from flask_eventsourcing.persistence.dialects.locks import utc_now
from flask_eventsourcing.projections import ModelProjection, on, reaction
from flask_eventsourcing.projections.checkpoint import ACTIVE, LEASE
from flask_eventsourcing.projections.rebuilding import Rebuild
from tests.domain import PATIENCE, until
from tests.projections.desk import Created, Deposited, Desk

pytestmark = pytest.mark.usefixtures("short_pauses")
on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)


def leaving(desk: Desk, error: BaseException, **attributes: Any) -> list[int]:
    """Register a projection and a reaction that raise an error at a deposit of 13; returns the amounts of the tries."""
    tries: list[int] = []

    class Leaving(ModelProjection):
        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            if event.amount == 13:
                tries.append(event.amount)
                raise error

    desk.register(type("Leaving", (Leaving,), attributes))
    return tries


def test_a_handler_that_exits_has_failed(desk: Desk) -> None:
    """A handler that calls ``sys.exit()`` ends no worker: its event is tried again, and then halts the projection."""
    tries = leaving(desk, SystemExit(0), retries=1)
    desk.open(1, 13, 2)
    (error,) = desk.run_once()
    assert isinstance(error, ProjectionHaltedError)
    assert "A handler of Leaving raised SystemExit" in str(error)
    assert isinstance(error.__cause__, HandlerError)
    assert tries[-2:] == [13, 13]
    assert desk.status("Leaving").state == "halted"


@on_sqlite
def test_a_handler_that_was_canceled_has_failed(desk: Desk) -> None:
    """A handler from which asyncio's ``CancelledError`` comes has failed like any other: its projection halts."""
    tries = leaving(desk, asyncio.CancelledError(), retries=1)
    desk.open(1, 13, 2)
    (error,) = desk.run_once()
    assert isinstance(error, ProjectionHaltedError)
    assert "A handler of Leaving raised asyncio's CancelledError" in str(error)
    assert tries[-2:] == [13, 13]
    assert desk.status("Leaving").state == "halted"


@on_sqlite
def test_a_handler_that_exits_makes_the_command_fail(desk: Desk) -> None:
    """``run --once`` does not end with 0 where a handler has called ``sys.exit(0)``; in a reaction it is the same."""
    leaving(desk, SystemExit(0), retries=0)

    class Told(ModelProjection):
        retries = 0

        @reaction(Created)
        def told(self, event: Any, key: str) -> None:
            sys.exit(0)

    desk.register(Told)
    desk.open(13)
    for name in ("Leaving", "Told"):
        result = desk.command("run", name, "--once")
        assert result.exit_code == 1
        assert f"A handler of {name} raised SystemExit" in result.output


@on_sqlite
@pytest.mark.parametrize("once", [True, False])
def test_whatever_ends_a_thread_is_an_error_of_the_worker(desk: Desk, once: bool) -> None:
    """An exception such as ``KeyboardInterrupt`` in a handler ends its consumer, and the run reports it."""
    leaving(desk, KeyboardInterrupt())
    desk.open(13)
    worker = desk.worker(once=once)
    (error,) = worker.run(period=0.01)
    assert str(error) == "Leaving was ended by KeyboardInterrupt."
    assert isinstance(error.__cause__, KeyboardInterrupt)


@on_sqlite
def test_a_worker_runs_once(desk: Desk) -> None:
    """A worker that has run says that it cannot run again; one that is stopped before it runs ends at once."""
    desk.balances()
    account_id = desk.open(1)
    stopped = desk.worker()
    stopped.stop()
    assert not stopped.run()
    worker = desk.worker(once=True)
    assert not worker.run()
    desk.deposit(account_id, 1)
    for each in (stopped, worker):
        with pytest.raises(RuntimeError, match="This worker was run before: make another Worker"):
            each.run()
    assert desk.amounts() == {account_id: 1}
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 2}


@on_sqlite
@pytest.mark.parametrize("once", [True, False])
def test_a_failing_handler_has_one_traceback(desk: Desk, once: bool, caplog: pytest.LogCaptureFixture) -> None:
    """If an event is tried many times, the log has one traceback, and a line for each try."""
    desk.balances(retries=4)
    desk.poison = {13}
    desk.open(1, 13)
    with caplog.at_level(logging.WARNING, logger="flask_eventsourcing"):
        if once:
            desk.run_once()
        else:
            with desk.running() as worker:
                until(lambda: worker.runners[0].progress.halted is not None)
    assert [bool(record.exc_info) for record in caplog.records if record.exc_info] == [True]
    lines = [record.getMessage() for record in caplog.records if "its handler failed" in record.getMessage()]
    assert [line.partition(", try ")[2][0] for line in lines] == ["1", "2", "3", "4", "5"]


@on_sqlite
def test_a_worker_with_nothing_left_to_run_ends(desk: Desk) -> None:
    """A worker ends, for its supervisor to see, if each projection has halted or was ended by a fatal error."""
    leaving(desk, KeyboardInterrupt(), name="Leaving")
    desk.balances(retries=0)
    desk.poison = {13}
    desk.open(13)
    worker = desk.worker()
    thread = threading.Thread(target=worker.run, args=(lambda: end_if_halted(worker), 0.02))
    thread.start()
    thread.join(PATIENCE)
    has_ended = not thread.is_alive()
    worker.stop()
    thread.join(PATIENCE)
    assert has_ended
    assert sorted(type(error).__name__ for error in worker.errors) == ["HandlerError", "ProjectionHaltedError"]


@on_sqlite
def test_one_that_another_worker_runs_has_not_halted(desk: Desk) -> None:
    """A worker in which a projection has halted stops saying so once another worker runs it."""
    desk.balances(retries=0)
    desk.poison = {13}
    desk.open(13)
    consumer = desk.consumer()
    with desk.running() as worker:
        until(lambda: worker.runners[0].progress.halted is not None)
        with desk.engine.begin() as connection:
            lease = utc_now() + timedelta(seconds=LEASE)
            consumer.checkpoint.set_values(connection, state=ACTIVE, token="another", leased_until=lease)
        until(lambda: worker.runners[0].progress.state == "standing by")
        assert worker.runners[0].progress.halted is None
        worker.stop()
    assert worker.errors == []


def test_a_run_goes_on_with_what_its_reactions_save(desk: Desk) -> None:
    """``--once`` ends when there is nothing left, what its own reactions have saved included."""
    desk.balances()

    class Interest(ModelProjection):
        @reaction(Deposited)
        def pay(self, event: Any, key: str) -> None:
            if event.amount > 1:
                desk.bank.deposit(event.originator_id, event.amount // 2)

    desk.register(Interest)
    account_id = desk.open(8)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 8 + 4 + 2 + 1}
    assert desk.position() == desk.position("Interest:reactions") == desk.head() == 5


@on_sqlite
def test_a_run_ends_although_others_write(desk: Desk) -> None:
    """Events that others save during a run with ``--once`` are left to the next run."""
    desk.balances()
    account_id = desk.open(1)
    saved: list[int] = []

    class Busy(ModelProjection):
        @reaction(Deposited)
        def told(self, event: Any, key: str) -> None:
            # As another process would, in a transaction of its own.
            with desk.context():
                desk.bank.deposit(account_id, 1)
                desk.session.commit()
            saved.append(1)

    desk.register(Busy)
    assert not desk.run_once()
    assert saved == [1]
    assert desk.amounts() == {account_id: 1}


@on_sqlite
def test_a_halted_one_is_not_run_again_by_the_same_run(desk: Desk) -> None:
    """A halted projection is reported once, also if the run goes on for events that reactions saved."""
    desk.balances(retries=0)
    desk.poison = {13}

    class Echo(ModelProjection):
        @reaction(Deposited)
        def echo(self, event: Any, key: str) -> None:
            if event.amount == 13:
                desk.bank.deposit(event.originator_id, 1)

    desk.register(Echo)
    desk.open(13)
    (error,) = desk.run_once()
    assert "Balances is halted" in str(error)
    assert desk.position("Echo:reactions") == desk.head() == 3


def test_a_rebuild_tells_what_it_has_set_aside(desk: Desk) -> None:
    """A rebuild says how many events it has set aside, those that wait behind them, and where they are listed."""
    desk.balances(on_failure="dead-letter", retries=0)
    desk.poison = {13}
    desk.open(13, 1)
    desk.open(1, 13)
    assert not desk.run_once()
    rebuilt = Rebuild(desk.consumer()).run()
    assert rebuilt is not None
    assert (rebuilt.dead_letters, rebuilt.waiting) == (2, 1)
    result = desk.command("rebuild", "Balances")
    told = f"It has set aside 2 dead letters, 1 waiting behind: see '{desk.program} dead-letters list'.\n"
    assert told in result.output
    desk.poison = set()
    result = desk.command("rebuild", "Balances")
    assert "set aside" not in result.output
    assert (desk.status().dead_letters, desk.status().waiting) == (0, 0)
