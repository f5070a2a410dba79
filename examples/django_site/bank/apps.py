"""The app."""

from __future__ import annotations

from django.apps import AppConfig


class BankConfig(AppConfig):
    """The bank."""

    name = "examples.django_site.bank"
    verbose_name = "Harbour Bank"
