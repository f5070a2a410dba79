"""Tasks of an app whose events are in Cassandra, for workers of Celery and RQ whose parent process has saved before."""

from __future__ import annotations

import os
from typing import Any, ClassVar
from uuid import UUID

from celery import Celery

from flask_eventsourcing.workers import FlaskAppOrFactory
from flask_eventsourcing.workers.celery import init_celery
from flask_eventsourcing.workers.rq import EventSourcingWorker
from tests.cassandra.hosts import served
from tests.cassandra.hosts.site import opened

celery_app = Celery("cassandra", broker=os.environ["QUEUE_REDIS"], backend=os.environ["QUEUE_REDIS"])
celery_app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)
init_celery(celery_app, served.app, conflict_retries=100)


def pay(number: int, shared: str) -> dict[str, Any]:
    """Pay into an account that all tasks use, and open one: after a conflict nothing was saved."""
    served.es.application.deposit(UUID(shared), 1)
    return opened(served.es.application, f"task {number}")


celery_app.task(name="pay")(pay)


class HorseWorker(EventSourcingWorker):
    """A worker that forks a work-horse for each job."""

    flask_app: ClassVar[FlaskAppOrFactory] = served.app
    conflict_retries = 100
