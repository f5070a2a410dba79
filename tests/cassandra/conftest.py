"""Connections with real nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.cassandra_nodes import Node, cassandra_cluster, keyspace_on, require_cassandra
from tests.length import IS_LONG
from tests.servers import ServerFolder

if TYPE_CHECKING:
    from flask_eventsourcing.cassandra import Connection
    from flask_eventsourcing.cassandra.recording import Log
    from flask_eventsourcing.cassandra.schema import IdType


@pytest.fixture(scope="module")
def cluster(server_folder: ServerFolder) -> Iterator[list[Node]]:
    """Three nodes."""
    with cassandra_cluster(server_folder) as nodes:
        yield nodes


@pytest.fixture(scope="module", params=["node", *(["cluster"] if IS_LONG else [])])
def connection(request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection in a keyspace of its own: with the run's node, and in a long run with three nodes too."""
    if request.param == "node":
        urls, copies = [request.getfixturevalue("cassandra_server")], 1
    else:
        urls, copies = [node.url for node in request.getfixturevalue("cluster")], 3
    require_cassandra()
    from flask_eventsourcing.cassandra import CassandraSettings, Connection

    addresses = [url.partition(":")[0] for url in urls]
    port = urls[0].partition(":")[2]
    with keyspace_on(urls[0]) as keyspace:
        made = Connection(CassandraSettings(tuple(addresses), keyspace, copies, port=int(port)))
        yield made
        made.close()


@pytest.fixture
def new_log(connection: Connection) -> Callable[..., Log]:
    """Makes the log of another application."""
    from flask_eventsourcing.cassandra.inspecting import Schema
    from flask_eventsourcing.cassandra.recording import Log

    def make(id_type: IdType = "uuid") -> Log:
        name = f"App{next(NUMBERS)}"
        Schema(connection, {name.lower(): id_type}).create()
        return Log(connection, name, id_type=id_type)

    return make


@pytest.fixture(scope="module")
def shared_log(connection: Connection) -> Log:
    """The log of an application that several tests use."""
    from flask_eventsourcing.cassandra.inspecting import Schema
    from flask_eventsourcing.cassandra.recording import Log

    Schema(connection, {"shared": "uuid"}).create()
    return Log(connection, "Shared")


NUMBERS = itertools.count()
