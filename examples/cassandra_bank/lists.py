"""The lists: made from the log alone, in a database of their own, which may be dropped and rebuilt at any time."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import BigInteger, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from example_app.domain import Account, Bank
from flask_eventsourcing import EventSourcing
from flask_eventsourcing.projections import ModelProjection, on

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


class Base(DeclarativeBase):
    """What each list derives from."""


db = SQLAlchemy(model_class=Base)
es = EventSourcing(db=db, application=Bank)


class Balance(Base):
    """What an account holds."""

    __tablename__ = "balance"

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(80))
    amount: Mapped[int] = mapped_column(BigInteger)
    closed: Mapped[bool]


class Transfer(Base):
    """What went from one account to another."""

    __tablename__ = "transfer"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    sender_id: Mapped[UUID]
    recipient_id: Mapped[UUID]
    amount: Mapped[int] = mapped_column(BigInteger)
    note: Mapped[str] = mapped_column(String(80))
    sent_at: Mapped[datetime]


@es.projection
class Balances(ModelProjection):
    """The list of accounts."""

    models = (Balance,)

    @on(Account.Opened)
    def opened(self, event: Account.Opened, session: Session) -> None:
        """Begin with nothing."""
        session.add(Balance(account_id=event.originator_id, owner=event.owner, amount=0, closed=False))

    @on(Account.Deposited, Account.TransferReceived)
    def paid_in(self, event: Account.Deposited | Account.TransferReceived, session: Session) -> None:
        """Add what came in."""
        session.get_one(Balance, event.originator_id).amount += event.amount

    @on(Account.Withdrawn, Account.TransferSent)
    def paid_out(self, event: Account.Withdrawn | Account.TransferSent, session: Session) -> None:
        """Take off what went out."""
        session.get_one(Balance, event.originator_id).amount -= event.amount

    @on(Account.Closed)
    def was_closed(self, event: Account.Closed, session: Session) -> None:
        """Note that it takes no more."""
        session.get_one(Balance, event.originator_id).closed = True


@es.projection
class Transfers(ModelProjection):
    """The list of transfers."""

    models = (Transfer,)

    @on(Account.TransferSent)
    def sent(self, event: Account.TransferSent, session: Session) -> None:
        """Note one."""
        session.add(
            Transfer(
                id=event.transfer_id,
                sender_id=event.originator_id,
                recipient_id=event.recipient_id,
                amount=event.amount,
                note=event.note,
                sent_at=event.timestamp,
            )
        )
