"""The tables of the Django site, which another site has made."""

from __future__ import annotations

from django.db import models

from flask_eventsourcing.contrib.django.models import event_models

LedgerRecords = event_models(__name__, "Ledger")


class Total(models.Model):
    """What is in an account."""

    account_id = models.UUIDField(primary_key=True)
    amount = models.BigIntegerField()

    class Meta:
        db_table = "total"

    def __str__(self) -> str:
        return f"{self.account_id}: {self.amount}"


class Line(models.Model):
    """One for each event, which no key keeps from being there twice."""

    account_id = models.CharField(max_length=36)
    version = models.IntegerField()

    class Meta:
        db_table = "line"

    def __str__(self) -> str:
        return f"{self.account_id} version {self.version}"
