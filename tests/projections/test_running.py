"""How events are applied: transactions, batches, errors, retries, halts and dead letters.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.domain import Aggregate
from sqlalchemy import orm

from flask_eventsourcing.exceptions import ProjectionHaltedError
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.applying import Applier
from flask_eventsourcing.projections.applying.pages import LogPages
from flask_eventsourcing.projections.checkpoint import FencedError
from flask_eventsourcing.projections.dead_letters import DeadLetter
from flask_eventsourcing.projections.runners.claims import Turn
from tests.domain import until
from tests.projections.desk import Deposited, Desk, PoisonError

pytestmark = pytest.mark.usefixtures("short_pauses")
on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)


def letters(desk: Desk, name: str = "Balances") -> list[DeadLetter]:
    """Return the dead letters of a projection."""
    application = desk.consumer(name).application
    with application.engine.connect() as connection:
        return list(application.dead_letters.select(connection, [name]))


def test_position_and_models_are_committed_together(desk: Desk) -> None:
    """A worker that dies between what its handlers wrote and the commit leaves neither models nor position."""
    desk.balances()
    account_id = desk.open(1, 2)

    class KilledError(BaseException):
        """Ends the worker's thread as a signal would end its process."""

    def kill(session: orm.Session) -> None:
        if session.in_transaction() and not session.in_nested_transaction():
            raise KilledError

    consumer = desk.consumer()
    with desk.context():
        consumer.checkpoint.ensure()
        claimed = consumer.checkpoint.claim(lease=consumer.leased)
        assert claimed is not None
        page = consumer.application.read_log(0, 10, None, ())
        sa.event.listen(desk.sessions, "before_commit", kill)
        with pytest.raises(KilledError):
            Applier(consumer).apply(claimed, page, page[-1].id)
        sa.event.remove(desk.sessions, "before_commit", kill)
        consumer.checkpoint.release(claimed)
    assert desk.row().position == 0
    assert desk.amounts() == {}
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 3}


def test_batches_grow_while_catching_up_and_shrink_at_the_head(desk: Desk) -> None:
    """Catching up, a commit has up to 2,000 events; at the head each event is committed at once."""
    desk.balances()
    with desk.context() as bank:
        account_id = bank.open_account()
        account = bank.account(account_id)
        for _ in range(4000):
            account.deposit(1)
        bank.save(account)
        desk.session.commit()
    moved: list[int] = []
    consumer = desk.consumer()
    # What a test machine needs for 2,000 events is not the point here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(consumer.application.datastore.dialect), "batch_seconds", 1000.0)
        original = type(consumer.checkpoint).advance

        def advance(self: Any, connection: Any, claimed: Any, position: int, *args: Any, **kwargs: Any) -> None:
            moved.append(position - claimed.position)
            original(self, connection, claimed, position, *args, **kwargs)

        patch.setattr(type(consumer.checkpoint), "advance", advance)
        with desk.running():
            until(lambda: desk.position() == 4001)
            # Quick as the first one is, the others are as large as they may be.
            assert moved == [1, 2000, 2000]
            del moved[:]
            desk.deposit(account_id, 1)
            until(lambda: desk.position() == 4002)
            assert moved == [1]
    assert desk.amounts() == {account_id: 4001}


def test_what_is_new_at_the_end_of_the_log_is_read_by_one_statement(desk: Desk) -> None:
    """One statement finds and reads the next events, unless others may appear between them or there are many."""
    desk.balances()
    account_id = desk.open(1, 2)
    pages = LogPages(desk.consumer(), None)
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    with desk.context():
        # Now the table was looked at.
        assert pages.look_ahead(3, 1000) == 3
        sa.event.listen(desk.engine, "before_cursor_execute", note)
        try:
            assert pages.look_ahead(1, 1000) == 3
            page = pages.read(1, 1000, 3)
        finally:
            sa.event.remove(desk.engine, "before_cursor_execute", note)
        assert len(statements) == 1
        assert ([each.id for each in page.events], page.position, page.full) == ([2, 3], 3, False)
        # More than are taken at a time.
        assert pages.look_ahead(1, 1) is None
    desk.deposit(account_id, 3, 4, 5, 6)
    with desk.context():
        assert pages.look_ahead(3, 1000) is None
        assert [each.id for each in pages.read(3, 2, 7).events] == [4, 5]
        with desk.engine.begin() as connection:
            connection.execute(sa.delete(desk.events_table).where(desk.events_table.c.notification_id == 5))
        assert pages.look_ahead(4, 1000) is None
        assert pages.look_ahead(5, 1000) == 7
        with desk.engine.begin() as connection:
            connection.execute(
                sa.update(desk.events_table).where(desk.events_table.c.notification_id == 7).values(state=bytes(2**21))
            )
        # Only the first may be large.
        assert pages.look_ahead(5, 1000) == 6
        assert pages.look_ahead(6, 1000) == 7


