"""An app with a read model in which an event that is applied twice shows, and a worker that runs it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.checkpoint import Checkpoint
from flask_eventsourcing.projections.workers import Worker

ACCOUNTS = 20


class Account(Aggregate):
    """An account."""

    def __init__(self) -> None:
        self.balance = 0

    @event("Moved")
    def move(self, amount: int) -> None:
        """Add an amount."""
        self.balance += amount


class Ledger(Application[UUID]):
    """The application."""


Moved: Any = Account.Moved  # type: ignore[attr-defined]


@dataclass
class Books:
    """The app, its read models, and its projection."""

    app: Flask
    db: SQLAlchemy
    es: EventSourcing
    Total: Any
    Line: Any


def define_totals(total: Any, line: Any) -> type[ModelProjection]:
    """Make the projection on its models."""
    slow = float(os.environ.get("LEDGER_SECONDS", "0"))

    class Totals(ModelProjection):
        models = (total, line)

        @on(Moved)
        def moved(self, event: Any, session: orm.Session) -> None:
            row = session.get(total, event.originator_id)
            if row is None:
                row = total(account_id=event.originator_id, moves=0, amount=0)
                session.add(row)
            row.moves += 1
            row.amount += event.amount
            session.add(line(account_id=str(event.originator_id), version=event.originator_version))
            if slow and event.originator_version % 7 == 0:
                time.sleep(slow)

    return Totals


def make_books(url: str, lock: str, define: Callable[[Any, Any], type[ModelProjection]] = define_totals) -> Books:
    """Make the app."""
    app = Flask("ledger")
    app.config.update(SQLALCHEMY_DATABASE_URI=url, EVENTSOURCING_PROJECTION_LOCK=lock)
    db = SQLAlchemy()
    base: Any = db.Model
    total_body = {
        "__tablename__": "total",
        "account_id": orm.mapped_column(sa.Uuid(), primary_key=True),
        "moves": orm.mapped_column(sa.Integer, nullable=False, default=0),
        "amount": orm.mapped_column(sa.BigInteger, nullable=False, default=0),
    }
    # No key keeps a line from being there twice.
    line_body = {
        "__tablename__": "line",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "account_id": orm.mapped_column(sa.String(36), nullable=False),
        "version": orm.mapped_column(sa.Integer, nullable=False),
    }
    total: Any = type(base)("Total", (base,), total_body)
    line: Any = type(base)("Line", (base,), line_body)
    es = EventSourcing(db=db, application=Ledger)
    es.projection(define(total, line))
    db.init_app(app)
    es.init_app(app)
    return Books(app, db, es, total, line)


def take_fence_away() -> None:
    """Move the position without checking the runner or the old position, to show what the check prevents."""

    def advance(self: Checkpoint, connection: Any, claimed: Any, position: int, applied: int, **_: Any) -> None:
        change = sa.update(self.table).where(self.table.c.name == self.name)
        connection.execute(change.values(position=position))

    Checkpoint.advance = advance  # type: ignore[method-assign]


def main() -> None:
    """Run the projection until the process is told to end; its arguments are URL, kind of lock and of fence."""
    url, lock, fence = sys.argv[1:]
    if fence == "unfenced":
        take_fence_away()
    run_worker(make_books(url, lock))


def run_worker(books: Books) -> None:
    """Run the projection until the process is told to end."""
    worker = Worker(books.app.extensions["eventsourcing"].projections.runnable())
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    errors = worker.run()
    books.es.close()
    sys.exit(1 if errors else 0)
