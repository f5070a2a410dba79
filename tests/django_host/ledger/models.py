"""The models of the tests' app."""

from __future__ import annotations

from django.db import models

from flask_eventsourcing.contrib.django.models import event_models

BankRecords = event_models(__name__, "Bank")
ShopRecords = event_models(__name__, "Shop")


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


class Entry(models.Model):
    """Rows of a projection that refer to each other."""

    before = models.ForeignKey("self", models.PROTECT, null=True)
    others = models.ManyToManyField("self", symmetrical=False)

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
