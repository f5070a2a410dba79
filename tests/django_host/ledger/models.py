"""The models of the tests' app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import models
from django.db.models.functions import Now

from flask_eventsourcing.contrib.django.models import AbstractStoredEvent, RecordTextField, event_models

BankRecords = event_models(__name__, "Bank")
ShopRecords = event_models(__name__, "Shop")


class Journal(AbstractStoredEvent):
    """A record class of the user's, with ids that are texts and columns of its own."""

    originator_id = RecordTextField(kind="text id")
    correlation_id: Any = None
    tenant = models.CharField(max_length=20, null=True)
    amount = models.DecimalField(max_digits=9, decimal_places=2, null=True)
    day = models.DateTimeField(null=True)
    details = models.JSONField(null=True)
    note = models.ForeignKey("ledger.Reason", models.PROTECT, null=True, db_column="note_key")
    stored_at = models.DateTimeField(db_default=Now())

    class Meta(AbstractStoredEvent.Meta):
        app_label = "ledger"

    @classmethod
    def column_values(cls, event: Any, metadata: Mapping[str, str]) -> Mapping[str, Any]:
        """Fill the columns."""
        values = getattr(event, "values", {})
        return {"tenant": metadata.get("tenant"), **values}


BooksRecords = event_models(__name__, "Books", stored_event_model=Journal)


class Balance(models.Model):
    """What a projection writes."""

    account_id = models.UUIDField(primary_key=True)
    amount = models.IntegerField()

    class Meta:
        app_label = "ledger"

    def __str__(self) -> str:
        return f"{self.account_id}: {self.amount}"


class Note(models.Model):
    """A model of the user's beside the events."""

    text = models.TextField()

    class Meta:
        app_label = "ledger"

    def __str__(self) -> str:
        return str(self.text)


class Reason(models.Model):
    """What a record class of the user's refers to."""

    text = models.TextField()

    class Meta:
        app_label = "ledger"

    def __str__(self) -> str:
        return str(self.text)


class Entry(models.Model):
    """Rows of a projection that refer to each other."""

    before = models.ForeignKey("self", models.PROTECT, null=True)
    others = models.ManyToManyField("self", symmetrical=False, related_name="+")

    class Meta:
        app_label = "ledger"

    def __str__(self) -> str:
        return str(self.pk)


class Tag(models.Model):
    """What is nobody's projection and refers to one, once a test has made its table."""

    entry = models.ForeignKey(Entry, models.CASCADE)

    class Meta:
        app_label = "ledger"
        managed = False

    def __str__(self) -> str:
        return str(self.pk)
