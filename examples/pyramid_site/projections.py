"""Read models that a worker keeps up to date with the events: ``pyramid-eventsourcing development.ini run --all``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from example_app.domain import Account
from examples.pyramid_site.models import Balance
from flask_eventsourcing.contrib.pyramid import projection
from flask_eventsourcing.projections import ModelProjection, on

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@projection
class Balances(ModelProjection):
    """What each account holds."""

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
