"""A bank and a shop that follows it: the same with the library's version 9.4, with which the dump was made."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, EventSourcingError, event
from eventsourcing.system import ProcessApplication


class Account(Aggregate):
    """An account."""

    @event("Opened")
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.balance = Decimal(0)

    @staticmethod
    def create_id(owner: str) -> UUID:
        """Return the id of an owner's account."""
        return uuid5(NAMESPACE_URL, f"/accounts/{owner}")

    @event("Deposited")
    def deposit(self, amount: Decimal) -> None:
        """Pay in."""
        self.balance += amount


class Bank(Application[UUID]):
    """The leader."""

    is_snapshotting_enabled = True
    snapshotting_intervals = {Account: 3}  # noqa: RUF012

    def open_account(self, owner: str) -> None:
        """Open an account."""
        self.save(Account(owner))

    def deposit(self, owner: str, amount: str) -> None:
        """Pay in."""
        account: Any = self.repository.get(Account.create_id(owner))
        account.deposit(Decimal(amount))
        self.save(account)

    def balance(self, owner: str) -> Decimal:
        """Return what is in an account."""
        account: Any = self.repository.get(Account.create_id(owner))
        found: Decimal = account.balance
        return found


class Voucher(Aggregate):
    """What a shop gives to a new customer of the bank."""

    @event("Given")
    def __init__(self, owner: str) -> None:
        self.owner = owner

    @staticmethod
    def create_id(owner: str) -> UUID:
        """Return the id of an owner's voucher."""
        return uuid5(NAMESPACE_URL, f"/vouchers/{owner}")


class Shop(ProcessApplication[UUID]):
    """The follower."""

    def policy(self, domain_event: Any, processing_event: Any) -> None:
        """Give a voucher for every new account, but for one whose owner is too much for the shop."""
        if isinstance(domain_event, Account.Opened):  # type: ignore[attr-defined]
            if domain_event.owner == "Mallory":
                raise EventSourcingError("Not for Mallory.")
            processing_event.collect_events(Voucher(domain_event.owner))

    def has_voucher(self, owner: str) -> bool:
        """Whether somebody has a voucher."""
        return Voucher.create_id(owner) in self.repository
