"""A user's bank, written in the style that type checkers can follow; a strict one finds nothing in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from flask_eventsourcing import (
    EventSourcing,
    SnapshotMixin,
    StaleAggregateError,
    StoredEventMixin,
    TrackingMixin,
    current_application,
)
from flask_eventsourcing.applications.erasure import Erasure
from flask_eventsourcing.projections import ModelProjection, on, reaction


class Account(Aggregate):
    """An aggregate with explicit event classes."""

    class Opened(Aggregate.Created):
        """It was opened."""

        owner: str

    class Deposited(Aggregate.Event):
        """Something was paid in."""

        amount: int

    class Withdrawn(Aggregate.Event):
        """Something was paid out."""

        amount: int

    @event(Opened)
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.balance = 0

    @event(Deposited)
    def deposit(self, amount: int) -> None:
        """Pay in."""
        self.balance += amount

    @event(Withdrawn)
    def withdraw(self, amount: int) -> None:
        """Pay out."""
        self.balance -= amount


class Bank(Application[UUID]):
    """The first application."""

    def open_account(self, owner: str) -> UUID:
        """Open an account."""
        account = Account(owner)
        self.save(account)
        return account.id

    def account(self, account_id: UUID) -> Account:
        """Read an account."""
        account: Account = self.repository.get(account_id)
        return account


class Shop(Application[str]):
    """The second one, with text ids."""

    def sell(self) -> int:
        """Sell something."""
        return 1


class Base(DeclarativeBase):
    """The declarative base."""


db = SQLAlchemy(model_class=Base)
if TYPE_CHECKING:
    Model = Base
else:
    Model = db.Model


class Journal(StoredEventMixin, Model):
    """A record class of one's own."""

    __tablename__ = "journal"
    tenant: Mapped[str | None] = mapped_column(sa.String(20))


class Balance(Model):
    """A read model."""

    __tablename__ = "balance"
    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    amount: Mapped[int]


es = EventSourcing(db=db, application=Bank, applications=[Shop], stored_event_model=Journal)


@es.projection(of=Bank)
class Balances(ModelProjection):
    """A projection whose handlers are checked."""

    models = (Balance,)

    @on(Account.Opened)
    def opened(self, event: Account.Opened, session: Session) -> None:
        """Add a row."""
        session.add(Balance(account_id=event.originator_id, amount=len(event.owner)))

    @on(Account.Deposited, Account.Withdrawn)
    def moved(self, event: Account.Deposited | Account.Withdrawn, session: Session) -> None:
        """Change a row."""
        balance = session.get_one(Balance, event.originator_id)
        balance.amount += event.amount

    @reaction(Account.Deposited, start="end")
    def thank(self, event: Aggregate.Event, key: str) -> None:
        """Take an event of any class of the aggregate's, which is more than there is to take."""


@es.transactional
def rename(owner: str) -> str:
    """Decorated bare."""
    return owner


@es.retry_on_conflict(times=5)
def deposit(account_id: UUID, amount: int) -> int:
    """Decorated with an argument."""
    account = es.application.account(account_id)
    account.deposit(amount)
    es.application.save(account)
    return account.balance


def create_app() -> Flask:
    """Make the app."""
    app = Flask(__name__)
    db.init_app(app)
    es.init_app(app)
    return app


def use(app: Flask) -> None:
    """Use what the extension gives; each value is of the type that is said."""
    assert_type(es, EventSourcing[Bank, SQLAlchemy])
    assert_type(es.application, Bank)
    assert_type(es[Shop], Shop)
    assert_type(es[Shop].sell(), int)
    assert_type(es.db, SQLAlchemy)
    assert_type(es.StoredEvent, type[StoredEventMixin])
    assert_type(es.Snapshot, type[SnapshotMixin])
    assert_type(es.Tracking, type[TrackingMixin])
    assert_type(es.models[Bank].tables["events"], sa.Table)
    assert_type(es.metadata, sa.MetaData)
    assert_type(current_application.name, str)
    assert_type(rename("Ada"), str)
    account_id = es.application.open_account("Ada")
    assert_type(deposit(account_id, amount=1), int)
    rows = db.session.scalars(sa.select(es.StoredEvent).where(es.StoredEvent.originator_id == account_id)).all()
    for row in rows:
        assert_type(row.topic, str)
        assert_type(row.state, bytes)
        assert_type(row.notification_id, int)
        assert_type(row.originator_id, UUID | str)
    assert_type(db.session.scalars(sa.select(Journal.tenant)).first(), str | None)
    with es.event_metadata(reason="import"), es.transaction() as session, es.using(session) as used:
        assert_type(used, Session)
    recordings = es.application.save(es.application.account(account_id))
    es.wait_for(Balances, recordings)
    es.wait_for("Balances", 5, timeout=1)
    assert_type(es.health().ok, bool)
    assert_type(es.erase(account_id), Erasure)
    es.close(app)
    try:
        es.application.account(account_id)
    except StaleAggregateError as error:
        assert_type(str(error), str)


def bare() -> None:
    """Without a class it is the library's own; one that is registered later is named."""
    plain = EventSourcing()
    assert_type(plain, EventSourcing[Application[UUID], SQLAlchemy])
    assert_type(plain.application, Application[UUID])
    later = EventSourcing[Bank](db=db)
    assert_type(later.register(Bank), type[Bank])
    assert_type(later.application, Bank)
