"""The Celery app of the Django site: ``celery -A tests.torture.two_sites_django.tasks worker``."""

from __future__ import annotations

import os

from celery import Celery

from flask_eventsourcing.contrib.django import get_application, project_site
from flask_eventsourcing.workers.celery import init_celery
from tests.torture.two_sites import Ledger, numbers_of

celery_app = Celery("two_sites", broker=os.environ["QUEUE_REDIS"])
celery_app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
init_celery(celery_app, project_site, conflict_retries=200)


@celery_app.task(name="transfer")
def transfer(numbers: str) -> None:
    """Transfer in a unit of work of its own."""
    get_application(Ledger).transfer(*numbers_of(numbers))
