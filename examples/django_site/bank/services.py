"""What the bank does for a request: each function is one transaction, which is tried again after a conflict.

An error of the bank's leaves the transaction, and so rolls it back; a view answers it then. Django does not roll back
for an answer of 4xx.
"""

from __future__ import annotations

from uuid import UUID, uuid4

from example_app.domain import Account, Bank
from examples.django_site.bank.models import Transfer
from flask_eventsourcing.contrib.django import get_application, retry_on_conflict


@retry_on_conflict
def open_account(owner: str, first_deposit: int = 0) -> Account:
    """Open an account."""
    return get_application(Bank).open_account(owner, first_deposit)


@retry_on_conflict
def deposit(account_id: UUID, amount: int, note: str = "") -> Account:
    """Pay money in."""
    return get_application(Bank).deposit(account_id, amount, note)


@retry_on_conflict
def withdraw(account_id: UUID, amount: int, note: str = "") -> Account:
    """Pay money out."""
    return get_application(Bank).withdraw(account_id, amount, note)


@retry_on_conflict
def transfer(sender_id: UUID, recipient_id: UUID, amount: int, note: str = "") -> Account:
    """Move money between two accounts: two aggregates and a row, all or nothing."""
    transfer_id = uuid4()
    sender, recipient = get_application(Bank).transfer(sender_id, recipient_id, amount, transfer_id, note)
    Transfer.objects.create(
        id=transfer_id,
        sender_id=sender_id,
        recipient_id=recipient_id,
        amount=amount,
        note=note.strip(),
        created_at=sender.modified_on,
    )
    return recipient


@retry_on_conflict
def close_account(account_id: UUID) -> Account:
    """Close an empty account."""
    return get_application(Bank).close_account(account_id)
