"""An app on a SQLite file that is used when the module is imported, before any fork.

With ``IMPORTED=pushed`` the module leaves a session open.
"""

from __future__ import annotations

import os

import sqlalchemy as sa
from flask import Flask

from tests.bank import make_site

site = make_site(
    os.environ.get("DATABASE_URL") or os.environ["QUEUE_DATABASE"],
    EVENTSOURCING_LOCK_TIMEOUT=60,
    PROPAGATE_EXCEPTIONS=False,
)
app: Flask = site.app


def open_account(name: str) -> str:
    """Open an account in the current transaction."""
    site.bank.open_account(name)
    return name


@app.get("/")
def ready() -> dict[str, int]:
    """Answer that the app is there, without using it."""
    return {"pid": os.getpid()}


@app.post("/open/<name>")
def open_it(name: str) -> dict[str, int]:
    """Open an account."""
    open_account(name)
    site.db.session.commit()
    return {"pid": os.getpid()}


with app.app_context():
    open_account("at import")
    site.db.session.commit()
if os.environ.get("IMPORTED") == "pushed":
    app.app_context().push()
    site.db.session.scalar(sa.text("SELECT count(*) FROM bank_events"))
