"""A bank in a Django project, on each database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.contract.backends import url_for
from tests.django_host import project
from tests.domain import Bank, in_thread

DATABASES = ("sqlite-file", "postgresql", "mariadb-mysqlclient")


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind."""
    return url_for(request.param, tmp_path, request)


class UndoneError(Exception):
    """Raised to roll back."""


@dataclass
class DjangoBank:
    """The bank in the project, with its events in one database."""

    alias: str
    url: str

    @property
    def bank(self) -> Bank:
        """The application."""
        from flask_eventsourcing.contrib.django import get_application

        return get_application(Bank)

    @property
    def connection(self) -> Any:
        """Django's connection of this thread."""
        from django.db import connections

        return connections[self.alias]

    def atomic(self, **options: Any) -> Any:
        """A block in that database."""
        from django.db import transaction

        return transaction.atomic(using=self.alias, **options)

    def note(self, text: str = "note") -> None:
        """Add a row of Django's ORM."""
        from tests.django_host.ledger.models import Note

        Note.objects.using(self.alias).create(text=text)

    def elsewhere(self, function: Any) -> Any:
        """Do something in a thread, with a connection of its own, and return what it returns."""
        found = []

        def run() -> None:
            try:
                found.append(function())
            finally:
                self.connection.close()

        in_thread(run)
        return found[0]

    def stored(self) -> tuple[int, int]:
        """Count the events and the notes that another connection sees."""
        from tests.django_host.ledger.models import BankRecords, Note

        models = (BankRecords.StoredEvent, Note)
        events, notes = self.elsewhere(lambda: [each.objects.using(self.alias).count() for each in models])
        return events, notes

    @contextmanager
    def rolled_back(self) -> Iterator[None]:
        """A block that is left by an exception, which is caught around it."""
        with suppress(UndoneError), self.atomic():
            yield
            raise UndoneError

    def opened(self) -> UUID:
        """Open an account and return its id."""
        return self.bank.open_account()


@pytest.fixture
def site(url: str) -> Iterator[DjangoBank]:
    """The bank, with tables."""
    with project.database("ledger", url), project.applications(Bank="ledger"):
        yield DjangoBank("ledger", url)
