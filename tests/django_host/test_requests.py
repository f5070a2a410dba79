"""Requests: what an answer says of the events, and units of work that are run again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any

import pytest
from django.db import IntegrityError as DjangoIntegrityError
from django.db import connections, transaction
from django.http import HttpResponse
from django.test import Client, TestCase, override_settings
from eventsourcing.persistence import IntegrityError

from flask_eventsourcing.contrib.django import retry_on_conflict
from flask_eventsourcing.signals import events_discarded
from tests.django_host.conftest import DjangoBank
from tests.django_host.urls import route
from tests.domain import conflict_with, in_threads


class RefusedError(Exception):
    """What a view raises."""


@pytest.fixture
def client() -> Iterator[Client]:
    """A client to which errors of views are answers."""
    loggers = [logging.getLogger(name) for name in ("django.request", "flask_eventsourcing.contrib.django.hosting")]
    for each in loggers:
        each.disabled = True
    yield Client(raise_request_exception=False)
    for each in loggers:
        each.disabled = False


def ask(client: Client, view: Any) -> int:
    """Have a view answer, and return the status."""
    route(view)
    status: int = client.get("/").status_code
    return status


def swallowing(site: DjangoBank) -> None:
    """Save events, and swallow an error of a statement after it."""
    from tests.django_host.ledger.models import Note

    site.opened()
    Note.objects.using(site.alias).create(pk=1, text="first")
    with suppress(DjangoIntegrityError):
        Note(pk=1, text="second").save(using=site.alias, force_insert=True)


def test_success(site: DjangoBank, client: Client) -> None:
    """What a view has committed is stored, and its answer goes through."""

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
        return HttpResponse(status=201)

    assert ask(client, view) == 201
    assert site.stored() == (1, 0)


def test_returned_failure_commits(site: DjangoBank, client: Client) -> None:
    """A returned 4xx rolls nothing back, as it rolls back no rows in Django."""

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
        return HttpResponse(status=409)

    assert ask(client, view) == 409
    assert site.stored() == (1, 0)


def test_exception_rolls_back(site: DjangoBank, client: Client) -> None:
    """An exception that leaves the block rolls the events back."""

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
            raise RefusedError

    assert ask(client, view) == 500
    assert site.stored() == (0, 0)


def test_swallowed_error(site: DjangoBank, client: Client) -> None:
    """A success becomes a 500 where events were rolled back because of an error that the view has swallowed."""
    told: list[Any] = []

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            swallowing(site)
        return HttpResponse(status=201)

    def receiver(sender: object, notifications: Any, **_: Any) -> None:
        told.extend(notifications)

    with events_discarded.connected_to(receiver):
        assert ask(client, view) == 500
    assert site.stored() == (0, 0)
    assert [each.originator_version for each in told] == [1]


class Around:
    """A middleware that has a request in one transaction, as that of django-reversion."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        """Answer in a block."""
        with transaction.atomic(using="ledger"):
            return self.get_response(request)


@pytest.mark.parametrize("is_asked", [False, True])
def test_swallowed_error_in_the_block_of_a_middleware(site: DjangoBank, client: Client, is_asked: bool) -> None:
    """The same where the block is that of a middleware around the package's, unless the view asks for a rollback."""
    told: list[Any] = []

    def view(request: Any) -> HttpResponse:
        swallowing(site)
        if is_asked:
            site.connection.set_rollback(True)
        return HttpResponse(status=201)

    def receiver(sender: object, notifications: Any, **_: Any) -> None:
        told.extend(notifications)

    ours = "flask_eventsourcing.contrib.django.middleware.EventSourcingMiddleware"
    around = f"{__name__}.{Around.__name__}"
    with events_discarded.connected_to(receiver), override_settings(MIDDLEWARE=[around, ours]):
        assert ask(client, view) == (201 if is_asked else 500)
    assert site.stored() == (0, 0)
    assert len(told) == (0 if is_asked else 1)


def test_swallowed_conflict(site: DjangoBank, client: Client) -> None:
    """The same holds for a conflict of an aggregate."""
    account_id = site.opened()
    save_late = conflict_with(site.bank, account_id)
    site.bank.deposit(account_id)

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
            with suppress(IntegrityError):
                save_late()
        return HttpResponse(status=201)

    assert ask(client, view) == 500
    assert site.stored() == (2, 0)


def test_swallowed_error_and_failure(site: DjangoBank, client: Client) -> None:
    """An answer that says that nothing was done stays as it is."""

    def view(request: Any) -> HttpResponse:
        with site.atomic():
            swallowing(site)
        return HttpResponse(status=400)

    assert ask(client, view) == 400
    assert site.stored() == (0, 0)


