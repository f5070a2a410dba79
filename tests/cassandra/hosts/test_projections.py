"""Projections of a Flask app that follow a log in Cassandra, and write models of the app's own database."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import Tracking
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.exceptions import CheckpointMismatchError, HandlerError
from flask_eventsourcing.projections import ModelProjection, on, reaction
from flask_eventsourcing.projections.consumers import logs
from flask_eventsourcing.projections.rebuilding import Rebuild
from tests.cassandra.hosts.site import settings
from tests.cassandra_nodes import session_on
from tests.domain import Bank
from tests.projections.desk import Created, Deposited, make_models
from tests.projections.desk_hosts import FlaskDesk

MakeDesk = Callable[..., FlaskDesk]


def new_desk(server: str, keyspace: str, uri: str, **others: Any) -> FlaskDesk:
    """Make an app whose bank has its events in a keyspace and its models in a database."""
    app, db = Flask(__name__), SQLAlchemy()
    app.config.update(settings(server, keyspace, **others), SQLALCHEMY_DATABASE_URI=uri)
    balance, seen = make_models(db.Model)
    db.init_app(app)
    es = EventSourcing(db=db, application=Bank)
    es.init_app(app)
    return FlaskDesk(db.Model, balance, seen, app, db, es)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """The database of the models."""
    return f"sqlite:///{tmp_path / 'models.db'}"


@pytest.fixture
def make_desk(cassandra_server: str, bank_keyspace: str, uri: str) -> Iterator[MakeDesk]:
    """Makes apps, on the keyspace of the module unless another one is named, and closes them."""
    made = []

    def make(keyspace: str = bank_keyspace, **others: Any) -> FlaskDesk:
        made.append(new_desk(cassandra_server, keyspace, uri, **others))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def desk(make_desk: MakeDesk) -> FlaskDesk:
    """An app; its log has the events of other tests too, with accounts of their own."""
    return make_desk()


def test_catch_up_and_follow(desk: FlaskDesk) -> None:
    """A projection catches up with a log in Cassandra and follows it; its positions are those of the log."""
    account_id = desk.open(1, 2)
    balances = desk.balances()
    assert desk.status().lag_events >= 3
    assert list(desk.run_once()) == []
    assert desk.amounts()[account_id] == 3
    assert (desk.position(), desk.status().lag_events, desk.status().state) == (desk.head(), 0, "stopped")
    with desk.running():
        for number in range(3):
            desk.deposit(account_id, 10)
            head = desk.head()
            with desk.app.app_context():
                desk.es.wait_for(balances, head, timeout=60)
            assert desk.amounts()[account_id] == 3 + 10 * (number + 1)
        assert desk.health().ok
    shown = desk.command("status").output
    assert "Balances" in shown
    assert str(desk.head()) in shown


def test_new_tables(make_desk: MakeDesk) -> None:
    """``init-db`` makes the tables of projections too, ``check`` looks at both databases."""
    desk = make_desk()
    desk.es.projection(type("Balances", (ModelProjection,), {"models": [desk.Balance], "seen": handler()}))
    made = desk.command("init-db").output
    assert {"Created table bank_projections.", "Created table balance."} <= set(made.splitlines())
    found = desk.command("check")
    assert found.exit_code == 0, found.output
    assert "Bank: log ok" in found.output
    assert "table bank_projections ok" in found.output


def handler() -> Any:
    """Return a handler that does nothing."""

    @on(Created)
    def seen(self: Any, event: Any, session: Any) -> None:
        pass

    return seen


def test_rebuild_while_events_are_saved(desk: FlaskDesk) -> None:
    """A rebuild takes in all events, also those that are saved while it runs."""
    account_id = desk.open(1, 2, 3)
    desk.balances(batch_size=3)
    desk.run_once()
    appending = Thread(target=desk.deposit, args=(account_id, *[1] * 9))
    with desk.running():
        appending.start()
        with desk.app.app_context():
            done = Rebuild(desk.consumer()).run()
        appending.join()
        head = desk.head()
        with desk.app.app_context():
            desk.wait_for("Balances", head, timeout=60)
    assert done is not None
    assert desk.amounts()[account_id] == 6 + 9
    assert desk.command("rebuild", "--dry-run", "Balances").exit_code == 0


def test_dead_letters(desk: FlaskDesk) -> None:
    """An event that fails is set aside with those behind it, and retried by a command."""
    account_id = desk.open(1, 666, 2)
    desk.poison.add(666)
    desk.balances(on_failure="dead-letter", retries=0)
    assert list(desk.run_once()) == []
    assert (desk.amounts()[account_id], desk.status().dead_letters, desk.status().waiting) == (1, 1, 1)
    desk.poison.clear()
    assert "Balances" in desk.command("dead-letters", "list").output
    retried = desk.command("dead-letters", "retry", "--projection", "Balances", "--all")
    assert retried.exit_code == 0, retried.output
    assert desk.amounts()[account_id] == 669


def test_halted_skipped_paused(desk: FlaskDesk) -> None:
    """A projection that halts can be skipped over its event, paused and resumed."""
    account_id = desk.open(1, 667, 2)
    desk.poison.add(667)
    desk.balances(retries=0)
    desk.run_once()
    status = desk.status()
    assert (status.state, desk.amounts()[account_id]) == ("halted", 1)
    for arguments in (
        ("skip", "Balances", str(status.failed_position), "--reason", "bad"),
        ("pause", "Balances"),
        ("resume", "Balances"),
    ):
        done = desk.command("projections", *arguments)
        assert done.exit_code == 0, done.output
    assert list(desk.run_once()) == []
    assert (desk.position(), desk.status().waiting) == (desk.head(), 1)


def test_reactions_save_events(desk: FlaskDesk) -> None:
    """A reaction saves events in Cassandra, which know what caused them; a run ends when there are no more."""
    account_id = desk.open(3)
    called = []

    class Bonus(ModelProjection):
        @reaction(Deposited, start="beginning")
        def pay(self, event: Any, key: str) -> None:
            if event.originator_id == account_id and event.amount > 1:
                called.append(key)
                desk.es.application.deposit(account_id, event.amount - 1)

    desk.register(Bonus)
    desk.balances()
    assert list(desk.run_once()) == []
    assert len(set(called)) == len(called) == 2
    assert desk.amounts()[account_id] == 3 + 2 + 1
    with desk.context() as bank:
        recorded = bank.recorder.find_recorded([desk.head() - 1, desk.head()])  # type: ignore[attr-defined]
    first, second = recorded.values()
    assert second.metadata["causation_id"] == str(first.event_id)


def test_handler_that_saves(desk: FlaskDesk) -> None:
    """A handler may not save in Cassandra: the event would stay when its batch is rolled back."""
    desk.open(1)

    class Doubling(ModelProjection):
        models = (desk.Balance,)
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: Any) -> None:
            desk.es.application.open_account()

    desk.register(Doubling)
    head = desk.head()
    (error,) = desk.run_once()
    assert isinstance(error.__cause__, HandlerError)
    assert "save them in a method with @reaction" in str(error)
    assert desk.head() == head


def test_position_without_an_event(desk: FlaskDesk) -> None:
    """A row that has a position of a process application and no event is skipped."""
    desk.balances()
    account_id = desk.open(1)
    with desk.context() as bank:
        log: Any = bank.recorder.log  # type: ignore[attr-defined]
        log.append((), Tracking("Upstream", log.parts.reader.last_row().end))
    desk.run_once()
    assert desk.position() == desk.head() + 1
    assert (desk.row().last_originator_id, desk.status().state) == (None, "stopped")
    desk.deposit(account_id, 2)
    desk.run_once()
    assert desk.amounts()[account_id] == 3


def test_long_lag_is_not_read(desk: FlaskDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of a projection that is far behind reads no more than a part of the log, and counts the rest."""
    desk.open(1, 2, 3, 4)
    desk.balances()
    monkeypatch.setattr(logs, "COUNTED", 1)
    status = desk.status()
    assert status.head - 1 <= status.lag_events <= status.head
    assert status.lag_seconds is not None


