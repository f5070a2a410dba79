"""Statements by mail."""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from email import message_from_bytes, policy
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from example_app import mail
from example_app.domain import Bank
from example_app.extensions import es
from example_app.tests.test_api import assert_problem, stored_events
from example_app.tests.test_pages import submit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import EmailMessage

    from flask import Flask
    from flask.testing import FlaskClient

    from example_app.tests.conftest import Accounts

MONTH = f"{datetime.now(UTC):%Y-%m}"


@pytest.fixture
def outbox(app: Flask, tmp_path: Path) -> Path:
    """The folder into which mails are put."""
    app.instance_path = str(tmp_path / "instance")
    return tmp_path / "instance" / "outbox"


@pytest.fixture
def celery(app: Flask, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Celery in eager mode: tasks run as soon as they are sent."""
    if not importlib.util.find_spec("celery"):
        pytest.skip("Celery is missing: pip install Flask-EventSourcing[celery]")
    from example_app.tasks_celery import celery_app

    monkeypatch.setitem(app.config, "STATEMENT_QUEUE", "celery")
    celery_app.conf.task_always_eager = True
    yield
    celery_app.conf.task_always_eager = False


def mails(outbox: Path) -> list[EmailMessage]:
    """Read what is in the outbox."""
    return [message_from_bytes(path.read_bytes(), policy=policy.default) for path in sorted(outbox.iterdir())]


@pytest.mark.usefixtures("celery")
def test_a_statement_is_mailed(client: FlaskClient, accounts: Accounts, outbox: Path) -> None:
    """The answer has the number of the task, and the mail every entry of the month."""
    account_id = accounts.open("Ada", "12.50")
    client.post(f"/api/accounts/{account_id}/withdrawals", json={"amount": "2.25", "note": "café"})
    answer = client.post(f"/api/accounts/{account_id}/statement-mail", json={"recipient": "ada@example.com"})
    assert (answer.status_code, answer.get_json()["month"]) == (202, MONTH)
    (message,) = mails(outbox)
    assert (message["To"], message["Subject"]) == ("ada@example.com", f"Your statement for {MONTH}")
    assert answer.get_json()["task_id"] in message["Message-ID"]
    text = message.get_content()
    for part in ("Statement of Ada", "Balance before: €0.00", "+€12.50", "€2.25  café", "Balance after: €10.25"):
        assert part in text
    assert stored_events() == 3


def test_a_month_without_entries_keeps_the_balance(app: Flask, accounts: Accounts) -> None:
    """A later month begins with the balance of now, an earlier one with none."""
    account_id = UUID(accounts.open("Ada", "12.50"))
    with app.app_context():
        statement = es[Bank].statement(account_id)
        for month, balance in (("2001-01", "€0.00"), ("9999-12", "€12.50")):
            text = mail.compose(statement, "ada@example.com", month, "1").get_content()
            assert f"Balance before: {balance}\nThere were no entries.\nBalance after: {balance}" in text


@pytest.mark.usefixtures("celery")
def test_a_task_that_runs_again_puts_one_mail(app: Flask, accounts: Accounts, outbox: Path) -> None:
    """A mail that is put into the outbox a second time takes the place of the first."""
    account_id = accounts.open()
    with app.app_context():
        for _ in range(2):
            mail.mail_statement(account_id, "ada@example.com", MONTH, "same")
    assert len(mails(outbox)) == 1


@pytest.mark.usefixtures("celery")
def test_the_page_asks_for_a_statement(client: FlaskClient, accounts: Accounts, outbox: Path) -> None:
    """The form on the account's page sends this month's statement, and comes back when the address is none."""
    account_id = accounts.open()
    page = f"/accounts/{account_id}"
    answer = submit(client, page, f"{page}/mail", recipient="no address")
    assert answer.status_code == 422
    assert 'value="no address"' in answer.text
    assert submit(client, page, f"{page}/mail", recipient="ada@example.com").status_code == 303
    assert "on its way to ada@example.com" in client.get(page).text
    assert len(mails(outbox)) == 1


def test_without_a_worker_it_says_so(client: FlaskClient, accounts: Accounts) -> None:
    """Where no task queue is set up, the answer is 503 with what to do, and the page has no form."""
    account_id = accounts.open()
    answer = client.post(f"/api/accounts/{account_id}/statement-mail", json={"recipient": "ada@example.com"})
    assert_problem(answer, 503, "mail-unavailable")
    assert "STATEMENT_QUEUE" in answer.get_json()["detail"]
    page = client.get(f"/accounts/{account_id}").text
    assert f"/accounts/{account_id}/mail" not in page
    assert "no worker that sends mail" in page


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"recipient": "ada"},
        {"recipient": "ada@example.com\nBcc: all@example.com"},
        {"recipient": ["ada@example.com"]},
        {"recipient": "ada@example.com", "month": "2026-13"},
        {"recipient": "ada@example.com", "month": "November"},
    ],
)
@pytest.mark.usefixtures("celery")
def test_bad_requests_are_refused(
    client: FlaskClient, accounts: Accounts, outbox: Path, body: dict[str, object]
) -> None:
    """An address or a month that is none answers 422, and nothing is sent."""
    account_id = accounts.open()
    assert_problem(client.post(f"/api/accounts/{account_id}/statement-mail", json=body), 422, "invalid-text")
    assert not outbox.exists()


@pytest.mark.usefixtures("celery")
def test_an_account_that_is_not_there_sends_nothing(client: FlaskClient, outbox: Path) -> None:
    """For an account that is not there the answer is 404."""
    answer = client.post(f"/api/accounts/{uuid4()}/statement-mail", json={"recipient": "ada@example.com"})
    assert_problem(answer, 404, "account-not-found")
    assert not outbox.exists()
