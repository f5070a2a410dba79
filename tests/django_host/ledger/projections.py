"""The projections of the tests' app, found by their module's name."""

from __future__ import annotations

from typing import Any

from flask_eventsourcing.contrib.django.projections import ModelProjection, on, projection
from tests.django_host.ledger.models import Balance
from tests.domain import Account

AnyAccount: Any = Account


@projection(of="Bank")
class Balances(ModelProjection):
    """What is in each account."""

    models = (Balance,)

    @on(Account.Created)
    def opened(self, event: Any, using: str) -> None:
        """Begin with nothing."""
        Balance.objects.using(using).create(account_id=event.originator_id, amount=0)

    @on(AnyAccount.Deposited)
    def deposited(self, event: Any, using: str) -> None:
        """Add it up."""
        balance = Balance.objects.using(using).get(account_id=event.originator_id)
        balance.amount += event.amount
        balance.save(using=using)
