"""Projections that write Django models."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.core.management import CommandError, call_command
from django.db import DatabaseError, transaction

from flask_eventsourcing.contrib.django import projecting, wait_for
from flask_eventsourcing.contrib.django import projections as declared
from flask_eventsourcing.contrib.django.projecting import projections
from flask_eventsourcing.contrib.django.projections import ModelProjection, on, projection, reaction
from flask_eventsourcing.exceptions import (
    CheckpointMismatchError,
    ConfigurationError,
    ProjectionHaltedError,
    UncommittedEventsError,
)
from flask_eventsourcing.projections.runners import Runner
from tests.django_host.conftest import DjangoBank
from tests.django_host.test_requests import as_test_case
from tests.domain import Account, in_thread

AnyAccount: Any = Account


def run(name: str = "Balances", alias: str = "ledger") -> None:
    """Run a projection to the end of the log, in this thread."""
    Runner(projections().bound[alias].find(name), threading.Event()).run(once=True)


def status(name: str = "Balances", alias: str = "ledger") -> Any:
    """Return what is known of a projection."""
    return next(each for each in projections().bound[alias].health().projections if each.name == name)


def balances(site: DjangoBank) -> dict[UUID, int]:
    """Return what the projection has written."""
    from tests.django_host.ledger.models import Balance

    return dict(Balance.objects.using(site.alias).values_list("account_id", "amount"))


@contextmanager
def declaring(cls: type[ModelProjection]) -> Iterator[None]:
    """Within it, the project has one projection more."""
    projection(of="Bank")(cls)
    projecting._projections.close()
    try:
        yield
    finally:
        declared.registered.remove((cls, "Bank"))
        projecting._projections.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep what runners log out of the tests' output."""
    logger = logging.getLogger("flask_eventsourcing")
    before, logger.level = logger.level, logging.CRITICAL
    yield
    logger.level = before


def test_models_and_position(site: DjangoBank) -> None:
    """Handlers write models, and each event is applied once."""
    one, other = site.opened(), site.opened()
    for amount in (1, 2, 3):
        site.bank.deposit(one, amount)
    run()
    assert balances(site) == {one: 6, other: 0}
    site.bank.deposit(other, 5)
    run()
    run()
    assert balances(site) == {one: 6, other: 5}
    assert status().position == 6


def test_failure_takes_models_and_position_along(site: DjangoBank) -> None:
    """What a handler has written before it fails is gone, the projection halts, and goes on when the cause is gone."""
    fails = [True]

    class Failing(ModelProjection):
        retries = 0

        @on(Account.Created)
        def opened(self, event: Any, using: str) -> None:
            from tests.django_host.ledger.models import Note

            Note.objects.using(using).create(text="written")
            if fails:
                raise ValueError("wrong")

    site.opened()
    with declaring(Failing):
        with pytest.raises(ProjectionHaltedError, match="ValueError: wrong"):
            run("Failing")
        assert site.stored() == (1, 0)
        assert status("Failing").state == "halted"
        fails.clear()
        call_command("eventsourcing", "projections", "resume", "Failing", database=site.alias, stdout=StringIO())
        run("Failing")
        assert site.stored() == (1, 1)


def test_swallowed_error(site: DjangoBank) -> None:
    """If a handler swallows an error of the database, the projection halts, and no event is lost silently."""

    class Swallowing(ModelProjection):
        retries = 0

        @on(Account.Created)
        def opened(self, event: Any, using: str) -> None:
            from tests.django_host.ledger.models import Note

            Note.objects.using(using).create(pk=1, text="first")
            try:
                Note(pk=1, text="second").save(using=using, force_insert=True)
            except DatabaseError:
                return

    site.opened()
    with declaring(Swallowing), pytest.raises(ProjectionHaltedError):
        run("Swallowing")
    assert site.stored() == (1, 0)


def test_savepoint_in_a_handler(site: DjangoBank) -> None:
    """A handler may put what fails into an atomic() block of its own, and go on."""

    class Careful(ModelProjection):
        retries = 0

        @on(Account.Created)
        def opened(self, event: Any, using: str) -> None:
            from tests.django_host.ledger.models import Note

            Note.objects.using(using).create(pk=1, text="first")
            with pytest.raises(DatabaseError), site.atomic():
                Note(pk=1, text="second").save(using=using, force_insert=True)
            Note.objects.using(using).create(pk=2, text="third")

    site.opened()
    with declaring(Careful):
        run("Careful")
    assert site.stored() == (1, 2)


