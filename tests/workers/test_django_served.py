"""A Django project under the servers that people use, which was in use before they forked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

from tests.bank import make_site
from tests.workers.serving import Database, gunicorn, serving, shared, uwsgi
from tests.workers.test_sqlite_served import stored

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


SQLITE: dict[str, tuple[Callable[[int], list[str]], str]] = {
    "gunicorn": (preloaded, "used"),
    "uwsgi": (partial(uwsgi, "prefork", APP), "closed"),
    "uwsgi-threads": (partial(uwsgi, "prefork-threads", APP), "closed"),
}
COUNT = 30


def opened(url: str) -> UUID:
    """Open an account in a SQLite file, by a process that leaves nothing open."""
    site = make_site(url)
    account_id = site.opened()
    site.close()
    return account_id


@pytest.mark.parametrize("server", SQLITE)
def test_sqlite_file_that_was_used_before_the_fork(server: str, tmp_path: Path) -> None:
    """Workers whose master has used the file commit what they answer, while another program opens and closes it."""
    url = f"sqlite:///{tmp_path / 'bank.db'}"
    account_id = opened(url)
    line, imported = SQLITE[server]
    with serving(line, tmp_path, DATABASE_URL=url, BACKEND="0", IMPORTED=imported) as served:
        for batch in range(1, 4):
            answers = served.load([f"/deposit/{account_id}"] * COUNT, clients=4, timeout=120)
            assert answers.failed == {}, served.log.read_text(errors="replace")[-3000:]
            assert stored(tmp_path / "bank.db") == 1 + COUNT * batch


@pytest.mark.parametrize("kind", ["prefork", "prefork-threads"])
def test_sqlite_file_that_is_left_open_under_uwsgi(kind: str, tmp_path: Path) -> None:
    """Where uWSGI forks with the file open, every thread of a worker refuses it, with an error that says so."""
    url = f"sqlite:///{tmp_path / 'bank.db'}"
    account_id = opened(url)
    with serving(partial(uwsgi, kind, APP), tmp_path, DATABASE_URL=url, BACKEND="0") as served:
        answers = served.load([f"/deposit/{account_id}?{number}" for number in range(COUNT)], clients=8, timeout=120)
        log = served.log.read_text(errors="replace")
    assert answers.all == []
    assert all(each.startswith("AnswerError: 500") for each in answers.failed.values())
    assert "InheritedDatabaseError" in log
    assert "close_all()" in log
    assert stored(tmp_path / "bank.db") == 1
