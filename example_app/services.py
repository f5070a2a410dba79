"""What a visitor can do: each function is one transaction over events and rows, tried again when another came first.

A conflict (two requests that change one account at the same moment) runs the whole function again, from its first
read, so nothing in here may have an effect outside of the database: no mail, no flash message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from flask import current_app

from example_app.domain import Bank
from example_app.errors import MailUnavailable
from example_app.extensions import db, es
from example_app.models import AccountSummary, Transfer

if TYPE_CHECKING:
    from uuid import UUID

    from example_app.domain import Account


@es.retry_on_conflict(times=5)
def open_account(owner: str, first_deposit: int = 0) -> Account:
    """Open an account."""
    account = es[Bank].open_account(owner, first_deposit)
    _summarise(account)
    return account


@es.retry_on_conflict(times=5)
def deposit(account_id: UUID, amount: int, note: str = "") -> Account:
    """Pay money into an account."""
    account = es[Bank].deposit(account_id, amount, note)
    _summarise(account)
    return account


@es.retry_on_conflict(times=5)
def withdraw(account_id: UUID, amount: int, note: str = "") -> Account:
    """Pay money out of an account."""
    account = es[Bank].withdraw(account_id, amount, note)
    _summarise(account)
    return account


@es.retry_on_conflict(times=5)
def transfer(sender_id: UUID, recipient_id: UUID, amount: int, note: str = "") -> UUID:
    """Move money between two accounts and return the transfer's id: two aggregates and three rows, all or nothing."""
    transfer_id = uuid4()
    sender, recipient = es[Bank].transfer(sender_id, recipient_id, amount, transfer_id, note)
    _summarise(sender)
    _summarise(recipient)
    db.session.add(
        Transfer(
            id=transfer_id,
            sender_id=sender_id,
            recipient_id=recipient_id,
            amount=amount,
            note=note.strip(),
            created_at=sender.modified_on,
        )
    )
    return transfer_id


@es.retry_on_conflict(times=5)
def close_account(account_id: UUID) -> Account:
    """Close an empty account."""
    account = es[Bank].close_account(account_id)
    _summarise(account)
    return account


@es.transactional
def request_statement_mail(account_id: UUID, recipient: str, month: str) -> str:
    """Have the statement of a month mailed by a worker, and return the number of the task."""
    es[Bank].get_account(account_id)
    arguments = (str(account_id), recipient, month)
    # Either is installed only where it is used.
    match current_app.config["STATEMENT_QUEUE"]:
        case "celery":
            from example_app.tasks_celery import mail_statement
            from flask_eventsourcing.workers.celery import send_after_commit

            return str(send_after_commit(mail_statement, *arguments).id)
        case "rq":
            from redis import Redis
            from rq import Queue, Retry

            from example_app import tasks_rq
            from flask_eventsourcing.workers.rq import enqueue_after_commit

            queue = Queue(tasks_rq.QUEUE, connection=Redis.from_url(current_app.config["REDIS_URL"]))
            return enqueue_after_commit(queue, tasks_rq.mail_statement, *arguments, retry=Retry(max=3))
        case _:
            raise MailUnavailable


def _summarise(account: Account) -> None:
    db.session.merge(
        AccountSummary(
            id=account.id,
            owner=account.owner,
            balance=account.balance,
            version=account.version,
            closed=account.closed,
            opened_at=account.created_on,
            changed_at=account.modified_on,
        )
    )
