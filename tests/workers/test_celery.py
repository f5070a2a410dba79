"""Real Celery workers of every pool: each task's events are stored once, or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psutil
import pytest

from tests.servers import require
from tests.workers.programs import Program, Workspace, expected_work

TASKS = "tests.workers.celery_tasks"
POOLS = {
    "prefork": ["--pool=prefork", "--concurrency=2"],
    "threads": ["--pool=threads", "--concurrency=4"],
    "solo": ["--pool=solo"],
    "gevent": ["--pool=gevent", "--concurrency=8"],
}
KINDS = ("tests.workers.celery_tasks.before", "classy", "loud", "shared", "again")

pytestmark = pytest.mark.xdist_group("queues")


class Client:
    """Sends tasks by their names and reads what became of them, out of Redis."""

    def __init__(self, workspace: Workspace) -> None:
        import redis
        from celery import Celery

        self.app = Celery("client", broker=workspace.redis, backend=workspace.redis, set_as_current=False)
        self.redis = redis.Redis.from_url(workspace.redis)

    def send(self, name: str, *args: Any, **options: Any) -> str:
        """Send a task and return its id."""
        with self.app.connection_for_write() as connection:
            task_id: str = self.app.send_task(name, args, connection=connection, **options).id
        return task_id

    def send_all(self, calls: list[tuple[str, int]]) -> list[str]:
        """Send many tasks through one connection."""
        with self.app.connection_for_write() as connection, self.app.amqp.Producer(connection) as producer:
            return [self.app.send_task(name, (number,), producer=producer).id for name, number in calls]

    def results(self, ids: list[str]) -> list[dict[str, Any]]:
        """Return what is known of tasks."""
        found: Any = self.redis.mget([f"celery-task-meta-{task_id}" for task_id in ids])
        return [json.loads(text) if text else {"status": "PENDING"} for text in found]

    def ready(self, ids: list[str]) -> bool:
        """Tell whether tasks have come to an end."""
        return all(each["status"] in {"SUCCESS", "FAILURE"} for each in self.results(ids))

    def waiting(self, queue: str = "celery") -> int:
        """Return how many messages a queue has."""
        found: Any = self.redis.llen(queue)
        return int(found)

    def close(self) -> None:
        """Close its connections."""
        self.redis.close()
        self.app.backend.client.close()
        self.app.close()


@pytest.fixture
def client(workspace: Workspace) -> Iterator[Client]:
    """A client, with the tables made."""
    require(importlib.util.find_spec("celery"), "Celery", "pip install Flask-EventSourcing[celery]")
    workspace.python("from tests.workers.queue_app import prepare; prepare()")
    (workspace.folder / "happened").unlink()
    with closing(Client(workspace)) as client:
        yield client


@contextmanager
def worker(workspace: Workspace, pool: str, *options: str) -> Iterator[Program]:
    """Run a worker."""
    command = ["celery", "-A", TASKS, "worker", "--without-gossip", "--without-mingle", "--loglevel=INFO"]
    with workspace.program(*command, *POOLS[pool], *options) as program:
        yield program


@pytest.mark.parametrize(
    ("workspace", "pool", "count"),
    [
        ("postgresql", "prefork", 200),
        ("sqlite", "prefork", 100),
        ("postgresql", "threads", 200),
        ("postgresql", "gevent", 200),
        ("sqlite", "solo", 100),
        pytest.param("postgresql", "prefork", 500, marks=pytest.mark.torture),
        pytest.param("sqlite", "prefork", 500, marks=pytest.mark.torture),
    ],
    indirect=["workspace"],
)
def test_every_task_is_done_once(workspace: Workspace, client: Client, pool: str, count: int) -> None:
    """Of many tasks of all kinds, a tenth fails and a tenth has a conflict: the right events are stored, none twice."""
    require(pool != "gevent" or importlib.util.find_spec("gevent"), "gevent", "pip install gevent")
    numbers = range(count)
    # Each kind gets all sorts of numbers: those that fail, that conflict and that do neither.
    ids = client.send_all([(KINDS[(number + number // 5) % len(KINDS)], number) for number in numbers])
    with worker(workspace, pool) as program:
        program.wait_for(lambda: client.ready(ids))
        if not workspace.database.startswith("sqlite"):
            assert_connections_are_idle(workspace)
        processes = [program.process.pid]
        if pool == "prefork":
            processes = [child.pid for child in psutil.Process(program.process.pid).children()]
        program.end()
    assert_stored(workspace, numbers)
    failed = [each["status"] == "FAILURE" for each in client.results(ids)]
    assert failed == [number % 10 == 0 for number in numbers]
    for what in ("made", "constructed"):
        assert sorted(workspace.happened(what)) == sorted(processes), what
    # The library closes an application that is collected once more.
    assert set(workspace.happened("closed")) == set(processes)


def assert_stored(workspace: Workspace, numbers: range) -> None:
    """Check that each task that has not failed is stored, with all that it did, once."""
    rows, deposits = expected_work(numbers)
    assert sorted(text for (text,) in workspace.query("SELECT text FROM note")) == sorted(rows)
    topics = Counter(str(topic) for (topic,) in workspace.query("SELECT topic FROM ledger_events"))
    assert topics == {"tests.domain:Account.Created": len(rows), "tests.workers.queue_app:Clerk.Created": 5} | {
        "tests.domain:Account.Deposited": deposits.total()
    }
    per_account = workspace.query(
        "SELECT count(*) FROM ledger_events GROUP BY originator_id HAVING count(*) > 1 ORDER BY count(*)"
    )
    assert [count for (count,) in per_account] == sorted(1 + count for count in deposits.values())
    states = [json.loads(bytes(state)) for (state,) in workspace.query("SELECT state FROM ledger_events")]
    assert sorted(state["owner"] for state in states if state.get("owner", "").startswith("task")) == sorted(rows)


def assert_connections_are_idle(workspace: Workspace) -> None:
    """Check that no connection is left in a transaction, and that there are not more than workers."""
    states = workspace.query(
        "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert {state for (state,) in states} <= {"idle"}
    assert len(states) <= 10


@pytest.mark.parametrize("pool", POOLS)
def test_application_is_constructed_when_a_process_starts(workspace: Workspace, client: Client, pool: str) -> None:
    """Processes that Celery announces have their application before their first task, the parent has none."""
    require(pool != "gevent" or importlib.util.find_spec("gevent"), "gevent", "pip install gevent")
    with worker(workspace, pool) as program:
        program.wait_for(lambda: " ready." in program.output)
        if pool in {"prefork", "solo"}:
            program.wait_for(lambda: len(workspace.happened("constructed")) == (2 if pool == "prefork" else 1))
        assert (program.process.pid in workspace.happened("made")) is (pool == "solo")
        program.end()


@pytest.mark.parametrize("when", ["before", "after"])
def test_idempotent_task_is_stored_once_although_its_process_is_killed(
    workspace: Workspace, client: Client, when: str
) -> None:
    """With ``acks_late``, a task whose process is killed before its commit, or right after it, is stored once."""
    with worker(workspace, "prefork") as program:
        task_id = client.send("late", when)
        program.wait_for(lambda: workspace.happened("waiting"))
        stored_at_kill = workspace.query("SELECT count(*) FROM ledger_events")
        os.kill(workspace.happened("waiting")[0], signal.SIGKILL)
        program.wait_for(lambda: client.ready([task_id]))
        (result,) = client.results([task_id])
        program.end()
    assert (result["status"], result["result"]) == ("SUCCESS", "done" if when == "before" else "was done")
    assert stored_at_kill == [(5,) if when == "before" else (7,)]
    assert workspace.query("SELECT count(*) FROM ledger_events") == [(7,)]


def test_task_that_does_not_return_is_rolled_back(workspace: Workspace, client: Client) -> None:
    """What a task saved is gone when it ends by Retry, Ignore, Reject, or its time limit."""
    hows = ("retry", "ignore", "reject", "time")
    with worker(workspace, "prefork") as program:
        ids = [client.send("ending", how) for how in hows]
        program.wait_for(lambda: client.ready([ids[0], ids[3]]))
        program.wait_for(lambda: all(f"[{task_id}]" in program.output for task_id in ids))
        results = client.results(ids)
        program.end()
    assert results[0]["result"] == "tried again"
    assert results[3]["result"]["exc_type"] == "SoftTimeLimitExceeded"
    assert workspace.query("SELECT count(*) FROM ledger_events") == [(5,)]


def test_task_that_a_task_sends_waits_for_its_commit(workspace: Workspace, client: Client) -> None:
    """A task sent by a task runs once, although the first try of its sender had a conflict."""
    with worker(workspace, "threads") as program:
        ids = [client.send("order", f"order-{number}") for number in range(10)]
        program.wait_for(lambda: client.ready(ids))
        program.wait_for(lambda: all(workspace.happened(f"mail:order-{number}") for number in range(10)))
        # What would come twice has been sent by now.
        program.wait_for(lambda: client.waiting() == 0)
        program.end()
    assert [len(workspace.happened(f"mail:order-{number}")) for number in range(10)] == [1] * 10
    assert workspace.query("SELECT count(*) FROM ledger_events") == [(15,)]


def test_map_is_one_unit_of_work(workspace: Workspace, client: Client) -> None:
    """``task.map(…)`` runs in one application context and one unit of work."""
    account = workspace.python("from tests.workers.queue_app import shared_account; print(shared_account(0))")
    nobody = "00000000-0000-0000-0000-000000000000"
    each: dict[str, Any] = {"task": "each", "args": [], "kwargs": {}, "options": {}}
    with worker(workspace, "solo") as program:
        ids = [client.send("celery.map", kwargs={"task": each, "it": [account, last]}) for last in (account, nobody)]
        program.wait_for(lambda: client.ready(ids))
        results = [result["status"] for result in client.results(ids)]
        program.end()
    assert results == ["SUCCESS", "FAILURE"]
    assert workspace.query("SELECT count(*) FROM ledger_events") == [(7,)]


def test_failing_factory_is_told(workspace: Workspace, client: Client) -> None:
    """When the Flask app cannot be made, the log and each task's failure say why."""
    with workspace.program(
        "celery", "-A", TASKS, "worker", "--pool=solo", "--loglevel=INFO", QUEUE_DATABASE="mysql+nothing://"
    ) as program:
        task_id = client.send("shared", 1)
        program.wait_for(lambda: client.ready([task_id]))
        (result,) = client.results([task_id])
        program.end()
    assert result["status"] == "FAILURE"
    assert "nothing" in str(result["result"])
