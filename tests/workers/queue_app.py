"""The Flask app of the task queues' tests, and the work that their tasks and jobs do.

The environment says where it keeps its data, ``QUEUE_DATABASE``, and where it writes down what happens, ``QUEUE_LOG``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing
from tests.bank import add_note
from tests.domain import Account, Bank

SHARED = 5
"""How many accounts the tasks share."""


class Clerk(Account):
    """An account whose id is given by its owner's name, so that it can be opened once."""

    @staticmethod
    def create_id(owner: str) -> UUID:
        """Return the id."""
        return uuid5(NAMESPACE_URL, f"/clerks/{owner}")


class Ledger(Bank):
    """A bank that writes down its beginning and its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        happened("constructed")

    def close(self) -> None:
        """Close."""
        happened("closed")
        super().close()


db = SQLAlchemy()
Note = add_note(db)
es = EventSourcing(db=db, application=Ledger)


def happened(what: str) -> None:
    """Write down what happens in this process, in one write, which no other interrupts."""
    with Path(os.environ["QUEUE_LOG"]).open("a") as log:
        log.write(f"{what} {os.getpid()}\n")


def create_app() -> Flask:
    """Make the app."""
    app = Flask("queues")
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["QUEUE_DATABASE"]
    db.init_app(app)
    es.init_app(app)
    happened("made")
    return app


def shared_account(number: int) -> UUID:
    """Return the id of an account that several tasks change."""
    return Clerk.create_id(str(number % SHARED))


def prepare() -> None:
    """Make the tables, and the accounts that tasks share."""
    app = create_app()
    with app.app_context():
        db.create_all()
        es.application.save(*(Clerk(owner=str(number)) for number in range(SHARED)))
        db.session.commit()
    es.close(app)


def conflict(number: int) -> None:
    """Save the change of a state that is out of date."""
    account: Clerk = es.application.repository.get(shared_account(number), version=1)
    account.deposit(1000)
    account.deposit(1000)
    es.application.save(account)


def work(number: int, first_try: bool) -> str:
    """Open an account, pay into a shared one and add a row; a tenth fails, a tenth has a conflict at its first try."""
    bank: Ledger = es[Ledger]
    bank.open_account(f"task {number}")
    db.session.add(Note(text=f"task {number}"))
    db.session.flush()
    if number % 10 == 1 and first_try:
        bank.deposit(shared_account(number), 1)
        conflict(number)
    bank.deposit(shared_account(number), 1)
    if number % 10 == 0:
        raise ValueError(f"{number} fails")
    return f"done {number}"