def test_rollback_that_was_asked_for(site: DjangoBank, client: Client) -> None:
    """A view may roll back by ``set_rollback()``, a savepoint or an exception that it catches, and answer a success."""

    def by_flag(request: Any) -> HttpResponse:
        with site.atomic():
            site.opened()
            transaction.set_rollback(True, using=site.alias)
        return HttpResponse()

    def by_savepoint(request: Any) -> HttpResponse:
        with site.atomic():
            savepoint = site.connection.savepoint()
            site.opened()
            transaction.savepoint_rollback(savepoint, using=site.alias)
        return HttpResponse()

    def by_exception(request: Any) -> HttpResponse:
        try:
            with site.atomic():
                site.opened()
                raise RefusedError
        except RefusedError:
            return HttpResponse()

    for view in (by_flag, by_savepoint, by_exception):
        assert ask(client, view) == 200
        assert site.stored() == (0, 0)


def test_autocommit_switched_off(site: DjangoBank, client: Client) -> None:
    """With autocommit off, a success without a commit becomes a 500, and nothing is committed later."""

    def view(request: Any) -> HttpResponse:
        transaction.set_autocommit(False, using=site.alias)
        site.opened()
        return HttpResponse(status=201)

    def committing(request: Any) -> HttpResponse:
        transaction.set_autocommit(False, using=site.alias)
        site.opened()
        transaction.commit(using=site.alias)
        return HttpResponse(status=201)

    assert ask(client, view) == 500
    transaction.set_autocommit(True, using=site.alias)
    assert site.stored() == (0, 0)
    assert ask(client, committing) == 201
    transaction.set_autocommit(True, using=site.alias)
    assert site.stored() == (1, 0)


@pytest.mark.parametrize("atomic_requests", [False, True])
def test_atomic_requests(site: DjangoBank, client: Client, atomic_requests: bool) -> None:
    """With ``ATOMIC_REQUESTS`` a view is one transaction, and without it each ``save()`` is."""
    connections.settings[site.alias]["ATOMIC_REQUESTS"] = atomic_requests

    def view(request: Any) -> HttpResponse:
        site.opened()
        site.opened()
        raise RefusedError

    def swallows(request: Any) -> HttpResponse:
        swallowing(site)
        return HttpResponse(status=201)

    assert ask(client, view) == 500
    assert site.stored() == (0 if atomic_requests else 2, 0)
    assert ask(client, swallows) == (500 if atomic_requests else 201)
    assert site.stored() == ((0, 0) if atomic_requests else (3, 1))


def test_transaction_of_a_test_case(site: DjangoBank, client: Client) -> None:
    """A test case's own transaction, which is never committed, is no loss of events."""
    account_id = site.opened()

    def view(request: Any) -> HttpResponse:
        site.bank.deposit(account_id)
        return HttpResponse(status=201)

    with as_test_case(site):
        assert ask(client, view) == 201
        assert site.bank.balance(account_id) == 1
    assert site.bank.balance(account_id) == 0


def as_test_case(site: DjangoBank) -> Any:
    """A block as Django's ``TestCase`` opens it around each test."""
    block = site.atomic()
    block._from_testcase = True

    class Undoing:
        def __enter__(self) -> None:
            block.__enter__()

        def __exit__(self, *error: Any) -> None:
            transaction.set_rollback(True, using=site.alias)
            block.__exit__(*error)

    return Undoing()


# ------------------------------------------------------------------------------------------------ retry_on_conflict


def test_retry(site: DjangoBank) -> None:
    """After a conflict the function is run again, in a new transaction, and sees what the other has stored."""
    account_id = site.opened()
    tries: list[int] = []

    @retry_on_conflict(times=2)
    def work() -> None:
        account = site.bank.account(account_id)
        tries.append(account.balance)
        site.note()
        if len(tries) == 1:
            site.elsewhere(lambda: site.bank.deposit(account_id, 10))
        account.deposit(1)
        site.bank.save(account)

    if site.connection.vendor == "sqlite":
        # The transaction that began first keeps all others from writing.
        site.elsewhere(lambda: site.bank.deposit(account_id, 10))
        tries.append(0)
    work()
    assert tries == [0, 10]
    assert site.bank.balance(account_id) == 11
    assert site.stored() == (3, 1)


def test_retry_gives_up(site: DjangoBank) -> None:
    """The last conflict is raised, with the number of tries, and another error at once."""
    account_id = site.opened()
    save_late = conflict_with(site.bank, account_id)
    site.bank.deposit(account_id)
    tries: list[int] = []

    @retry_on_conflict(times=1)
    def conflicting() -> None:
        tries.append(1)
        conflict_again(site, account_id)

    with pytest.raises(IntegrityError) as raised:
        conflicting()
    assert len(tries) == 2
    assert raised.value.__notes__ == ["Tried 2 times."]

    @retry_on_conflict
    def failing() -> None:
        tries.append(1)
        raise RefusedError

    with pytest.raises(RefusedError):
        failing()
    assert len(tries) == 3
    with pytest.raises(IntegrityError):
        save_late()


