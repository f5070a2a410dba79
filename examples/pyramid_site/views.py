"""What a client can do. Each request is one transaction, which pyramid_tm commits and pyramid_retry tries again."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from pyramid.httpexceptions import HTTPBadRequest, HTTPNotFound
from pyramid.view import exception_view_config, view_config

from example_app.domain import Account, Bank
from example_app.errors import AccountNotFound, BankError
from example_app.money import decimal_text, parse_amount
from examples.pyramid_site.models import Balance, Transfer


@view_config(route_name="home", renderer="json")
def home(request: Any) -> dict[str, Any]:
    """Tell what there is."""
    return {"accounts": request.route_url("accounts"), "transfers": request.route_url("transfers")}


@view_config(route_name="accounts", request_method="GET", renderer="json")
def list_accounts(request: Any) -> dict[str, Any]:
    """List what each account holds, as far as the projection is."""
    rows = request.dbsession.scalars(sa.select(Balance).order_by(Balance.owner, Balance.account_id))
    return {"accounts": [{"id": str(r.account_id), "owner": r.owner, "balance": decimal_text(r.amount)} for r in rows]}


@view_config(route_name="accounts", request_method="POST", renderer="json")
def open_account(request: Any) -> dict[str, Any]:
    """Open an account."""
    first = _amount(request) if request.POST.get("amount") else 0
    return _shown(request.eventsourcing[Bank].open_account(request.POST.get("owner", ""), first))


@view_config(route_name="account", request_method="GET", renderer="json")
def show_account(request: Any) -> dict[str, Any]:
    """Show an account with its entries, from its own events."""
    statement = request.eventsourcing[Bank].statement(_id(request.matchdict["id"]))
    entries = [
        {"version": e.version, "kind": e.kind, "amount": decimal_text(e.amount), "balance": decimal_text(e.balance)}
        for e in statement.entries
    ]
    return {"owner": statement.owner, "balance": decimal_text(statement.balance), "entries": entries}


@view_config(route_name="deposits", request_method="POST", renderer="json")
def deposit(request: Any) -> dict[str, Any]:
    """Pay money in."""
    bank = request.eventsourcing[Bank]
    return _shown(bank.deposit(_id(request.matchdict["id"]), _amount(request), request.POST.get("note", "")))


@view_config(route_name="withdrawals", request_method="POST", renderer="json")
def withdraw(request: Any) -> dict[str, Any]:
    """Pay money out."""
    bank = request.eventsourcing[Bank]
    return _shown(bank.withdraw(_id(request.matchdict["id"]), _amount(request), request.POST.get("note", "")))


@view_config(route_name="transfers", request_method="POST", renderer="json")
def transfer(request: Any) -> dict[str, Any]:
    """Move money between two accounts: two aggregates and a row, all or nothing."""
    posted = request.POST
    sender_id, recipient_id = _id(posted.get("sender", "")), _id(posted.get("recipient", ""))
    amount, note, transfer_id = _amount(request), posted.get("note", ""), uuid4()
    sender, _ = request.eventsourcing[Bank].transfer(sender_id, recipient_id, amount, transfer_id, note)
    accounts = {"sender_id": sender_id, "recipient_id": recipient_id}
    row = Transfer(id=transfer_id, amount=amount, note=note.strip(), created_at=sender.modified_on, **accounts)
    request.dbsession.add(row)
    return {"id": str(transfer_id)}


@exception_view_config(AccountNotFound, renderer="json")
def not_found(error: AccountNotFound, request: Any) -> dict[str, str]:
    """Say that there is no such account."""
    request.response.status_code = 404
    return {"title": error.title, "detail": str(error)}


@exception_view_config(BankError, renderer="json")
def refused(error: BankError, request: Any) -> dict[str, str]:
    """Say why the bank refuses: a 4xx, for which the commit veto aborts."""
    request.response.status_code = 409
    return {"title": error.title, "detail": str(error)}


def _shown(account: Account) -> dict[str, Any]:
    return {"id": str(account.id), "owner": account.owner, "balance": decimal_text(account.balance)}


def _id(given: str) -> UUID:
    try:
        return UUID(given)
    except ValueError:
        raise HTTPNotFound("There is no such account.") from None


def _amount(request: Any) -> int:
    try:
        return parse_amount(request.POST.get("amount", ""))
    except ValueError as error:
        raise HTTPBadRequest(str(error)) from None
