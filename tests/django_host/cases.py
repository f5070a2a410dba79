"""The tests of a user's project, which are run by ``manage.py test`` and by pytest-django, not here."""

from __future__ import annotations

from contextlib import closing
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest
from bank.domain import Bank  # type: ignore[import-not-found]  # in the project of the documentation
from bank.models import Balance, BankRecords  # type: ignore[import-not-found]
from django.db import connection, transaction
from django.test import LiveServerTestCase, TestCase, TransactionTestCase
from eventsourcing.domain import Aggregate, event

from flask_eventsourcing.contrib.django import get_application
from flask_eventsourcing.contrib.django.testing import EventSourcingTestCase, initialized, run_projections
from flask_eventsourcing.signals import events_recorded


class Counter(Aggregate):
    """Counts."""

    def __init__(self) -> None:
        self.number = 0

    @event("Counted")
    def count(self) -> None:
        """Count one more."""
        self.number += 1


def stored() -> int:
    """Count the events."""
    found: int = BankRecords.StoredEvent.objects.count()
    return found


def posted(address: str) -> int:
    """Open an account by a request to a server, and return the status."""
    with closing(HTTPConnection(urlsplit(address).netloc, timeout=60)) as connection:
        connection.request("POST", "/live", "owner=Ada", {"Content-Type": "application/x-www-form-urlencoded"})
        return connection.getresponse().status


class SharedData:
    """Tests with data of their class, which each of them changes."""

    counter: Any

    @classmethod
    def setUpTestData(cls) -> None:
        """Save an aggregate for all tests."""
        cls.counter = Counter()
        get_application(Bank).save(cls.counter)

    def change(self) -> None:
        """Change the class's aggregate, and the stored one."""
        bank = get_application(Bank)
        assert stored() == 1
        self.counter.count()
        bank.save(self.counter)
        other = bank.repository.get(self.counter.id)
        assert other.number == 1
        other.count()
        bank.save(other)
        assert stored() == 3

    def test_one(self) -> None:
        """A test changes the data of its class, also in the database."""
        self.change()

    def test_other(self) -> None:
        """Another test changes the same data, and sees nothing of the first one's changes."""
        self.change()


class OursTest(SharedData, EventSourcingTestCase):
    """With the package's test case."""


class PlainTest(SharedData, TestCase):
    """With Django's own."""


class CapturedTest(EventSourcingTestCase):
    """``captureOnCommitCallbacks`` and what is announced."""

    def test_captured(self) -> None:
        """What is saved in a block is one callback, and what was rolled back is none."""
        told: list[Any] = []

        def hear(sender: object, notifications: Any, **_: Any) -> None:
            told.extend(notifications)

        with events_recorded.connected_to(hear):
            with self.captureOnCommitCallbacks() as callbacks, transaction.atomic():
                self.application.save(Counter())
                savepoint = connection.savepoint()
                self.application.save(Counter())
                connection.savepoint_rollback(savepoint)
            assert (len(callbacks), len(told)) == (1, 0)
            callbacks[0]()
            assert len(told) == 1
            with self.captureOnCommitCallbacks(execute=True) as callbacks:
                self.application.save(Counter())
            assert (len(callbacks), len(told)) == (1, 2)
            with self.captureOnCommitCallbacks(execute=True) as callbacks:
                self.client.post("/accounts", {"owner": "Ada"})
            assert (len(callbacks), len(told)) == (1, 3)


class LiveTest(LiveServerTestCase):
    """A server in a thread of its own."""

    def order(self) -> None:
        """Send a request, and look at what it has stored."""
        told: list[Any] = []

        def hear(sender: object, notifications: Any, **_: Any) -> None:
            told.extend(notifications)

        with initialized() as application, events_recorded.connected_to(hear):
            assert posted(self.live_server_url) == 201
            assert len(application.notification_log.select(1, 10)) == 1
            assert len(told) == 1
            run_projections()
        assert Balance.objects.count() == 1

    def test_one(self) -> None:
        """A request to the live server stores an event, and projections apply it."""
        self.order()

    def test_other(self) -> None:
        """A second request finds nothing that the first test has left."""
        self.order()


class CommittedTest(TransactionTestCase):
    """Tests that commit."""

    def test_one(self) -> None:
        """A test that commits has its own events only, without those that it has rolled back."""
        bank = get_application(Bank)
        bank.save(Counter())
        with transaction.atomic():
            bank.save(Counter())
            transaction.set_rollback(True)
        assert stored() == 1

    def test_other(self) -> None:
        """A second test that commits finds nothing that the first one has left."""
        self.test_one()

    def test_read_beside(self) -> None:
        """A connection that reads beside a transaction is closed before the test database is dropped."""
        bank = get_application(Bank)
        with transaction.atomic():
            bank.save(Counter())
            bank.recorder.high_water_mark()


@pytest.mark.django_db
class TestPytest:
    """Classes and fixtures of pytest-django."""

    def test_captured(self, django_capture_on_commit_callbacks: Any, eventsourcing_application: Any) -> None:
        """The fixture of pytest-django that captures callbacks also captures the signal."""
        told: list[Any] = []

        def hear(sender: object, notifications: Any, **_: Any) -> None:
            told.extend(notifications)

        with events_recorded.connected_to(hear), django_capture_on_commit_callbacks(execute=True):
            eventsourcing_application.save(Counter())
        assert len(told) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_live_server(live_server: Any, eventsourcing_application: Any, number: int) -> None:
    """The live server of pytest-django uses the project's application."""
    assert posted(str(live_server)) == 201
    assert len(eventsourcing_application.notification_log.select(1, 10)) == 1


@pytest.mark.django_db(transaction=True, reset_sequences=True)
@pytest.mark.parametrize("number", [1, 2])
def test_positions(eventsourcing_application: Any, number: int) -> None:
    """Positions begin again where sequences are reset."""
    assert eventsourcing_application.save(Counter())[0].notification.id == 1
