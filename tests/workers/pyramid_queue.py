"""A Pyramid application with Celery tasks and RQ jobs, laid out as a user would, for real workers of both."""

from __future__ import annotations

import os
from typing import Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
import zope.sqlalchemy
from celery import Celery
from pyramid.config import Configurator
from redis import Redis
from rq import Queue
from sqlalchemy import orm

from flask_eventsourcing.contrib.pyramid import event_models
from flask_eventsourcing.workers import FlaskAppOrFactory
from flask_eventsourcing.workers.celery import init_celery, send_after_commit
from flask_eventsourcing.workers.rq import EventSourcingWorker, enqueue_after_commit
from tests.workers.queue_app import Ledger


class Base(orm.DeclarativeBase):
    """The base of the models."""


LedgerRecords = event_models(Base, "Ledger")
engine = sa.create_engine(os.environ["QUEUE_DATABASE"])
factory = orm.sessionmaker(engine)


def dbsession(request: Any) -> orm.Session:
    """Make the session of a request."""
    session = factory()
    zope.sqlalchemy.register(session, transaction_manager=request.tm)
    return session


def order(request: Any) -> Any:
    """Pay in, send a task and a job that do so too, and answer with a status."""
    account_id = request.params["account"]
    request.eventsourcing[Ledger].deposit(UUID(account_id), 1)
    send_after_commit(pay_in, account_id, 10)
    with Redis.from_url(os.environ["QUEUE_REDIS"]) as connection:
        enqueue_after_commit(Queue(connection=connection), pay_in_job, account_id, 100)
        request.response.status_code = int(request.params["status"])
        # The connection is used once more, by the commit.
        request.tm.commit() if request.response.status_code < 400 else request.tm.abort()
        request.tm.begin()
    return {}


def main(**settings: Any) -> Any:
    """Make the WSGI application."""
    veto = {"tm.commit_veto": "pyramid_tm.default_commit_veto", "tm.manager_hook": "pyramid_tm.explicit_manager"}
    with Configurator(settings={**veto, **settings}) as config:
        config.include("pyramid_tm")
        config.registry["dbsession_factory"] = factory
        config.add_request_method(dbsession, reify=True)
        config.include("flask_eventsourcing.contrib.pyramid")
        config.add_eventsourcing(Ledger, models=LedgerRecords)
        config.add_route("order", "/")
        config.add_view(order, route_name="order", renderer="json")
    return config.make_wsgi_app()


app = main()
es = app.registry["flask_eventsourcing"]
celery_app = Celery("site", broker=os.environ["QUEUE_REDIS"], backend=os.environ["QUEUE_REDIS"])
celery_app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
init_celery(celery_app, app, conflict_retries=100)
with engine.connect() as before_the_fork:
    before_the_fork.exec_driver_sql("SELECT 1")


class SiteWorker(EventSourcingWorker):
    """A worker of the application's."""

    flask_app: ClassVar[FlaskAppOrFactory | None] = app
    conflict_retries = 100


@celery_app.task(name="pay_in")
def pay_in(account_id: str, amount: int) -> None:
    """Pay in, unless it is 13."""
    es[Ledger].deposit(UUID(account_id), amount)
    if amount == 13:
        raise ValueError


def pay_in_job(account_id: str, amount: int) -> None:
    """Pay in as a job."""
    pay_in(account_id, amount)


def send() -> None:
    """Make the tables and an account; send requests of which every second fails, and tasks; print the account's id."""
    from webtest import TestApp

    Base.metadata.create_all(engine)
    account_id = str(es[Ledger].open_account())
    for status in (200, 409) * 2:
        TestApp(app).get("/", {"account": account_id, "status": str(status)}, expect_errors=True)
    for amount in (13, 1000) * 6:
        pay_in.delay(account_id, amount)
    es.close()
    print(account_id)  # noqa: T201
