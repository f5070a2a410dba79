"""A Pyramid application under the servers that people use, which was in use before they forked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.hosts.zope_site import ZopeSite
from tests.workers.serving import gunicorn, serving, uwsgi

pytestmark = pytest.mark.xdist_group("web-servers")
APP = "tests.workers.pyramid_served:app"


def waitress(port: int) -> list[str]:
    """Return the line that starts waitress."""
    return [sys.executable, "-m", "tests.workers.pyramid_served", str(port)]


def preloaded(port: int) -> list[str]:
    """Return the line that starts gunicorn, which loads the application before it forks."""
    return gunicorn("sync", APP, port, "--preload")


LINES: dict[str, Callable[[int], list[str]]] = {
    "waitress": waitress,
    "gunicorn": preloaded,
    "uwsgi": partial(uwsgi, "prefork-threads", APP),
}


@pytest.mark.parametrize("server", LINES)
def test_one_application_in_every_process(server: str, postgres_url: str, tmp_path: Path) -> None:
    """Every process has one bank, although one was constructed before the fork, and no update is lost."""
    bank = ZopeSite(postgres_url, scoped=True)
    account_id = bank.opened()
    with serving(LINES[server], tmp_path, DATABASE_URL=postgres_url) as served:
        answers = served.load([f"/deposit/{account_id}"] * 80, clients=6)
        assert answers.failed == {}, served.log.read_text(errors="replace")[-3000:]
    assert {answer["constructed"] for answer in answers.all} == {1}
    assert (len(answers.pids) > 1) is (server != "waitress")
    with bank.manager:
        assert bank.bank.balance(account_id) == 80
    bank.close()
