"""Prefork workers of Celery on a SQLite file that their parent has used, or still uses."""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.servers import require
from tests.workers.programs import Program, Workspace
from tests.workers.test_celery import Client

WORKER = (
    *("celery", "-A", "tests.workers.celery_sqlite", "worker", "--without-gossip", "--without-mingle"),
    *("--pool=prefork", "--concurrency=3", "--loglevel=INFO"),
)
COUNT = 40

pytestmark = [pytest.mark.xdist_group("queues"), pytest.mark.parametrize("workspace", ["sqlite"], indirect=True)]


@pytest.fixture
def client(workspace: Workspace) -> Iterator[Client]:
    """A client."""
    require(importlib.util.find_spec("celery"), "Celery", "pip install Flask-EventSourcing[celery]")
    with closing(Client(workspace)) as made:
        yield made


@pytest.fixture
def shared(workspace: Workspace, client: Client) -> str:
    """The account into which all tasks pay."""
    code = """
from tests.workers.sqlite_served import app, site
print(site.opened())
"""
    return workspace.python(code)


def run(program: Program, client: Client, shared: str, path: Path, count: int) -> list[dict[str, Any]]:
    """Send tasks, and look into the file as another program does until they are done."""
    ids = [client.send("open", number, shared) for number in range(count)]

    def is_done() -> bool:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("SELECT count(*) FROM bank_events").fetchall()
        return client.ready(ids)

    program.wait_for(is_done)
    return client.results(ids)


def check_stored(workspace: Workspace, results: list[dict[str, Any]], shared: str) -> None:
    """Check that just what the tasks that succeeded have said is stored."""
    said = sorted(each["result"][0].replace("-", "") for each in results if each["status"] == "SUCCESS")
    opened = workspace.query("SELECT originator_id FROM bank_events WHERE CAST(state AS TEXT) LIKE '%\"task %'")
    assert sorted(row[0] for row in opened) == said
    (last,) = workspace.query(
        f"SELECT max(originator_version) FROM bank_events WHERE originator_id = '{shared.replace('-', '')}'"
    )
    assert last[0] == 1 + len(said)


@pytest.mark.parametrize("options", [(), ("--max-tasks-per-child=4",)])
def test_parent_that_has_used_the_file(
    workspace: Workspace, client: Client, shared: str, options: tuple[str, ...]
) -> None:
    """Tasks at once in several processes, forked at the start or all the time, are each stored once."""
    with workspace.program(*WORKER, *options) as program:
        results = run(program, client, shared, workspace.folder / "queues.db", COUNT)
        program.end()
    assert {each["status"] for each in results} == {"SUCCESS"}, program.output[-6000:]
    assert len({each["result"][1] for each in results}) >= (COUNT // 4 if options else 2)
    check_stored(workspace, results, shared)


def test_parent_that_goes_on_to_write(workspace: Workspace, client: Client, shared: str) -> None:
    """A thread of the parent writes while it forks: all that was told to be done is stored, the parent's too.

    Where its transaction was longer than a fork waits, the task fails, and says why.
    """
    with workspace.program(*WORKER, "--max-tasks-per-child=2", IMPORTED="busy") as program:
        program.wait_for(lambda: workspace.happened("parent wrote"))
        results = run(program, client, shared, workspace.folder / "queues.db", COUNT)
        program.end()
    failed = {each["result"]["exc_type"] for each in results if each["status"] == "FAILURE"}
    assert failed <= {"InheritedDatabaseError"}, program.output[-6000:]
    assert sum(each["status"] == "SUCCESS" for each in results) > COUNT // 2
    check_stored(workspace, results, shared)
    (found,) = workspace.query("SELECT count(*) FROM bank_events WHERE CAST(state AS TEXT) LIKE '%\"parent\"%'")
    assert len(workspace.happened("parent wrote")) <= found[0] <= len(workspace.happened("parent wrote")) + 1


def test_parent_that_has_a_session_open(workspace: Workspace, client: Client, shared: str) -> None:
    """If the parent has the file open at the fork, each task fails, names file and remedy, and stores nothing."""
    with workspace.program(*WORKER, IMPORTED="pushed") as program:
        results = run(program, client, shared, workspace.folder / "queues.db", 4)
        program.end()
    assert {each["status"] for each in results} == {"FAILURE"}
    assert {each["result"]["exc_type"] for each in results} == {"InheritedDatabaseError"}
    assert f"{workspace.folder / 'queues.db'} was open when this process was forked" in program.output
    assert "db.session.remove()" in program.output
    check_stored(workspace, results, shared)
