"""A Pyramid application under the servers that people use, which was in use before they forked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.hosts.zope_site import ZopeSite
from tests.workers.serving import GUNICORN, UWSGI, gunicorn, serving, shared, uwsgi

pytestmark = pytest.mark.xdist_group("web-servers")
APP = "tests.workers.pyramid_served:app"


def waitress(port: int) -> list[str]:
    """Return the line that starts waitress."""
    return [sys.executable, "-m", "tests.workers.pyramid_served", str(port)]


def preloaded(kind: str, port: int) -> list[str]:
    """Return the line that starts gunicorn, which loads the application before it forks."""
    return gunicorn(kind, APP, port, "--preload")


LINES: dict[str, Callable[[int], list[str]]] = {
    "waitress": waitress,
    **{f"gunicorn {kind}": partial(preloaded, kind) for kind in GUNICORN},
    **{f"uwsgi {kind}": partial(uwsgi, kind, APP) for kind in UWSGI},
}
SHORT = ("waitress", "gunicorn sync", "uwsgi prefork-threads")


@pytest.mark.parametrize("server", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in LINES])
def test_one_application_in_every_process(server: str, postgres_url: str, tmp_path: Path) -> None:
    """Every process has one bank and connections of its own, whatever was used before the fork; no update is lost."""
    bank = ZopeSite(postgres_url, scoped=True)
    account_id = bank.opened()
    with serving(LINES[server], tmp_path, DATABASE_URL=postgres_url) as served:
        answers = served.load([f"/deposit/{account_id}"] * 80, clients=6)
        # A second worker may have been slow to start.
        while server != "waitress" and len(answers.pids) == 1 and len(answers.all) < 800 and not answers.failed:
            answers.done[""] += served.load([f"/deposit/{account_id}"] * 80, clients=6).all
        assert answers.failed == {}, served.log.read_text(errors="replace")[-3000:]
    assert {answer["constructed"] for answer in answers.all} == {1}
    assert (len(answers.pids) > 1) is (server != "waitress")
    assert shared(answers.backends) == {}
    if server != "waitress" and "lazy" not in server:
        assert {answer["before"] for answer in answers.all}.isdisjoint(answers.backends)
    with bank.manager:
        assert bank.bank.balance(account_id) == len(answers.all)
    bank.close()
