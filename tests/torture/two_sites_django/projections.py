"""The projection, which the other sites run under the same name."""

from __future__ import annotations

from typing import Any

from flask_eventsourcing.contrib.django.projections import ModelProjection, on, projection
from tests.torture.two_sites import Moved
from tests.torture.two_sites_django.models import Line, Total


@projection(of="Ledger")
class Totals(ModelProjection):
    """What is in each account."""

    models = (Total, Line)

    @on(Moved)
    def moved(self, event: Any) -> None:
        """Add it up."""
        total, _ = Total.objects.get_or_create(account_id=event.originator_id, defaults={"amount": 0})
        total.amount += event.amount
        total.save()
        Line.objects.create(account_id=str(event.originator_id), version=event.originator_version)
