"""Servers and workers that fork after the module has used a SQLite file, started by their own commands."""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.servers import require
from tests.workers.programs import PATIENCE, Workspace
from tests.workers.serving import gunicorn, serving, uwsgi

TARGET = "tests.workers.sqlite_served:app"
LINES: dict[str, Callable[[int], list[str]]] = {
    "uwsgi": partial(uwsgi, "prefork", TARGET),
    "uwsgi-threads": partial(uwsgi, "prefork-threads", TARGET),
    "gunicorn": lambda port: gunicorn("sync", TARGET, port, "--preload"),
}
COUNT = 30

pytestmark = pytest.mark.xdist_group("web-servers")


def stored(path: Path) -> int:
    """Count the events, as another program that opens and closes the file."""
    with (
        closing(sqlite3.connect(path, timeout=60)) as connection,
        closing(connection.execute("SELECT count(*) FROM bank_events")) as rows,
    ):
        found: int = rows.fetchone()[0]
    return found


@pytest.mark.parametrize("server", LINES)
def test_module_that_uses_the_file(server: str, tmp_path: Path) -> None:
    """Workers whose master has used the file commit what they answer, while another program opens and closes it."""
    path = tmp_path / "bank.db"
    with serving(LINES[server], tmp_path, DATABASE_URL=f"sqlite:///{path}") as served:
        for batch in range(3):
            paths = [f"/open/{batch}-{number}" for number in range(COUNT)]
            answers = served.load(paths, clients=4, timeout=120)
            assert answers.failed == {}, served.log.read_text(errors="replace")[-3000:]
            # Gunicorn's or uWSGI's master has used it once.
            assert stored(path) == 1 + COUNT * (batch + 1)
    assert stored(path) == 1 + COUNT * 3


@pytest.mark.parametrize("server", ["uwsgi", "gunicorn"])
def test_module_that_leaves_a_session_open(server: str, tmp_path: Path) -> None:
    """Workers whose master has a session open at the fork refuse the file with an error that says so."""
    path = tmp_path / "bank.db"
    with serving(LINES[server], tmp_path, DATABASE_URL=f"sqlite:///{path}", IMPORTED="pushed") as served:
        answers = served.load(["/open/a"], clients=1, timeout=120)
        assert next(iter(answers.failed.values())).startswith("AnswerError: 500")
        log = served.log.read_text(errors="replace")
    assert "InheritedDatabaseError" in log
    assert f"{path} was open when this process was forked" in log
    assert stored(path) == 1


@pytest.mark.parametrize("workspace", ["sqlite"], indirect=True)
def test_work_horses(workspace: Workspace) -> None:
    """Each work-horse of an RQ worker that has used the file commits its job."""
    require(importlib.util.find_spec("rq"), "RQ", "pip install Flask-EventSourcing[rq]")
    from redis import Redis
    from rq import Queue

    with Redis.from_url(workspace.redis) as connection:
        queue = Queue(connection=connection)
        for number in range(5):
            queue.enqueue("tests.workers.sqlite_jobs.open_account", str(number))
        command = (
            "rq.cli",
            "worker",
            "--url",
            workspace.redis,
            "--worker-class",
            "tests.workers.sqlite_jobs.UsedWorker",
        )
        with workspace.program(*command, "--burst") as program:
            assert program.process.wait(PATIENCE) == 0, program.output
        assert len(queue.failed_job_registry) == 0, program.output
    assert workspace.query("SELECT count(*) FROM bank_events") == [(6,)]