def test_pages(desk: FlaskDesk) -> None:
    """A page of the log ends before its events take too much memory, and claims no position beyond them."""
    desk.open(1, 2, 3)
    with desk.context() as bank:
        reader: Any = bank.recorder.log.parts.reader  # type: ignore[attr-defined]
        head = desk.head()
        assert [reader.page_to(1, 10, head, 1)[1], reader.page_to(1, 2, head)[1]] == [1, 2]
        events, upto = reader.page_to(head - 1, 10, head + 1000)
        assert ([each.id for each in events], upto) == ([head - 1, head], head)
        assert reader.page_to(head + 5, 10, head + 1000) == ([], head + 4)


def test_another_log(make_desk: MakeDesk, cassandra_server: str, cassandra_keyspace: str) -> None:
    """A log in another keyspace, one that was emptied, and one filled again, are named states with a remedy."""
    before = make_desk()
    before.open(1, 2)
    before.balances()
    before.run_once()
    before.close()
    desk = make_desk(cassandra_keyspace)
    desk.balances()
    assert desk.command("init-db").exit_code == 0
    desk.open()
    assert desk.status().state == "another log"
    (error,) = desk.run_once()
    assert isinstance(error, CheckpointMismatchError)
    assert "flask eventsourcing rebuild Balances" in str(error)
    assert desk.command("rebuild", "Balances").exit_code == 0
    account_id = desk.open(1)
    desk.run_once()
    assert desk.amounts() == {account_id: 1} | dict.fromkeys(set(desk.amounts()) - {account_id}, 0)
    desk.close()
    with session_on(cassandra_server) as session:
        for name in ("log", "state"):
            session.execute(f"TRUNCATE {cassandra_keyspace}.bank_{name}", timeout=60)
    again = make_desk(cassandra_keyspace)
    again.balances()
    assert again.status().state == "ahead of its log"
    again.open(7, 8, 9)
    assert again.status().state == "another log"
    with again.app.app_context(), pytest.raises(CheckpointMismatchError, match="has applied another event at position"):
        again.wait_for("Balances", 1)
    assert "every table that is made has an identity of its own" in again.command("new-identity", input="y").output
    assert again.command("projections", "accept", "Balances").exit_code == 0
    assert again.status().state == "stopped"


def kill(*_: object) -> None:
    """End as a machine that loses its power does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_kill(step: str, account_id: UUID, *where: str) -> None:
    """Run the projection until it is about to write an account, and kill this process at a step of that."""
    desk = new_desk(*where)
    desk.balances()

    def flushed(session: Any, _: object) -> None:
        if any(
            isinstance(each, desk.Balance) and each.account_id == account_id for each in (*session.new, *session.dirty)
        ):
            if step == "handler":
                kill()
            sa.event.listen(desk.db.session, step, kill)

    sa.event.listen(desk.db.session, "after_flush", flushed)
    desk.run_once()


def test_killed_worker(make_desk: MakeDesk, cassandra_server: str, bank_keyspace: str, uri: str) -> None:
    """A worker that is killed in a handler, before a commit or after it, applies each event once in the end."""
    desk = make_desk()
    desk.balances()
    account_id = desk.open(1, 2, 3)
    desk.close()
    for step in ("handler", "before_commit", "after_commit"):
        arguments = (step, account_id, cassandra_server, bank_keyspace, uri)
        process = multiprocessing.get_context("fork").Process(target=run_and_kill, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    assert list(desk.run_once()) == []
    assert desk.amounts()[account_id] == 6
    assert desk.position() == desk.head()
