"""What is told where a cluster cannot be used: one clear error, and no other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from eventsourcing.persistence import OperationalError, StoredEvent

from flask_eventsourcing.exceptions import MissingRightError, MissingTableError
from tests.cassandra_nodes import Node, cassandra_cluster, keyspace_on
from tests.servers import ServerFolder, free_port

if TYPE_CHECKING:
    from flask_eventsourcing.cassandra import Connection

pytestmark = pytest.mark.xdist_group("cassandra-cluster")


@contextmanager
def connection_to(url: str, **settings: Any) -> Iterator[Connection]:
    """Give a connection with a cluster that may not be there."""
    from flask_eventsourcing.cassandra import CassandraSettings, Connection

    host, _, port = url.partition(":")
    defaults: dict[str, Any] = {"keyspace": f"missing_{uuid4().hex}", "replication": 1, "patience": 5.0}
    defaults["contact_points"] = (host,)
    made = Connection(CassandraSettings(port=int(port), **defaults | settings))
    yield made
    made.close()


def save(connection: Connection) -> None:
    """Save something."""
    from flask_eventsourcing.cassandra import CassandraApplicationRecorder
    from flask_eventsourcing.cassandra.recording import Log

    CassandraApplicationRecorder(Log(connection, "bank")).insert_events([StoredEvent(uuid4(), 1, "topic", b"")])


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_no_node_answers(host: str) -> None:
    """If no node answers, or the name is unknown, the error gives the addresses that were tried."""
    pytest.importorskip("cassandra.cluster", reason="cassandra-driver is not installed")
    port = free_port()
    with connection_to(f"{host}:{port}") as connection:
        with pytest.raises(OperationalError, match=f"cannot be reached at {host}, port {port}: "):
            save(connection)
        assert not connection.is_open


def test_what_the_nodes_do_not_have(cassandra_server: str) -> None:
    """A missing keyspace and a missing data centre are named, the keyspace with the command that creates it."""
    with connection_to(cassandra_server) as connection, pytest.raises(MissingTableError, match="command 'init-db'"):
        save(connection)
    reason = r"cannot be reached at .*, data centre moon: "
    with connection_to(cassandra_server, local_dc="moon") as connection, pytest.raises(OperationalError, match=reason):
        save(connection)


@pytest.mark.long
def test_role_without_rights(server_folder: ServerFolder) -> None:
    """A wrong password is one clear error, and so is a missing right; what the role may do works after it."""
    from flask_eventsourcing.cassandra.inspecting import Schema, readable_errors

    rights = {
        "authenticator": {"class_name": "PasswordAuthenticator"},
        "authorizer": {"class_name": "CassandraAuthorizer"},
    }
    with cassandra_cluster(server_folder, 1, **rights) as (node,):
        admin = {"username": "cassandra", "password": "cassandra", "keyspace": "bank"}
        with connection_to(node.url, **admin) as connection:
            Schema(connection, {"bank": "uuid"}).create()
            save(connection)
            connection.execute("CREATE ROLE reader WITH LOGIN = true AND PASSWORD = 'reader'")
            connection.execute("GRANT SELECT ON KEYSPACE bank TO reader")
            wrong = {**admin, "password": "wrong"}
            with (
                connection_to(node.url, **wrong) as refused,
                pytest.raises(MissingRightError, match="refuses the login"),
            ):
                save(refused)
            reader = {**admin, "username": "reader", "password": "reader"}
            with connection_to(node.url, **reader) as refused:
                with pytest.raises(MissingRightError, match="reader has no MODIFY permission"):
                    save(refused)
                with pytest.raises(MissingRightError, match="reader has no CREATE permission"), readable_errors():
                    Schema(refused, {"other": "uuid"}).create()
                assert refused.execute("SELECT count(*) FROM bank.bank_log").one()[0] == 1
            save(connection)


@pytest.mark.long
def test_node_that_hangs(cluster: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves succeed while one of three nodes, whichever, hangs with its connections open, as one without a network.

    The first save of a process is one of them, whose statements no node knows.
    """
    from cassandra.cluster import Session

    from flask_eventsourcing.cassandra.inspecting import Schema

    # Who waits for the node's answer to such a statement would wait for ever.
    monkeypatch.setattr(Session, "_default_timeout", 3600.0)

    # Less than the minute for which the driver takes such a node to be up.
    points = {"contact_points": tuple(node.address for node in cluster), "replication": 3, "patience": 25.0}
    with keyspace_on(cluster[0].url) as keyspace, connection_to(cluster[0].url, keyspace=keyspace, **points) as made:
        Schema(made, {"bank": "uuid"}).create()
        save(made)
        for node in cluster:
            process = node.process
            assert process is not None
            with connection_to(node.url, keyspace=keyspace, **points) as fresh:
                wait_for_pools(fresh, len(cluster))
                os.kill(process.pid, signal.SIGSTOP)
                try:
                    save(fresh)
                    for _ in range(3):
                        save(made)
                finally:
                    os.kill(process.pid, signal.SIGCONT)


def wait_for_pools(connection: Connection, count: int) -> None:
    """Wait until a session is connected with so many nodes."""
    while len(connection.session.get_pools()) < count:
        time.sleep(0.1)