def test_dead_letters(site: DjangoBank) -> None:
    """An event whose handler keeps failing is set aside, listed, and applied again when that is asked for."""
    from tests.django_host.ledger.models import BankRecords

    fails = [True]

    class Letters(ModelProjection):
        retries = 0
        on_failure = "dead-letter"

        @on(Account.Created)
        def opened(self, event: Any, using: str) -> None:
            from tests.django_host.ledger.models import Note

            if fails:
                raise ValueError("wrong")
            Note.objects.using(using).create(text="written")

    site.opened()
    with declaring(Letters):
        run("Letters")
        assert [each.error for each in BankRecords.DeadLetter.objects.using(site.alias).all()] == ["ValueError: wrong"]
        printed = StringIO()
        call_command("eventsourcing", "dead-letters", "list", database=site.alias, stdout=printed)
        assert "ValueError: wrong" in printed.getvalue()
        fails.clear()
        call_command("eventsourcing", "dead-letters", "retry", "--all", database=site.alias, stdout=StringIO())
        assert not BankRecords.DeadLetter.objects.using(site.alias).exists()
    assert site.stored() == (1, 1)


def test_recorded_and_reactions(site: DjangoBank) -> None:
    """A handler with a parameter ``recorded`` gets what is stored beside the event; a reaction may save."""
    told: list[Any] = []

    class Reacting(ModelProjection):
        @on(Account.Created)
        def opened(self, event: Any, recorded: Any) -> None:
            told.append((recorded.position, recorded.event_id, recorded.time.tzinfo))

        @reaction(Account.Created)
        def pay(self, event: Any, key: str) -> None:
            site.bank.deposit(event.originator_id, 7)

    account_id = site.opened()
    with declaring(Reacting):
        run("Reacting")
        run("Reacting:reactions")
    assert [each[0] for each in told] == [1]
    assert None not in told[0]
    assert site.bank.balance(account_id) == 7


def test_two_runners(site: DjangoBank) -> None:
    """Only one of two runners runs, and no event is applied twice."""
    account_id = site.opened()
    for _ in range(20):
        site.bank.deposit(account_id, 1)
    errors: list[Exception] = []

    def work() -> None:
        try:
            run()
        except Exception as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert errors == []
    assert balances(site) == {account_id: 20}


def test_waiting(site: DjangoBank) -> None:
    """A caller can wait until a projection has applied its events, while a worker runs."""
    bound = projections().bound[site.alias]
    worker = bound.worker()
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        account = Account("Ada")
        for _ in range(3):
            account.deposit(2)
            wait_for("Balances", site.bank.save(account), timeout=30)
            assert balances(site)[account.id] == account.balance
        account.deposit(2)
        with pytest.raises(UncommittedEventsError), site.atomic():
            wait_for("Balances", site.bank.save(account))
        with pytest.raises(ConfigurationError, match="no projection 'Nope'"):
            wait_for("Nope", 1)
    finally:
        worker.stop()
        thread.join(60)
    assert worker.errors == []


def test_another_event_at_the_position(site: DjangoBank) -> None:
    """A checkpoint keeps the id of the event that it applied last, and notices another event at that position."""
    from tests.django_host.ledger.models import BankRecords

    site.bank.deposit(site.opened(), 1)
    run()
    assert BankRecords.Projection.objects.using(site.alias).get(name="Balances").last_event_id
    assert status().problem is None
    BankRecords.StoredEvent.objects.using(site.alias).filter(notification_id=2).update(event_id=uuid4())
    assert status().state == "another log"
    with pytest.raises(CheckpointMismatchError):
        run()


def test_a_table_that_is_missing(site: DjangoBank) -> None:
    """A projection without its table is a state that names the table and the remedy, for every command."""
    from tests.django_host.ledger.models import Balance

    account_id = site.opened()
    for amount in (1, 2):
        with site.connection.schema_editor() as editor:
            editor.delete_model(Balance)
        found = status()
        assert found.state == "tables missing"
        assert found.problem is not None
        assert "lacks its table ledger_balance" in found.problem
        assert "manage.py eventsourcing rebuild Balances" in found.problem
        with pytest.raises(CheckpointMismatchError, match="lacks its table ledger_balance"):
            run()
        site.bank.deposit(account_id, amount)
        with pytest.raises(CheckpointMismatchError, match="lacks its table ledger_balance"):
            wait_for("Balances", amount + 1, timeout=60)
        with pytest.raises(CommandError, match="ledger_balance"):
            call_command("eventsourcing", "run", "--once", database=site.alias, stdout=StringIO())
        with pytest.raises((CommandError, SystemExit)):
            call_command("eventsourcing", "status", "--check", database=site.alias, stdout=StringIO())
        assert found.dead_letters == 0
        # A database may tell tables by the second in which they were made.
        time.sleep(1.1 if site.connection.vendor == "mysql" else 0)
        with site.connection.schema_editor() as editor:
            editor.create_model(Balance)
        if amount == 1:
            run()
            assert balances(site) == {account_id: 1}
    with pytest.raises(CheckpointMismatchError, match="was made again"):
        run()
    call_command("eventsourcing", "rebuild", "Balances", "--offline", database=site.alias, stdout=StringIO())
    assert balances(site) == {account_id: 3}


