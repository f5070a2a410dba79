"""The Celery app of an app on a SQLite file that the worker's parent process has used.

With ``IMPORTED=busy`` a thread of the parent goes on to write, beside its forks.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any
from uuid import UUID

from celery import Celery, signals

from flask_eventsourcing.workers.celery import init_celery
from tests.workers.queue_app import happened
from tests.workers.sqlite_served import site

celery_app = Celery("sqlite", broker=os.environ["QUEUE_REDIS"], backend=os.environ["QUEUE_REDIS"])
celery_app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)
init_celery(celery_app, site.app, conflict_retries=100)


@celery_app.task(name="open")
def open_and_deposit(number: int, shared: str) -> list[Any]:
    """Open an account, and pay into one that all tasks use."""
    account_id = site.bank.open_account(f"task {number}")
    site.bank.deposit(UUID(shared))
    return [str(account_id), os.getpid()]


def write_for_ever() -> None:
    """Open accounts, one a transaction."""
    while True:
        with site.app.app_context():
            site.bank.open_account("parent")
            site.db.session.commit()
        happened("parent wrote")
        time.sleep(0.01)


@signals.worker_ready.connect
def begin_to_write(**_: Any) -> None:
    """Write in the parent."""
    if os.environ.get("IMPORTED") == "busy":
        threading.Thread(target=write_for_ever, daemon=True).start()
