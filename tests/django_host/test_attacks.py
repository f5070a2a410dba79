"""What a user of Django may do to a transaction, on purpose or not, and what is told of the events then."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any, ClassVar

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, connections, transaction
from django.http import HttpResponse
from django.test import AsyncClient, Client, SimpleTestCase
from eventsourcing.persistence import IntegrityError, PersistenceError

from flask_eventsourcing.contrib.django import retry_on_conflict
from flask_eventsourcing.exceptions import ConfigurationError, RollbackOnlyError, StaleAggregateError
from flask_eventsourcing.signals import events_discarded, events_recorded
from tests.django_host import project
from tests.django_host.conftest import DjangoBank, UndoneError
from tests.django_host.test_requests import ask, client  # noqa: F401 (a fixture)
from tests.django_host.urls import route
from tests.domain import Account, conflict_with

pytestmark = pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning")


class Told:
    """Notes what the signals tell."""

    def __init__(self) -> None:
        self.recorded: list[Any] = []
        self.discarded: list[Any] = []

    def hear_recorded(self, sender: object, notifications: Any, **_: Any) -> None:
        """Hear of what is committed."""
        self.recorded.extend(notifications)

    def hear_discarded(self, sender: object, notifications: Any, **_: Any) -> None:
        """Hear of what is gone."""
        self.discarded.extend(notifications)

    def counts(self) -> tuple[int, int]:
        """How many events were told as committed, and as gone."""
        return len(self.recorded), len(self.discarded)


@pytest.fixture
def told() -> Any:
    """What the signals tell."""
    made = Told()
    with events_recorded.connected_to(made.hear_recorded), events_discarded.connected_to(made.hear_discarded):
        yield made


def test_failing_on_commit_stops_no_signal(site: DjangoBank, told: Told) -> None:
    """If a user's function fails after the commit, the signal is sent and the saved object can be used."""
    account = Account("Ada")

    def work() -> None:
        with site.atomic():
            site.bank.save(Account("Bob"))
            transaction.on_commit(_fail, using=site.alias)
            site.bank.save(account)

    with pytest.raises(UndoneError):
        work()
    assert told.counts() == (2, 0)
    account.deposit(1)
    site.bank.save(account)
    assert site.stored() == (3, 0)


def _fail() -> None:
    raise UndoneError


def test_receiver_that_saves(site: DjangoBank) -> None:
    """A receiver of ``events_recorded`` may save; events that wait to be announced are announced after that."""
    heard: list[Any] = []

    def receiver(sender: object, notifications: Any, **_: Any) -> None:
        heard.append(notifications[0].originator_version)
        if len(heard) == 1:
            with site.atomic():
                site.bank.save(first)

    first, second = Account("Ada"), Account("Bob")
    with events_recorded.connected_to(receiver), site.atomic():
        site.bank.save(first)
        transaction.on_commit(lambda: heard.append("users"), using=site.alias)
        second.deposit(1)
        site.bank.save(second)
        first.deposit(5)
    assert heard == [1, 2, "users", 1]
    second.deposit(1)
    site.bank.save(second)
    assert site.stored() == (5, 0)


def test_savepoint_without_a_block(site: DjangoBank, told: Told) -> None:
    """What was saved since ``transaction.savepoint()`` is gone with its rollback: not announced, its object refused."""
    kept, lost = Account("Ada"), Account("Bob")
    with site.atomic():
        site.bank.save(kept)
        savepoint = site.connection.savepoint()
        site.bank.save(lost)
        transaction.savepoint_rollback(savepoint, using=site.alias)
        with pytest.raises(StaleAggregateError):
            site.bank.save(lost)
    assert site.stored() == (1, 0)
    assert told.counts() == (1, 0)


def test_connection_closed_in_a_block(site: DjangoBank, told: Told, client: Client) -> None:  # noqa: F811
    """Events that are lost because their connection is closed in a block are reported, though Django is silent."""

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
            site.connection.close()
        return HttpResponse(status=201)

    assert ask(client, view) == 500
    with site.atomic():
        site.opened()
        connections.close_all()
    assert told.counts() == (0, 2)
    site.opened()
    assert site.stored() == (1, 0)