def test_what_was_applied_inline_meanwhile_is_not_applied_again(desk: Desk) -> None:
    """A worker applies no event that a process of another release has applied inline since it looked."""
    desk.balances()
    desk.open(1)
    consumer = desk.consumer()
    with desk.context():
        consumer.checkpoint.ensure()
        claimed = consumer.checkpoint.claim(lease=consumer.leased)
        assert claimed is not None
        page = consumer.application.read_log(0, 10, None, ())
        ranges = sa.insert(consumer.application.models.tables["inline_ranges"])
        with desk.engine.begin() as connection:
            connection.execute(ranges.values(projection="Balances", first_position=2, last_position=2))

        def look_and_apply() -> None:
            # Where the statement that moves the position cannot tell it, the look at the log does.
            Turn(consumer).find_end(claimed, LogPages(consumer, None), 10)
            Applier(consumer).apply(claimed, page, page[-1].id)

        with pytest.raises(FencedError):
            look_and_apply()
        assert desk.row().position == 0
        # It was the second that was applied.
        assert Applier(consumer).apply(claimed, page[:1], page[0].id).position == 1


def test_a_transient_error_is_retried_and_forgotten(desk: Desk) -> None:
    """An event whose handler fails at first is tried again; the status forgets the error with its success."""
    tries: list[int] = []
    noted: list[str | None] = []

    class Flaky(ModelProjection):
        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            tries.append(event.amount)
            if len(tries) > 1:
                noted.append(desk.row("Flaky").error)
            if len(tries) < 4:
                raise PoisonError("not yet")

    desk.register(Flaky)
    desk.open(1)
    # A row that another connection reads is locked, and so is SQLite's database, but they can be read.
    assert not desk.run_once()
    assert tries == [1] * 4
    assert noted[0] is not None
    assert "PoisonError: not yet" in noted[0]
    assert (desk.row("Flaky").error, desk.row("Flaky").failed_position) == (None, None)


@pytest.mark.parametrize("retries", [0, 2])
def test_an_event_is_tried_as_often_as_the_projection_says(desk: Desk, retries: int) -> None:
    """With ``retries = n`` a handler that keeps failing is called n + 1 times."""
    desk.poison.add(13)
    desk.reacting(retries=retries)
    desk.open(13)
    assert desk.run_once()
    assert len(desk.calls) == retries + 1


def test_a_poisonous_event_halts_its_projection(desk: Desk) -> None:
    """The position stays before the event, the status names it, and after the fix the projection goes on."""
    desk.balances(retries=1)
    desk.poison.add(13)
    account_id = desk.open(*range(1, 40))
    (error,) = desk.run_once()
    assert isinstance(error, ProjectionHaltedError)
    status = desk.status()
    assert (status.state, status.position, status.failed_position) == ("halted", 13, 14)
    assert status.error is not None
    assert "event 14 (Account.Deposited" in status.error
    assert "PoisonError: cannot digest 13" in status.error
    assert not status.healthy
    assert desk.amounts() == {account_id: sum(range(1, 13))}
    # It stays halted, no matter who runs it, until somebody resumes it.
    (again,) = desk.run_once()
    assert isinstance(again, ProjectionHaltedError)
    assert str(again) == str(error)
    desk.poison.clear()
    desk.consumer().checkpoint.resume()
    assert not desk.run_once()
    assert desk.amounts() == {account_id: sum(range(1, 40))}
    status = desk.status()
    assert (status.state, status.error, status.failed_position) == ("stopped", None, None)


def test_a_running_worker_waits_for_a_halted_projection_to_be_resumed(desk: Desk) -> None:
    """A worker whose projection has halted goes on with it as soon as it is resumed, without a restart."""
    desk.balances(retries=0)
    desk.poison.add(13)
    account_id = desk.open(1, 13, 2)
    with desk.running() as worker:
        until(lambda: desk.status().state == "halted")
        until(lambda: worker.runners[0].progress.state == "halted")
        desk.poison.clear()
        desk.consumer().checkpoint.resume()
        until(lambda: desk.position() == 4)
    assert not worker.errors
    assert desk.amounts() == {account_id: 16}


def test_a_poisonous_event_stops_nobody_else(desk: Desk) -> None:
    """In one worker, a halted projection does not keep the others from going on."""
    desk.balances(retries=0)
    desk.reacting()
    desk.open(1)

    class Poisoned(ModelProjection):
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            raise PoisonError

    desk.register(Poisoned)
    errors = desk.run_once("Balances", "Poisoned", "Reacting:reactions")
    assert len(errors) == 1
    assert desk.row().position == 2
    assert len(desk.calls) == 1


def test_errors_that_show_at_the_flush_name_their_event(desk: Desk) -> None:
    """An error that the database finds later in the batch halts before the event that caused it."""

    class Late(ModelProjection):
        models = (desk.Seen,)
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            text = None if event.amount == 13 else "fine"
            session.add(desk.Seen(account_id=str(event.originator_id), version=event.originator_version, text=text))
            if event.amount == 14:
                raise PoisonError("the batch never gets to its flush")

    desk.register(Late)
    desk.open(*range(1, 20))
    (error,) = desk.run_once()
    assert isinstance(error, ProjectionHaltedError)
    assert desk.row("Late").failed_position == 14
    assert desk.row("Late").position == 13


