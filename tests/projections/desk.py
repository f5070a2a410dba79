"""A bank with read models, and what tests do with its projections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.projections import ModelProjection, on, reaction
from flask_eventsourcing.projections.checkpoint import CheckpointRow
from flask_eventsourcing.projections.consumers import Consumer
from flask_eventsourcing.projections.registry import Worker
from flask_eventsourcing.projections.upkeep.following import ProjectionStatus
from tests.bank import make_app
from tests.domain import Account, Bank

PATIENCE = 30.0
Created: Any = Account.Created
Deposited: Any = Account.Deposited  # type: ignore[attr-defined]


class PoisonError(Exception):
    """What the handlers of the tests fail with."""


def make_models(db: SQLAlchemy, id_type: Any = None) -> tuple[Any, Any]:
    """Make the read models: the balance of each account, and a list of what happened."""
    base: Any = db.Model
    balance = {
        "__tablename__": "balance",
        "account_id": orm.mapped_column(id_type or sa.Uuid(), primary_key=True),
        "amount": orm.mapped_column(sa.Integer, nullable=False),
    }
    seen = {
        "__tablename__": "seen",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "account_id": orm.mapped_column(sa.String(50), nullable=False),
        "version": orm.mapped_column(sa.Integer, nullable=False),
        "text": orm.mapped_column(sa.String(50), nullable=False),
    }
    return type(base)("Balance", (base,), balance), type(base)("Seen", (base,), seen)


@dataclass(eq=False)
class Desk:
    """A Flask app with a bank, its read models, and switches that make handlers fail."""

    app: Flask
    db: SQLAlchemy
    es: EventSourcing[Bank]
    Balance: Any
    Seen: Any
    poison: set[int] = field(default_factory=set)
    """Amounts whose deposits the handlers refuse."""
    calls: list[tuple[UUID, int, str]] = field(default_factory=list)
    """What reactions were called with: aggregate, version and key."""

    @property
    def bank(self) -> Bank:
        """The bank of the current app context."""
        return self.es.application

    def balances(self, **attributes: Any) -> type[ModelProjection]:
        """Register the projection of balances, with class attributes of its own."""
        desk = self

        class Balances(ModelProjection):
            models = (desk.Balance,)

            @on(Created)
            def opened(self, event: Any, session: orm.Session) -> None:
                session.add(desk.Balance(account_id=event.originator_id, amount=0))

            @on(Deposited)
            def deposited(self, event: Any, session: orm.Session) -> None:
                row = session.get_one(desk.Balance, event.originator_id)
                row.amount += event.amount
                if event.amount in desk.poison:
                    raise PoisonError(f"cannot digest {event.amount}")

        return self.register(type("Balances", (Balances,), attributes))

    def reacting(self, *, start: Any = "beginning", **attributes: Any) -> type[ModelProjection]:
        """Register a projection with a reaction only, which notes its calls."""
        desk = self

        class Reacting(ModelProjection):
            @reaction(Deposited, start=start)
            def called(self, event: Any, key: str) -> None:
                desk.calls.append((event.originator_id, event.originator_version, key))
                if event.amount in desk.poison:
                    raise PoisonError(f"cannot send {event.amount}")

        return self.register(type("Reacting", (Reacting,), attributes))

    def register(self, projection_class: Any) -> type[ModelProjection]:
        """Register a projection on the bank."""
        registered: type[ModelProjection] = self.es.projection(projection_class)
        with self.app.app_context():
            self.db.create_all()
        return registered

    @contextmanager
    def context(self) -> Iterator[Bank]:
        """An application context, with the bank."""
        with self.app.app_context():
            yield self.bank

    def open(self, *amounts: int) -> UUID:
        """Open an account, make deposits, each in a transaction of its own, and return the account's id."""
        with self.context() as bank:
            account_id = bank.open_account()
            self.db.session.commit()
        self.deposit(account_id, *amounts)
        return account_id

    def deposit(self, account_id: Any, *amounts: int) -> None:
        """Make deposits, each in a transaction of its own."""
        with self.context() as bank:
            for amount in amounts:
                bank.deposit(account_id, amount)
                self.db.session.commit()

    def worker(self, *names: str, once: bool = False) -> Worker:
        """Return a worker for some consumers, or for all."""
        found = self.app.extensions["eventsourcing"].projections.runnable()
        return Worker([each for each in found if not names or each.name in names], once=once)

    def run_once(self, *names: str) -> Sequence[Exception]:
        """Run to the head, and return the errors that ended consumers."""
        return self.worker(*names, once=True).run(period=0.01)

    @contextmanager
    def running(self, *names: str) -> Iterator[Worker]:
        """A worker in a thread."""
        worker = self.worker(*names)
        thread = threading.Thread(target=worker.run, kwargs={"period": 0.02})
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the worker does not end"

    def consumer(self, name: str = "Balances") -> Consumer:
        """Find a consumer."""
        found: Consumer = self.app.extensions["eventsourcing"].projections.find(name)
        return found

    def any_consumer(self) -> Consumer:
        """Find the first consumer, whatever it is."""
        found: Consumer = next(iter(self.app.extensions["eventsourcing"].projections))
        return found

    def row(self, name: str = "Balances") -> CheckpointRow:
        """Return the row of a consumer."""
        row = self.consumer(name).checkpoint.read()
        assert row is not None
        return row

    def position(self, name: str = "Balances") -> int:
        """Return the position of a consumer, 0 if it has none yet."""
        row = self.consumer(name).checkpoint.read()
        return 0 if row is None else row.position

    def status(self, name: str = "Balances") -> ProjectionStatus:
        """Return what is known of a consumer."""
        with self.app.app_context():
            return next(each for each in self.es.health().projections if each.name == name)

    def amounts(self) -> dict[Any, int]:
        """Return the read model, from a new transaction."""
        with self.app.app_context():
            return {row.account_id: row.amount for row in self.db.session.scalars(sa.select(self.Balance))}

    def head(self) -> int:
        """Return the last position of the log."""
        with self.context() as bank:
            return bank.recorder.max_notification_id() or 0

    def close(self) -> None:
        """Close the applications and every connection."""
        self.es.close(self.app)
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()


def make_desk(uri: str, *classes: type[Application[Any]], id_type: Any = None, **config: Any) -> Desk:
    """Make a desk, whose tables are created with its first projection; keyword arguments are configuration keys."""
    app = make_app(uri, **config)
    db = SQLAlchemy()
    balance, seen = make_models(db, id_type)
    es = EventSourcing[Bank](db=db, applications=classes or (Bank,))
    db.init_app(app)
    es.init_app(app)
    return Desk(app, db, es, balance, seen)


def until(condition: Callable[[], Any], what: str = "it", patience: float = PATIENCE) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not happened in {patience:g} s"
        time.sleep(0.01)
