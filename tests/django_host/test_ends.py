"""Ends of transactions past Django, or in the middle of its own functions: what is told is what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
from django.db import Error, IntegrityError, transaction
from django.http import HttpResponse
from django.test import Client

from flask_eventsourcing.signals import events_discarded, events_recorded
from tests.django_host.conftest import DATABASES, DjangoBank, UndoneError
from tests.django_host.test_requests import ask, client, swallowing
from tests.domain import Account, in_thread

__all__ = ["client"]


@contextmanager
def told() -> Iterator[tuple[list[int], list[int]]]:
    """Within it, the versions of the events are kept that are told to be stored, and of those told to be lost."""
    stored: list[int] = []
    lost: list[int] = []

    def recorded(sender: object, notifications: Any, **_: Any) -> None:
        stored.extend(each.originator_version for each in notifications)

    def discarded(sender: object, notifications: Any, **_: Any) -> None:
        lost.extend(each.originator_version for each in notifications)

    with events_recorded.connected_to(recorded), events_discarded.connected_to(discarded):
        yield stored, lost


def execute(site: DjangoBank, how: str, statement: str) -> None:
    """Run a statement on Django's cursor, or on one of the driver's, of which Django hears nothing."""
    with closing(site.connection.cursor() if how == "cursor" else site.connection.connection.cursor()) as cursor:
        cursor.execute(statement)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep what is logged of losses out of the output."""
    caplog.set_level("CRITICAL", "flask_eventsourcing.contrib.django")


@pytest.mark.parametrize("statement", ["ROLLBACK", "/* a */ rollback;", "SELECT 1; ROLLBACK"])
def test_text_that_rolls_back(site: DjangoBank, client: Client, statement: str) -> None:
    """After a textual ROLLBACK neither the client nor a receiver is told that the events are stored."""
    if ";" in statement and site.connection.vendor != "postgresql":
        statement = "ROLLBACK"

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
            execute(site, "cursor", statement)
            site.note()
        return HttpResponse(status=201)

    with told() as (stored, lost):
        assert ask(client, view) == 500
    assert (stored, lost) == ([], [])
    assert site.stored()[0] == 0
    site.opened()
    assert site.stored()[0] == 1


def test_text_that_commits(site: DjangoBank) -> None:
    """Events that a textual COMMIT has stored are announced, even if an exception leaves the block later."""
    account = Account("Ada")
    with told() as (stored, lost):
        with site.rolled_back():
            site.bank.save(account)
            execute(site, "cursor", "COMMIT")
        assert site.stored()[0] == 1
        assert (stored, lost) == ([1], [])
        account.deposit(1)
        site.bank.save(account)
        assert (stored, lost) == ([1, 2], [])


@pytest.mark.parametrize("url", DATABASES[:2], indirect=True)
def test_driver_that_rolls_back(site: DjangoBank, client: Client) -> None:
    """The same where the driver's own connection is rolled back, and it knows whether it is in a transaction."""

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
            site.connection.connection.rollback()
        return HttpResponse(status=201)

    with told() as (stored, lost):
        assert ask(client, view) == 500
    assert (stored, lost) == ([], [])


def test_driver_error_that_is_swallowed(site: DjangoBank, client: Client) -> None:
    """An error on a cursor of the driver's, which aborts a transaction of PostgreSQL, makes the request fail too."""

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
            with suppress(site.connection.Database.Error):
                execute(site, "driver", "SELECT nothing FROM nowhere")
        return HttpResponse(status=201)

    with told() as (stored, lost):
        status = ask(client, view)
    is_stored = site.stored()[0] == 1
    assert (status, stored, lost) == ((201, [1], []) if is_stored else (500, [], []))
    assert is_stored is (site.connection.vendor != "postgresql")


def test_closed_inside(site: DjangoBank, client: Client) -> None:
    """A connection that is closed inside a block loses its events, of which Django says nothing."""
    if site.connection.vendor == "sqlite":
        # Django does not run a block to its end there.
        site.connection.ensure_connection()

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            with site.atomic():
                site.opened()
            site.connection.close()
        return HttpResponse(status=201)

    with told() as (stored, lost):
        assert ask(client, view) == 500
    assert (stored, lost) == ([], [1])
    assert site.stored()[0] == 0


def test_loss_while_an_error_is_handled(site: DjangoBank, client: Client) -> None:
    """Lost events are reported also while another error is handled, but not if an error leaves the block."""

    def view(request: Any) -> HttpResponse:
        try:
            raise UndoneError
        except UndoneError:
            with site.atomic():
                swallowing(site)
        return HttpResponse(status=201)

    def undone(request: Any) -> HttpResponse:
        with site.rolled_back():
            swallowing(site)
        return HttpResponse(status=201)

    with told() as (stored, lost):
        assert ask(client, undone) == 201
        assert lost == []
        assert ask(client, view) == 500
    assert (stored, lost) == ([], [1])