def test_in_a_test_case(site: DjangoBank) -> None:
    """Within a test case's transaction a projection sees what the test has saved, and all of it is undone."""
    with as_test_case(site):
        account_id = site.opened()
        run()
        assert balances(site) == {account_id: 0}
    assert balances(site) == {}
    assert site.stored() == (0, 0)


def test_status_and_run_as_commands(site: DjangoBank) -> None:
    """``run`` without a name runs all; ``status`` and ``check`` print what those of Flask print."""
    site.opened()
    in_thread(lambda: call_command("eventsourcing", "run", "--once", database=site.alias, stdout=StringIO()))
    assert len(balances(site)) == 1
    printed = StringIO()
    call_command("eventsourcing", "status", database=site.alias, stdout=printed)
    heads, row = printed.getvalue().splitlines()
    assert heads.split()[:4] == ["NAME", "APPLICATION", "STATE", "POSITION"]
    assert row.split()[:2] == ["Balances", "Bank"]
    printed = StringIO()
    call_command("eventsourcing", "check", database=site.alias, stdout=printed)
    assert "table bank_events ok" in printed.getvalue()
    with pytest.raises(CommandError, match="no projection 'Nope'"):
        call_command("eventsourcing", "run", "Nope", database=site.alias, stdout=StringIO())
    with pytest.raises(CommandError, match="migrate"):
        call_command("eventsourcing", "init-db", database=site.alias, stdout=StringIO())


def test_refused_projections() -> None:
    """What cannot be run here is refused when it is declared: inline projections, and other classes."""

    class Inline(ModelProjection):
        inline = True

        @on(Account.Created)
        def opened(self, event: Any) -> None:
            """Do nothing."""

    with pytest.raises(ConfigurationError, match="inline = True"):
        projection(of="Bank")(Inline)
    with pytest.raises(ConfigurationError, match="derived from"):
        projection(of="Bank")(Account)  # type: ignore[type-var]
    with pytest.raises(ConfigurationError, match=r"must take \(self, event\)"):

        class Wrong(ModelProjection):
            @on(Account.Created)
            def opened(self, event: Any, session: Any) -> None:
                """Do nothing."""


def test_model_in_another_database(site: DjangoBank) -> None:
    """A projection whose models are elsewhere is refused, unless its handlers take the alias."""
    from tests.django_host.ledger.models import Note

    class Elsewhere(ModelProjection):
        models = (Note,)

        @on(Account.Created)
        def opened(self, event: Any) -> None:
            """Do nothing."""

    def declare() -> None:
        with declaring(Elsewhere):
            projections()

    with pytest.raises(ConfigurationError, match=r"ledger\.Note, which is in 'default'"):
        declare()


def test_function_after_the_commit_that_fails(site: DjangoBank, caplog: pytest.LogCaptureFixture) -> None:
    """A function that one event's handler leaves to ``on_commit`` keeps no other's from being called, and is logged."""
    called: list[int] = []

    def call(amount: int) -> None:
        called.append(amount)
        if amount == 2:
            raise KeyError("mail")

    class Mails(ModelProjection):
        """Tells somebody of each deposit."""

        models = ()

        @on(AnyAccount.Deposited)
        def deposited(self, event: Any, using: str) -> None:
            """Tell it after the commit."""
            transaction.on_commit(lambda: call(event.amount), using=using)

    account_id = site.opened()
    for amount in (1, 2, 3):
        site.bank.deposit(account_id, amount)
    with declaring(Mails):
        run("Mails")
        assert called == [1, 2, 3]
        assert status("Mails").position == 4
    assert [record.name for record in caplog.records if record.exc_info] == ["django.db.backends.base"]
