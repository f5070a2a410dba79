"""Through uWSGI, a worker of projections and a task queue: one correlation, and a tree of causes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest

from tests.servers import require
from tests.workers.programs import Program, Workspace
from tests.workers.serving import serving, uwsgi

CHAIN = "tests.workers.chain"

pytestmark = pytest.mark.xdist_group("web-servers")


@contextmanager
def task_worker(workspace: Workspace, kind: str) -> Iterator[Program]:
    """Run the worker of a task queue."""
    if kind == "celery":
        command = ["celery", "-A", CHAIN, "worker", "--without-gossip", "--without-mingle", "--concurrency=1"]
    else:
        worker = "flask_eventsourcing.workers.rq.EventSourcingWorker"
        command = ["rq.cli", "worker", "--url", workspace.redis, "--worker-class", worker]
    with workspace.program(*command, CHAIN=kind, FLASK_APP=CHAIN) as program:
        yield program


@pytest.mark.parametrize("workspace", ["postgresql", "sqlite"], indirect=True)
@pytest.mark.parametrize("kind", ["celery", "rq"])
def test_request_event_projection_reaction_task_event(workspace: Workspace, kind: str) -> None:
    """All events that a request causes in three processes have its correlation, and each names its cause."""
    require(find_spec("celery") and find_spec("rq"), "Celery and RQ", "pip install Flask-EventSourcing[celery,rq]")
    workspace.python(f"import os; os.environ['CHAIN'] = {kind!r}; from {CHAIN} import prepare; prepare()")
    variables = {**workspace.environment, "CHAIN": kind, "PYTHONPATH": workspace.environment["PYTHONPATH"]}
    run = ["flask", "--app", CHAIN, "eventsourcing", "run"]
    with (
        serving(partial(uwsgi, "prefork", f"{CHAIN}:create_app()"), workspace.folder, None, **variables) as served,
        workspace.program(*run, CHAIN=kind) as projections,
        task_worker(workspace, kind),
    ):
        # Not what waits for the server's start: a look that was given up is answered too once the app is loaded.
        served.ask("/")
        count = "SELECT count(*) FROM ledger_events"
        projections.wait_for(lambda: workspace.query(count)[0][0] >= 5, 120)
    query = "SELECT event_id, correlation_id, metadata FROM ledger_events ORDER BY notification_id"
    rows: list[tuple[str, str, dict[str, Any]]] = [
        (str(row[0]).replace("-", ""), row[1], row[2] if isinstance(row[2], dict) else json.loads(row[2]))
        for row in workspace.query(query)
    ]
    assert len({row[1] for row in rows}) == 1
    request, handler, *others = (row[0] for row in rows)
    causes = [row[2].get("causation_id", "").replace("-", "") for row in rows]
    assert causes == ["", request, handler, handler, handler]
    assert len({request, handler, *others}) == 5
