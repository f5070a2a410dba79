"""Tasks and jobs that save an event each time they are tried, for what a task queue carries on."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery, chain, chord
from flask import Flask
from redis import Redis
from rq import Queue, Retry
from rq.command import send_stop_job_command
from rq.job import Job, JobStatus, get_current_job

from flask_eventsourcing.metadata import null_metadata_in_context
from flask_eventsourcing.workers.celery import init_celery
from flask_eventsourcing.workers.rq import EventSourcingQueue
from tests.workers.queue_app import create_app as create_queue_app
from tests.workers.queue_app import db, es

celery_app = Celery("carrying", broker=os.environ["QUEUE_REDIS"], backend=os.environ["QUEUE_REDIS"])
celery_app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)


def create_app() -> Flask:
    """Make the app."""
    return create_queue_app()


init_celery(celery_app, create_app)


def opened(owner: str) -> None:
    """Store an event, whatever becomes of the task."""
    es.application.open_account(owner)
    db.session.commit()


@celery_app.task(name="saves")
def saves(*owner: Any) -> None:
    """Save, after tasks whose results come first."""
    opened(owner[-1])


@celery_app.task(name="hides")
def hides(owner: str) -> None:
    """Save without the metadata of others."""
    with null_metadata_in_context():
        opened(owner)


@celery_app.task(name="fails", bind=True, autoretry_for=(ValueError,), retry_backoff=False, default_retry_delay=0)
def fails(self: Any, owner: str) -> None:
    """Fail after it has stored an event, until the third try."""
    opened(owner)
    if self.request.retries < 2:
        raise ValueError


@celery_app.task(name="retries", bind=True)
def retries(self: Any, owner: str) -> None:
    """Ask for another try."""
    opened(owner)
    if not self.request.retries:
        raise self.retry(countdown=0)


@celery_app.task(name="dies", bind=True, acks_late=True, reject_on_worker_lost=True)
def dies(self: Any, owner: str) -> None:
    """Die after it has stored an event, until the message is delivered again."""
    opened(owner)
    if not self.request.delivery_info["redelivered"]:
        os._exit(1)


@celery_app.task(name="errs")
def errs(owner: str) -> None:
    """Fail after it has stored an event."""
    opened(owner)
    raise ValueError(owner)


@celery_app.task(name="told")
def told(request: Any, error: Exception, traceback: Any) -> None:
    """Save for a task that has failed; the worker calls it as a function, and commits it."""
    es.application.open_account(str(error))


@celery_app.task(name="sends")
def sends(owner: str) -> None:
    """Send another task."""
    opened(owner)
    saves.delay(owner)


def send_tasks(who: str) -> None:
    """Send what has one root in Celery, and leaves two events or three."""
    for task in (fails, retries, dies, sends):
        task.delay(f"{who} {task.name}")
    chain(saves.si(f"{who} chain"), saves.si(f"{who} chain"), saves.si(f"{who} chain")).apply_async()
    errs.apply_async((f"{who} errback",), link_error=[told.s(), saves.si(f"{who} errback")])
    saves.apply_async((f"{who} link",), link=saves.si(f"{who} link"), countdown=0.1, headers={"own": "1"})


def send_more_tasks(who: str) -> None:
    """Send what has none, so that only a request gives it a correlation."""
    owner = f"{who} chord"
    chord([saves.si(owner), chain(saves.si(owner), saves.si(owner))])(saves.s(owner))
    hides.delay(f"{who} hides")


def save_in_job(owner: str) -> None:
    """Save."""
    opened(owner)


def fail_in_job(owner: str) -> Any:
    """Store an event, and be tried again twice."""
    opened(owner)
    job = get_current_job()
    assert job is not None
    # As jobs do that note how far they are.
    job.meta["tries"] = job.meta.get("tries", 0) + 1
    job.save_meta()
    if job.meta["tries"] < 3:
        raise ValueError


def err_in_job(owner: str) -> None:
    """Store an event, and fail."""
    opened(owner)
    raise ValueError


def wait_in_job(owner: str) -> None:
    """Store an event, have the worker stop this job, and wait for it."""
    opened(owner)
    job = get_current_job()
    assert job is not None
    send_stop_job_command(job.connection, job.id)
    time.sleep(600)


def called_back(job: Job, *_: Any) -> None:
    """Save when a job has ended; the worker commits it."""
    es.application.open_account(job.args[0])


def enqueue_jobs(who: str) -> None:
    """Enqueue jobs of each kind."""
    with Redis.from_url(os.environ["QUEUE_REDIS"]) as connection:
        queue = EventSourcingQueue(connection=connection)
        queue.enqueue(fail_in_job, f"{who} fails", retry=Retry(max=3))
        queue.enqueue(save_in_job, f"{who} success", on_success=called_back)
        queue.enqueue(err_in_job, f"{who} failure", on_failure=called_back)
        queue.enqueue(wait_in_job, f"{who} stopped", on_stopped=called_back)
        first = queue.enqueue(save_in_job, f"{who} depends")
        queue.enqueue(save_in_job, f"{who} depends", depends_on=first, meta={"own": 1})
        _abandon(queue, queue.enqueue(save_in_job, f"{who} abandoned", on_failure=called_back))
        queue.enqueue_many([queue.prepare_data(save_in_job, (f"{who} many",)) for _ in range(2)])


def _abandon(queue: Queue, job: Job) -> None:
    """Leave a job as a worker does that died long ago."""
    queue.remove(job)
    job.set_status(JobStatus.STARTED)
    queue.connection.zadd(queue.started_job_registry.key, {f"{job.id}:gone": 1})


def prepare(kind: str) -> None:
    """Make the tables, and send what there is to send: in a request, and outside of an app."""
    app = create_app()
    with app.app_context():
        db.create_all()

    @app.post("/")
    def send() -> dict[str, str]:
        opened("request itself")
        if kind == "celery":
            send_tasks("request")
            send_more_tasks("request")
        else:
            enqueue_jobs("request")
        return {}

    app.test_client().post("/", headers={"X-Correlation-ID": "c"})
    es.close(app)
    if kind == "celery":
        send_tasks("nobody")
    else:
        enqueue_jobs("nobody")
