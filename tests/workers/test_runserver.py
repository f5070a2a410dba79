"""``manage.py runserver`` with its reloader."""

from __future__ import annotations

import socket
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from tests.workers.serving import AnswerError, Answers, Database, Served, serving, shared

pytestmark = pytest.mark.xdist_group("web-servers")
MANAGE = """
import sys
import edited
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""
CODE = "from tests.workers.django_served import *\nVERSION = {}\n"
DEPOSITS = 40


def line(port: int) -> list[str]:
    """Return the line that starts the development server."""
    return [sys.executable, "manage.py", "runserver", f"127.0.0.1:{port}"]


def write(folder: Path, version: int) -> None:
    """Write the module, whose time the reloader looks at."""
    (folder / "edited.py").write_text(CODE.format(version))


def paid(served: Served, database: Database, account_id: object) -> Answers:
    """Pay in, and check that one application has answered on connections of its own."""
    answers = served.load([f"/deposit/{account_id}"] * DEPOSITS, clients=4)
    assert answers.failed == {}, served.log.read_text(errors="replace")[-3000:]
    assert {answer["constructed"] for answer in answers.all} == {1}
    assert len(answers.pids) == 1
    assert shared(answers.backends, database.logged()) == {}
    return answers


def test_reloader(database: Database, tmp_path: Path) -> None:
    """Only the process that serves has an application; after an edit there is another, and the first has ended."""
    (account_id,) = database.opened(1)
    write(tmp_path, 1)
    (tmp_path / "manage.py").write_text(MANAGE)
    with serving(line, tmp_path, database, BACKEND="pg_backend_pid()", IMPORTED="none") as served:
        before = paid(served, database, account_id)
        (serving_process,) = before.pids
        assert [each.pid for each in served.processes()] == [serving_process]
        pid = restarted(served, before.pids, tmp_path)
        after = paid(served, database, account_id)
        assert after.pids == {pid}
        assert [each.pid for each in served.processes()] == [pid]
        assert not psutil.pid_exists(serving_process)
        wait_until_gone(database, before)
        served.end()
        wait_until_gone(database, after)
        with closing(socket.socket()) as probe:
            assert probe.connect_ex(("127.0.0.1", served.port)) != 0
    assert database.balances([account_id]) == [2 * DEPOSITS]
    # The process that watches has imported the project too.
    assert (tmp_path / "constructed").read_text().split() == [str(serving_process), str(pid)]


def restarted(served: Served, before: set[int], folder: Path) -> int:
    """Edit the module until another process answers, and return that."""
    deadline = time.monotonic() + 120
    edits = 1
    edited = 0.0
    while time.monotonic() < deadline:
        # An edit before the reloader first looks at a file is none for it.
        if time.monotonic() > edited + 5:
            edits, edited = edits + 1, time.monotonic()
            write(folder, edits)
        time.sleep(0.1)
        with suppress(OSError, AnswerError):
            pid: int = served.ask("/", "GET")["pid"]
            if pid not in before:
                return pid
    raise AssertionError("the reloader did not restart the server")


def wait_until_gone(database: Database, answers: Answers) -> None:
    """Wait until the server of the database has none of the connections any more."""
    deadline = time.monotonic() + 60
    while left := set(database.activity()) & set(answers.backends):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
