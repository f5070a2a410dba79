"""Statements by mail with Celery: ``celery -A example_app.tasks_celery worker``."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from example_app import create_app, mail
from flask_eventsourcing.workers.celery import init_celery

celery_app = Celery("bank", broker=os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"))
celery_app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
init_celery(celery_app, create_app)


@celery_app.task(bind=True, acks_late=True, autoretry_for=(OSError,), retry_backoff=True)
def mail_statement(self: Any, account_id: str, recipient: str, month: str) -> str:
    """Mail the statement of a month; tried again while the mail server does not answer."""
    return mail.mail_statement(account_id, recipient, month, self.request.id)
