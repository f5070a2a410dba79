"""The models of the tests' app."""

from __future__ import annotations

from django.db import models

from flask_eventsourcing.contrib.django.models import event_models

BankRecords = event_models(__name__, "Bank")
ShopRecords = event_models(__name__, "Shop")


class Note(models.Model):
    """A model of the user's beside the events."""

    text = models.TextField()

    class Meta:
        app_label = "ledger"

    def __str__(self) -> str:
        return str(self.text)
