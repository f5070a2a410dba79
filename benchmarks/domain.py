"""What is stored: the events of accounts, each with about 220 bytes of state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import StoredEvent

LENGTH = 100
"""Events of one account."""


class Account(Aggregate):
    """An account whose events are as large as those of a small business application."""

    @event("Opened")
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.balance = 0
        self.moves = 0

    @event("Moved")
    def move(self, amount: int, currency: str, reference: str, purpose: str) -> None:
        """Add an amount to the balance."""
        self.balance += amount
        self.moves += 1


class Bench(Application[UUID]):
    """The application; every contender stores its events."""


@cache
def states() -> tuple[tuple[str, bytes], ...]:
    """Topic and state of each event of one account."""
    application = Bench(env={"PERSISTENCE_MODULE": "eventsourcing.popo"})
    account = Account("A. N. Owner")
    for number in range(1, LENGTH):
        account.move(12_345 + number, "EUR", f"TRF-2025-{number:08}", "Rent of the flat, second floor, left-hand side")
    stored = [application.mapper.to_stored_event(each) for each in account.collect_events()]
    return tuple((each.topic, each.state) for each in stored)


def new_events(count: int) -> list[StoredEvent]:
    """Make the first *count* events of a new account."""
    originator_id = uuid4()
    return [StoredEvent(originator_id, n, topic, state) for n, (topic, state) in enumerate(states()[:count], start=1)]


def originator(number: int) -> UUID:
    """The id of an account that a table was filled with."""
    return uuid5(NAMESPACE_URL, f"account/{number}")


def rows(count: int) -> Iterator[tuple[UUID, int, str, bytes]]:
    """The rows that every table is filled with before it is measured."""
    for number in range(count // LENGTH):
        originator_id = originator(number)
        for version, (topic, state) in enumerate(states(), start=1):
            yield originator_id, version, topic, state
