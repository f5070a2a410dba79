"""Real RQ workers: each job's events are stored once, or not at all."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.servers import require
from tests.workers.programs import PATIENCE, Program, Workspace
from tests.workers.test_celery import assert_stored

JOBS = "tests.workers.rq_jobs"

pytestmark = pytest.mark.xdist_group("queues")


@pytest.fixture
def queue(workspace: Workspace) -> Iterator[Any]:
    """A queue, with the tables made."""
    require(importlib.util.find_spec("rq"), "RQ", "pip install Flask-EventSourcing[rq]")
    from redis import Redis
    from rq import Queue

    workspace.python("from tests.workers.queue_app import prepare; prepare()")
    (workspace.folder / "happened").unlink()
    with Redis.from_url(workspace.redis) as connection:
        yield Queue(connection=connection)


@contextmanager
def worker(workspace: Workspace, worker_class: str, *options: str, **variables: str) -> Iterator[Program]:
    """Run a worker."""
    command = ["rq.cli", "worker", "--url", workspace.redis, "--worker-class", worker_class, *options]
    with workspace.program(*command, **variables) as program:
        yield program


def ended(queue: Any, count: int) -> bool:
    """Tell whether that many jobs have come to an end."""
    return len(queue.finished_job_registry) + len(queue.failed_job_registry) >= count


def events(workspace: Workspace) -> int:
    """Count the events."""
    return int(workspace.query("SELECT count(*) FROM ledger_events")[0][0])


@pytest.mark.parametrize(
    ("workspace", "count"),
    [("postgresql", 60), ("sqlite", 30), pytest.param("postgresql", 500, marks=pytest.mark.torture)],
    indirect=["workspace"],
)
def test_every_job_is_done_once(workspace: Workspace, queue: Any, count: int) -> None:
    """Of many jobs, a tenth fails and a tenth has a conflict: the right events are stored, none twice."""
    numbers = range(count)
    jobs = queue.enqueue_many(
        [queue.prepare_data(f"{JOBS}.{'awaited' if number % 7 == 0 else 'numbered'}", (number,)) for number in numbers]
    )
    with ExitStack() as stack:
        workers = [
            stack.enter_context(worker(workspace, f"{JOBS}.QueueWorker", "--name", str(number))) for number in range(2)
        ]
        workers[0].wait_for(lambda: ended(queue, count))
        for program in workers:
            program.end()
    assert_stored(workspace, numbers)
    failed = set(queue.failed_job_registry.get_job_ids())
    assert [job.id in failed for job in jobs] == [number % 10 == 0 for number in numbers]
    tries = workspace.happened("made")
    # A process for each try, and each has made one app, constructed one application and closed it.
    assert len(tries) == len(set(tries)) >= count + count // 10
    assert sorted(workspace.happened("constructed")) == sorted(tries)
    assert set(workspace.happened("closed")) == set(tries)
    assert not {program.process.pid for program in workers} & set(tries)


@pytest.mark.parametrize(("worker_class", "count"), [("QueueSimpleWorker", 20), ("QueueSpawnWorker", 10)])
def test_other_workers_keep_the_same_promises(workspace: Workspace, queue: Any, worker_class: str, count: int) -> None:
    """The worker that does not fork, and the one that spawns, store the right events too."""
    for number in range(count):
        queue.enqueue(f"{JOBS}.numbered", number)
    with worker(workspace, f"{JOBS}.{worker_class}", "--burst") as program:
        assert program.process.wait(PATIENCE) == 0, program.output
    assert_stored(workspace, range(count))
    assert len(queue.failed_job_registry) == count / 10
    processes = [program.process.pid] if worker_class == "QueueSimpleWorker" else workspace.happened("made")
    assert len(set(processes)) == len(processes)
    for what in ("made", "constructed"):
        assert sorted(workspace.happened(what)) == sorted(processes)
    assert set(workspace.happened("closed")) == set(processes)


def test_app_is_found_as_flask_finds_it(workspace: Workspace, queue: Any) -> None:
    """``EventSourcingWorker`` itself takes the app that ``FLASK_APP`` names."""
    job = queue.enqueue(f"{JOBS}.numbered", 2)
    name = "flask_eventsourcing.workers.rq.EventSourcingWorker"
    with worker(workspace, name, "--burst", FLASK_APP="tests.workers.queue_app:create_app") as program:
        assert program.process.wait(PATIENCE) == 0, program.output
    assert job.return_value() == "done 2"
    assert_stored(workspace, range(2, 3))


def test_worker_without_an_app_says_so(workspace: Workspace, queue: Any) -> None:
    """A worker that is not told the app ends at once, with what to set, and takes no job."""
    queue.enqueue(f"{JOBS}.numbered", 2)
    with worker(workspace, "flask_eventsourcing.workers.rq.EventSourcingWorker", "--burst") as program:
        assert program.process.wait(PATIENCE) == 1
    assert "FLASK_APP" in program.output.splitlines()[-1]
    assert len(queue) == 1


def test_job_that_does_not_return_is_rolled_back(workspace: Workspace, queue: Any) -> None:
    """What a job saved is gone when it returns a Retry, runs out of time, or its work-horse is killed."""
    returns = queue.enqueue(f"{JOBS}.ending", "return")
    slow = queue.enqueue(f"{JOBS}.overdue")
    killed = queue.enqueue(f"{JOBS}.ending", "kill")
    with worker(workspace, f"{JOBS}.QueueWorker") as program:
        program.wait_for(lambda: workspace.happened("waiting kill"))
        os.kill(workspace.happened("waiting kill")[0], signal.SIGKILL)
        program.wait_for(lambda: ended(queue, 3))
        program.end()
    assert returns.return_value() == "tried again"
    assert workspace.happened("timeout")
    assert set(queue.failed_job_registry.get_job_ids()) == {slow.id, killed.id}
    assert events(workspace) == 5


def test_job_that_always_has_a_conflict_fails(workspace: Workspace, queue: Any) -> None:
    """A job is enqueued again ``conflict_retries`` times, and then fails with its conflict."""
    job = queue.enqueue(f"{JOBS}.always_conflicts")
    with worker(workspace, f"{JOBS}.QueueWorker", "--burst") as program:
        assert program.process.wait(PATIENCE) == 0, program.output
    assert len(workspace.happened("tried")) == 11
    assert "IntegrityError: always" in job.latest_result().exc_string
    assert events(workspace) == 5


def test_warm_shutdown_finishes_the_job(workspace: Workspace, queue: Any) -> None:
    """A worker that gets SIGTERM lets the job in hand come to its end, and its events are stored."""
    job = queue.enqueue(f"{JOBS}.patient", 2)
    with worker(workspace, f"{JOBS}.QueueWorker") as program:
        program.wait_for(lambda: workspace.happened("waiting"))
        program.end()
    assert job.return_value() == "done"
    assert events(workspace) == 6


def test_job_that_a_job_enqueues_waits_for_its_commit(workspace: Workspace, queue: Any) -> None:
    """A job enqueued by a job is done once, although the first try of its sender had a conflict."""
    queue.enqueue(f"{JOBS}.order", "order")
    with worker(workspace, f"{JOBS}.QueueWorker", "--burst") as program:
        assert program.process.wait(PATIENCE) == 0, program.output
    assert len(workspace.happened("mail:order")) == 1
    assert events(workspace) == 6


def test_work_horse_leaves_its_parents_session_alone(workspace: Workspace, queue: Any) -> None:
    """A worker run within an application context that has uncommitted events shares nothing with its work-horses."""
    jobs = [queue.enqueue(f"{JOBS}.numbered", number) for number in (2, 3)]
    workspace.python(f"from {JOBS} import work_in_context; work_in_context()")
    assert [job.return_value() for job in jobs] == ["done 2", "done 3"]
    # Of the parent two accounts, of each job one and a deposit, and the shared ones.
    assert events(workspace) == 2 + 4 + 5
    parent, *horses = workspace.happened("constructed")
    assert len({parent, *horses}) == 3


def test_job_context_serves_any_worker(workspace: Workspace, queue: Any) -> None:
    """A function decorated with ``job_context`` has its unit of work under RQ's own worker."""
    good, bad = (queue.enqueue(f"{JOBS}.decorated", fail) for fail in (False, True))
    with worker(workspace, "rq.Worker", "--burst") as program:
        assert program.process.wait(PATIENCE) == 0, program.output
    assert good.return_value() == "done"
    assert bad.is_failed
    assert events(workspace) == 6
    assert set(workspace.happened("closed")) == set(workspace.happened("made"))
