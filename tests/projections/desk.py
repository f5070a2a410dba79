"""A bank with read models on one host, and what tests do with its projections: the "desk" of this folder."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import pytest
import sqlalchemy as sa
from click.testing import Result
from sqlalchemy import orm

from flask_eventsourcing.applications.erasure import Erasure
from flask_eventsourcing.models import Models
from flask_eventsourcing.projections import ModelProjection, on, reaction
from flask_eventsourcing.projections.checkpoint import CheckpointRow
from flask_eventsourcing.projections.consumers import Consumer
from flask_eventsourcing.projections.registry import BoundProjections
from flask_eventsourcing.projections.upkeep.following import Health, ProjectionStatus
from flask_eventsourcing.projections.workers import Worker
from tests.domain import PATIENCE, Account, Bank

R = TypeVar("R")
on_flask = pytest.mark.parametrize("host", ["flask"], indirect=True)
"""For what is Flask's own."""
Created: Any = Account.Created
Deposited: Any = Account.Deposited  # type: ignore[attr-defined]


class PoisonError(Exception):
    """What the handlers of the tests fail with."""


class Idle(ModelProjection):
    """A projection that does nothing."""

    @on(Created)
    def opened(self, event: Any, session: orm.Session) -> None:
        """Do nothing."""


def make_models(base: Any, id_type: Any = None) -> tuple[Any, Any]:
    """Make the read models: the balance of each account, and a list of what happened."""
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
class Desk(ABC):
    """A bank on a host, its read models, and switches that make handlers fail."""

    program: ClassVar[str]
    """How its user calls the commands."""
    Model: Any
    Balance: Any
    Seen: Any
    poison: set[int] = field(default_factory=set, kw_only=True)
    """Amounts whose deposits the handlers refuse."""
    calls: list[tuple[UUID, int, str]] = field(default_factory=list, kw_only=True)
    """What reactions were called with: aggregate, version and key."""

    @property
    @abstractmethod
    def bank(self) -> Bank:
        """The bank of the current context."""

    @property
    @abstractmethod
    def projections(self) -> BoundProjections:
        """Those that are registered."""

    @property
    @abstractmethod
    def session(self) -> orm.Session:
        """The current session."""

    @property
    @abstractmethod
    def sessions(self) -> Any:
        """What makes the sessions, for who listens to all of them."""

    @property
    @abstractmethod
    def models(self) -> Models:
        """The record classes of the first application."""

    @property
    def events_table(self) -> sa.Table:
        """The table of the log."""
        return self.models.tables["events"]

    @property
    def engine(self) -> sa.Engine:
        """The database."""
        return self.projections.host.datastore.engine

    @abstractmethod
    def _working(self) -> AbstractContextManager[object]:
        """What is around a piece of work with a session of its own."""

    @abstractmethod
    def projection(self, projection_class: Any) -> Any:
        """Register a projection, and make no table."""

    @abstractmethod
    def using(self, session: orm.Session) -> AbstractContextManager[orm.Session]:
        """Have another session be the current one."""

    @abstractmethod
    def retry(self, function: Callable[[], R], times: int = 3) -> R:
        """Run a unit of work, and again after a conflict."""

    @abstractmethod
    def erase(self, aggregate_id: Any, *, redact: bool = False) -> Erasure:
        """Erase an aggregate with the next commit."""

    @abstractmethod
    def command(self, *arguments: str, input: str | None = None) -> Result:
        """Call a command."""

    @abstractmethod
    def close(self) -> None:
        """Close the applications and every connection."""

    def create_all(self) -> None:
        """Make the tables that are missing."""
        self.Model.metadata.create_all(self.engine)

    def health(self) -> Health:
        """Look at every projection."""
        with self._working():
            return self.projections.health()

    def wait_for(self, projection: Any, recordings: Any, timeout: float = 5.0) -> None:
        """Wait until a projection has dealt with events."""
        self.projections.wait_for(projection, recordings, timeout)

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

    def listing(self, **attributes: Any) -> type[ModelProjection]:
        """Register a projection with a row for each event, whose text is the name of the event's class."""
        desk = self

        class Listing(ModelProjection):
            models = (desk.Seen,)

            @on(Created, Deposited)
            def happened(self, event: Any, session: orm.Session) -> None:
                seen = {"account_id": str(event.originator_id), "version": event.originator_version}
                session.add(desk.Seen(**seen, text=type(event).__name__))

        return self.register(type("Listing", (Listing,), attributes))

    def register(self, projection_class: Any) -> type[ModelProjection]:
        """Register a projection on the bank."""
        registered: type[ModelProjection] = self.projection(projection_class)
        self.create_all()
        return registered

    @contextmanager
    def context(self) -> Iterator[Bank]:
        """What is around a piece of work, with the bank."""
        with self._working():
            yield self.bank

    def open(self, *amounts: int) -> UUID:
        """Open an account, make deposits, each in a transaction of its own, and return the account's id."""
        with self.context() as bank:
            account_id = bank.open_account()
            self.session.commit()
        self.deposit(account_id, *amounts)
        return account_id

    def deposit(self, account_id: Any, *amounts: int) -> None:
        """Make deposits, each in a transaction of its own."""
        with self.context() as bank:
            for amount in amounts:
                bank.deposit(account_id, amount)
                self.session.commit()

    def worker(self, *names: str, once: bool = False) -> Worker:
        """Return a worker for some consumers, or for all."""
        return self.projections.worker(*names, once=once)

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
        found: Consumer = self.projections.find(name)
        return found

    def any_consumer(self) -> Consumer:
        """Find the first consumer, whatever it is."""
        found: Consumer = next(iter(self.projections))
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
        return next(each for each in self.health().projections if each.name == name)

    def amounts(self) -> dict[Any, int]:
        """Return the read model, from a new transaction."""
        with self._working(), orm.Session(self.engine) as session:
            return {row.account_id: row.amount for row in session.scalars(sa.select(self.Balance))}

    def head(self) -> int:
        """Return the last position of the log."""
        with self.context() as bank:
            return bank.recorder.max_notification_id() or 0
