"""The jobs of the tests, and worker classes that know the Flask app."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, ClassVar

from eventsourcing.persistence import IntegrityError
from redis import Redis
from rq import Queue, Retry, SpawnWorker, get_current_job
from rq.timeouts import JobTimeoutException

from flask_eventsourcing.workers import FlaskAppOrFactory
from flask_eventsourcing.workers.rq import (
    EventSourcingSimpleWorker,
    EventSourcingWorker,
    EventSourcingWorkerMixin,
    enqueue_after_commit,
    job_context,
)
from tests.workers.queue_app import create_app, db, es, happened, work


class QueueWorker(EventSourcingWorker):
    """A worker that forks a work-horse for each job."""

    flask_app: ClassVar[FlaskAppOrFactory] = create_app


class QueueSimpleWorker(EventSourcingSimpleWorker):
    """A worker that performs jobs in its own process."""

    flask_app = create_app


class QueueSpawnWorker(EventSourcingWorkerMixin, SpawnWorker):
    """A worker whose work-horses are new processes."""

    flask_app = staticmethod(create_app)


def tried() -> int:
    """Return how often the current job was tried before."""
    job: Any = get_current_job()
    return job.number_of_retries or 0


def numbered(number: int) -> str:
    """Do the numbered work."""
    return work(number, tried() == 0)


async def awaited(number: int) -> str:
    """Do the numbered work as a coroutine."""
    return work(number, tried() == 0)


def ending(how: str) -> Any:
    """Save an event, and end in another way than by returning."""
    if tried():
        return "tried again"
    es.application.open_account(how)
    if how == "return":
        return Retry(max=1)
    if how == "conflict":
        raise IntegrityError("always")
    happened(f"waiting {how}")
    time.sleep(30)
    return "too late"


def always_conflicts() -> None:
    """Have a conflict at every try."""
    es.application.open_account("always")
    happened("tried")
    raise IntegrityError("always")


def patient(seconds: float) -> str:
    """Take a while, and save an event before it."""
    es.application.open_account("patient")
    happened("waiting")
    time.sleep(seconds)
    return "done"


def overdue() -> None:
    """Save an event, and then run out of time, however long it took until then."""
    es.application.open_account("overdue")
    # RQ's own signal, for which it has set a later time.
    signal.alarm(1)
    try:
        time.sleep(400)
    except JobTimeoutException:
        happened("timeout")
        raise


def order(text: str) -> None:
    """Enqueue another job, which fails at the first try."""
    es.application.open_account(text)
    with Redis.from_url(os.environ["QUEUE_REDIS"]) as connection:
        enqueue_after_commit(Queue(connection=connection), mail, text)
    if not tried():
        raise IntegrityError("a conflict")


def mail(text: str) -> None:
    """Have an effect outside of the database."""
    happened(f"mail:{text}")


@job_context(create_app)
def decorated(fail: bool) -> str:
    """Do something under a worker that knows nothing of Flask."""
    es.application.open_account("decorated")
    if fail:
        raise ValueError
    return "done"


def work_in_context() -> None:
    """Run a worker within an application context whose session is in the midst of a transaction."""
    app = create_app()
    QueueWorker.flask_app = app
    with app.app_context(), Redis.from_url(os.environ["QUEUE_REDIS"]) as connection:
        es.application.open_account("parent")
        QueueWorker([Queue(connection=connection)], connection=connection).work(burst=True)
        es.application.open_account("parent")
        db.session.commit()
    es.close(app)
