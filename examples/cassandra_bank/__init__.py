"""The bank with its events in Cassandra: the domain module of ``example_app``, and lists in a database beside it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flask import Flask

from examples.cassandra_bank.lists import db, es
from examples.cassandra_bank.views import bank

if TYPE_CHECKING:
    from collections.abc import Mapping


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the app. ``CASSANDRA_NODES`` names nodes as in ``10.0.0.1:9042,10.0.0.2:9042``, all with one port.

    What ``config`` has goes before everything else.
    """
    app = Flask(__name__)
    nodes = [each.partition(":") for each in os.environ.get("CASSANDRA_NODES", "127.0.0.1:9042").split(",")]
    app.config.update(
        EVENTSOURCING_PERSISTENCE="cassandra",
        EVENTSOURCING_CASSANDRA_CONTACT_POINTS=[host for host, _, _ in nodes],
        EVENTSOURCING_CASSANDRA_PORT=int(nodes[0][2] or 9042),
        EVENTSOURCING_CASSANDRA_KEYSPACE="bank",
        # As many copies as there are nodes, up to three.
        EVENTSOURCING_CASSANDRA_REPLICATION=min(len(nodes), 3),
        SQLALCHEMY_DATABASE_URI="sqlite:///lists.db",
    )
    app.config.from_prefixed_env()  # FLASK_SQLALCHEMY_DATABASE_URI, for one
    app.config.update(config or {})
    db.init_app(app)
    es.init_app(app)
    app.register_blueprint(bank)
    return app
