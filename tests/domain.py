"""A small bank, with no framework in it, for the tests; threads, and waiting for what they do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from eventsourcing.application import AggregateNotFoundError, Application
from eventsourcing.domain import Aggregate, BaseAggregate, CanInitAggregate, CanMutateAggregate, event

PATIENCE = 30.0
"""Seconds to wait for what takes a moment."""


class Account(Aggregate):
    """An account of the bank."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.balance = 0

    @event("Deposited")
    def deposit(self, amount: int) -> None:
        """Pay in."""
        self.balance += amount


class Bank(Application[UUID]):
    """The application of most tests."""

    def open_account(self, owner: str = "Ada") -> UUID:
        """Open an account and return its id."""
        account = Account(owner)
        self.save(account)
        return account.id

    def account(self, account_id: Any) -> Account:
        """Read an account."""
        account: Account = self.repository.get(account_id)
        return account

    def deposit(self, account_id: Any, amount: int = 1) -> None:
        """Read an account, pay in and save it."""
        account = self.account(account_id)
        account.deposit(amount)
        self.save(account)

    def balance(self, account_id: UUID) -> int | None:
        """Return what is in an account, or None if there is no such account."""
        try:
            return self.account(account_id).balance
        except AggregateNotFoundError:
            return None


class Member(BaseAggregate[str]):
    """An aggregate whose id is a text, its name."""

    @dataclass(frozen=True)
    class Event(CanMutateAggregate[str]):
        """The base class of its events."""

        originator_id: str
        originator_version: int
        timestamp: datetime

    @dataclass(frozen=True)
    class Joined(Event, CanInitAggregate[str]):
        """Its first event."""

        originator_topic: str
        name: str

    @staticmethod
    def create_id(name: str) -> str:
        """Make the id of the name."""
        return name

    def __init__(self, name: str) -> None:
        self.name = name
        self.visits = 0

    @event("Visited")
    def visit(self) -> None:
        """Count a visit."""
        self.visits += 1


class Branch(Bank):
    """A bank that takes a snapshot at every second version."""

    name = "Bank"
    is_snapshotting_enabled = True
    snapshotting_intervals: ClassVar[dict[type[Any], int]] = {Account: 2}


class Shop(Bank):
    """A second application, with tables of its own."""


def conflict_with(bank: Bank, account_id: UUID) -> Callable[[], None]:
    """Read an account now, and return what saves a change of that state later."""
    stale = bank.account(account_id)
    stale.deposit(1000)
    return lambda: _save(bank, stale)


def _save(bank: Bank, account: Account) -> None:
    bank.save(account)


def in_thread(function: Callable[[], Any]) -> None:
    """Run a function in a thread of its own, without this thread's application context, and pass on its error."""
    in_threads([function])


def in_threads(functions: Sequence[Callable[[], Any]], patience: float = 60) -> None:
    """Run functions in threads that start together, and pass on the first error."""
    start = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            start.wait(patience)
            function()
        except BaseException as error:  # noqa: BLE001  # raised in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread does not end"


def until(condition: Callable[[], Any], what: str = "it", patience: float = PATIENCE) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not happened in {patience:g} s"
        time.sleep(0.01)
