"""Tables, sessions and transactions, as Pyramid's cookiecutter lays them out.

The tables depend on no setting, so that Alembic's ``env.py``, which imports only ``Base``, sees them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import zope.sqlalchemy
from sqlalchemy import BigInteger, DateTime, String, engine_from_config
from sqlalchemy.orm import Mapped, Session, configure_mappers, mapped_column, sessionmaker

from examples.pyramid_site.models.meta import Base
from flask_eventsourcing.contrib.zope import event_models

__all__ = ["Balance", "BankRecords", "Base", "Transfer", "get_tm_session", "includeme"]

BankRecords = event_models(Base, "Bank")


class Transfer(Base):
    """One transfer between two accounts, a row that the request itself writes beside the events."""

    __tablename__ = "transfer"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    sender_id: Mapped[UUID]
    recipient_id: Mapped[UUID]
    amount: Mapped[int] = mapped_column(BigInteger)
    note: Mapped[str] = mapped_column(String(80))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Balance(Base):
    """What an account holds, a row that the projection writes."""

    __tablename__ = "balance"

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(80))
    amount: Mapped[int] = mapped_column(BigInteger, index=True)
    closed: Mapped[bool]


configure_mappers()


def get_tm_session(session_factory: sessionmaker[Session], transaction_manager: Any, request: Any = None) -> Session:
    """Return a session whose transactions a manager commits."""
    session = session_factory(info={"request": request})
    zope.sqlalchemy.register(session, transaction_manager=transaction_manager)
    return session


def includeme(config: Any) -> None:
    """Add ``request.dbsession``, committed by pyramid_tm; pyramid_retry tries again after a conflict."""
    settings = config.get_settings()
    settings["tm.manager_hook"] = "pyramid_tm.explicit_manager"
    config.include("pyramid_tm")
    config.include("pyramid_retry")
    factory = sessionmaker(engine_from_config(settings, prefix="sqlalchemy."))
    config.registry["dbsession_factory"] = factory

    def dbsession(request: Any) -> Session:
        # A functional test may have put its own session there.
        given: Session | None = request.environ.get("app.dbsession")
        return get_tm_session(factory, request.tm, request) if given is None else given

    config.add_request_method(dbsession, reify=True)
