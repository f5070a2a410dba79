"""A Flask app with projections, for tests that run commands as processes.

``DATABASE_URL`` names the database. A deposit of 13 is one that the handler of ``Picky`` and ``Fragile`` cannot take,
unless ``CORRECTED`` is set. With ``PAUSE`` the handlers of deposits take that many seconds.
"""

from __future__ import annotations

import os
import time
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.projections import ModelProjection, on, reaction
from tests.domain import Account, Bank

POISON = 13


class Base(orm.DeclarativeBase):
    """The base of the models; their keys have names, as migrations need them."""

    metadata = sa.MetaData(naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(column_0_label)s"})


db = SQLAlchemy(model_class=Base)
es = EventSourcing(db=db, application=Bank)


class Balance(Base):
    """What an account holds."""

    __tablename__ = "balance"
    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    amount: Mapped[int]


class Deposit(Base):
    """A deposit, by who noted it and its position."""

    __tablename__ = "deposit"
    noted_by: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


def pause() -> None:
    """Take the time that was asked for."""
    time.sleep(float(os.environ.get("PAUSE", "0")))


def note(by: str, event: Any, session: Any) -> None:
    """Note a deposit."""
    pause()
    if event.amount == POISON and not os.environ.get("CORRECTED"):
        raise ValueError("thirteen is not an amount")
    session.add(
        Deposit(noted_by=by, account_id=event.originator_id, version=event.originator_version, amount=event.amount)
    )


@es.projection
class Balances(ModelProjection):
    """What accounts hold, and a line for each deposit."""

    models = (Balance,)

    @on(Account.Created)
    def opened(self, event: Any, session: Any) -> None:
        """Begin with nothing."""
        session.add(Balance(account_id=event.originator_id, amount=0))

    @on(Account.Deposited)  # type: ignore[attr-defined]
    def deposited(self, event: Any, session: Any) -> None:
        """Add the amount."""
        pause()
        session.get(Balance, event.originator_id).amount += event.amount

    @reaction(Account.Deposited)  # type: ignore[attr-defined]
    def tell(self, event: Any, key: str) -> None:
        """Do nothing: it is the position that tests look at."""


@es.projection
class Fragile(ModelProjection):
    """Halts at a deposit of 13."""

    retries = 0

    @on(Account.Deposited)  # type: ignore[attr-defined]
    def deposited(self, event: Any, session: Any) -> None:
        """Note it."""
        note("fragile", event, session)


@es.projection
class Picky(ModelProjection):
    """Sets a deposit of 13 aside."""

    retries = 0
    on_failure = "dead-letter"

    @on(Account.Deposited)  # type: ignore[attr-defined]
    def deposited(self, event: Any, session: Any) -> None:
        """Note it."""
        note("picky", event, session)


@es.projection
class Inline(ModelProjection):
    """Runs within save()."""

    inline = True

    @on(Account.Created)
    def opened(self, event: Any, session: Any) -> None:
        """Do nothing."""


def create_app() -> Flask:
    """Make the app."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    es.init_app(app)
    return app
