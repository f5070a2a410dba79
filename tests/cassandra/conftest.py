"""Connections with real nodes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.cassandra_nodes import Node, cassandra_cluster, keyspace_on
from tests.servers import ServerFolder

if TYPE_CHECKING:
    from flask_eventsourcing.cassandra import Connection
    from flask_eventsourcing.cassandra.recording import Log
    from flask_eventsourcing.cassandra.schema import IdType


# The package cannot be imported without its driver; the tests that need nodes say so when they are skipped.
collect_ignore = [] if importlib.util.find_spec("cassandra") else ["test_protocol.py", "test_fairness.py"]


@pytest.fixture(scope="session")
def cluster(server_folder: ServerFolder) -> Iterator[list[Node]]:
    """Three nodes."""
    with cassandra_cluster(server_folder) as nodes:
        yield nodes


@contextmanager
def connected(urls: Sequence[str]) -> Iterator[Connection]:
    """Give a connection with nodes, in a keyspace of its own."""
    from flask_eventsourcing.cassandra import CassandraSettings, Connection

    addresses = [url.partition(":")[0] for url in urls]
    port = urls[0].partition(":")[2]
    with keyspace_on(urls[0]) as keyspace:
        made = Connection(CassandraSettings(tuple(addresses), keyspace, len(urls), port=int(port)))
        yield made
        made.close()


@pytest.fixture(scope="module")
def connection(cassandra_server: str) -> Iterator[Connection]:
    """A connection with the run's node."""
    with connected([cassandra_server]) as made:
        yield made


@pytest.fixture(scope="module")
def cluster_connection(cluster: list[Node]) -> Iterator[Connection]:
    """A connection with three nodes, of which each has all."""
    with connected([node.url for node in cluster]) as made:
        yield made


def make_log(connection: Connection, id_type: IdType = "uuid") -> Log:
    """Make the log of another application."""
    from flask_eventsourcing.cassandra.inspecting import Schema
    from flask_eventsourcing.cassandra.recording import Log

    name = f"App{next(NUMBERS)}"
    Schema(connection, {name.lower(): id_type}).create()
    return Log(connection, name, id_type=id_type)


@pytest.fixture
def new_log(connection: Connection) -> Callable[..., Log]:
    """Makes the log of another application."""
    return partial(make_log, connection)


@pytest.fixture(scope="module")
def shared_log(connection: Connection) -> Log:
    """The log of an application that several tests use."""
    return make_log(connection)


@pytest.fixture
def new_cluster_log(cluster_connection: Connection) -> Callable[..., Log]:
    """Makes the log of another application, on three nodes."""
    return partial(make_log, cluster_connection)


@pytest.fixture(scope="module")
def shared_cluster_log(cluster_connection: Connection) -> Log:
    """The log of an application on three nodes that several tests use."""
    return make_log(cluster_connection)


NUMBERS = itertools.count()
