"""The application factory, its errors and its tables."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from eventsourcing.persistence import IntegrityError, OperationalError
from flask_migrate import downgrade, upgrade
from sqlalchemy import inspect

from example_app import create_app, demo_check, services
from example_app.extensions import db

if TYPE_CHECKING:
    from flask import Flask
    from flask.testing import FlaskClient

TABLES = {"account_summary", "bank_events", "bank_snapshots", "bank_tracking", "transfer"} | {
    "balance",
    "bank_dead_letters",
    "bank_projections",
    "fraud_alert",
    "monthly_statement",
    "outflow",
}


@pytest.fixture
def empty_app(config: dict[str, object]) -> Flask:
    """The bank on a database without tables."""
    return create_app({**config, "PROPAGATE_EXCEPTIONS": False})


def test_the_database_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DATABASE_URL says where the bank keeps its data, and without it that is bank.db in the instance folder."""
    monkeypatch.setattr("flask.Flask.auto_find_instance_path", lambda app: str(tmp_path / "instance"))
    monkeypatch.setenv("SECRET_KEY", "from the environment")
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert create_app().config["SQLALCHEMY_DATABASE_URI"] == "sqlite:///bank.db"
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    app = create_app()
    assert app.config["SQLALCHEMY_DATABASE_URI"] == "sqlite://"
    assert app.config["SECRET_KEY"] == "from the environment"


def test_the_secret_key_is_kept(config: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a configured key one is made at the first start, kept in a file that only its owner reads, and reused."""
    monkeypatch.delenv("SECRET_KEY", raising=False)
    monkeypatch.setattr("flask.Flask.auto_find_instance_path", lambda app: str(tmp_path / "instance"))
    without = {key: value for key, value in config.items() if key != "SECRET_KEY"}
    keys = {create_app(without).config["SECRET_KEY"] for _ in range(2)}
    assert len(keys) == 1
    assert len(keys.pop()) >= 64
    (file,) = (tmp_path / "instance").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_migrations_make_and_drop_the_tables(empty_app: Flask) -> None:
    """``flask db upgrade`` makes every table, and ``flask db downgrade`` drops them again."""
    with empty_app.app_context():
        upgrade()
        assert set(inspect(db.engine).get_table_names()) >= TABLES
        downgrade(revision="base")
        assert set(inspect(db.engine).get_table_names()) == {"alembic_version"}
        db.engine.dispose()


def test_the_migrations_agree_with_the_models(empty_app: Flask) -> None:
    """After the migrations, autogenerate finds nothing to change."""
    runner = empty_app.test_cli_runner()
    assert runner.invoke(args=["db", "upgrade"]).exit_code == 0
    checked = runner.invoke(args=["db", "check"])
    assert checked.exit_code == 0, checked.output
    assert runner.invoke(args=["eventsourcing", "check"]).exit_code == 0
    with empty_app.app_context():
        db.engine.dispose()


def test_missing_tables_are_told(empty_app: Flask) -> None:
    """Before the migrations have run, every answer says which command is missing."""
    for path, body in (("/", None), ("/api/accounts", {"owner": "Ada"})):
        client = empty_app.test_client()
        answer = client.get(path) if body is None else client.post(path, json=body)
        assert answer.status_code == 503
        assert "flask --app example_app db upgrade" in answer.text
    with empty_app.app_context():
        db.engine.dispose()


@pytest.mark.parametrize(
    ("error", "status"), [(IntegrityError, 409), (OperationalError, 503), (ZeroDivisionError, 500)]
)
def test_failures_are_answered_in_kind(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, error: type[Exception], status: int
) -> None:
    """A lasting conflict answers 409, a failing database 503 and a mistake 500, each as a problem document."""

    def _fail(*_: object) -> None:
        raise error("inner workings")

    monkeypatch.setattr(services, "open_account", _fail)
    answer = client.post("/api/accounts", json={"owner": "Ada"})
    assert (answer.status_code, answer.content_type) == (status, "application/problem+json")
    assert "inner workings" not in answer.text


def test_the_demonstration_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m example_app.demo_check`` drives a real server from an empty database and exits 0."""
    monkeypatch.delenv("DEMO_DATABASE_URL", raising=False)
    monkeypatch.chdir(Path(__file__).parents[2])
    assert demo_check.main() == 0
    assert "Everything is as it should be." in capsys.readouterr().out
