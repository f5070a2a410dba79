"""Projections of a log from which an aggregate was erased.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing import AggregateErased
from flask_eventsourcing.projections import ModelProjection, on, reaction
from tests.projections.desk import Created, Deposited, Desk


@pytest.fixture(params=[False, True], ids=["delete", "redact"])
def redact(request: pytest.FixtureRequest) -> bool:
    """Both ways to erase."""
    found: bool = request.param
    return found


def erase(desk: Desk, account_id: UUID, *, redact: bool = False) -> Any:
    """Erase an account, and commit."""
    with desk.context():
        done = desk.erase(account_id, redact=redact)
        desk.session.commit()
    return done


def obeying(desk: Desk, **attributes: Any) -> None:
    """Register a projection of balances that forgets who was erased."""

    class Balances(ModelProjection):
        models = (desk.Balance,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            session.get_one(desk.Balance, event.originator_id).amount += event.amount
            if event.amount in desk.poison:
                raise ValueError(event.amount)

        @on(AggregateErased)
        def erased(self, event: AggregateErased, session: orm.Session) -> None:
            session.execute(sa.delete(desk.Balance).where(desk.Balance.account_id == event.originator_id))

        @reaction(AggregateErased)
        def tell(self, event: AggregateErased, key: str) -> None:
            desk.calls.append((event.originator_id, event.originator_version, key))  # type: ignore[arg-type]

    desk.register(type("Balances", (Balances,), attributes))


def test_the_last_event_of_the_log(desk: Desk, redact: bool) -> None:
    """Erasing the last event does not look like a restored log: the projection goes on."""
    desk.balances()
    kept, account_id = desk.open(1), desk.open(2)
    assert not desk.run_once()
    assert desk.position() == desk.head()
    erase(desk, account_id, redact=redact)
    assert desk.status().problem is None
    assert desk.status().lag_events == 0
    assert not desk.run_once()
    assert desk.position() == desk.head() == 5
    # It has no handler for erasures, and the rest goes on.
    desk.deposit(kept, 3)
    assert not desk.run_once()
    assert desk.amounts() == {kept: 4, account_id: 2}
    assert desk.status().problem is None


def test_a_log_of_which_nothing_else_is_left(desk: Desk) -> None:
    """The same where every aggregate was erased."""
    desk.balances()
    accounts = [desk.open(1), desk.open(2)]
    assert not desk.run_once()
    for account_id in accounts:
        erase(desk, account_id)
        assert desk.status().problem is None
    assert not desk.run_once()
    assert desk.status().problem is None


def test_a_handler_deletes_rows_of_an_erased_aggregate(desk: Desk, redact: bool) -> None:
    """A handler for ``AggregateErased`` is called in the order of the log, and a reaction once."""
    obeying(desk)
    kept, account_id = desk.open(1), desk.open(2)
    assert not desk.run_once()
    done = erase(desk, account_id, redact=redact)
    assert desk.status().lag_events == 1
    assert not desk.run_once()
    assert desk.amounts() == {kept: 1}
    assert [call[:2] for call in desk.calls] == [(account_id, 3)]
    assert desk.position() == done.position


def test_a_running_worker_is_told(desk: Desk) -> None:
    """A worker that waits for news is woken by an erasure."""
    obeying(desk)
    account_id = desk.open(2)
    with desk.running("Balances"), desk.context():
        desk.wait_for("Balances", 2, timeout=30)
        done = desk.erase(account_id)
        desk.session.commit()
        assert done.position is not None
        desk.wait_for("Balances", done.position, timeout=30)
    assert desk.amounts() == {}


def test_a_projection_that_is_behind(desk: Desk, redact: bool) -> None:
    """Events that were erased before a projection reached them are never applied, and do not stop it."""
    obeying(desk)
    kept, account_id = desk.open(1), desk.open(2)
    erase(desk, account_id, redact=redact)
    assert not desk.run_once()
    assert desk.amounts() == {kept: 1}


def test_an_inline_projection(desk: Desk, redact: bool) -> None:
    """An inline projection handles the erasure in its transaction, and a rollback undoes both."""
    obeying(desk, inline=True)
    account_id = desk.open(2)
    with desk.context():
        desk.erase(account_id, redact=redact)
        desk.session.rollback()
    assert desk.amounts() == {account_id: 2}
    erase(desk, account_id, redact=redact)
    assert desk.amounts() == {}
    assert (desk.status().state, desk.status().problem) == ("inline", None)


def test_a_rebuild(desk: Desk, redact: bool) -> None:
    """A rebuild after an erasure succeeds, and the new tables have nothing of the erased aggregate."""
    desk.balances()
    kept, account_id = desk.open(1), desk.open(2)
    assert not desk.run_once()
    erase(desk, account_id, redact=redact)
    desk.deposit(kept, 3)
    assert not desk.run_once()
    result = desk.command("rebuild", "Balances")
    assert result.exit_code == 0, result.output
    assert desk.amounts() == {kept: 4}


def test_dead_letters_go_too(desk: Desk, redact: bool) -> None:
    """Dead letters of the aggregate, and what waits behind them, are erased; others stay."""
    obeying(desk, on_failure="dead-letter", retries=0)
    desk.poison |= {13, 14}
    other, account_id = desk.open(14), desk.open(1, 13, 2)
    assert not desk.run_once()
    assert (desk.status().dead_letters, desk.status().waiting) == (2, 1)
    assert erase(desk, account_id, redact=redact).dead_letters == 2
    assert desk.status().dead_letters == 1
    assert not desk.run_once()
    assert desk.amounts() == {other: 0}
    assert (desk.status().dead_letters, desk.status().waiting) == (1, 0)


def test_a_halted_projection(desk: Desk, redact: bool) -> None:
    """A projection that halts before an event of the aggregate goes on when that is erased."""
    obeying(desk, retries=0)
    desk.poison.add(13)
    account_id = desk.open(13)
    assert desk.run_once("Balances")
    erase(desk, account_id, redact=redact)
    desk.consumer().checkpoint.resume()
    assert not desk.run_once("Balances")
    assert desk.amounts() == {}
    assert desk.status().problem is None
