"""The bank itself: an aggregate, its events, its rules and the application that keeps them. No Flask in here.

Every amount in this module is a whole number of cents.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

from eventsourcing.application import AggregateNotFoundError, Application
from eventsourcing.domain import Aggregate, datetime_now_with_tzinfo, event

from example_app.errors import (
    AccountClosed,
    AccountNotEmpty,
    AccountNotFound,
    InsufficientFunds,
    InvalidAmount,
    InvalidText,
    SameAccount,
    VersionNotFound,
)
from example_app.money import money_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from eventsourcing.domain import DomainEventProtocol

LARGEST_AMOUNT = 100_000_000_000
LONGEST_TEXT = 80


def checked_amount(amount: int) -> int:
    """Return the amount if it can be booked, raise InvalidAmount if not."""
    if isinstance(amount, bool) or not isinstance(amount, int):
        raise InvalidAmount("An amount is a whole number of cents.")
    if not 0 < amount <= LARGEST_AMOUNT:
        raise InvalidAmount(f"An amount lies between {money_text(1)} and {money_text(LARGEST_AMOUNT)}.")
    return amount


def checked_text(text: str, what: str, *, required: bool = False) -> str:
    """Return the text without surrounding spaces if it can be stored and shown, raise InvalidText if not."""
    text = text.strip()
    if required and not text:
        raise InvalidText(f"{what} is missing.")
    if len(text) > LONGEST_TEXT or not text.isprintable():
        raise InvalidText(f"{what} is one line of at most {LONGEST_TEXT} characters.")
    return text


_time: ContextVar[datetime | None] = ContextVar("time", default=None)


@contextmanager
def happening_at(time: datetime) -> Iterator[None]:
    """Let what is done within have happened at another time than now; it must have a time zone."""
    token = _time.set(time)
    try:
        yield
    finally:
        _time.reset(token)


class Dated:
    """An event that gets its time from ``happening_at()``, or from the clock."""

    @staticmethod
    def create_timestamp() -> datetime:
        """Return the time of a new event."""
        return _time.get() or datetime_now_with_tzinfo()


class Account(Aggregate):
    """One account: commands check the rules and trigger events, events change the state and check nothing.

    Rules change over the years, the past does not: an event that was right when it happened is applied for ever.
    """

    class Opened(Dated, Aggregate.Created):
        """The account was opened."""

        owner: str

    class Deposited(Dated, Aggregate.Event):
        """Money was paid in."""

        amount: int
        note: str

        def apply(self, aggregate: Account) -> None:
            """Add the amount."""
            aggregate.balance += self.amount

    class Withdrawn(Dated, Aggregate.Event):
        """Money was paid out."""

        amount: int
        note: str

        def apply(self, aggregate: Account) -> None:
            """Take the amount off."""
            aggregate.balance -= self.amount

    class TransferSent(Dated, Aggregate.Event):
        """Money went to another account."""

        amount: int
        note: str
        transfer_id: UUID
        recipient_id: UUID

        def apply(self, aggregate: Account) -> None:
            """Take the amount off."""
            aggregate.balance -= self.amount

    class TransferReceived(Dated, Aggregate.Event):
        """Money came from another account."""

        amount: int
        note: str
        transfer_id: UUID
        sender_id: UUID

        def apply(self, aggregate: Account) -> None:
            """Add the amount."""
            aggregate.balance += self.amount

    class Closed(Dated, Aggregate.Event):
        """The account was closed."""

        def apply(self, aggregate: Account) -> None:
            """Take no more entries."""
            aggregate.closed = True

    @event(Opened)
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.balance = 0
        self.closed = False

    @classmethod
    def open(cls, owner: str) -> Account:
        """Open an empty account."""
        return cls(owner=checked_text(owner, "The owner's name", required=True))

    def deposit(self, amount: int, note: str = "") -> None:
        """Pay money in."""
        self._check_open()
        self.trigger_event(self.Deposited, amount=checked_amount(amount), note=checked_text(note, "The note"))

    def withdraw(self, amount: int, note: str = "") -> None:
        """Pay money out, as far as the account holds any."""
        self._check_covers(amount)
        self.trigger_event(self.Withdrawn, amount=amount, note=checked_text(note, "The note"))

    def send(self, amount: int, recipient: Account, transfer_id: UUID, note: str = "") -> None:
        """Transfer money to another account."""
        if recipient.id == self.id:
            raise SameAccount
        self._check_covers(amount)
        recipient._check_open()
        note = checked_text(note, "The note")
        self.trigger_event(
            self.TransferSent, amount=amount, note=note, transfer_id=transfer_id, recipient_id=recipient.id
        )
        recipient.trigger_event(
            self.TransferReceived, amount=amount, note=note, transfer_id=transfer_id, sender_id=self.id
        )

    def close(self) -> None:
        """Close the account, which must be empty."""
        self._check_open()
        if self.balance:
            raise AccountNotEmpty(self.balance)
        self.trigger_event(self.Closed)

    def _check_open(self) -> None:
        if self.closed:
            raise AccountClosed(self.owner)

    def _check_covers(self, amount: int) -> None:
        self._check_open()
        if checked_amount(amount) > self.balance:
            raise InsufficientFunds(self.balance, amount)


@dataclass(frozen=True)
class Entry:
    """One line of a statement."""

    version: int
    kind: str
    recorded_at: datetime
    amount: int = 0
    note: str = ""
    transfer_id: UUID | None = None
    counterparty_id: UUID | None = None
    balance: int = 0


@dataclass(frozen=True)
class Statement:
    """What an account's history said at one of its versions, with some of its entries or all of them."""

    account_id: UUID
    owner: str
    version: int
    latest_version: int
    changed_at: datetime
    balance: int
    closed: bool
    entries: tuple[Entry, ...]


