"""Statements by mail with RQ: ``rq worker --worker-class example_app.tasks_rq.BankWorker statements``."""

from __future__ import annotations

from rq import get_current_job

from example_app import create_app, mail
from flask_eventsourcing.workers.rq import EventSourcingWorker

QUEUE = "statements"


class BankWorker(EventSourcingWorker):
    """A worker whose jobs run in the bank."""

    flask_app = create_app


def mail_statement(account_id: str, recipient: str, month: str) -> str:
    """Mail the statement of a month."""
    job = get_current_job()
    if job is None:
        raise RuntimeError("This is a job: enqueue it.")
    return mail.mail_statement(account_id, recipient, month, job.id)
