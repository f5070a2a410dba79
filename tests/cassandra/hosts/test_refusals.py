"""What a Flask app refuses when it starts, with Cassandra."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask

from flask_eventsourcing import ConfigurationError, EventSourcing
from flask_eventsourcing.projections.definitions import ModelProjection, on
from tests.cassandra.hosts.site import Account, Bank, settings

pytestmark = pytest.mark.usefixtures("driver")


def start(es: EventSourcing[Any, Any] | None = None, **others: Any) -> Flask:
    """Start an app on a node that is not there: nothing connects."""
    app = Flask(__name__)
    app.config.update({key: value for key, value in settings("127.0.0.1:9", "bank", **others).items() if value != ...})
    (es or EventSourcing(application=Bank)).init_app(app)
    return app


def test_starts_without_a_node() -> None:
    """An app starts and constructs its applications although no node answers."""
    start(CONSTRUCT="init")


@pytest.mark.parametrize("name", ["CONTACT_POINTS", "KEYSPACE", "REPLICATION"])
def test_what_has_no_default(name: str) -> None:
    """Contact points, keyspace and replication have no default, and the error names the one that is missing."""
    with pytest.raises(ConfigurationError, match=f"EVENTSOURCING_CASSANDRA_{name} is missing, which has no default"):
        start(None, **{f"CASSANDRA_{name}": ...})


@pytest.mark.parametrize("mode", ["explicit", "request"])
def test_commit_modes(mode: str) -> None:
    """Only "save" is a mode: there is nothing that could be committed later."""
    with pytest.raises(ConfigurationError, match=f"EVENTSOURCING_COMMIT is '{mode}', but Cassandra has no transaction"):
        start(COMMIT=mode)
    assert start(COMMIT="save").extensions["eventsourcing"].config.commit == "save"


def test_forgotten_persistence() -> None:
    """Settings of Cassandra without the one that chooses it are refused, as the events would be somewhere else."""
    with pytest.raises(ConfigurationError, match="set EVENTSOURCING_PERSISTENCE to 'cassandra'"):
        start(PERSISTENCE=...)
    with pytest.raises(ConfigurationError, match="CASSANDRA_PASSWORD go together"):
        start(CASSANDRA_USERNAME="ada")


def test_setting_of_databases() -> None:
    """A setting that would have no effect is refused by its name."""
    with pytest.raises(ConfigurationError, match="EVENTSOURCING_BIND_KEY is a setting of databases"):
        start(BIND_KEY="events")


def test_transactional_function() -> None:
    """A function that is decorated with ``transactional`` is refused by its name when the app starts."""
    es = EventSourcing(application=Bank)

    @es.transactional
    def transfer() -> None:
        raise NotImplementedError

    with pytest.raises(ConfigurationError, match=r"transfer with @es\.transactional cannot hold events"):
        start(es)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_projection(inline: bool, later: bool) -> None:
    """An inline projection, and one without a database, are refused with the reason, before and after the start."""
    es: EventSourcing[Any, Any] = EventSourcing(application=Bank)

    class Balances(ModelProjection):
        @on(Account.Closed)
        def opened(self, event: Any, session: Any) -> None:
            raise NotImplementedError

    Balances.inline = inline
    steps: list[Callable[[], object]] = [lambda: start(es), lambda: es.projection(Balances)]
    first, second = steps if later else reversed(steps)
    first()
    with pytest.raises(ConfigurationError, match="Balances is inline, but" if inline else "Balances has no database"):
        second()


@pytest.mark.parametrize("name", ["Größe", 'x"; DROP KEYSPACE bank; --', "two words"])
def test_names(name: str) -> None:
    """An application whose name cannot be that of tables is refused by its name."""
    with pytest.raises(ConfigurationError, match="has a name that tables in Cassandra cannot have"):
        start(EventSourcing(application=type("Named", (Bank,), {"name": name})))


def test_failed_start_leaves_the_app_untouched() -> None:
    """A start that is refused registers nothing, and can be done again."""
    app, es = Flask(__name__), EventSourcing(application=Bank)
    app.config.update(settings("127.0.0.1:9", "bank", BIND_KEY="events"))
    with pytest.raises(ConfigurationError):
        es.init_app(app)
    assert "eventsourcing" not in app.extensions
    del app.config["EVENTSOURCING_BIND_KEY"]
    es.init_app(app)


@pytest.mark.parametrize(
    ("found", "gevent", "message"),
    [
        ({}, False, "driver of Cassandra is missing"),
        ({"cassandra-driver": "3.30.1", "scylla-driver": "3.29.12"}, False, "are both installed"),
        ({"cassandra-driver": "3.31.0"}, True, "use cassandra-driver below 3.31"),
        ({"scylla-driver": "3.29.12"}, True, "scylla-driver 3.29.12 does not connect where gevent"),
    ],
)
def test_drivers(found: dict[str, str], gevent: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, both of them, and one that does not work under gevent are refused with the reason."""
    from flask_eventsourcing.cassandra import drivers

    monkeypatch.setattr(drivers, "installed", lambda: found)
    monkeypatch.setitem(sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched=lambda _: gevent))
    with pytest.raises(ConfigurationError, match=message):
        start()


def test_driver_below_3_31_under_gevent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last driver with a reactor for gevent is accepted under it."""
    from flask_eventsourcing.cassandra import drivers

    monkeypatch.setattr(drivers, "installed", lambda: {"cassandra-driver": "3.30.1"})
    monkeypatch.setitem(sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched=lambda _: True))
    start()
