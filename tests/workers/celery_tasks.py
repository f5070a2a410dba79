"""The Celery app of the tests, ``celery -A tests.workers.celery_tasks worker``, with tasks of every kind."""

from __future__ import annotations

import os
import time
from typing import Any
from uuid import UUID

from celery import Celery, Task, shared_task
from celery.exceptions import Ignore, Reject
from eventsourcing.persistence import IntegrityError
from flask import current_app

from flask_eventsourcing.workers.celery import init_celery, send_after_commit
from tests.workers.queue_app import Clerk, create_app, db, es, happened, work

celery_app = Celery("tests", broker=os.environ["QUEUE_REDIS"], backend=os.environ["QUEUE_REDIS"])
celery_app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    # On Redis a message that was not acknowledged waits for this before another worker gets it.
    broker_transport_options={"visibility_timeout": 3600},
)


@celery_app.task(bind=True)
def before(self: Any, number: int) -> str:
    """A task that is there before ``init_celery``."""
    return work(number, self.request.retries == 0)


init_celery(celery_app, create_app, conflict_retries=100)


class Loud(Task):
    """A base class of the user's, with a ``__call__`` of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do more around the task."""
        return super().__call__(*args, **kwargs)


class Classy(Task):
    """A task that is a class."""

    name = "classy"

    def run(self, number: int) -> str:
        """Work."""
        return work(number, self.request.retries == 0)


celery_app.register_task(Classy())


@celery_app.task(bind=True, base=Loud, name="loud")
def loud(self: Any, number: int) -> str:
    """A task with a base class of the user's."""
    return work(number, self.request.retries == 0)


@shared_task(bind=True, name="shared")
def shared(self: Any, number: int) -> str:
    """A task of a package that does not know the app."""
    return work(number, self.request.retries == 0)


@celery_app.task(bind=True, name="again", autoretry_for=(ConnectionError,), retry_backoff=1, max_retries=2)
def again(self: Any, number: int) -> str:
    """A task that Celery retries for reasons of its own."""
    done = work(number, self.request.retries == 0)
    if number % 10 == 2 and self.request.retries == 0:
        raise ConnectionError
    return done


KINDS = (before.name, Classy.name, "loud", "shared", "again")


def wait_to_be_killed() -> None:
    """Wait longer than the test does."""
    happened("waiting")
    time.sleep(60)


@celery_app.task(name="late", acks_late=True, reject_on_worker_lost=True, bind=True)
def late(self: Any, when: str) -> str:
    """A task that may run twice, and stores its event once: its id is made from that of the task."""
    clerk = Clerk(owner=self.request.id)
    clerk.deposit(1)
    first = self.request.delivery_info["redelivered"] is not True
    try:
        with db.session.begin_nested():
            es.application.save(clerk)
    except IntegrityError:
        return "was done"
    if first and when == "before":
        wait_to_be_killed()
    elif first:
        unit = current_app.extensions["eventsourcing"].host.unit()
        unit.on_commit(wait_to_be_killed)
    return "done"


@celery_app.task(name="ending", bind=True, soft_time_limit=2, max_retries=1)
def ending(self: Any, how: str) -> str:
    """A task that saves an event and ends in another way than by returning."""
    if self.request.retries:
        return "tried again"
    es.application.open_account(how)
    if how == "retry":
        raise self.retry(countdown=0.1)
    if how == "ignore":
        raise Ignore
    if how == "reject":
        raise Reject("no", requeue=False)
    time.sleep(30)
    return "too late"


@celery_app.task(name="mail")
def mail(text: str) -> None:
    """A task with an effect outside of the database."""
    happened(f"mail:{text}")


@celery_app.task(name="order", bind=True)
def order(self: Any, text: str) -> None:
    """A task that sends another one, which fails at the first try."""
    es.application.open_account(text)
    send_after_commit(mail, text)
    if not self.request.retries:
        raise IntegrityError("a conflict")


@celery_app.task(name="each")
def each(account_id: str) -> None:
    """A task that is called for each of several arguments, ``each.map(…)``."""
    es.application.deposit(UUID(account_id))
