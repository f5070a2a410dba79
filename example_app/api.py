"""The JSON API. Amounts are decimal text in both directions; errors are problem details.

It takes no cookies into account and reads only ``application/json``, so a page of another site cannot use it in a
visitor's name, and it needs no token against that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from flask import Blueprint, abort, request, url_for

from example_app import inputs, queries, services
from example_app.domain import Account, Bank, Entry
from example_app.extensions import db, es
from example_app.models import AccountSummary, Transfer
from example_app.money import CURRENCY, decimal_text

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

api = Blueprint("api", __name__, url_prefix="/api")


@api.get("/accounts")
def list_accounts() -> ResponseReturnValue:
    """List the accounts, ``?page=1&per_page=20&search=ada``."""
    found = queries.accounts()
    return {
        "accounts": [_summary_json(summary) for summary in found.items],
        "page": found.page,
        "pages": found.pages,
        "total": found.total,
    }


@api.post("/accounts")
def open_account() -> ResponseReturnValue:
    """Open an account: ``{"owner": "Ada", "first_deposit": "10.00"}``."""
    body = inputs.json_object()
    owner = inputs.text(body.get("owner"), "The owner's name")
    account = services.open_account(owner, inputs.optional_amount(body.get("first_deposit")))
    return _created(_account_json(account), url_for("api.get_account", account_id=account.id))


@api.get("/accounts/<uuid:account_id>")
def get_account(account_id: UUID) -> ResponseReturnValue:
    """Return an account as it is now."""
    return _account_json(es[Bank].get_account(account_id))


@api.post("/accounts/<uuid:account_id>/deposits")
def deposit(account_id: UUID) -> ResponseReturnValue:
    """Pay money in: ``{"amount": "12.50", "note": "pocket money"}``."""
    body = inputs.json_object()
    note = inputs.text(body.get("note"), "The note")
    account = services.deposit(account_id, inputs.amount(body.get("amount")), note)
    return _created(_account_json(account), _statement_url(account))


@api.post("/accounts/<uuid:account_id>/withdrawals")
def withdraw(account_id: UUID) -> ResponseReturnValue:
    """Pay money out: ``{"amount": "12.50", "note": "cash"}``."""
    body = inputs.json_object()
    note = inputs.text(body.get("note"), "The note")
    account = services.withdraw(account_id, inputs.amount(body.get("amount")), note)
    return _created(_account_json(account), _statement_url(account))


@api.delete("/accounts/<uuid:account_id>")
def close_account(account_id: UUID) -> ResponseReturnValue:
    """Close an empty account; its history stays readable."""
    services.close_account(account_id)
    return "", 204


@api.get("/accounts/<uuid:account_id>/statement")
def statement(account_id: UUID) -> ResponseReturnValue:
    """Return the account as of a version or as of now with a page of its entries, ``?version=3&page=1&per_page=20``."""
    try:
        version = int(request.args["version"]) if "version" in request.args else None
    except ValueError:
        abort(422, "A version is a whole number.")
    found = es[Bank].summary(account_id, version)
    entries = queries.entries(found)
    return {
        "account_id": str(found.account_id),
        "owner": found.owner,
        "version": found.version,
        "latest_version": found.latest_version,
        "balance": decimal_text(found.balance),
        "currency": CURRENCY,
        "closed": found.closed,
        "entries": [_entry_json(entry) for entry in entries.items],
        "page": entries.page,
        "pages": entries.pages,
        "total": entries.total,
    }


@api.post("/accounts/<uuid:account_id>/statement-mail")
def mail_statement(account_id: UUID) -> ResponseReturnValue:
    """Have a month's statement mailed: ``{"recipient": "ada@example.com", "month": "2026-11"}``."""
    body = inputs.json_object()
    recipient, month = inputs.address(body.get("recipient")), inputs.month(body.get("month"))
    task_id = services.request_statement_mail(account_id, recipient, month)
    return {"task_id": task_id, "recipient": recipient, "month": month}, 202


@api.post("/transfers")
def transfer() -> ResponseReturnValue:
    """Move money: ``{"sender_id": …, "recipient_id": …, "amount": "12.50", "note": "rent"}``."""
    body = inputs.json_object()
    transfer_id = services.transfer(
        inputs.account_number(body.get("sender_id")),
        inputs.account_number(body.get("recipient_id")),
        inputs.amount(body.get("amount")),
        inputs.text(body.get("note"), "The note"),
    )
    found = db.session.get_one(Transfer, transfer_id)
    return _created(_transfer_json(found), url_for("api.get_transfer", transfer_id=transfer_id))


@api.get("/transfers/<uuid:transfer_id>")
def get_transfer(transfer_id: UUID) -> ResponseReturnValue:
    """Return one transfer."""
    found = db.session.get(Transfer, transfer_id)
    if found is None:
        abort(404, f"There is no transfer with the number {transfer_id}.")
    return _transfer_json(found)


def _created(body: dict[str, Any], location: str) -> ResponseReturnValue:
    return body, 201, {"Location": location}


def _statement_url(account: Account) -> str:
    return url_for("api.statement", account_id=account.id, version=account.version)


def _account_json(account: Account) -> dict[str, Any]:
    return {
        "id": str(account.id),
        "owner": account.owner,
        "balance": decimal_text(account.balance),
        "currency": CURRENCY,
        "version": account.version,
        "closed": account.closed,
        "opened_at": account.created_on.isoformat(),
        "changed_at": account.modified_on.isoformat(),
    }


def _summary_json(summary: AccountSummary) -> dict[str, Any]:
    return {
        "id": str(summary.id),
        "owner": summary.owner,
        "balance": decimal_text(summary.balance),
        "currency": CURRENCY,
        "version": summary.version,
        "closed": summary.closed,
        "opened_at": summary.opened_at.isoformat(),
        "changed_at": summary.changed_at.isoformat(),
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "version": entry.version,
        "kind": entry.kind,
        "amount": decimal_text(entry.amount),
        "balance": decimal_text(entry.balance),
        "note": entry.note,
        "recorded_at": entry.recorded_at.isoformat(),
        "transfer_id": str(entry.transfer_id) if entry.transfer_id else None,
        "counterparty_id": str(entry.counterparty_id) if entry.counterparty_id else None,
    }


def _transfer_json(found: Transfer) -> dict[str, Any]:
    return {
        "id": str(found.id),
        "sender_id": str(found.sender_id),
        "recipient_id": str(found.recipient_id),
        "amount": decimal_text(found.amount),
        "currency": CURRENCY,
        "note": found.note,
        "created_at": found.created_at.isoformat(),
    }
