"""Tables. They depend on no setting, so that ``makemigrations`` finds the same for everybody."""

from __future__ import annotations

from django.db import models

from flask_eventsourcing.contrib.django.models import event_models

BankRecords = event_models(__name__, "Bank")


class Transfer(models.Model):
    """One transfer between two accounts, a row that the request itself writes beside the events."""

    id = models.UUIDField(primary_key=True)
    sender_id = models.UUIDField()
    recipient_id = models.UUIDField()
    amount = models.BigIntegerField()
    note = models.CharField(max_length=80)
    created_at = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return f"{self.amount} cents from {self.sender_id} to {self.recipient_id}"


class Balance(models.Model):
    """What an account holds, a row that the projection writes."""

    account_id = models.UUIDField(primary_key=True)
    owner = models.CharField(max_length=80)
    amount = models.BigIntegerField(db_index=True)
    closed = models.BooleanField(default=False)

    def __str__(self) -> str:
        return f"{self.owner}: {self.amount} cents"
