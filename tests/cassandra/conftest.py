"""Connections with real nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.cassandra_nodes import keyspace_on

if TYPE_CHECKING:
    from flask_eventsourcing.cassandra import Connection
    from flask_eventsourcing.cassandra.recording import Log


@pytest.fixture(scope="module")
def connection(cassandra_server: str) -> Iterator[Connection]:
    """A connection with the run's node, in a keyspace of its own."""
    from flask_eventsourcing.cassandra import CassandraSettings, Connection

    address, _, port = cassandra_server.partition(":")
    with keyspace_on(cassandra_server) as keyspace:
        made = Connection(CassandraSettings((address,), keyspace, 1, port=int(port)))
        yield made
        made.close()


@pytest.fixture
def new_log(connection: Connection) -> Callable[..., Log]:
    """Makes the log of another application."""
    from flask_eventsourcing.cassandra import schema
    from flask_eventsourcing.cassandra.recording import Log

    def make(id_type: schema.IdType = "uuid") -> Log:
        name = f"App{next(NUMBERS)}"
        schema.create(connection, name.lower(), id_type=id_type)
        return Log(connection, name, id_type=id_type)

    return make


@pytest.fixture(scope="module")
def shared_log(connection: Connection) -> Log:
    """The log of an application that several tests use."""
    from flask_eventsourcing.cassandra import schema
    from flask_eventsourcing.cassandra.recording import Log

    schema.create(connection, "shared")
    return Log(connection, "Shared")


NUMBERS = itertools.count()
