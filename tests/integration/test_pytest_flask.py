"""Under pytest-flask, whose fixtures keep an application context open around the requests of a test.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask
from flask.testing import FlaskClient

from tests.bank import Site, make_site


@pytest.fixture
def site() -> Iterator[Site]:
    """A site in memory."""
    site = make_site("sqlite://")
    yield site
    site.close()


@pytest.fixture
def app(site: Site) -> Flask:
    """The app, by the name that pytest-flask looks for."""

    @site.app.get("/commit/<int:commit>")
    def open_account(commit: int) -> str:
        account_id = site.bank.open_account()
        if commit:
            site.db.session.commit()
        return str(account_id)

    return site.app


def test_client_fixture(client: FlaskClient, site: Site) -> None:
    """Requests of the ``client`` fixture are answered as any other, although they share one application context."""
    assert client.get("/commit/1").status_code == 200
    assert client.get("/commit/0").status_code == 500
    assert client.get("/commit/1").status_code == 200
    assert site.stored() == (2, 0)


@pytest.mark.usefixtures("client")
def test_application_is_at_hand(site: Site) -> None:
    """In the open context a test can use ``es.application`` directly."""
    account_id = site.bank.open_account()
    site.db.session.commit()
    assert site.bank.balance(account_id) == 0
