"""What real workers carry on: the correlation of a request, and that of tasks which no request has sent."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec

import pytest

from tests.servers import require
from tests.workers.programs import Program, Workspace

CARRYING = "tests.workers.carrying"

pytestmark = pytest.mark.parametrize("workspace", ["sqlite"], indirect=True)


def correlations(workspace: Workspace, program: Program, expected: dict[str, int]) -> dict[str, set[str]]:
    """Return the correlations of the events by their owner, when as many are stored as are expected."""
    found: dict[str, list[str]] = {}

    def are_stored() -> bool:
        found.clear()
        query = "SELECT correlation_id, json_extract(CAST(state AS TEXT), '$.owner') FROM ledger_events"
        for correlation, owner in workspace.query(query):
            found.setdefault(owner, []).append(correlation)
        return {owner: len(each) for owner, each in found.items()} == expected

    program.wait_for(are_stored, 120)
    return {owner: set(each) for owner, each in found.items()}


def assert_carried(found: dict[str, set[str]]) -> None:
    """Check that what comes of a request has its correlation, and what comes of another task has one of its own."""
    of_kind: dict[str, list[set[str]]] = defaultdict(list)
    for owner, each in found.items():
        of_kind[owner.split()[0]].append(each)
    assert all(each == {"c"} for each in of_kind["request"]), found
    assert [len(each) for each in of_kind["nobody"]] == [1] * len(of_kind["nobody"]), found
    assert len(set().union(*of_kind["nobody"])) == len(of_kind["nobody"]), found


@pytest.mark.xdist_group("queues")
def test_celery(workspace: Workspace) -> None:
    """Tries, links, errbacks and chains of a request's task have its correlation; another task has its own."""
    require(find_spec("celery"), "Celery", "pip install Flask-EventSourcing[celery]")
    workspace.python(f"from {CARRYING} import prepare; prepare('celery')")
    counts = {"fails": 3, "retries": 2, "dies": 2, "sends": 2, "chain": 3, "link": 2, "errback": 3}
    expected = {f"{who} {kind}": count for who in ("request", "nobody") for kind, count in counts.items()}
    expected |= {"request itself": 1, "request chord": 4, "request hides": 1}
    command = ["celery", "-A", CARRYING, "worker", "--without-gossip", "--without-mingle", "--concurrency=2"]
    with workspace.program(*command) as program:
        assert_carried(correlations(workspace, program, expected))


@pytest.mark.xdist_group("queues")
def test_rq(workspace: Workspace) -> None:
    """Tries, callbacks and dependent jobs of a request have its correlation; another job has its own."""
    require(find_spec("rq"), "RQ", "pip install Flask-EventSourcing[rq]")
    workspace.python(f"from {CARRYING} import prepare; prepare('rq')")
    expected = {f"request {kind}": count for kind, count in {"itself": 1, "fails": 3, "depends": 2, "many": 2}.items()}
    expected |= {"nobody fails": 3, "nobody depends": 2, "nobody many": 2}
    expected |= {"request abandoned": 1, "nobody abandoned": 1}
    expected |= {f"{who} {kind}": 2 for who in ("request", "nobody") for kind in ("success", "failure", "stopped")}
    worker = "flask_eventsourcing.workers.rq.EventSourcingWorker"
    command = ["rq.cli", "worker", "--url", workspace.redis, "--worker-class", worker]
    with workspace.program(*command, FLASK_APP=CARRYING) as program:
        found = correlations(workspace, program, expected)
        # RQ's jobs that are enqueued one by one have nothing in common.
        assert (len(found.pop("nobody depends")), len(found.pop("nobody many"))) == (2, 2)
        assert_carried(found)
