"""The app that web servers serve, for the node and the keyspace that the environment names."""

from __future__ import annotations

import gc
import os
from typing import Any

from flask import Flask, request

from flask_eventsourcing import EventSourcing
from tests.cassandra.hosts.site import Bank, settings

made_in: list[int] = []


class CountedBank(Bank):
    """Notes in which process it was constructed."""

    name = "Bank"

    def __init__(self, env: Any = None) -> None:
        super().__init__(env)
        made_in.append(os.getpid())


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
        from cassandra.cluster import Session

        return {"pid": os.getpid(), "sessions": [type(each) for each in gc.get_objects()].count(Session)}

    @app.post("/open/<owner>")
    def open_account(owner: str) -> dict[str, Any]:
        account = es.application.open_account(request.args.get("owner", owner))
        return {"id": str(account.id), "pid": os.getpid(), "constructed": made_in.count(os.getpid())}

    return app


app: Flask = create_app()
if os.environ["IMPORTED"] == "used":
    # Before the server forks, if that loads the module before.
    with app.app_context():
        es.application.open_account("parent")
