"""Events that Django's own commands dump and load, and times that are read with other settings."""

from __future__ import annotations

import importlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.management import call_command
from django.core.serializers.base import DeserializationError
from django.test import override_settings

from flask_eventsourcing.contrib.django.projections import ModelProjection, on
from tests.django_host.conftest import DjangoBank
from tests.django_host.test_projections import balances, declaring, quiet, run
from tests.domain import Account

__all__ = ["quiet"]


def rows(site: DjangoBank) -> list[tuple[Any, ...]]:
    """Read all events."""
    from tests.django_host.ledger.models import BankRecords

    return list(BankRecords.StoredEvent.objects.using(site.alias).order_by("pk").values_list())


@pytest.mark.parametrize("kind", ["json", "xml"])
def test_dumpdata_and_loaddata(site: DjangoBank, kind: str, tmp_path: Path) -> None:
    """Events that were dumped and loaded are what they were, to the microsecond; those that follow come after them."""
    account_id = site.opened()
    site.bank.deposit(account_id, 3)
    run()
    before = rows(site)
    assert before[0][6]
    file = str(tmp_path / f"dump.{kind}")
    # A model that is not managed has no table here.
    excluded = ["ledger.tag"]
    call_command("dumpdata", "ledger", exclude=excluded, database=site.alias, format=kind, output=file, verbosity=0)
    call_command("flush", database=site.alias, interactive=False, verbosity=0)
    assert rows(site) == []
    call_command("loaddata", file, database=site.alias, verbosity=0)
    assert rows(site) == before
    site.bank.deposit(account_id, 4)
    assert site.bank.balance(account_id) == 7
    run()
    assert balances(site) == {account_id: 7}


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_metadata_as_each_driver_takes_them(driver: str) -> None:
    """Metadata are passed to the driver that Django uses in the form in which this driver takes JSON."""
    from tests.django_host.ledger.models import BankRecords

    connection = SimpleNamespace(vendor="postgresql", Database=importlib.import_module(driver))
    value = BankRecords.StoredEvent._meta.get_field("metadata").get_db_prep_value({"user": "ada"}, connection)
    assert type(value).__module__.startswith("psycopg.") is (driver == "psycopg")
    assert json.loads(value if isinstance(value, str) else json.dumps(value.obj)) == {"user": "ada"}


def test_fixture_whose_metadata_are_no_json(site: DjangoBank, tmp_path: Path) -> None:
    """A fixture whose metadata could not be read afterwards is refused, and nothing of it is stored."""
    file = tmp_path / "dump.json"
    file.write_text('[{"model": "ledger.bankstoredevent", "pk": 1, "fields": {"metadata": "{\'a\'"}}]')
    with pytest.raises(DeserializationError, match="not JSON"):
        call_command("loaddata", str(file), database=site.alias, verbosity=0)
    assert site.stored() == (0, 0)


@pytest.mark.parametrize("uses_zones", [True, False])
def test_times_in_another_zone(site: DjangoBank, uses_zones: bool) -> None:
    """The time of an event is read as it was stored, whatever ``USE_TZ`` and ``TIME_ZONE`` are, by handlers too."""
    from tests.django_host.ledger.models import BankRecords

    told: list[Any] = []

    class Told(ModelProjection):
        @on(Account.Created)
        def opened(self, event: Any, recorded: Any) -> None:
            told.append(recorded.time)

    with override_settings(USE_TZ=uses_zones, TIME_ZONE="America/New_York"):
        site.connection.close()
        site.opened()
        (found,) = BankRecords.StoredEvent.objects.using(site.alias).values_list("recorded_at", flat=True)
        with declaring(Told):
            run("Told")
        site.connection.close()
    assert abs(found - datetime.now(UTC)) < timedelta(hours=1)
    assert told == [found]
