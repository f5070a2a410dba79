"""The bank on the run's node, in a keyspace of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.cassandra_nodes import keyspace_on, require_cassandra, start_node
from tests.conftest import FOLDER
from tests.servers import ServerFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flask import Flask
    from flask.testing import FlaskClient


@pytest.fixture(scope="session")
def node(pytestconfig: pytest.Config) -> Iterator[str]:
    """The run's node, or one of its own where only these tests run."""
    require_cassandra()
    folder = pytestconfig.stash.get(FOLDER, None)
    own = ServerFolder.create() if folder is None else None
    yield os.environ.get("TEST_CASSANDRA_NODE") or (folder or own).shared("cassandra", start_node).url  # type: ignore[union-attr]
    if own is not None:
        own.remove()


@pytest.fixture(scope="module")
def keyspace(node: str) -> Iterator[str]:
    """A keyspace that the tests of a module share."""
    with keyspace_on(node) as name:
        yield name


@pytest.fixture
def bank_app(node: str, keyspace: str, tmp_path: Path) -> Iterator[Flask]:
    """The app, with its tables."""
    from examples.cassandra_bank import create_app
    from examples.cassandra_bank.lists import db, es

    host, _, port = node.partition(":")
    app = create_app(
        {
            "EVENTSOURCING_CASSANDRA_CONTACT_POINTS": [host],
            "EVENTSOURCING_CASSANDRA_PORT": int(port),
            "EVENTSOURCING_CASSANDRA_KEYSPACE": keyspace,
            "EVENTSOURCING_CASSANDRA_PATIENCE": 60,
            "SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path / 'lists.db'}",
        }
    )
    made = app.test_cli_runner().invoke(args=["eventsourcing", "init-db"])
    assert made.exit_code == 0, made.output
    yield app
    with app.app_context():
        es.close(app)
        for engine in db.engines.values():
            engine.dispose()


@pytest.fixture
def visitor(bank_app: Flask) -> FlaskClient:
    """A client of the bank."""
    return bank_app.test_client()