def test_commit_that_fails_is_told_by_its_error(site: DjangoBank, told: Told, client: Client) -> None:  # noqa: F811
    """If the commit itself fails, its error is enough. A view that catches it may answer as it likes."""
    if site.connection.vendor == "mysql":
        # It has no constraint that waits for the commit.
        return
    with site.connection.cursor() as cursor:
        cursor.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        cursor.execute("CREATE TABLE child (id INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)")

    def view(request: Any) -> HttpResponse:
        with suppress(DatabaseError), site.atomic():
            site.opened()
            with site.connection.cursor() as cursor:
                cursor.execute("INSERT INTO child VALUES (1)")
        return HttpResponse(status=200)

    assert ask(client, view) == 200
    assert site.stored() == (0, 0)
    assert told.counts() == (0, 0)


def test_error_of_a_raw_cursor_that_was_swallowed(site: DjangoBank, told: Told) -> None:
    """A commit that PostgreSQL would turn into a rollback is refused; elsewhere the events are committed."""

    def work() -> None:
        with site.atomic():
            site.opened()
            with suppress(DatabaseError), site.connection.cursor() as cursor:
                cursor.execute("SELECT * FROM there_is_no_such_table")

    if site.connection.vendor == "postgresql":
        with pytest.raises(transaction.TransactionManagementError, match="1 events were saved and cannot be committed"):
            work()
        assert (site.stored(), told.counts()) == ((0, 0), (0, 0))
        # In a block of its own it is Django that fails, and no more is gone than that block.
        with site.atomic():
            site.opened()
            with suppress(DatabaseError):
                work()
    else:
        work()
    assert (site.stored(), told.counts()) == ((1, 0), (1, 0))


def test_rollback_that_the_server_does_by_itself(site: DjangoBank, told: Told) -> None:
    """After a deadlock that was swallowed the server has rolled all back: the commit is refused."""
    if site.connection.vendor != "mysql":
        return
    from tests.django_host.ledger.models import Note

    rows = Note.objects.using(site.alias)
    site.note("one")
    site.note("two")
    first, second = rows.values_list("pk", flat=True)
    has_locked = threading.Event()

    def other() -> None:
        # It has done more, so that the server ends the transaction with the events.
        with site.atomic():
            rows.bulk_create([Note(text="more")] * 50)
            rows.filter(pk=second).update(text="x")
            has_locked.set()
            rows.filter(pk=first).update(text="x")

    def work() -> None:
        with site.atomic():
            site.opened()
            rows.filter(pk=first).update(text="y")
            thread.start()
            has_locked.wait(20)
            with suppress(DatabaseError), site.connection.cursor() as cursor:
                cursor.execute("UPDATE ledger_note SET text = 'y' WHERE id = %s", [second])

    thread = threading.Thread(target=site.elsewhere, args=(other,))
    with pytest.raises(transaction.TransactionManagementError, match="cannot be committed"):
        work()
    thread.join()
    assert (site.stored(), told.counts()) == ((0, 52), (0, 0))


def test_rollback_that_was_asked_for_excuses_no_other(site: DjangoBank, told: Told) -> None:
    """If an inner block asks for its rollback, an error that rolls the outer block back is reported nevertheless."""
    from tests.django_host.ledger.models import Note

    with site.atomic():
        site.opened()
        with site.atomic():
            transaction.set_rollback(True, using=site.alias)
        with suppress(DatabaseError):
            Note.objects.using(site.alias).create(text=None)
    assert site.stored() == (0, 0)
    assert told.counts() == (0, 1)


def test_autocommit_switched_off(site: DjangoBank, told: Told) -> None:
    """A commit without a block is announced at once, and a later rollback does not concern it."""
    account = Account("Ada")
    site.connection.set_autocommit(False)
    try:
        site.bank.save(account)
        site.connection.commit()
        assert told.counts() == (1, 0)
        account.deposit(1)
        site.bank.save(account)
        site.connection.rollback()
        with pytest.raises(StaleAggregateError):
            site.bank.save(account)
    finally:
        site.connection.rollback()
        site.connection.set_autocommit(True)
    assert (site.stored(), told.counts()) == ((1, 0), (1, 0))


