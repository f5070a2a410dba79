"""The server-rendered pages: every form posts, and is answered with a redirect or with itself and what was wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from flask import Blueprint, Response, abort, flash, redirect, render_template, request, url_for

from example_app import inputs, queries, services
from example_app.chart import CONTENT_SECURITY_POLICY, NARROW, WIDTH, balance_chart
from example_app.domain import Bank
from example_app.errors import AccountNotFound, BankError
from example_app.extensions import es
from example_app.money import change_text, money_text
from example_app.problems import Problem, bank_problem, respond

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

NEWEST_ENTRIES = 7

pages = Blueprint("pages", __name__)


@pages.get("/")
def index() -> ResponseReturnValue:
    """List the accounts."""
    return render_template(
        "index.html", found=queries.accounts(), totals=queries.totals(), search=queries.search_text()
    )


@pages.get("/transfers")
def transfers() -> ResponseReturnValue:
    """List the transfers."""
    return render_template("transfers.html", found=queries.transfers())


@pages.get("/accounts/new")
def open_form() -> ResponseReturnValue:
    """Show the form for a new account."""
    return render_template("open.html")


@pages.post("/accounts/new")
def open_account() -> ResponseReturnValue:
    """Open an account."""
    first_deposit = inputs.optional_amount(request.form.get("first_deposit"))
    account = services.open_account(request.form.get("owner", ""), first_deposit)
    flash(f"Welcome, {account.owner}. Your account is open.")
    return _to_account(account.id)


@pages.get("/accounts/<uuid:account_id>")
def account(account_id: UUID) -> ResponseReturnValue:
    """Show an account with its latest entries and everything that can be done with it."""
    return _account_page(account_id)


@pages.post("/accounts/<uuid:account_id>/deposit")
def deposit(account_id: UUID) -> ResponseReturnValue:
    """Pay money in."""
    amount = inputs.amount(request.form.get("amount"))
    services.deposit(account_id, amount, request.form.get("note", ""))
    flash(f"{money_text(amount)} paid in.")
    return _to_account(account_id)


@pages.post("/accounts/<uuid:account_id>/withdraw")
def withdraw(account_id: UUID) -> ResponseReturnValue:
    """Pay money out."""
    amount = inputs.amount(request.form.get("amount"))
    services.withdraw(account_id, amount, request.form.get("note", ""))
    flash(f"{money_text(amount)} paid out.")
    return _to_account(account_id)


@pages.post("/accounts/<uuid:account_id>/transfer")
def transfer(account_id: UUID) -> ResponseReturnValue:
    """Move money to another account."""
    recipient_id = inputs.account_number(request.form.get("recipient_id"))
    amount = inputs.amount(request.form.get("amount"))
    services.transfer(account_id, recipient_id, amount, request.form.get("note", ""))
    flash(f"{money_text(amount)} sent to {es[Bank].get_account(recipient_id).owner}.")
    return _to_account(account_id)


@pages.post("/accounts/<uuid:account_id>/mail")
def mail(account_id: UUID) -> ResponseReturnValue:
    """Have this month's statement mailed."""
    recipient = inputs.address(request.form.get("recipient"))
    services.request_statement_mail(account_id, recipient, inputs.month(None))
    flash(f"This month's statement is on its way to {recipient}.")
    return _to_account(account_id)


@pages.post("/accounts/<uuid:account_id>/close")
def close(account_id: UUID) -> ResponseReturnValue:
    """Close an empty account."""
    services.close_account(account_id)
    flash("The account is closed. Its history stays readable.")
    return _to_account(account_id)


@pages.get("/accounts/<uuid:account_id>/statement")
def statement(account_id: UUID) -> ResponseReturnValue:
    """Show what the account's history said at any of its versions."""
    statement = es[Bank].summary(account_id, _version())
    found = queries.entries(statement, latest_first=True)
    owners = queries.owners(entry.counterparty_id for entry in found.items)
    return render_template("statement.html", statement=statement, found=found, owners=owners)


@pages.get("/accounts/<uuid:account_id>/statement.svg")
def chart(account_id: UUID) -> ResponseReturnValue:
    """Draw the balance up to a version, ``?size=narrow`` for a phone."""
    statement = es[Bank].statement(account_id, _version())
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    width = NARROW if request.args.get("size") == "narrow" else WIDTH
    return Response(balance_chart(statement, width), mimetype="image/svg+xml", headers=headers)


def _version() -> int | None:
    try:
        return int(request.args["version"]) if "version" in request.args else None
    except ValueError:
        abort(404, "A version is a whole number.")


@pages.errorhandler(BankError)
def refused(error: BankError) -> ResponseReturnValue:
    """Show a refused form again, as it was filled in, with the reason; everything else gets a page of its own.

    The transaction of the request was rolled back by now: nothing was stored.
    """
    problem = bank_problem(error)
    if request.endpoint == "pages.open_account":
        return render_template("open.html", problem=problem), problem.status
    account_id = (request.view_args or {}).get("account_id")
    missing = isinstance(error, AccountNotFound) and error.account_id == account_id
    if request.method != "POST" or account_id is None or missing:
        return respond(problem)
    try:
        return _account_page(account_id, problem), problem.status
    except AccountNotFound as not_found:
        return respond(bank_problem(not_found))


def _account_page(account_id: UUID, problem: Problem | None = None) -> str:
    latest = es[Bank].summary(account_id)
    first = max(1, latest.version - NEWEST_ENTRIES + 1)
    newest = es[Bank].entries(account_id, first, latest.version)[::-1]
    return render_template(
        "account.html",
        account=latest,
        newest=newest,
        owners=queries.owners(entry.counterparty_id for entry in newest),
        recipients=queries.recipients(account_id),
        problem=problem,
        action=(request.endpoint or "").removeprefix("pages.") if problem else None,
    )


def _to_account(account_id: UUID) -> ResponseReturnValue:
    return redirect(url_for("pages.account", account_id=account_id), 303)


@pages.app_template_filter()
def number(account_id: UUID) -> str:
    """Return an account's number as people read it: the start of its id, in two groups."""
    return f"{account_id.hex[:4]} {account_id.hex[4:8]}".upper()


@pages.app_template_filter()
def hue(account_id: UUID) -> int:
    """Return one of eight colours for an account, always the same."""
    return account_id.int % 8


pages.add_app_template_filter(money_text, "money")
pages.add_app_template_filter(change_text, "change")