class Bank(Application[UUID]):
    """Every account there is."""

    snapshotting_intervals: ClassVar[dict[type[Any], int]] = {Account: 100}

    def open_account(self, owner: str, first_deposit: int = 0) -> Account:
        """Open an account, with money in it from the start or none."""
        account = Account.open(owner)
        if first_deposit:
            account.deposit(first_deposit, "First deposit")
        self.save(account)
        return account

    def deposit(self, account_id: UUID, amount: int, note: str = "") -> Account:
        """Pay money in."""
        account = self.get_account(account_id)
        account.deposit(amount, note)
        self.save(account)
        return account

    def withdraw(self, account_id: UUID, amount: int, note: str = "") -> Account:
        """Pay money out."""
        account = self.get_account(account_id)
        account.withdraw(amount, note)
        self.save(account)
        return account

    def transfer(
        self, sender_id: UUID, recipient_id: UUID, amount: int, transfer_id: UUID, note: str = ""
    ) -> tuple[Account, Account]:
        """Move money between two accounts: the events of both are stored together or not at all."""
        # Read and stored in one order, so that a transfer and its opposite never wait for each other in a ring.
        accounts = {account_id: self.get_account(account_id) for account_id in sorted({sender_id, recipient_id})}
        sender, recipient = accounts[sender_id], accounts[recipient_id]
        sender.send(amount, recipient, transfer_id, note)
        self.save(*accounts.values())
        return sender, recipient

    def close_account(self, account_id: UUID) -> Account:
        """Close an empty account."""
        account = self.get_account(account_id)
        account.close()
        self.save(account)
        return account

    def get_account(self, account_id: UUID) -> Account:
        """Return the account as it is now."""
        try:
            account: Account = self.repository.get(account_id)
        except AggregateNotFoundError:
            raise AccountNotFound(account_id) from None
        return account

    def statement(self, account_id: UUID, version: int | None = None) -> Statement:
        """Return the account as of a version, the latest unless told otherwise, with all entries up to then."""
        summary = self.summary(account_id, version)
        return replace(summary, entries=self.entries(account_id, 1, summary.version))

    def summary(self, account_id: UUID, version: int | None = None) -> Statement:
        """Return the statement as of a version without its entries."""
        last = next(iter(self.events.get(account_id, desc=True, limit=1)), None)
        if last is None:
            raise AccountNotFound(account_id)
        latest = last.originator_version
        if version is None:
            version = latest
        if not 1 <= version <= latest:
            raise VersionNotFound(version, latest)
        account: Account = self.repository.get(account_id, version=version)
        changed_at = account.modified_on
        return Statement(account_id, account.owner, version, latest, changed_at, account.balance, account.closed, ())

    def entries(self, account_id: UUID, first: int, last: int) -> tuple[Entry, ...]:
        """Return the entries of an account from one version to another, each with the balance after it."""
        balance = 0
        if first > 1:
            before: Account = self.repository.get(account_id, version=first - 1)
            balance = before.balance
        return tuple(_entries(self.events.get(account_id, gt=first - 1, lte=last), balance))


def _entries(events: Iterable[DomainEventProtocol[UUID]], balance: int) -> Iterator[Entry]:
    for happened in events:
        entry = _entry(happened)
        balance += entry.amount
        yield replace(entry, balance=balance)


def _entry(happened: DomainEventProtocol[UUID]) -> Entry:
    """Return the statement's line for an event; its balance is filled in by what comes before it."""
    match happened:
        case Account.Opened():
            return Entry(happened.originator_version, "opened", happened.timestamp)
        case Account.Closed():
            return Entry(happened.originator_version, "closed", happened.timestamp)
        case Account.Deposited(amount=amount, note=note):
            return Entry(happened.originator_version, "deposit", happened.timestamp, amount, note)
        case Account.Withdrawn(amount=amount, note=note):
            return Entry(happened.originator_version, "withdrawal", happened.timestamp, -amount, note)
        case Account.TransferSent(amount=amount, note=note, transfer_id=transfer_id, recipient_id=other_id):
            version, time = happened.originator_version, happened.timestamp
            return Entry(version, "transfer_sent", time, -amount, note, transfer_id, other_id)
        case Account.TransferReceived(amount=amount, note=note, transfer_id=transfer_id, sender_id=other_id):
            version, time = happened.originator_version, happened.timestamp
            return Entry(version, "transfer_received", time, amount, note, transfer_id, other_id)
        case _:
            raise TypeError(f"A statement has no line for {type(happened).__qualname__}; add one in _entry().")
