"""The Pyramid application that servers run; its import uses the database, and constructs the bank, before any fork."""

from __future__ import annotations

import os
import sys
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from tests.domain import Bank
from tests.pyramid_site.site import VETO, PyramidSite

CONSTRUCTED: list[int] = []
BACKEND = sa.text("SELECT pg_backend_pid()")


class ServedBank(Bank):
    """A bank that knows the process in which it was constructed."""

    name = "Bank"

    def __init__(self, env: Any = None) -> None:
        super().__init__(env=env)
        CONSTRUCTED.append(os.getpid())


def answer(request: Any) -> dict[str, Any]:
    """Pay in, and tell which process has answered, on which connection, and the one that the import has used."""
    if request.method == "POST":
        account_id = UUID(request.path_info.rpartition("/")[2])
        request.eventsourcing[ServedBank].deposit(account_id)
    backend = request.dbsession.scalar(BACKEND)
    return {"pid": os.getpid(), "constructed": CONSTRUCTED.count(os.getpid()), "backend": backend, "before": BEFORE}


def add_views(config: Any) -> None:
    """Add the view that pays in."""
    config.add_route("deposit", "/deposit/{id}")
    config.add_view(answer, route_name="deposit", renderer="json")


site = PyramidSite(
    os.environ["DATABASE_URL"], application=ServedBank, configure=add_views, **{**VETO, "retry.attempts": "50"}
)
site.view = answer
app = site.app
# As a module may do that has something to look up.
site.es.construct()
with site.factory() as session:
    # It stays in the pool when the server forks.
    BEFORE = session.scalar(BACKEND)

if __name__ == "__main__":
    from waitress import serve

    serve(app, listen=f"127.0.0.1:{sys.argv[1]}")
