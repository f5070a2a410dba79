"""Inline projections: handlers within ``save()``, in its transaction.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from sqlalchemy import orm

from flask_eventsourcing import AbortedTransactionError
from flask_eventsourcing.exceptions import CheckpointMismatchError, HandlerError
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.consumers.inline import merge_ranges
from flask_eventsourcing.projections.rebuilding import Rebuild
from tests.domain import Account, in_thread
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Created, Desk, PoisonError, on_flask
from tests.projections.desk_hosts import FlaskDesk, make_desk


def test_a_read_model_in_the_same_transaction(desk: Desk) -> None:
    """The read model is there as soon as save() has returned, and is committed or rolled back with the events."""
    desk.balances(inline=True)
    with desk.context() as bank:
        account_id = bank.open_account()
        bank.deposit(account_id, 5)
        assert desk.session.get_one(desk.Balance, account_id).amount == 5
        desk.session.commit()
        bank.deposit(account_id, 10)
        desk.session.rollback()
    assert desk.amounts() == {account_id: 5}
    assert desk.head() == 2


def test_several_events_of_one_save(desk: Desk) -> None:
    """All events of a save are applied, in their order."""
    desk.balances(inline=True)
    with desk.context() as bank:
        one, two = Account("Ada"), Account("Bob")
        for amount in (1, 2):
            one.deposit(amount)
            two.deposit(amount * 10)
        bank.save(one, two)
        desk.session.commit()
    assert desk.amounts() == {one.id: 3, two.id: 30}


def test_a_savepoint(desk: Desk) -> None:
    """A savepoint that is rolled back takes events and read model with it."""
    desk.balances(inline=True)
    with desk.context() as bank:
        account_id = bank.open_account()
        with suppress(RuntimeError), desk.session.begin_nested():
            bank.deposit(account_id, 5)
            raise RuntimeError
        with desk.session.begin_nested():
            bank.deposit(account_id, 7)
        desk.session.commit()
        assert bank.balance(account_id) == 7
    assert desk.amounts() == {account_id: 7}


def test_a_failing_handler_fails_the_save(desk: Desk) -> None:
    """The error of a handler comes out of save(), and the session refuses a commit until it is rolled back."""
    desk.balances(inline=True)
    desk.poison.add(13)
    account_id = desk.open(1)
    with desk.context() as bank:
        with pytest.raises(PoisonError):
            bank.deposit(account_id, 13)
        with pytest.raises(AbortedTransactionError, match="An inline projection failed"):
            desk.session.commit()
        desk.session.rollback()
        bank.deposit(account_id, 2)
        desk.session.commit()
        assert bank.balance(account_id) == 3
    assert desk.amounts() == {account_id: 3}


def test_a_row_that_is_refused_is_named(desk: Desk) -> None:
    """If the database refuses rows of an inline projection, save() raises that error."""
    desk.balances(inline=True)
    account_id = desk.open(1)
    with desk.context() as bank:
        bank.open_account()
        desk.session.add(desk.Balance(account_id=uuid4(), amount=None))
        with pytest.raises(sa.exc.IntegrityError, match=r"balance|amount"):
            bank.deposit(account_id, 1)
        desk.session.rollback()
        bank.deposit(account_id, 5)
        desk.session.commit()
    assert desk.amounts() == {account_id: 6}


def test_a_failure_in_a_savepoint_ends_with_it(desk: Desk) -> None:
    """A save that fails within a savepoint affects only the savepoint."""
    desk.balances(inline=True)
    desk.poison.add(13)
    with desk.context() as bank:
        account_id = bank.open_account()
        with suppress(PoisonError), desk.session.begin_nested():
            bank.deposit(account_id, 13)
        desk.session.commit()
        assert bank.balance(account_id) == 0
    assert desk.amounts() == {account_id: 0}


def test_a_failure_outlasts_a_later_one_in_a_savepoint(desk: Desk) -> None:
    """A failed save that was ignored is not forgotten because a savepoint after it failed and was rolled back."""
    desk.balances(inline=True)
    desk.poison.add(13)
    account_id = desk.open()
    with desk.context() as bank:
        with suppress(PoisonError):
            bank.deposit(account_id, 13)
        with suppress(PoisonError), desk.session.begin_nested():
            bank.deposit(account_id, 13)
        with pytest.raises(AbortedTransactionError):
            desk.session.commit()
        desk.session.rollback()
    assert desk.head() == 1


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_handler_that_ends_the_transaction(desk: Desk, ending: str, inside: bool) -> None:
    """A handler must not commit or roll back; then neither events nor read models are stored."""

    class Ending(ModelProjection):
        models = (desk.Balance,)
        inline = True

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))
            session.flush()
            getattr(session, ending)()

    desk.register(Ending)
    with desk.context() as bank:
        if inside:
            with pytest.raises(HandlerError, match="ended the transaction"):
                bank.open_account()
            desk.session.rollback()
    if not inside:
        with pytest.raises(HandlerError, match="ended the transaction"):
            bank.open_account()
    assert desk.head() == 0
    assert desk.amounts() == {}


def test_outside_an_application_context(desk: Desk) -> None:
    """Outside a context, events and read model are committed by save(), or neither of them."""
    desk.balances(inline=True)
    desk.poison.add(13)
    with desk.context() as bank:
        pass
    account_id = bank.open_account()
    bank.deposit(account_id, 5)
    with pytest.raises(PoisonError):
        bank.deposit(account_id, 13)
    assert desk.amounts() == {account_id: 5}
    assert bank.balance(account_id) == 5


@on_flask
def test_in_the_mode_save(new_desk: MakeDesk) -> None:
    """Where save() commits, the read model is committed with it; after a failure nothing is."""
    desk = new_desk(EVENTSOURCING_COMMIT="save")
    desk.balances(inline=True)
    desk.poison.add(13)
    with desk.context() as bank:
        account_id = bank.open_account()
        bank.deposit(account_id, 5)
        with pytest.raises(PoisonError):
            bank.deposit(account_id, 13)
        desk.session.rollback()
    assert desk.amounts() == {account_id: 5}
    assert desk.head() == 2


@on_flask
def test_in_the_mode_request(new_desk: MakeDesk) -> None:
    """If the request commits, a view that ignores a failed save answers with an error."""
    desk = new_desk(EVENTSOURCING_COMMIT="request")
    assert isinstance(desk, FlaskDesk)
    desk.balances(inline=True)
    desk.poison.add(13)
    client = desk.app.test_client()

    def post(*amounts: int) -> int:
        def view() -> str:
            for amount in amounts:
                with suppress(PoisonError):
                    desk.bank.deposit(account_id, amount)
            return "done"

        return client.post("/", environ_overrides={"tests.view": view}).status_code

    account_id = desk.open()
    assert post(5) == 200
    assert desk.amounts() == {account_id: 5}
    assert post(1, 13) == 500
    assert desk.amounts() == {account_id: 5}
    assert desk.head() == 2


def test_a_conflict_is_retried_with_its_read_model(desk: Desk) -> None:
    """A unit that is re-run after a conflict applies its events once."""
    desk.balances(inline=True)
    account_id = desk.open()
    tries: list[int] = []

    def unit() -> None:
        account = desk.bank.account(account_id)
        if not tries:
            in_thread(lambda: desk.deposit(account_id, 100))
        tries.append(1)
        account.deposit(1)
        desk.bank.save(account)

    with desk.context():
        desk.retry(unit)
    assert len(tries) == 2
    assert desk.amounts() == {account_id: 101}


def test_rows_that_the_session_had_loaded_before_are_read_again(desk: Desk) -> None:
    """A view that has shown the balance before it deposits does not overwrite what others deposited meanwhile."""
    desk.balances(inline=True)
    account_id = desk.open(1)
    with desk.context() as bank:
        shown = desk.session.get_one(desk.Balance, account_id)
        assert shown.amount == 1
        in_thread(lambda: desk.deposit(account_id, 100))
        try:
            bank.deposit(account_id, 10)
            desk.session.commit()
            expected = 111
        except IntegrityError:
            # MariaDB's snapshot of the log is as old as the row, so that it is a conflict there.
            desk.session.rollback()
            expected = 101
    assert desk.amounts() == {account_id: expected}


def test_status_and_waiting(desk: Desk) -> None:
    """An inline projection is never behind: it is healthy, and waiting for it returns at once."""
    desk.balances(inline=True)
    account_id = desk.open(1)
    status = desk.status()
    assert (status.state, status.position, status.lag_events, status.healthy) == ("inline", 2, 0, True)
    with desk.context() as bank:
        account = bank.account(account_id)
        account.deposit(1)
        recordings = bank.save(account)
        desk.session.commit()
        desk.wait_for("Balances", recordings, timeout=0)
    assert not desk.projections.runnable()


def test_in_memory() -> None:
    """Inline projections work in an in-memory database too."""
    desk = make_desk("sqlite://")
    desk.balances(inline=True)
    account_id = desk.open(1, 2)
    assert desk.amounts() == {account_id: 3}
    desk.close()


def test_reactions_alone(desk: Desk) -> None:
    """An inline projection that has reactions only has nothing to do within save(), and a worker calls them."""
    desk.reacting(inline=True)
    account_id = desk.open(5)
    assert desk.run_once() == []
    assert [call[0] for call in desk.calls] == [account_id]


def test_tables_that_were_made_again(desk: Desk) -> None:
    """A table of an inline projection that was dropped and created again is a fault, until a rebuild."""
    desk.balances(inline=True)
    account_id = desk.open(1)
    application = desk.consumer().application
    merge_ranges(application)
    assert desk.status().healthy
    with desk.context():
        if desk.engine.dialect.name == "mysql":
            # It knows tables by the second in which they were made.
            time.sleep(1.1)
        table = desk.Balance.__table__
        table.drop(desk.engine)
        table.create(desk.engine)
    merge_ranges(application)
    status = desk.status()
    assert (status.state, status.healthy) == ("tables made again", False)
    with desk.context(), pytest.raises(CheckpointMismatchError, match="was made again"):
        desk.wait_for("Balances", 1)
    Rebuild(desk.consumer(), threading.Event()).run()
    merge_ranges(application)
    assert desk.status().healthy
    assert desk.amounts() == {account_id: 1}
    desk.deposit(account_id, 2)
    assert desk.amounts() == {account_id: 3}
