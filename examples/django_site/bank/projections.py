"""Read models that a worker keeps up to date with the events: ``manage.py eventsourcing run``."""

from __future__ import annotations

from uuid import UUID

from django.db.models import F

from example_app.domain import Account
from examples.django_site.bank.models import Balance
from flask_eventsourcing.contrib.django.projections import ModelProjection, on, projection


@projection(of="Bank")
class Balances(ModelProjection):
    """What each account holds."""

    models = (Balance,)

    @on(Account.Opened)
    def opened(self, event: Account.Opened) -> None:
        """Begin with nothing."""
        Balance.objects.create(account_id=event.originator_id, owner=event.owner, amount=0)

    @on(Account.Deposited, Account.TransferReceived)
    def paid_in(self, event: Account.Deposited | Account.TransferReceived) -> None:
        """Add what came in."""
        self._change(event.originator_id, event.amount)

    @on(Account.Withdrawn, Account.TransferSent)
    def paid_out(self, event: Account.Withdrawn | Account.TransferSent) -> None:
        """Take off what went out."""
        self._change(event.originator_id, -event.amount)

    @on(Account.Closed)
    def was_closed(self, event: Account.Closed) -> None:
        """Note that it takes no more."""
        Balance.objects.filter(account_id=event.originator_id).update(closed=True)

    def _change(self, account_id: UUID, change: int) -> None:
        Balance.objects.filter(account_id=account_id).update(amount=F("amount") + change)
