"""A Django project with RQ jobs, whose worker has used the database before it forks a work-horse for each job.

``python -m tests.workers.django_queue WORKER`` works until the queue is empty.
"""

from __future__ import annotations

import os
import sys
from typing import Any, ClassVar
from uuid import UUID

import django
import sqlalchemy as sa
from django.conf import settings

from tests.django_host.databases import database_settings

if not settings.configured:
    settings.configure(
        DATABASES={"default": database_settings(os.environ["QUEUE_DATABASE"], CONN_MAX_AGE=None)},
        EVENTSOURCING={"Bank": {"APPLICATION": "tests.domain.Bank"}},
        INSTALLED_APPS=["flask_eventsourcing.contrib.django", "tests.django_host.ledger"],
        SECRET_KEY="of the tests",
        USE_TZ=True,
    )
    django.setup()

from django.core.management import call_command
from django.db import connection, connections, transaction
from redis import Redis
from rq import Queue, Worker

from flask_eventsourcing.contrib.django import get_application, project_site
from flask_eventsourcing.workers import FlaskAppOrFactory
from flask_eventsourcing.workers.rq import EventSourcingWorker
from tests.domain import Bank

SESSION = {"postgresql": "SELECT pg_backend_pid()", "sqlite": "SELECT 1"}


class UnitWorker(EventSourcingWorker):
    """Gives each job a unit of work."""

    flask_app: ClassVar[FlaskAppOrFactory | None] = staticmethod(project_site)


class PlainWorker(Worker):
    """As that of django-rq: it closes the connections before a job and after it, and knows nothing of events."""

    def perform_job(self, *args: Any, **kwargs: Any) -> bool:
        """Perform a job."""
        connections.close_all()
        try:
            return bool(super().perform_job(*args, **kwargs))
        finally:
            connections.close_all()


def pay_in(account_id: str, amount: int) -> None:
    """Pay in, unless it is 13, after which the job fails."""
    get_application(Bank).deposit(UUID(account_id), amount)
    if amount == 13:
        raise ValueError


@transaction.atomic
def pay_in_block(account_id: str, amount: int) -> None:
    """Do it in a block of the job's own."""
    pay_in(account_id, amount)


def prepare() -> None:
    """Make the tables and an account, whose id is printed."""
    call_command("migrate", run_syncdb=True, verbosity=0)
    print(get_application(Bank).open_account())  # noqa: T201


def session() -> int:
    """Use the database, and return the number of the session."""
    get_application(Bank).notification_log.select(1, 1)
    with connection.cursor() as cursor:
        cursor.execute(SESSION[connection.vendor])
        found: int = cursor.fetchone()[0]
    return found


def work(worker_class: Any) -> int:
    """Work until the queue is empty, and see that the worker has its session still."""
    before = session()
    address = sa.make_url(os.environ["QUEUE_REDIS"]).render_as_string()
    with Redis.from_url(address) as redis:
        worker_class([Queue(connection=redis)], connection=redis).work(burst=True)
    return 0 if session() == before else 1


if __name__ == "__main__":
    sys.exit(work({"unit": UnitWorker, "plain": PlainWorker}[sys.argv[1]]))
