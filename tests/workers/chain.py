"""A request whose event a projection answers with an event, a reaction with another, and a task with the last."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from flask import Flask
from redis import Redis
from sqlalchemy import orm

from flask_eventsourcing.projections import ModelProjection, on, reaction
from flask_eventsourcing.workers.celery import init_celery, send_after_commit
from flask_eventsourcing.workers.rq import EventSourcingQueue, enqueue_after_commit
from tests.domain import Account
from tests.workers.queue_app import create_app as create_queue_app
from tests.workers.queue_app import db, es

Created: Any = Account.Created


@es.projection
class Chain(ModelProjection):
    """Answers each event with the next."""

    @on(Created)
    def opened(self, event: Any, session: orm.Session) -> None:
        """Answer the request's."""
        if event.owner == "request":
            es.application.open_account("handler")

    @reaction(Created)
    def answered(self, event: Any, key: str) -> None:
        """Answer the handler's, and send what answers it too, in each way that there is."""
        if event.owner != "handler":
            return
        es.application.open_account("reaction")
        if os.environ["CHAIN"] == "celery":
            send_after_commit(last, "after commit")
            last.delay("at once")
            return
        with Redis.from_url(os.environ["QUEUE_REDIS"]) as connection:
            queue = EventSourcingQueue(connection=connection)
            enqueue_after_commit(queue, job, "after commit")
            queue.enqueue(job, "at once")


def create_app() -> Flask:
    """Make the app."""
    app = create_queue_app()

    @app.post("/")
    def request_view() -> dict[str, str]:
        es.application.open_account("request")
        db.session.commit()
        return {}

    return app


celery_app = Celery("chain", broker=os.environ["QUEUE_REDIS"], backend=os.environ["QUEUE_REDIS"])
celery_app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
init_celery(celery_app, create_app)


def job(owner: str) -> None:
    """Open an account."""
    es.application.open_account(owner)


last = celery_app.task(job, name="last")


def prepare() -> None:
    """Make the tables."""
    app = create_app()
    with app.app_context():
        db.create_all()
    es.close(app)
