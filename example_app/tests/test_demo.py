"""What ``make demo`` opens."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from example_app import services
from example_app.extensions import db, es
from example_app.projections import FraudAlert, MonthlyStatement
from example_app.seed import seed

if TYPE_CHECKING:
    import pytest
    from flask import Flask
    from flask.testing import FlaskClient

ROOT = Path(__file__).parents[2]


def test_a_new_bank_has_a_life(app: Flask, client: FlaskClient) -> None:
    """An empty bank gets accounts, months of entries and alerts, none of them in the future."""
    now = datetime.now(UTC)
    with app.app_context():
        assert seed(now) > 100
    result = app.test_cli_runner().invoke(args=["eventsourcing", "run", "--all", "--once"])
    assert result.exit_code == 0, result.output
    with app.app_context():
        alerts = db.session.query(FraudAlert).order_by(FraudAlert.seen_at).all()
        assert [alert.reason for alert in alerts] == ["More than €10,000.00 at once", "3 times within a minute"]
        months = {month for (month,) in db.session.query(MonthlyStatement.month)}
        assert len(months) >= 6
        assert max(months) <= f"{now:%Y-%m}"
    accounts = client.get("/api/accounts").get_json()["accounts"]
    assert len(accounts) > 4
    assert {account["closed"] for account in accounts} == {True, False}
    assert max(account["changed_at"] for account in accounts) < now.isoformat()


def test_a_bank_with_accounts_is_left_alone(app: Flask, client: FlaskClient) -> None:
    """Where anything was stored, nothing is added."""
    with app.app_context():
        services.open_account("Ada")
        before = db.session.query(es.StoredEvent).count()
        assert seed() == 0
        assert db.session.query(es.StoredEvent).count() == before


def test_a_port_that_is_taken_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the port taken nothing is started or made, and the message names the way out."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'bank.db'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (str(taken.getsockname()[1]), "http", "99999"):
            command = [sys.executable, "-m", "example_app.demo", port]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert done.stdout == ""
            assert port in done.stderr
            assert "make demo PORT=" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_port_is_looked_at_before_anything_is_installed() -> None:
    """``make demo`` needs only Python to say that the port is taken, so it says so before it installs anything."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-S", "-E", str(ROOT / "example_app" / "demo.py"), port, "--check-port"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"The port {port} cannot be used" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
