"""Many requests at the same moment."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import TYPE_CHECKING

from example_app.extensions import db
from example_app.models import AccountSummary

if TYPE_CHECKING:
    from flask import Flask

    from example_app.tests.conftest import Accounts

THREADS = 8


def test_no_update_is_lost(app: Flask, accounts: Accounts) -> None:
    """Eight clients that change one account at once are all answered 201, and every deposit counts."""
    account_id = accounts.open()

    def _deposit(_: int) -> list[int]:
        client = app.test_client()
        path = f"/api/accounts/{account_id}/deposits"
        return [client.post(path, json={"amount": "1.00"}).status_code for _ in range(10)]

    with ThreadPoolExecutor(THREADS) as pool:
        statuses = Counter(status for each in pool.map(_deposit, range(THREADS)) for status in each)
    assert statuses == {201: 80}
    assert accounts.balance(account_id) == "80.00"
    db.session.rollback()
    assert db.session.query(AccountSummary).one().balance == 8000


def test_money_is_neither_made_nor_lost(app: Flask, accounts: Accounts) -> None:
    """Transfers in opposite directions at once are answered 201 or, without money, 422; the sum stays."""
    ada, ben = accounts.open("Ada", "20.00"), accounts.open("Ben", "20.00")

    def _transfer(number: int) -> list[int]:
        client = app.test_client()
        sender, recipient = (ada, ben) if number % 2 else (ben, ada)
        order = {"sender_id": sender, "recipient_id": recipient, "amount": "15.00"}
        return [client.post("/api/transfers", json=order).status_code for _ in range(5)]

    with ThreadPoolExecutor(THREADS) as pool:
        statuses = {status for each in pool.map(_transfer, range(THREADS)) for status in each}
    assert statuses <= {201, 422}
    assert Decimal(accounts.balance(ada)) + Decimal(accounts.balance(ben)) == 40
    assert Decimal(accounts.balance(ada)) >= 0
