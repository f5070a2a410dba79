"""What a client of the bank, and its operator, can rely on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from flask import Flask
    from flask.testing import FlaskClient


def open_account(visitor: FlaskClient, owner: str = "Ada", amount: str = "10") -> str:
    """Open an account and return its id."""
    answer = visitor.post("/accounts", data={"owner": owner, "amount": amount})
    assert answer.status_code == 201
    found: str = answer.get_json()["id"]
    return found


def project(app: Flask) -> None:
    """Let the lists come to the end of the log."""
    done = app.test_cli_runner().invoke(args=["eventsourcing", "run", "--all", "--once"])
    assert done.exit_code == 0, done.output


def listed(visitor: FlaskClient, *ids: str) -> dict[str, Any]:
    """Return the balances of accounts that the list has."""
    rows = visitor.get("/accounts").get_json()["accounts"]
    return {row["id"]: row["balance"] for row in rows if row["id"] in ids}


def test_account_has_its_entries_at_once(visitor: FlaskClient) -> None:
    """What a client pays in and out is in the account's statement when the answer is there."""
    account = open_account(visitor)
    visitor.post(f"/accounts/{account}/deposits", data={"amount": "2.50"})
    visitor.post(f"/accounts/{account}/withdrawals", data={"amount": "1"})
    shown = visitor.get(f"/accounts/{account}").get_json()
    assert shown["balance"] == "11.50"
    assert [each["kind"] for each in shown["entries"]] == ["opened", "deposit", "deposit", "withdrawal"]


def test_lists_are_projections(bank_app: Flask, visitor: FlaskClient) -> None:
    """Accounts and transfers are listed when the projections have run, and the same again after a rebuild."""
    sender, recipient = open_account(visitor), open_account(visitor, "Bob", "0")
    posted = {"sender": sender, "recipient": recipient, "amount": "4"}
    transfer = visitor.post("/transfers", data=posted).get_json()["id"]
    refused = visitor.post("/transfers", data={**posted, "amount": "400"})
    assert (refused.status_code, refused.get_json()["title"]) == (409, "Not enough money in the account")
    project(bank_app)
    assert listed(visitor, sender, recipient) == {sender: "6.00", recipient: "4.00"}
    assert transfer in [each["id"] for each in visitor.get("/transfers").get_json()["transfers"]]
    done = bank_app.test_cli_runner().invoke(args=["eventsourcing", "rebuild", "Balances"])
    assert done.exit_code == 0, done.output
    assert listed(visitor, sender, recipient) == {sender: "6.00", recipient: "4.00"}


def test_what_is_refused(visitor: FlaskClient) -> None:
    """An account that there is not, and an amount or a number that is none, have a status of their own."""
    assert visitor.get(f"/accounts/{uuid4()}").status_code == 404
    assert visitor.post("/accounts", data={"owner": "Ada", "amount": "1e5"}).status_code == 400
    assert visitor.post("/transfers", data={"sender": "x", "recipient": "y", "amount": "1"}).status_code == 400


def test_clients_on_one_account(bank_app: Flask, visitor: FlaskClient) -> None:
    """Eight clients that pay into one account at once lose no update: who had a conflict tries again."""
    account = open_account(visitor, amount="0")

    def pay(_: int) -> int:
        return bank_app.test_client().post(f"/accounts/{account}/deposits", data={"amount": "1"}).status_code

    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(pay, range(8)))
    assert visitor.get(f"/accounts/{account}").get_json()["balance"] == f"{statuses.count(200)}.00"
    assert set(statuses) == {200}