def test_dead_letters(desk: Desk) -> None:
    """The event is set aside with its traceback, later ones of its aggregate wait, and others are applied."""
    desk.balances(retries=1, on_failure="dead-letter")
    desk.poison.add(13)
    ada = desk.open(1, 13, 2)
    bob = desk.open(4, 5)
    desk.deposit(ada, 6)
    assert not desk.run_once()
    assert desk.amounts() == {ada: 1, bob: 9}
    status = desk.status()
    assert (status.dead_letters, status.waiting, status.position) == (1, 2, desk.head())
    assert not status.healthy
    failed, *waiting = letters(desk)
    assert (failed.position, failed.originator_id, failed.originator_version) == (3, str(ada), 3)
    assert failed.error == "PoisonError: cannot digest 13"
    assert failed.traceback is not None
    assert "raise PoisonError" in failed.traceback
    assert failed.attempts == 2
    assert [(each.position, each.error) for each in waiting] == [(4, None), (8, None)]
    # Also those that come when the worker runs again.
    desk.deposit(ada, 7)
    assert not desk.run_once()
    assert desk.status().waiting == 3


@pytest.mark.parametrize("on_failure", ["halt", "dead-letter"])
def test_any_text_of_an_error_can_be_stored(desk: Desk, on_failure: str, caplog: pytest.LogCaptureFixture) -> None:
    """Errors with texts that a database cannot store are stored in a form that it can."""
    texts = ["nul \0 byte", "half a pair \ud800", "long " * 50_000, "näïve 😀" * 9_000]

    def failing(text: str) -> Any:
        @on(Deposited)
        def deposited(self: Any, event: Any, session: orm.Session) -> None:
            raise PoisonError(text)

        return deposited

    for number, text in enumerate(texts):
        attributes = {"deposited": failing(text), "retries": 0, "on_failure": on_failure}
        desk.register(type(f"Rude{number}", (ModelProjection,), attributes))
    desk.open(1)
    # What the log of the tests is written to cannot take them all either.
    with caplog.at_level(logging.CRITICAL, logger="flask_eventsourcing"):
        errors = desk.run_once()
    assert len(errors) == (len(texts) if on_failure == "halt" else 0)
    for number in range(len(texts)):
        name = f"Rude{number}"
        found = desk.row(name).error if on_failure == "halt" else letters(desk, name)[0].error
        assert "PoisonError: " in (found or "")


@pytest.mark.parametrize("on_failure", ["halt", "dead-letter"])
@pytest.mark.parametrize(
    "change", [{"topic": "tests.domain:Account.Gone"}, {"state": b"{no json"}], ids=["class", "state"]
)
def test_events_that_cannot_be_read(desk: Desk, on_failure: str, change: dict[str, Any]) -> None:
    """An event whose class is gone, or whose state is damaged, fails as one whose handler does."""

    class Everything(ModelProjection):
        models = (desk.Seen,)
        retries = 0

        # A class of the library, so that every event is read.
        @on(Aggregate.Event)
        def noted(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Seen(account_id=str(event.originator_id), version=event.originator_version, text="x"))

    desk.register(type("Everything", (Everything,), {"on_failure": on_failure}))
    desk.open(1, 2)
    desk.open(3)
    with desk.context():
        table = desk.events_table
        desk.session.execute(sa.update(table).where(table.c.notification_id == 2).values(**change))
        desk.session.commit()
    errors = desk.run_once()
    status = desk.status("Everything")
    if on_failure == "halt":
        assert isinstance(errors[0], ProjectionHaltedError)
        assert (status.position, status.failed_position) == (1, 2)
        assert status.lag_seconds is None
    else:
        assert not errors
        assert (status.dead_letters, status.waiting) == (1, 1)


def test_a_serialisation_failure_is_not_the_handlers_fault(desk: Desk) -> None:
    """If the database rolls a worker back because of a deadlock, the worker tries again, and no event is lost."""
    desk.balances(retries=0)
    account_id = desk.open(1, 2, 3)
    failures = [0]

    class DriverError(Exception):
        sqlstate = "40P01"

    def fail(*_: Any) -> None:
        if failures[0] < 2:
            failures[0] += 1
            raise sa.exc.OperationalError("UPDATE", {}, DriverError())

    sa.event.listen(desk.sessions, "after_flush", fail)
    assert not desk.run_once()
    assert failures == [2]
    assert desk.amounts() == {account_id: 6}


def test_a_stopped_worker_ends_after_its_batch(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that is told to stop ends by itself, gives up its claim, and says nothing of errors."""
    desk.balances()
    account_id: UUID = desk.open(1)
    with caplog.at_level(logging.WARNING), desk.running():
        until(lambda: desk.position() == 2)
    assert desk.status().runner is None
    assert desk.row().token is None
    assert desk.amounts() == {account_id: 1}
    assert not caplog.records
