"""Workers of task queues that fork from a process with a session: each task is done once, on a session of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.cassandra.hosts.conftest import MakeApp
from tests.servers import require
from tests.workers.programs import PATIENCE, Workspace
from tests.workers.test_celery import Client

TASKS = "tests.cassandra.hosts.queued"
CELERY = (
    *("celery", "-A", TASKS, "worker", "--without-gossip", "--without-mingle"),
    *("--pool=prefork", "--concurrency=3", "--loglevel=INFO"),
)
COUNT = 24

pytestmark = pytest.mark.xdist_group("queues")


@pytest.fixture
def workspace(
    tmp_path: Path, redis_url: str, cassandra_server: str, bank_keyspace: str, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A Redis, and the keyspace of the module."""
    for name, value in (("NODE", cassandra_server), ("KEYSPACE", bank_keyspace), ("IMPORTED", "used")):
        monkeypatch.setenv(name, value)
    return Workspace(tmp_path, "", redis_url)


def in_celery(workspace: Workspace, shared: str) -> list[dict[str, Any]]:
    """Run tasks of Celery, and return what they have returned."""
    require(importlib.util.find_spec("celery"), "Celery", "pip install Flask-EventSourcing[celery]")
    with closing(Client(workspace)) as client, workspace.program(*CELERY) as program:
        ids = [client.send("pay", number, shared) for number in range(COUNT)]
        program.wait_for(lambda: client.ready(ids))
        results = client.results(ids)
        program.end()
    assert {each["status"] for each in results} == {"SUCCESS"}, program.output[-6000:]
    return [each["result"] for each in results]


def in_rq(workspace: Workspace, shared: str) -> list[dict[str, Any]]:
    """Run jobs of RQ, and return what they have returned."""
    require(importlib.util.find_spec("rq"), "RQ", "pip install Flask-EventSourcing[rq]")
    from redis import Redis
    from rq import Queue

    command = ["rq.cli", "worker", "--burst", "--url", workspace.redis, "--worker-class", f"{TASKS}.HorseWorker"]
    with Redis.from_url(workspace.redis) as connection:
        queue = Queue(connection=connection)
        jobs = [queue.enqueue(f"{TASKS}.pay", number, shared) for number in range(COUNT // 3)]
        with workspace.program(*command) as program:
            assert program.process.wait(PATIENCE) == 0, program.output[-6000:]
        return [job.return_value() for job in jobs]


@pytest.mark.parametrize("run", [in_celery, in_rq])
def test_each_task_is_done_once(
    run: Callable[[Workspace, str], list[dict[str, Any]]], workspace: Workspace, make_app: MakeApp
) -> None:
    """Tasks in processes forked from one that has a session are each stored once, by an application of the process."""
    app, es = make_app()
    with app.app_context():
        shared = es.application.open_account("shared").id
        answers = run(workspace, str(shared))
        assert {answer["constructed"] for answer in answers} == {1}
        owners = {es.application.repository.get(UUID(answer["id"])).owner for answer in answers}
        assert owners == {f"task {number}" for number in range(len(answers))}
        assert es.application.repository.get(shared).balance == len(answers)