def test_retried_function_that_swallows_an_error(site: DjangoBank) -> None:
    """A function under ``retry_on_conflict`` does not seem to succeed if its block could only be rolled back."""
    account_id = site.opened()
    save_late = conflict_with(site.bank, account_id)
    site.bank.deposit(account_id)

    @retry_on_conflict
    def swallowing() -> None:
        site.opened()
        with suppress(IntegrityError):
            save_late()

    @retry_on_conflict
    def asking() -> str:
        site.opened()
        transaction.set_rollback(True, using=site.alias)
        return "refused"

    with pytest.raises(RollbackOnlyError):
        swallowing()
    assert asking() == "refused"
    assert site.stored() == (2, 0)


def test_retried_function_that_runs_later_is_refused() -> None:
    """A coroutine function or a generator would run after its block, and is refused when it is decorated."""

    async def later() -> None: ...

    def generator() -> Any:
        yield

    for function in (later, generator):
        with pytest.raises(ConfigurationError, match="atomic"):
            retry_on_conflict(function)


def test_async_views(site: DjangoBank, told: Told) -> None:
    """In an event loop ``save()`` is refused as Django's ORM is; with ``sync_to_async`` a view is one transaction."""

    async def view(request: Any) -> HttpResponse:
        with pytest.raises(SynchronousOnlyOperation):
            site.opened()
        await sync_to_async(work)()
        return HttpResponse(status=201)

    def work() -> None:
        with site.atomic():
            site.opened()
            site.note()

    async def losing(request: Any) -> HttpResponse:
        await sync_to_async(lose)()
        return HttpResponse(status=201)

    def lose() -> None:
        with site.atomic():
            site.opened()
            site.connection.needs_rollback = True

    async def request() -> int:
        # In a thread of its own: that of the process may have a connection to the database of another test.
        async with ThreadSensitiveContext():
            response: Any = await AsyncClient(raise_request_exception=False).get("/")
            await sync_to_async(connections.close_all)()
        return int(response.status_code)

    route(view)
    assert async_to_sync(request)() == 201
    assert (site.stored(), told.counts()) == ((1, 1), (1, 0))
    route(losing)
    assert asyncio.run(request()) == 500
    assert site.stored() == (1, 1)


def test_two_aliases_of_one_database(site: DjangoBank) -> None:
    """With its events in one alias and rows in another there are two transactions, as for rows in both."""
    with project.alias("second", site.url):
        if site.connection.vendor != "sqlite":
            with suppress(UndoneError), transaction.atomic(using="second"):
                site.opened()
                raise UndoneError
            assert site.stored() == (1, 0)
        with site.atomic():
            site.opened()
        connections["second"].close()


def test_databases_that_a_test_case_bans(site: DjangoBank) -> None:
    """If a ``SimpleTestCase`` forbids the database of the events, no connection of the package gets around that."""
    from tests.django_host.ledger.models import BankRecords

    site.opened()

    class Banned(SimpleTestCase):
        databases: ClassVar[Any] = set()

    datastore: Any = site.bank.recorder.datastore  # type: ignore[attr-defined]
    site.connection.close()
    Banned.setUpClass()
    try:
        for use in (
            site.opened,
            lambda: BankRecords.StoredEvent.objects.using(site.alias).count(),
            lambda: site.bank.notification_log.select(1, 10),
            datastore.engine.connect,
        ):
            with pytest.raises(AssertionError, match="not allowed"):
                use()
    finally:
        Banned.tearDownClass()
        Banned.doClassCleanups()
    assert site.stored() == (1, 0)


def test_connection_that_the_server_ends(site: DjangoBank) -> None:
    """After a restart of the server a save fails with the library's error, and the one after it works."""
    kill = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}.get(site.connection.vendor)
    if kill is None:
        return
    ask_id = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}[site.connection.vendor]
    site.opened()
    for in_block in (False, True):
        with site.connection.cursor() as cursor:
            cursor.execute(ask_id)
            number = cursor.fetchone()[0]

        def end(number: int = number) -> None:
            with site.connection.cursor() as cursor:
                cursor.execute(kill.format(number))

        with pytest.raises((PersistenceError, DatabaseError)):
            _save_after(site, end, in_block=in_block)
        site.opened()
    assert site.stored() == (3, 0)


def _save_after(site: DjangoBank, end: Any, *, in_block: bool) -> None:
    if in_block:
        with site.atomic():
            site.opened()
            site.elsewhere(end)
            site.opened()
    else:
        site.elsewhere(end)
        site.opened()
