"""The nodes that the tests start."""

from __future__ import annotations

from tests.cassandra_nodes import session_on


def test_node_answers(cassandra_server: str) -> None:
    """The run's node is one of 5.0, and keeps what it has acknowledged when it is killed."""
    with session_on(cassandra_server) as session:
        (version,) = session.execute("SELECT release_version FROM system.local").one()
        rows = session.execute("SELECT name, value FROM system_views.settings").all()
    assert version.startswith("5.0.")
    assert {row.name: row.value for row in rows if row.name in ("commitlog_sync", "paxos_variant")} == {
        "commitlog_sync": "batch",
        "paxos_variant": "v2",
    }
