"""The bank without Flask and without a database: the library keeps the events in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from example_app.domain import LARGEST_AMOUNT, Account, Bank
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOBODY = UUID(int=1)


@pytest.fixture
def bank() -> Iterator[Bank]:
    """A bank in memory."""
    with Bank(env={"PERSISTENCE_MODULE": "eventsourcing.popo"}) as bank:
        yield bank


def test_an_account_is_opened_empty(bank: Bank) -> None:
    """A new account belongs to its owner, is open and holds nothing."""
    account = bank.get_account(bank.open_account("  Ada Lovelace ").id)
    assert (account.owner, account.balance, account.closed, account.version) == ("Ada Lovelace", 0, False, 1)


@pytest.mark.parametrize("owner", ["", "   ", "x" * 81, "Ada\nBen", "\x00", "\ud800"])
def test_an_owner_needs_a_proper_name(bank: Bank, owner: str) -> None:
    """A name that is empty, too long or not printable opens no account."""
    with pytest.raises(InvalidText):
        bank.open_account(owner)
    assert bank.recorder.max_notification_id() is None


def test_money_goes_in_and_out(bank: Bank) -> None:
    """The balance is what was paid in less what was paid out."""
    account_id = bank.open_account("Ada", 1000).id
    bank.deposit(account_id, 550, "salary")
    bank.withdraw(account_id, 50)
    assert bank.get_account(account_id).balance == 1500


def test_an_account_may_be_emptied_but_not_overdrawn(bank: Bank) -> None:
    """The last cent can be paid out, one more cannot, and the refusal stores nothing."""
    account_id = bank.open_account("Ada", 1000).id
    with pytest.raises(InsufficientFunds, match=r"holds €10\.00, and €10\.01 was asked for"):
        bank.withdraw(account_id, 1001)
    assert bank.get_account(account_id).version == 2
    assert bank.withdraw(account_id, 1000).balance == 0


@pytest.mark.parametrize("amount", [0, -1, LARGEST_AMOUNT + 1, True, 1.5])
def test_only_proper_amounts_are_booked(bank: Bank, amount: int) -> None:
    """Nothing, less than nothing, too much, and what is no whole number of cents is refused by every command."""
    account_id, other_id = bank.open_account("Ada", 1000).id, bank.open_account("Ben").id
    commands: tuple[Callable[[], object], ...] = (
        lambda: bank.deposit(account_id, amount),
        lambda: bank.withdraw(account_id, amount),
        lambda: bank.transfer(account_id, other_id, amount, uuid4()),
    )
    for command in commands:
        with pytest.raises(InvalidAmount):
            command()
    assert bank.get_account(account_id).version == 2


def test_a_transfer_changes_both_accounts(bank: Bank) -> None:
    """What one account loses the other gains, under one transfer number."""
    ada, ben, transfer_id = bank.open_account("Ada", 1000), bank.open_account("Ben"), uuid4()
    bank.transfer(ada.id, ben.id, 400, transfer_id, "lunch")
    sent, received = bank.statement(ada.id).entries[-1], bank.statement(ben.id).entries[-1]
    assert (sent.kind, sent.amount, sent.balance, sent.counterparty_id) == ("transfer_sent", -400, 600, ben.id)
    assert (received.kind, received.amount, received.balance) == ("transfer_received", 400, 400)
    assert received.counterparty_id == ada.id
    assert sent.transfer_id == received.transfer_id == transfer_id
    assert sent.note == received.note == "lunch"


def test_a_refused_transfer_changes_neither_account(bank: Bank) -> None:
    """Too little money, the same account twice, an unknown or a closed recipient: both accounts stay as they were."""
    ada, ben, gone = bank.open_account("Ada", 1000), bank.open_account("Ben"), bank.open_account("Gone")
    bank.close_account(gone.id)
    for recipient_id, amount, error in (
        (ben.id, 1001, InsufficientFunds),
        (ada.id, 1, SameAccount),
        (NOBODY, 1, AccountNotFound),
        (gone.id, 1, AccountClosed),
    ):
        with pytest.raises(error):
            bank.transfer(ada.id, recipient_id, amount, uuid4())
    assert [bank.get_account(account.id).version for account in (ada, ben, gone)] == [2, 1, 2]


def test_only_an_empty_account_is_closed(bank: Bank) -> None:
    """Money in the account keeps it open; an empty one is closed for good."""
    account_id = bank.open_account("Ada", 1).id
    with pytest.raises(AccountNotEmpty, match=r"€0\.01"):
        bank.close_account(account_id)
    bank.withdraw(account_id, 1)
    assert bank.close_account(account_id).closed
    commands: tuple[Callable[[], object], ...] = (
        lambda: bank.deposit(account_id, 1),
        lambda: bank.withdraw(account_id, 1),
        lambda: bank.close_account(account_id),
    )
    for command in commands:
        with pytest.raises(AccountClosed):
            command()


def test_a_statement_tells_any_version_of_the_past(bank: Bank) -> None:
    """A statement as of a version has the entries, the balance and the state that the account had then."""
    account_id = bank.open_account("Ada", 1000).id
    bank.withdraw(account_id, 1000, "cash")
    bank.close_account(account_id)
    found = [bank.statement(account_id, version) for version in (1, 2, 3, 4)]
    assert [statement.balance for statement in found] == [0, 1000, 0, 0]
    assert [statement.closed for statement in found] == [False, False, False, True]
    assert [len(statement.entries) for statement in found] == [1, 2, 3, 4]
    assert {statement.latest_version for statement in found} == {4}
    assert found[-1] == bank.statement(account_id)
    assert [entry.kind for entry in found[-1].entries] == ["opened", "deposit", "withdrawal", "closed"]


@pytest.mark.parametrize("version", [0, -1, 3])
def test_a_version_that_never_was_has_no_statement(bank: Bank, version: int) -> None:
    """Asking for a version that the account has not had says which versions there are."""
    account_id = bank.open_account("Ada", 1000).id
    with pytest.raises(VersionNotFound, match="versions 1 to 2"):
        bank.statement(account_id, version)


def test_an_unknown_account_has_no_statement(bank: Bank) -> None:
    """An account that never was is an error of its own, not an empty statement."""
    with pytest.raises(AccountNotFound):
        bank.statement(NOBODY)
    with pytest.raises(AccountNotFound):
        bank.get_account(NOBODY)


def test_long_histories_are_read_from_snapshots(bank: Bank) -> None:
    """Every hundredth version is kept as a snapshot, and the statements do not change by that."""
    account_id = bank.open_account("Ada").id
    for _ in range(205):
        bank.deposit(account_id, 1)
    assert bank.snapshots is not None
    assert [snapshot.originator_version for snapshot in bank.snapshots.get(account_id)] == [100, 200]
    account = bank.get_account(account_id)
    assert (account.balance, account.version, account.owner) == (205, 206, "Ada")
    assert isinstance(account, Account)
    assert bank.statement(account_id, 150).entries[-1].balance == 149
