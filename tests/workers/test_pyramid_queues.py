"""Real workers of Celery and RQ for a Pyramid application: what its requests have sent after their commit, once."""

from __future__ import annotations

import importlib.util
import json
from uuid import UUID

import pytest

from tests.servers import require
from tests.workers.programs import PATIENCE, Workspace

SITE = "tests.workers.pyramid_queue"
CELERY = [
    "celery",
    "-A",
    f"{SITE}:celery_app",
    "worker",
    "--without-gossip",
    "--without-mingle",
    "--pool=prefork",
    "--concurrency=2",
]
RQ = ["rq.cli", "worker", "--worker-class", f"{SITE}.SiteWorker", "--burst", "--url"]

pytestmark = pytest.mark.xdist_group("queues")


def balance(workspace: Workspace, account_id: str) -> int:
    """Add up what is in the log, in which nothing may be missing."""
    rows = workspace.query("SELECT originator_id, originator_version, state FROM ledger_events ORDER BY 2")
    own = [row for row in rows if UUID(str(row[0])) == UUID(account_id)]
    assert [version for _, version, _ in own] == list(range(1, len(own) + 1))
    return sum(json.loads(bytes(state)).get("amount", 0) for _, _, state in own)


@pytest.mark.parametrize("workspace", ["postgresql", pytest.param("sqlite", marks=pytest.mark.long)], indirect=True)
def test_tasks_and_jobs_of_requests(workspace: Workspace) -> None:
    """Requests that were committed have each task and job done once, by workers that were forked; others have none."""
    for each in ("celery", "rq"):
        require(importlib.util.find_spec(each), each, f"pip install Flask-EventSourcing[{each}]")
    account_id = workspace.python(f"from {SITE} import send; send()")
    assert balance(workspace, account_id) == 2
    with workspace.program(*CELERY) as worker:
        worker.wait_for(lambda: balance(workspace, account_id) == 2 + 2 * 10 + 6 * 1000)
        worker.end()
    with workspace.program(*RQ, workspace.redis) as worker:
        assert worker.process.wait(PATIENCE) == 0, worker.output
    assert balance(workspace, account_id) == 2 + 2 * 10 + 6 * 1000 + 2 * 100
    # One in the program that has sent, one in each process of Celery's, one for each job.
    assert len(set(workspace.happened("constructed"))) == len(workspace.happened("constructed")) == 1 + 2 + 2
