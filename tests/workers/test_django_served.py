"""A Django project under the servers that people use, which was in use before they forked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.workers.serving import Database, gunicorn, serving, shared, uwsgi

pytestmark = pytest.mark.xdist_group("web-servers")
APP = "tests.workers.django_served:app"


def preloaded(port: int) -> list[str]:
    """Return the line that starts gunicorn, which loads the project before it forks."""
    return gunicorn("sync", APP, port, "--preload")


LINES: dict[str, Callable[[int], list[str]]] = {
    "gunicorn": preloaded,
    "uwsgi": partial(uwsgi, "prefork-threads", APP),
}


@pytest.mark.parametrize("server", LINES)
def test_one_application_in_every_process(server: str, database: Database, tmp_path: Path) -> None:
    """Every process has one bank and connections of its own, although both were there before the fork."""
    (account_id,) = database.opened(1)
    with serving(LINES[server], tmp_path, database, BACKEND="pg_backend_pid()") as served:
        answers = served.load([f"/deposit/{account_id}"] * 80, clients=6)
        assert answers.failed == {}, served.log.read_text(errors="replace")[-3000:]
    assert {answer["constructed"] for answer in answers.all} == {1}
    assert len(answers.pids) > 1
    assert shared(answers.backends, database.logged()) == {}
    assert database.balances([account_id]) == [80]
