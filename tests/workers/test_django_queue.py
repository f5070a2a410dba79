"""RQ's workers of a Django project: ours, and one that is as that of django-rq."""

from __future__ import annotations

import importlib.util

import pytest

from tests.servers import require
from tests.workers.programs import PATIENCE, Workspace

MODULE = "tests.workers.django_queue"
AMOUNTS = (1, 13, 10, 100)
JOBS = {"unit": "pay_in", "plain": "pay_in_block"}
"""With a plain worker, the job has a block of its own."""

pytestmark = pytest.mark.xdist_group("queues")


@pytest.mark.parametrize("workspace", ["postgresql", "sqlite"], indirect=True)
@pytest.mark.parametrize("kind", JOBS)
def test_work_horses(workspace: Workspace, kind: str) -> None:
    """Each work-horse commits its job or rolls it back, on a session of its own; the worker keeps the one it has."""
    require(importlib.util.find_spec("rq"), "RQ", "pip install Flask-EventSourcing[rq]")
    from redis import Redis
    from rq import Queue

    account_id = workspace.python(f"from {MODULE} import prepare; prepare()")
    with Redis.from_url(workspace.redis) as connection:
        queue = Queue(connection=connection)
        for amount in AMOUNTS:
            queue.enqueue(f"{MODULE}.{JOBS[kind]}", account_id, amount)
        with workspace.program(MODULE, kind) as program:
            assert program.process.wait(PATIENCE) == 0, program.output
        assert len(queue.failed_job_registry) == AMOUNTS.count(13), program.output
        assert len(queue.finished_job_registry) == len(AMOUNTS) - AMOUNTS.count(13)
    versions = workspace.query("SELECT originator_version FROM bank_events ORDER BY notification_id")
    assert versions == [(number,) for number in range(1, 5)]
