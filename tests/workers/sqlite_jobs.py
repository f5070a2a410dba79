"""The worker of an app on a SQLite file that its parent process has used."""

from __future__ import annotations

from typing import ClassVar

from flask_eventsourcing.workers import FlaskAppOrFactory
from flask_eventsourcing.workers.rq import EventSourcingWorker
from tests.workers.sqlite_served import app, open_account

__all__ = ["UsedWorker", "open_account"]


class UsedWorker(EventSourcingWorker):
    """A worker that forks a work-horse for each job, from a process that has used the file."""

    flask_app: ClassVar[FlaskAppOrFactory] = app
