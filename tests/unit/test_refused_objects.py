"""The objects that ``save()`` refuses, and what a receiver of prompts gets, without a database."""

from __future__ import annotations

import gc
import threading
from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import IntegrityError, InterfaceError, Notification
from eventsourcing.system import RecordingEvent, RecordingEventReceiver

from flask_eventsourcing.applications import CommittedReceiver, refuse_stale_aggregates
from flask_eventsourcing.applications.stale import RefusedObjects, lose, refused
from flask_eventsourcing.exceptions import FlaskEventSourcingError, StaleAggregateError
from tests.domain import Account, Bank


class Slim:
    """An aggregate that cannot be referenced weakly."""

    __slots__ = ("id",)

    def __init__(self) -> None:
        self.id = uuid4()


def test_object_is_known_by_its_identity() -> None:
    """An equal object is another one, and an object that dies is forgotten."""
    objects = RefusedObjects()
    account = Account("Ada")
    objects.add(account, StaleAggregateError, "for a reason")
    assert account in objects
    assert deepcopy(account) == account
    assert deepcopy(account) not in objects
    with pytest.raises(StaleAggregateError, match=f"Account {account.id} cannot be saved: for a reason."):
        objects.check(account)
    del account
    gc.collect()
    assert vars(objects)["_found"] == {}


def test_object_that_cannot_be_referenced_weakly_is_known_too() -> None:
    """Objects without weak references are remembered up to a limit, which keeps the last ones."""
    objects = RefusedObjects(held=2)
    slim = [Slim() for _ in range(3)]
    for each in slim:
        objects.add(each, StaleAggregateError, "lost")
    assert [each in objects for each in slim] == [False, True, True]


def test_first_reason_is_told() -> None:
    """An object that is refused again keeps the first reason."""
    account = Account("Ada")
    lose(account, "first")
    lose(account, "second")
    with pytest.raises(FlaskEventSourcingError, match="first"):
        refused.check(account)


def test_application_of_ones_own_refuses_too() -> None:
    """An application on any persistence module refuses what could not be stored, and is closed when it is dropped."""
    bank = Bank()
    refuse_stale_aggregates(bank)
    closing = bank.closing
    account = Account("Ada")
    bank.save(account)
    account.deposit(1)
    stale = deepcopy(account)
    bank.save(account)
    with pytest.raises(IntegrityError):
        bank.save(stale)
    with pytest.raises(StaleAggregateError):
        bank.save(stale)
    account.deposit(1)
    bank.save(account)
    assert bank.balance(account.id) == 2
    del bank
    assert closing.is_set()


class Noted(RecordingEventReceiver[UUID]):
    """Notes what it is told."""

    def __init__(self, expected: int) -> None:
        self.told: list[tuple[int | None, list[int]]] = []
        self.all_told = threading.Event()
        self._expected = expected

    def receive_recording_event(self, new_recording_event: RecordingEvent[UUID]) -> None:
        """Note the previous position and the new ones."""
        positions = [each.notification.id for each in new_recording_event.recordings]
        self.told.append((new_recording_event.previous_max_notification_id, positions))
        if len(self.told) == self._expected:
            self.all_told.set()


class Log:
    """A recorder whose high-water mark is set by hand; a reading fails where there is none."""

    def __init__(self, mark: int | None) -> None:
        self.mark = mark

    def high_water_mark(self) -> int:
        """Return it."""
        if self.mark is None:
            raise InterfaceError
        return self.mark


def saved(*positions: int, previous: int | None = None) -> RecordingEvent[UUID]:
    """Return what a leader tells of a save."""
    recordings: Any = [
        SimpleNamespace(notification=Notification(uuid4(), 1, "", b"", position)) for position in positions
    ]
    return RecordingEvent("School", recordings, previous)


def receiver_of(log: Log, expected: int) -> tuple[CommittedReceiver, Noted]:
    """Return a receiver and what it tells."""
    noted = Noted(expected)
    leader: Any = SimpleNamespace(recorder=log, closing=threading.Event())
    return CommittedReceiver(noted, leader), noted


def test_receiver_is_told_in_the_order_of_the_log() -> None:
    """A prompt that came too early waits for the events before it; a gap has no previous position, and is read."""
    log = Log(2)
    receiver, noted = receiver_of(log, 3)
    receiver.receive_recording_event(saved(1, 2, previous=99))
    receiver.receive_recording_event(saved(5, previous=2))
    receiver.receive_recording_event(saved(3, 4, previous=5))
    assert noted.told == [(None, [1, 2])]
    log.mark = 5
    assert noted.all_told.wait(10)
    assert noted.told == [(None, [1, 2]), (2, [3, 4]), (4, [5])]
    receiver.receive_recording_event(saved(4))
    log.mark = 8
    receiver.receive_recording_event(saved(8, previous=5))
    assert noted.told[3:] == [(None, [8])]


def test_receiver_is_told_later_while_the_log_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    """An outage of the database loses no prompt, and the log says what happened."""
    log = Log(None)
    receiver, noted = receiver_of(log, 1)
    receiver.receive_recording_event(saved(1))
    assert noted.told == []
    assert "prompted later" in caplog.text
    log.mark = 1
    assert noted.all_told.wait(10)
