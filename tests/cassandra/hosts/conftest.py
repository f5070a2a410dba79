"""A keyspace with the tables of the bank, and Flask apps on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from eventsourcing.application import Application
from flask import Flask

from flask_eventsourcing import EventSourcing
from tests.cassandra.hosts.site import Bank, settings
from tests.cassandra_nodes import keyspace_on, require_cassandra

MakeApp = Callable[..., tuple[Flask, EventSourcing[Any, Any]]]


@pytest.fixture
def driver() -> None:
    """The driver; a test that only needs it is skipped where a node cannot be started, too."""
    require_cassandra()


@pytest.fixture(scope="module")
def bank_keyspace(cassandra_server: str) -> Iterator[str]:
    """A keyspace with the tables of the bank, which the tests of a module share."""
    with keyspace_on(cassandra_server) as name:
        app, es = Flask(__name__), EventSourcing(application=Bank)
        app.config.update(settings(cassandra_server, name))
        es.init_app(app)
        result = app.test_cli_runner().invoke(args=["eventsourcing", "init-db"])
        assert result.exit_code == 0, result.output
        es.close()
        yield name


@pytest.fixture
def make_app(cassandra_server: str, bank_keyspace: str) -> Iterator[MakeApp]:
    """Makes Flask apps on the keyspace, and closes them."""
    made = []

    def make(application: type[Application[Any]] | None = Bank, **others: Any) -> tuple[Flask, EventSourcing[Any, Any]]:
        app, es = Flask(__name__), EventSourcing(application=application)
        app.config.update(settings(cassandra_server, bank_keyspace, **others))
        es.init_app(app)
        made.append(es)
        return app, es

    yield make
    for each in made:
        each.close()
