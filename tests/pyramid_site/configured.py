"""A Pyramid application that an ini file names, with a projection that a scan finds."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from pyramid.config import Configurator
from sqlalchemy import engine_from_config, orm

from flask_eventsourcing.contrib.pyramid import event_models, projection
from flask_eventsourcing.projections import ModelProjection, on
from tests.domain import Account, Bank

Created: Any = Account.Created
Deposited: Any = Account.Deposited  # type: ignore[attr-defined]
states: list[Any] = []
"""Those of the applications that were made."""


class Base(orm.DeclarativeBase):
    """The base of the models."""


BankRecords = event_models(Base, "Bank")


class Total(Base):
    """What an account holds."""

    __tablename__ = "total"
    account_id: orm.Mapped[UUID] = orm.mapped_column(primary_key=True)
    amount: orm.Mapped[int]


@projection
class Totals(ModelProjection):
    """Adds up."""

    models = (Total,)

    @on(Created)
    def opened(self, event: Any, session: orm.Session) -> None:
        """Begin with nothing."""
        session.add(Total(account_id=event.originator_id, amount=0))

    @on(Deposited)
    def deposited(self, event: Any, session: orm.Session) -> None:
        """Add."""
        session.get_one(Total, event.originator_id).amount += event.amount


def main(global_config: Any, **settings: Any) -> Any:
    """Make the WSGI application."""
    with Configurator(settings=settings) as config:
        config.include("pyramid_tm")
        config.registry["dbsession_factory"] = orm.sessionmaker(engine_from_config(settings))
        config.include("flask_eventsourcing.contrib.pyramid")
        config.add_eventsourcing(Bank, models=BankRecords)
        config.scan("tests.pyramid_site.configured")
    states.append(config.registry["flask_eventsourcing"])
    return config.make_wsgi_app()


def bare(global_config: Any, **settings: Any) -> Any:
    """Make a WSGI application in which there is no event sourcing."""
    return Configurator(settings=settings).make_wsgi_app()
