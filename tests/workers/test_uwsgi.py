"""uWSGI, started by its own command, in each way in which it makes processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.workers import checks
from tests.workers.serving import UWSGI, Database, check, serving, shared, uwsgi

pytestmark = pytest.mark.xdist_group("web-servers")


def line(kind: str, target: str = "tests.workers.served:app") -> Callable[[int], list[str]]:
    """Return what makes the line that starts it on a port."""
    return partial(uwsgi, kind, target)


@pytest.mark.parametrize("kind", UWSGI)
def test_one_application_in_every_process(kind: str, database: Database, tmp_path: Path) -> None:
    """Under load every worker has one application of its own and connections of its own, and no request fails."""
    with serving(line(kind), tmp_path, database) as served:
        answers = check(served, database)
        assert len(answers.pids) > 1


def test_a_context_pushed_by_the_module(database: Database, tmp_path: Path) -> None:
    """A module may have pushed an application context and left its session open when uWSGI forks."""
    with serving(line("prefork"), tmp_path, database, IMPORTED="pushed") as served:
        check(served, database)


@pytest.mark.parametrize("imported", ["used", "pushed"])
def test_the_check_finds_what_is_shared(imported: str, database: Database, tmp_path: Path) -> None:
    """Without the protection the same load finds connections that several processes have used, or breaks them."""
    accounts = database.opened(4)
    with serving(line("prefork"), tmp_path, database, IMPORTED=imported, UNPROTECTED="1") as served:
        answers = served.load([f"/deposit/{accounts[number % 4]}" for number in range(60)], timeout=3)
        assert shared(answers.backends, database.logged()) or answers.failed


@pytest.mark.parametrize("kind", UWSGI)
def test_constructed_before_the_first_request(kind: str, database: Database, tmp_path: Path) -> None:
    """With ``init_uwsgi`` each worker has its application before its first request."""
    with serving(line(kind), tmp_path, database, EAGER="1") as served:
        assert served.ask("/", "GET")["constructed"] == 1
        answer = served.ask("/open/first")
        assert (answer["constructed"], answer["made_in"]) == (1, answer["pid"])


@pytest.mark.parametrize("kind", UWSGI)
def test_sigterm(kind: str, database: Database, tmp_path: Path) -> None:
    """At SIGTERM requests in progress finish, applications are closed, and the exit status is uWSGI's own."""
    checks.ends_gracefully(line(kind), line(kind, "tests.workers.bare:app"), tmp_path, database, EAGER="1")


@pytest.mark.parametrize("kind", ["prefork", "lazy-apps-threads", "gevent"])
def test_a_killed_worker(kind: str, database: Database, tmp_path: Path) -> None:
    """When a worker is killed, what was answered is stored, nothing is stored by half, and another one serves."""
    checks.survives_a_kill(line(kind), tmp_path, database, EAGER="1")
