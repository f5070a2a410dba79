"""The read models, their pages and the health check."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from email import message_from_bytes
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest

from example_app import create_app
from example_app.domain import Account
from example_app.extensions import db, es
from example_app.projections import LARGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from flask import Flask
    from flask.testing import FlaskClient

    from example_app.tests.conftest import Accounts

ROOT = Path(__file__).parents[2]


def catch_up(app: Flask) -> None:
    """Run every projection and reaction to the end of the log."""
    result = app.test_cli_runner().invoke(args=["eventsourcing", "run", "--all", "--once"])
    assert result.exit_code == 0, result.output


def record(*moments: tuple[datetime, str, int], owner: str = "Ada") -> UUID:
    """Store the history of an account that had deposits and withdrawals at these moments."""
    account = Account.open(owner)
    for moment, kind, amount in moments:
        events = {"in": Account.Deposited, "out": Account.Withdrawn}
        account.trigger_event(events[kind], amount=amount, note="", timestamp=moment)
    es.application.save(account)
    db.session.commit()
    return account.id


def test_balances_follow_the_events(app: Flask, client: FlaskClient, accounts: Accounts) -> None:
    """The balances are those of the accounts, transfers included; a closed account is not listed."""
    ada, ben, gone = accounts.open("Ada", "100.00"), accounts.open("Ben"), accounts.open("Gone")
    client.post("/api/transfers", json={"sender_id": ada, "recipient_id": ben, "amount": "30.00"})
    client.post(f"/api/accounts/{ben}/withdrawals", json={"amount": "0.50"})
    client.delete(f"/api/accounts/{gone}")
    catch_up(app)
    page = client.get("/balances").text
    for text in ("€70.00", "€29.50", "€99.50", "Up to date, position 8."):
        assert text in page
    assert page.index("Ada") < page.index("Ben")
    assert "Gone" not in page


def test_pages_say_how_far_behind_they_are(app: Flask, client: FlaskClient, accounts: Accounts) -> None:
    """Without a worker the pages show what there is, and say how many events are still to come."""
    account_id = accounts.open("Ada", "100.00")
    for path in ("/balances", f"/accounts/{account_id}/months", "/alerts"):
        assert "The worker is not running just now." in client.get(path).text
    text = client.get("/balances").text
    assert "Figures up to position 0; 2 events behind." in text
    assert "has not come that far" in text
    catch_up(app)
    accounts.open("Ben")
    assert "Figures up to position 2; 1 event behind." in client.get("/balances").text


def test_months(app: Flask, client: FlaskClient) -> None:
    """Each month opens with what the one before it closed with, and has its sums and its entries."""
    account_id = record(
        (datetime(2026, 1, 31, 23, 59, tzinfo=UTC), "in", 10000),
        (datetime(2026, 3, 1, tzinfo=UTC), "in", 500),
        (datetime(2026, 3, 31, tzinfo=UTC), "out", 2500),
    )
    catch_up(app)
    text = client.get(f"/accounts/{account_id}/months").text
    march, january = text[text.index("March 2026") :].split("January 2026")
    for amount in ("€80.00", "€100.00", "+€5.00", "−€25.00", "<dd>2</dd>"):  # noqa: RUF001
        assert amount in march
    for amount in ("€100.00", "€0.00", "+€100.00", "<dd>1</dd>"):
        assert amount in january
    assert "February" not in text
    assert client.get("/accounts/00000000-0000-0000-0000-000000000001/months").status_code == 404


def test_fraud_watch(app: Flask, client: FlaskClient, tmp_path: Path) -> None:
    """A large amount and the third one within a minute are shown, and nothing else is."""
    app.instance_path = str(tmp_path)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    moments = [(start.replace(second=second), "out", 1) for second in (0, 30, 59)]
    slow = [(start.replace(minute=minute), "out", LARGE) for minute in (0, 2, 4)]
    record((start, "in", 10 * LARGE), *moments, owner="Quick")
    record((start, "in", 10 * LARGE), *slow, owner="Slow")
    record((start, "in", 10 * LARGE), (start, "out", LARGE + 1), owner="Large")
    catch_up(app)
    text = client.get("/alerts").text
    assert text.count("<li class=") == 2
    assert "3 times within a minute" in text
    assert "More than €10,000.00 at once" in text


def test_an_alert_is_mailed_once(app: Flask, tmp_path: Path) -> None:
    """An alert is reported by one mail, also when it is reported again, and one from before the watch is not."""
    app.instance_path = str(tmp_path)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    record((start, "in", 10 * LARGE), (start, "out", LARGE + 1))
    catch_up(app)
    assert not (tmp_path / "outbox").exists()
    account_id = record((start, "in", 10 * LARGE), (start, "out", LARGE + 2))
    catch_up(app)
    (mail,) = (tmp_path / "outbox").iterdir()
    message = message_from_bytes(mail.read_bytes())
    assert message["Subject"] == f"Please look at account {account_id}"
    number = message["Message-ID"].strip()
    assert number.startswith("<Bank-FraudWatch-")
    assert number.endswith("@alerts.invalid>")
    assert app.test_cli_runner().invoke(args=["eventsourcing", "rebuild", "FraudWatch"]).exit_code == 0
    catch_up(app)
    assert [each.name for each in (tmp_path / "outbox").iterdir()] == [mail.name]
    assert message_from_bytes(mail.read_bytes())["Message-ID"].strip() == number


def test_rebuilt_read_models_are_the_same(app: Flask, client: FlaskClient, accounts: Accounts) -> None:
    """Rebuilding the balances from the first event on changes nothing that a visitor sees."""
    accounts.open("Ada", "12.00")
    catch_up(app)
    before = client.get("/balances").text
    assert app.test_cli_runner().invoke(args=["eventsourcing", "rebuild", "Balances", "--drop-old"]).exit_code == 0
    assert client.get("/balances").text == before


def test_health_without_a_worker(client: FlaskClient) -> None:
    """``/healthz`` answers 503 with the state of each projection while nobody runs them."""
    answer = client.get("/healthz")
    assert (answer.status_code, answer.get_json()["ok"]) == (503, False)
    names = [each["name"] for each in answer.get_json()["projections"]]
    assert names == ["Balances", "MonthlyStatements", "FraudWatch", "FraudWatch:reactions"]


def test_health_without_a_database(config: dict[str, object]) -> None:
    """``/healthz`` answers 503 with JSON when the tables or the database are not there."""
    app = create_app(config)
    answer = app.test_client().get("/healthz")
    assert (answer.status_code, answer.get_json()["ok"]) == (503, False)
    with app.app_context():
        db.engine.dispose()


@contextmanager
def demo(config: dict[str, object], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """Run the demonstration on a free port."""
    uri = str(config["SQLALCHEMY_DATABASE_URI"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = folder / "demo.log"
    environment = {**os.environ, "DATABASE_URL": uri, "SECRET_KEY": "only for tests", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "example_app.demo", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_demonstration_runs_the_worker(config: dict[str, object], tmp_path: Path, number: int) -> None:
    """``make demo`` runs server and worker, so that ``/healthz`` answers 200; Ctrl-C and SIGTERM end both."""
    opener = build_opener(ProxyHandler({}))
    with demo(config, tmp_path) as (process, address, log):
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                with opener.open(f"{address}/healthz", timeout=10) as answer:
                    assert answer.status == 200
                    break
            except URLError:
                # No server yet, or no worker yet, which is a 503.
                time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(60) == 0, log.read_text()
        assert "INFO Balances: stopped" in log.read_text()
