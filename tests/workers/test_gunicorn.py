"""gunicorn, started by its own command, with each kind of worker, and with the app loaded before the fork or after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.workers import checks
from tests.workers.serving import GUNICORN, Database, Served, check, gunicorn, serving, shared

pytestmark = pytest.mark.xdist_group("web-servers")
PRELOAD = pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
CONFIGURATION = "from flask_eventsourcing.workers.gunicorn import post_worker_init, worker_exit\n"


def line(kind: str, *options: str, target: str = "tests.workers.served:app") -> Callable[[int], list[str]]:
    """Return what makes the line that starts it on a port."""
    return lambda port: gunicorn(kind, target, port, *options)


@pytest.fixture
def hooks(tmp_path: Path) -> str:
    """A configuration file with the hooks."""
    path = tmp_path / "gunicorn.conf.py"
    path.write_text(CONFIGURATION)
    return f"--config={path}"


@PRELOAD
@pytest.mark.parametrize("kind", GUNICORN)
def test_one_application_in_every_process(
    kind: str, preload: tuple[str, ...], database: Database, tmp_path: Path
) -> None:
    """Under load every worker has one application of its own and connections of its own, and no request fails."""
    with serving(line(kind, *preload), tmp_path, database) as served:
        answers = check(served, database)
        assert len(answers.pids) > 1


def test_a_context_pushed_by_the_module(database: Database, tmp_path: Path) -> None:
    """A module may have pushed an application context and left its session open when gunicorn forks."""
    with serving(line("sync", "--preload"), tmp_path, database, IMPORTED="pushed") as served:
        check(served, database)


def test_the_check_finds_what_is_shared(database: Database, tmp_path: Path) -> None:
    """Without the protection the same load finds connections that several processes have used, or breaks them."""
    accounts = database.opened(4)
    with serving(line("sync", "--preload"), tmp_path, database, UNPROTECTED="1") as served:
        answers = served.load([f"/deposit/{accounts[number % 4]}" for number in range(60)], timeout=3)
        # What only took too long on a busy machine says nothing.
        broken = [each for each in answers.failed.values() if each.startswith("AnswerError: 500")]
        assert shared(answers.backends, database.logged()) or broken


@PRELOAD
@pytest.mark.parametrize("kind", GUNICORN)
def test_constructed_before_the_first_request(
    kind: str, preload: tuple[str, ...], hooks: str, database: Database, tmp_path: Path
) -> None:
    """With the hooks each worker has its application before its first request, whatever middleware is around it."""
    made = line(kind, hooks, *preload, target="tests.workers.served:application")
    with serving(made, tmp_path, database, MIDDLEWARE="1") as served:
        assert served.ask("/", "GET")["constructed"] == 1
        answer = served.ask("/open/first")
        assert (answer["constructed"], answer["made_in"]) == (1, answer["pid"])


def test_hooks_without_an_app(hooks: str, tmp_path: Path) -> None:
    """Where no app has the extension, the hooks say so in gunicorn's log and do nothing else."""
    with serving(line("sync", hooks, target="tests.workers.bare:app"), tmp_path) as served:
        assert "no Flask app has called es.init_app(app)" in served.log.read_text()
        assert served.end() == 0


@PRELOAD
@pytest.mark.parametrize("kind", GUNICORN)
def test_sigterm(kind: str, preload: tuple[str, ...], hooks: str, database: Database, tmp_path: Path) -> None:
    """At SIGTERM requests in progress finish, applications are closed, and the exit status is gunicorn's own."""
    bare = line(kind, target="tests.workers.bare:app")
    checks.ends_gracefully(line(kind, hooks, *preload), bare, tmp_path, database)


@PRELOAD
@pytest.mark.parametrize("kind", GUNICORN)
def test_a_killed_worker(kind: str, preload: tuple[str, ...], hooks: str, database: Database, tmp_path: Path) -> None:
    """When a worker is killed, what was answered is stored, nothing is stored by half, and another one serves."""
    checks.survives_a_kill(line(kind, hooks, *preload), tmp_path, database)


@pytest.fixture
def one_worker(database: Database, tmp_path: Path) -> Iterator[Served]:
    """A server with a single worker."""
    with serving(line("gthread", "--workers=1"), tmp_path, database) as served:
        yield served


def grown(served: Served, query: str = "") -> int:
    """Return by how many bytes the one worker has grown over 1,000 requests, after a warm-up."""
    (worker,) = served.processes()
    sizes = []
    for turn, count in enumerate((600, 1000)):
        answers = served.load([f"/open/{turn}-{number}{query}" for number in range(count)], keep_alive=True)
        assert answers.failed == {}
        assert answers.pids == {worker.pid}
        sizes.append(psutil.Process(worker.pid).memory_info().rss)
    return sizes[1] - sizes[0]


def test_memory_does_not_grow(one_worker: Served) -> None:
    """1,000 requests leave less than half a kilobyte each in a worker."""
    assert grown(one_worker) < 512 * 1024


def test_a_leak_is_found(one_worker: Served) -> None:
    """A worker that keeps 4 KB of each request is seen to grow."""
    assert grown(one_worker, "?leak=1") > 2 * 1024 * 1024
