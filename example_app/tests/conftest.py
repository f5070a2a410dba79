"""What the tests of the example share: an app on a database of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from example_app import create_app
from example_app.extensions import db

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flask import Flask
    from flask.testing import FlaskClient


@pytest.fixture
def config(tmp_path: Path) -> dict[str, object]:
    """The configuration of an app on an SQLite file that only this test has."""
    return {
        "SECRET_KEY": "only for tests",
        "SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path / 'bank.db'}",
        "TESTING": True,
    }


@pytest.fixture
def app(config: dict[str, object]) -> Iterator[Flask]:
    """The bank with empty tables; pytest-flask makes its ``client`` from this."""
    app = create_app(config)
    # As in production, so that the tests see the answers that a client would get.
    app.config["PROPAGATE_EXCEPTIONS"] = False
    with app.app_context():
        db.create_all()
    yield app
    with app.app_context():
        db.session.remove()
        db.engine.dispose()


class Accounts:
    """Opens accounts through the API, for tests that are about something else."""

    def __init__(self, client: FlaskClient) -> None:
        self.client = client

    def open(self, owner: str = "Ada", first_deposit: str | None = None) -> str:
        """Open an account and return its id."""
        body = {"owner": owner} | ({"first_deposit": first_deposit} if first_deposit else {})
        answer = self.client.post("/api/accounts", json=body)
        assert answer.status_code == 201
        return str(answer.get_json()["id"])

    def balance(self, account_id: str) -> str:
        """Return an account's balance."""
        return str(self.client.get(f"/api/accounts/{account_id}").get_json()["balance"])


@pytest.fixture
def accounts(client: FlaskClient) -> Accounts:
    """A helper that opens accounts."""
    return Accounts(client)
