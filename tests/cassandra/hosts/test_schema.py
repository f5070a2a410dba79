"""Keyspace and tables in Cassandra: ``init-db`` makes them, ``check`` compares them, and looks at the nodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from flask_eventsourcing import EventSourcing
from tests.cassandra.hosts.site import Bank, settings
from tests.cassandra_nodes import session_on


def run(server: str, keyspace: str, command: str, **others: Any) -> tuple[int, str]:
    """Run a command in an app of its own."""
    app, es = Flask(__name__), EventSourcing(application=Bank)
    app.config.update(settings(server, keyspace, **others))
    es.init_app(app)
    done = app.test_cli_runner().invoke(args=["eventsourcing", command])
    es.close()
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.output


def test_init_db_and_check(cassandra_server: str, cassandra_keyspace: str) -> None:
    """``init-db`` makes what is missing, also while others do, and ``check`` names each difference."""
    code, output = run(cassandra_server, cassandra_keyspace, "check")
    assert code == 1
    assert f"keyspace {cassandra_keyspace} is missing: run the command 'init-db'" in output
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: run(cassandra_server, cassandra_keyspace, "init-db"), range(3)))
    assert [code for code, _ in made] == [0, 0, 0], made
    code, output = run(cassandra_server, cassandra_keyspace, "init-db")
    assert (code, output) == (0, "All tables are there.\n")
    code, output = run(cassandra_server, cassandra_keyspace, "check")
    assert code == 0, output
    assert "bank_log ok" in output
    assert "Bank: log ok, last position 0" in output
    code, output = run(cassandra_server, cassandra_keyspace, "check", CASSANDRA_REPLICATION={"datacenter1": 3})
    assert code == 1
    assert "has another replication than the settings" in output
    with session_on(cassandra_server) as session:
        session.execute(f"ALTER TABLE {cassandra_keyspace}.bank_events DROP correlation_id")
        session.execute(
            f"ALTER KEYSPACE {cassandra_keyspace} WITH replication = "
            "{'class': 'NetworkTopologyStrategy', 'datacenter1': 3} AND durable_writes = false"
        )
    code, output = run(cassandra_server, cassandra_keyspace, "check", CASSANDRA_REPLICATION={"datacenter1": 3})
    assert code == 1
    assert "bank_events: column correlation_id is missing" in output
    assert "has durable_writes = false" in output
    assert "datacenter1 asks for 3 copies, but there are 1 nodes" in output
    for copies, differs in ((3, False), (2, True)):
        _, output = run(
            cassandra_server, cassandra_keyspace, "check", CASSANDRA_REPLICATION={"replication_factor": copies}
        )
        assert ("has another replication than the settings" in output) is differs, output


def test_streams_that_were_emptied(cassandra_server: str, cassandra_keyspace: str) -> None:
    """``check`` finds that streams lack what the log has, and they can be written again from it."""
    assert run(cassandra_server, cassandra_keyspace, "init-db")[0] == 0
    app, es = Flask(__name__), EventSourcing(application=Bank)
    app.config.update(settings(cassandra_server, cassandra_keyspace))
    es.init_app(app)
    with app.app_context():
        account_id = es.application.open_account("ada").id
        for amount in (5, 6):
            es.application.deposit(account_id, amount)
        assert run(cassandra_server, cassandra_keyspace, "check")[0] == 0
        with session_on(cassandra_server) as session:
            session.execute(f"TRUNCATE {cassandra_keyspace}.bank_events", timeout=60)
        code, output = run(cassandra_server, cassandra_keyspace, "check")
        assert code == 1
        assert f"bank_events lacks events of {account_id} that the log has" in output
        recorder: Any = es.application.recorder
        assert recorder.write_streams() == 3
        assert run(cassandra_server, cassandra_keyspace, "check")[0] == 0
        es.application.deposit(account_id, 7)
        assert es.application.repository.get(account_id).balance == 18
    es.close()


def test_refused_keyspace(cassandra_server: str, cassandra_keyspace: str) -> None:
    """A replication that the cluster refuses is one line, at once."""
    code, output = run(cassandra_server, cassandra_keyspace, "init-db", CASSANDRA_REPLICATION={"nowhere": 1})
    assert code == 1
    assert "Unrecognized strategy option {nowhere}" in output


def test_unreachable_nodes(cassandra_server: str) -> None:
    """Where no node answers, commands say so in one line."""
    for command in ("check", "init-db"):
        code, output = run("127.0.0.1:9", "bank", command)
        assert code == 1
        assert "The database cannot be reached: Cassandra cannot be reached at 127.0.0.1, port 9" in output


def test_node_settings(monkeypatch: pytest.MonkeyPatch, cassandra_server: str, cassandra_keyspace: str) -> None:
    """``check`` says what is wrong with the settings of a node that would lose acknowledged events."""
    from flask_eventsourcing.cassandra import inspecting

    # What a node with other settings would say, which would take seconds to start.
    other = "SELECT name, value FROM system_views.settings WHERE name IN ('cluster_name')"
    monkeypatch.setattr(inspecting, "SETTINGS", other)
    code, output = run(cassandra_server, cassandra_keyspace, "check")
    assert code == 1
    assert "has commitlog_sync: None, with which it loses acknowledged events when it is killed" in output
    assert "has paxos_variant: None, so the outcome" in output
