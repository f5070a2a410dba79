"""What a client can do. A save is stored when it returns: there is no transaction around a request."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from flask import Blueprint, abort, request

from example_app.domain import Account, Bank
from example_app.errors import AccountNotFound, BankError
from example_app.money import decimal_text, parse_amount
from examples.cassandra_bank.lists import Balance, Transfer, db, es

bank = Blueprint("bank", __name__)


@bank.get("/accounts")
def list_accounts() -> dict[str, Any]:
    """List what each account holds, as far as the projection is."""
    rows = db.session.scalars(sa.select(Balance).where(~Balance.closed).order_by(Balance.owner, Balance.account_id))
    return {"accounts": [{"id": str(r.account_id), "owner": r.owner, "balance": decimal_text(r.amount)} for r in rows]}


@bank.get("/transfers")
def list_transfers() -> dict[str, Any]:
    """List the latest transfers, as far as the projection is."""
    rows = db.session.scalars(sa.select(Transfer).order_by(Transfer.sent_at.desc(), Transfer.id).limit(100))
    return {
        "transfers": [
            {
                "id": str(r.id),
                "sender": str(r.sender_id),
                "recipient": str(r.recipient_id),
                "amount": decimal_text(r.amount),
            }
            for r in rows
        ]
    }


@bank.post("/accounts")
def open_account() -> tuple[dict[str, Any], int]:
    """Open an account."""
    first = _amount() if request.form.get("amount") else 0
    return _shown(es[Bank].open_account(request.form.get("owner", ""), first)), 201


@bank.get("/accounts/<uuid:account_id>")
def show_account(account_id: UUID) -> dict[str, Any]:
    """Show an account with its entries, from its own events: what was saved is there at once."""
    statement = es[Bank].statement(account_id)
    entries = [
        {"version": e.version, "kind": e.kind, "amount": decimal_text(e.amount), "balance": decimal_text(e.balance)}
        for e in statement.entries
    ]
    return {"owner": statement.owner, "balance": decimal_text(statement.balance), "entries": entries}


@bank.post("/accounts/<uuid:account_id>/deposits")
@es.retry_on_conflict(times=5)
def deposit(account_id: UUID) -> dict[str, Any]:
    """Pay money in; again, when another request has changed the account meanwhile."""
    return _shown(es[Bank].deposit(account_id, _amount(), request.form.get("note", "")))


@bank.post("/accounts/<uuid:account_id>/withdrawals")
@es.retry_on_conflict(times=5)
def withdraw(account_id: UUID) -> dict[str, Any]:
    """Pay money out."""
    return _shown(es[Bank].withdraw(account_id, _amount(), request.form.get("note", "")))


@bank.post("/transfers")
@es.retry_on_conflict(times=5)
def transfer() -> tuple[dict[str, Any], int]:
    """Move money between two accounts: one save, so that the events of both are stored, or none."""
    transfer_id = uuid4()
    es[Bank].transfer(_id("sender"), _id("recipient"), _amount(), transfer_id, request.form.get("note", ""))
    return {"id": str(transfer_id)}, 201


@bank.errorhandler(AccountNotFound)
def not_found(error: AccountNotFound) -> tuple[dict[str, str], int]:
    """Say that there is no such account."""
    return {"title": error.title, "detail": str(error)}, 404


@bank.errorhandler(BankError)
def refused(error: BankError) -> tuple[dict[str, str], int]:
    """Say why the bank refuses."""
    return {"title": error.title, "detail": str(error)}, 409


def _shown(account: Account) -> dict[str, Any]:
    return {"id": str(account.id), "owner": account.owner, "balance": decimal_text(account.balance)}


def _id(name: str) -> UUID:
    try:
        return UUID(request.form.get(name, ""))
    except ValueError:
        abort(400, f"The number of the {name} is missing.")


def _amount() -> int:
    try:
        return parse_amount(request.form.get("amount", ""))
    except ValueError as error:
        abort(400, str(error))
