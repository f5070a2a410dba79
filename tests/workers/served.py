"""The app that the servers of these tests run; its import uses the database before any fork.

``IMPORTED`` says in which way: ``pushed`` is the mistake to push an application context in the module and to leave its
session open; with ``used`` a connection is idle, another one in use and a subscription made.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from flask import Flask, request, request_started

from flask_eventsourcing.persistence import forks
from flask_eventsourcing.web import uncommitted
from flask_eventsourcing.web.sessions import ScopeInProcess
from flask_eventsourcing.workers.uwsgi import init_uwsgi
from tests.bank import make_site
from tests.domain import Bank

CONSTRUCTED: list[int] = []
KEPT: list[Any] = []


class ServedBank(Bank):
    """A bank that knows the process in which it was constructed, and writes down its end."""

    name = "Bank"

    def __init__(self, env: Any = None) -> None:
        super().__init__(env=env)
        self.made_in = os.getpid()
        CONSTRUCTED.append(self.made_in)

    def close(self) -> None:
        """Write down which process closes the application of which."""
        with Path(os.environ["CLOSED"]).open("a") as file:
            file.write(f"{self.made_in} {os.getpid()}\n")
        super().close()


site = make_site(
    os.environ["DATABASE_URL"],
    ServedBank,
    create=False,
    SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 4, "max_overflow": 2},
)
app: Flask = site.app


def backend() -> int:
    """Return the server's process of the session's connection, and leave a mark of this process at the server."""
    found: int = site.db.session.scalar(sa.text(f"SELECT pg_backend_pid() /* process={os.getpid()} */"))
    return found


def report() -> dict[str, Any]:
    """Return the values that tell which process has answered."""
    bank: Any = site.bank
    pid = os.getpid()
    return {
        "pid": pid,
        "parent": os.getppid(),
        "constructed": CONSTRUCTED.count(pid),
        "made_in": bank.made_in,
        "backend": backend(),
    }


@app.get("/")
def ready() -> dict[str, Any]:
    """Answer that the app is there, without using it."""
    return {"pid": os.getpid(), "constructed": CONSTRUCTED.count(os.getpid())}


@app.post("/deposit/<uuid:account_id>")
def deposit(account_id: UUID) -> dict[str, Any]:
    """Pay in."""

    @site.es.retry_on_conflict(times=50)
    def pay_in() -> dict[str, Any]:
        site.bank.deposit(account_id)
        return report()

    return pay_in()


@app.post("/open/<name>")
def open_account(name: str) -> dict[str, Any]:
    """Open an account, add a row of the ORM, and wait between the two for as long as the query says."""
    site.bank.open_account(name)
    found = report()
    time.sleep(request.args.get("seconds", 0.0, float))
    site.note(name)
    site.db.session.commit()
    if "leak" in request.args:
        KEPT.append(bytearray(4096))
    return found


def unprotect() -> None:
    """Take away what protects a forked process, for the test of the tests."""
    with app.app_context():
        engine = site.db.engine
    for name in ("connect", "dispose", "recreate"):
        del vars(engine.pool)[name]
    sa.event.remove(engine, "checkout", forks._note_process)
    scope: Any = site.db.session.registry.scopefunc
    if isinstance(scope, ScopeInProcess):
        site.db.session.registry.scopefunc = scope._scope
    request_started.disconnect(uncommitted._begin_request, app)


if os.environ.get("UNPROTECTED"):
    unprotect()
if os.environ["IMPORTED"] == "pushed":
    app.app_context().push()
    KEPT.append(site.bank.open_account("never committed"))
    backend()
else:
    with app.app_context():
        KEPT.append(site.bank.recorder.subscribe())
        KEPT[0]._waiter.wait(0.1)
        KEPT.append(site.db.engine.connect())
        KEPT[1].scalar(sa.text(f"SELECT pg_backend_pid() /* process={os.getpid()} */"))
        backend()
if os.environ.get("EAGER"):
    init_uwsgi(app)
if os.environ.get("MIDDLEWARE"):
    # As users wrap it; gunicorn is then given no Flask app.
    application = import_module("werkzeug.middleware.proxy_fix").ProxyFix(app)
