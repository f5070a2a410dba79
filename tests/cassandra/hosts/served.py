"""The app that web servers serve, for the node and the keyspace that the environment names."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, request

from flask_eventsourcing import EventSourcing
from tests.cassandra.hosts.site import CountedBank, opened, sessions_of_process, settings

es = EventSourcing(application=CountedBank)


def create_app() -> Flask:
    """Make the app."""
    app = Flask(__name__)
    app.config.update(settings(os.environ["NODE"], os.environ["KEYSPACE"]))
    if points := os.environ.get("CONTACT_POINTS"):
        app.config.update(EVENTSOURCING_CASSANDRA_CONTACT_POINTS=points.split())
    es.init_app(app)

    @app.get("/")
    def index() -> dict[str, Any]:
        return {}

    @app.post("/sessions")
    def sessions() -> dict[str, Any]:
        return sessions_of_process()

    @app.post("/open/<owner>")
    def open_account(owner: str) -> dict[str, Any]:
        return opened(es.application, request.args.get("owner", owner))

    return app


app: Flask = create_app()
if os.environ["IMPORTED"] == "used":
    # Before the server forks, if that loads the module before.
    with app.app_context():
        es.application.open_account("parent")