def conflict_again(site: DjangoBank, account_id: Any) -> None:
    """Save a state that is not the latest."""
    one, other = site.bank.account(account_id), site.bank.account(account_id)
    one.deposit(1)
    other.deposit(1)
    site.bank.save(one)
    site.bank.save(other)


def test_retry_in_another_block(site: DjangoBank) -> None:
    """Inside another block there is no second try, which is an error; in that of a test case there is."""

    @retry_on_conflict
    def work() -> None:
        site.opened()

    with site.atomic(), pytest.raises(RuntimeError, match="inside another atomic"):
        work()
    with as_test_case(site):
        work()
        account_id = site.opened()
        with pytest.raises(IntegrityError):
            retry_on_conflict(times=1)(lambda: conflict_again(site, account_id))()
        assert site.bank.balance(account_id) == 0
    assert site.stored() == (0, 0)


def test_retried_view_has_no_transaction_around_it(site: DjangoBank, client: Client) -> None:
    """A view with the decorator is not run in the transaction of ``ATOMIC_REQUESTS``."""
    connections.settings[site.alias]["ATOMIC_REQUESTS"] = True

    @retry_on_conflict
    def view(request: Any) -> HttpResponse:
        assert len(site.connection.atomic_blocks) == 1
        site.opened()
        return HttpResponse(status=201)

    assert ask(client, view) == 201
    assert site.stored() == (1, 0)


def by_read(request: Any) -> bytes:
    """Read the body as a stream, which can be done once."""
    found: bytes = request.read()
    return found


def by_body(request: Any) -> bytes:
    """Read the body as a whole."""
    found: bytes = request.body
    return found


def by_upload(request: Any) -> bytes:
    """Read a file of a form."""
    found: bytes = request.FILES["file"].read()
    return found


def of_rest_framework(request: Any) -> bytes:
    """Read the body as Django REST framework does, with a request of its own at each try."""
    found: bytes = request.body if request._read_started else request.read()
    return found


READINGS = {
    "stream": (by_read, "data", 200),
    "body": (by_body, "data", 200),
    "upload": (by_upload, "file", 200),
    "large upload": (by_upload, "file", 200),
    "rest framework": (of_rest_framework, "data", 200),
    "large stream": (by_read, "data", 500),
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("is_method", [False, True])
def test_retried_view_reads_its_request_again(site: DjangoBank, client: Client, reading: str, is_method: bool) -> None:
    """Each try of a view reads the same body; after a body that is too large to keep there is no further try."""
    read, kind, status = READINGS[reading]
    seen: list[bytes] = []

    def view(request: Any) -> HttpResponse:
        seen.append(read(request))
        if len(seen) == 1:
            conflict_again(site, site.opened())
        return HttpResponse()

    class View:
        @retry_on_conflict
        def post(self, request: Any) -> HttpResponse:
            return view(request)

    route(View().post if is_method else retry_on_conflict(view))
    body = b"Ada"
    with override_settings(FILE_UPLOAD_MAX_MEMORY_SIZE=100 if "large" in reading else 10_000):
        if "large" in reading:
            body *= 100
        sent: Any = {"file": BytesIO(body)} if kind == "file" else body
        answer = client.post("/", sent) if kind == "file" else client.post("/", sent, content_type="text/plain")
    assert answer.status_code == status
    assert seen == [body] * (2 if status == 200 else 1)


def test_contended_aggregate(site: DjangoBank) -> None:
    """Many threads that change one aggregate all succeed, and no update is lost."""
    account_id = site.opened()
    threads, rounds = 6, 5

    def work() -> None:
        try:
            for _ in range(rounds):
                retry_on_conflict(times=10)(lambda: site.bank.deposit(account_id, 1))()
        finally:
            site.connection.close()

    in_threads([work] * threads, patience=120)
    assert site.bank.balance(account_id) == threads * rounds
    assert threading.active_count() >= 1


def test_callbacks_are_captured(site: DjangoBank) -> None:
    """``captureOnCommitCallbacks`` sees what waits for the commit, and executes it."""
    from flask_eventsourcing.signals import events_recorded

    told: list[Any] = []

    def receiver(sender: object, notifications: Any, **_: Any) -> None:
        told.extend(notifications)

    with events_recorded.connected_to(receiver), as_test_case(site):
        site.opened()
        with TestCase.captureOnCommitCallbacks(using=site.alias, execute=True) as callbacks:
            site.opened()
        assert len(callbacks) == 1
        assert len(told) == 1
    assert len(told) == 1