def test_commit_that_fails(site: DjangoBank) -> None:
    """If the database refuses the commit, Django's error is raised, and the events are not reported as lost too."""
    from tests.django_host.ledger.models import Journal

    def work() -> None:
        with site.atomic():
            site.opened()
            Journal.objects.using(site.alias).create(originator_id="a", originator_version=1, note_id=99)

    with told() as (stored, lost), pytest.raises(IntegrityError):
        work()
    assert (stored, lost) == ([], [])
    assert site.stored()[0] == 0


def test_function_that_fails_before(site: DjangoBank) -> None:
    """If another function of ``on_commit`` fails before the package's own, stored events are announced anyway."""
    account = Account("Ada")

    def fail() -> None:
        raise UndoneError

    def work() -> None:
        with site.atomic():
            transaction.on_commit(fail, using=site.alias)
            site.bank.save(account)

    with told() as (stored, lost):
        with pytest.raises(UndoneError):
            work()
        assert (stored, lost) == ([1], [])
        account.deposit(1)
        site.bank.save(account)
        assert (stored, lost) == ([1, 2], [])


def test_function_that_saves_before(site: DjangoBank) -> None:
    """A function of ``on_commit`` that runs before the package's own may save or read: each event is announced once."""
    account, other = Account("Ada"), Account("Grace")
    order: list[str] = []

    def save() -> None:
        with site.atomic():
            site.bank.save(other)
        order.append("saved")

    with told() as (stored, lost):
        with site.atomic():
            transaction.on_commit(save, using=site.alias)
            site.bank.save(account)
        assert (stored, lost) == ([1, 1], [])
    assert order == ["saved"]
    for each in (account, other):
        each.deposit(1)
        site.bank.save(each)
    assert site.stored()[0] == 4


def test_manual_transaction_past_django(site: DjangoBank) -> None:
    """With autocommit off, the rows in the database decide whether the driver has committed or rolled back."""
    site.connection.set_autocommit(False)
    try:
        with told() as (stored, _):
            site.opened()
            site.connection.connection.rollback()
            site.opened()
            site.connection.connection.commit()
            site.opened()
            site.connection.commit()
            assert len(stored) == 2
    finally:
        with suppress(Error):
            site.connection.rollback()
        site.connection.set_autocommit(True)
    assert site.stored()[0] == 2


def test_events_of_others_at_a_lost_position(site: DjangoBank) -> None:
    """Events that the driver rolled back are not mixed up with those of others that have their positions now."""
    site.connection.set_autocommit(False)
    try:
        with told() as (stored, _):
            site.opened()
            site.connection.connection.rollback()
            in_thread(site.opened)
            with pytest.raises(Error):
                site.connection.commit()
            assert stored == [1]
    finally:
        with suppress(Error):
            site.connection.rollback()
        site.connection.set_autocommit(True)
    assert site.stored()[0] == 1


def test_statements_of_a_block_are_not_suspected(site: DjangoBank) -> None:
    """Blocks in blocks, rolled back or not, cost no statement more at the commit."""
    from django.test.utils import CaptureQueriesContext

    site.opened()
    with CaptureQueriesContext(site.connection) as queries:
        with site.atomic():
            site.opened()
            with site.rolled_back():
                site.opened()
            with site.atomic():
                site.note()
        last = [each["sql"] for each in queries.captured_queries][-2:]
    assert last[0].startswith("RELEASE SAVEPOINT")
    assert last[1] == "COMMIT"
    assert site.connection.execute_wrappers == []


@pytest.mark.parametrize("url", DATABASES, indirect=True)
def test_savepoints_whose_numbers_begin_again(site: DjangoBank) -> None:
    """``transaction.clean_savepoints()`` changes nothing of what a rollback to a savepoint takes along."""
    site.opened()
    with told() as (stored, lost), site.atomic():
        site.connection.savepoint()
        account_id = site.opened()
        transaction.clean_savepoints(using=site.alias)
        inner = site.connection.savepoint()
        site.bank.deposit(account_id, 5)
        transaction.clean_savepoints(using=site.alias)
        site.bank.deposit(account_id, 5)
        transaction.savepoint_rollback(inner, using=site.alias)
    transaction.clean_savepoints(using=site.alias)
    assert site.stored() == (2, 0)
    assert (stored, lost) == ([1], [])
    assert site.connection.savepoint_state == 0
