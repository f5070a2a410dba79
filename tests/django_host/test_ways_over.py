"""What eventsourcing-django and djangoevents have stored, and what their users are used to."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.apps import apps
from django.apps.registry import Apps
from django.core.management import CommandError, call_command
from django.db import connections, transaction
from django.db import models as django_models
from django.test import override_settings
from eventsourcing.system import SingleThreadedRunner, System

from flask_eventsourcing.contrib.django import get_application
from flask_eventsourcing.contrib.django.followers import runner_env
from flask_eventsourcing.contrib.django.imports import (
    Converted,
    Imported,
    JournalEvent,
    import_event_journal,
    landing,
)
from flask_eventsourcing.exceptions import ConfigurationError, ImportedEventsError
from tests.contract.backends import url_for
from tests.django_host import project
from tests.django_host.conftest import DjangoBank
from tests.django_host.former.domain import Account, Bank, Shop
from tests.django_host.former.make_eventsourcing_django import ENV
from tests.django_host.ledger.models import BankRecords, ShopRecords
from tests.django_host.test_program import bank_project
from tests.django_host.test_requests import as_test_case
from tests.docs.pages import files
from tests.source import ROOT

FORMER = Path(__file__).parent / "former"
KEYS = {key.removeprefix("BANK_"): value for key, value in ENV.items() if key.startswith("BANK_")}
SETTING: dict[str, Any] = {
    "Bank": {"APPLICATION": "tests.django_host.former.domain.Bank", "DATABASE": "ledger", "ENV": KEYS},
    "Shop": {"APPLICATION": "tests.django_host.former.domain.Shop", "DATABASE": "ledger"},
}
OF_BANK = [1, 7, 8, 9, 10, 12, 13, 14]
"""Positions of the bank's events among those of others, and one that was deleted."""
OF_SHOP = [2, 5, 11]


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database, of SQLite unless a test names another kind."""
    return url_for(getattr(request, "param", "sqlite-file"), tmp_path, request)


@pytest.fixture
def former(url: str) -> Iterator[None]:
    """A database with the tables of eventsourcing-django, as its dump has them, beside empty ones of this package."""
    with project.database("ledger", url), override_settings(EVENTSOURCING=SETTING):
        load(FORMER / "eventsourcing_django.sql")
        yield


PLAIN = {"RecordUUIDField": django_models.UUIDField, "RecordBinaryField": django_models.BinaryField}


def as_made(model: Any) -> Any:
    """Return the model with Django's own fields, as the other package has made its table; some have native UUIDs."""
    options = {"app_label": "made", "apps": Apps(), "db_table": model._meta.db_table}
    fields = {
        each.name: PLAIN[type(each).__name__]() if type(each).__name__ in PLAIN else each.clone()
        for each in model._meta.local_concrete_fields
    }
    return type("Made", (django_models.Model,), {"__module__": __name__, "Meta": type("Meta", (), options), **fields})


def load(dump: Path) -> None:
    """Make the tables of a dump, with their rows."""
    stored = sqlite3.connect(":memory:")
    stored.executescript(dump.read_text())
    known = landing.stored_events(), landing.snapshots(), landing.notification_tracking(), landing.event_journal()
    names = {name for (name,) in stored.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection: Any = connections["ledger"]
    for made in (as_made(each) for each in known if each._meta.db_table in names):
        with connection.schema_editor() as editor:
            editor.create_model(made)
        rows = stored.execute(f"SELECT * FROM {made._meta.db_table}")
        fields = {field.column: field.attname for field in made._meta.local_concrete_fields}
        attributes = [fields[column] for column, *_ in rows.description]
        for row in rows:
            values = dict(zip(attributes, row, strict=True))
            if "create_date" in values:
                # As Django has stored it, with USE_TZ.
                values["create_date"] = datetime.fromisoformat(values["create_date"]).replace(tzinfo=UTC)
            made.objects.using("ledger").create(**values)
    stored.close()


def take_over(*names: str, **options: Any) -> str:
    """Run the command and return what it prints."""
    output = StringIO()
    call_command("import_eventsourcing_django", *names, database="ledger", stdout=output, **options)
    return output.getvalue()


def positions(records: Any) -> list[int]:
    """Return the positions of an application's events."""
    found = records.StoredEvent.objects.using("ledger").order_by("pk")
    return list(found.values_list("pk", flat=True))


@pytest.mark.parametrize("url", ["sqlite-file", "postgresql", "mariadb-mysqlclient"], indirect=True)
def test_everything_is_taken_over(former: None) -> None:
    """Events, snapshots and positions of followers come over as they were, with cipher, compressor and gaps."""
    said = take_over("Bank", "Shop")
    assert "Bank: 8 events up to position 14, 1 snapshots, positions of 0 applications: taken over" in said
    assert "Shop: 3 events up to position 11, 0 snapshots, positions of 1 applications: taken over" in said
    assert (positions(BankRecords), positions(ShopRecords)) == (OF_BANK, OF_SHOP)
    bank, shop = get_application(Bank), get_application(Shop)
    assert bank.balance("Ada") == Decimal("11.00")
    assert shop.has_voucher("Cyd")
    assert shop.recorder.max_tracking_id("Bank") == 12
    assert BankRecords.Snapshot.objects.using("ledger").get().originator_version == 3
    assert "are there already" in take_over("Bank", "Shop")
    bank.open_account("Eve")
    assert [each.id for each in bank.notification_log.select(1, 10)] == [*OF_BANK, 15]
    # What was stored since is no difference.
    assert "8 events up to position 14" in take_over("Bank")


def test_a_dry_run_leaves_nothing(former: None) -> None:
    """With ``--dry-run`` all is done and checked, and nothing is there then."""
    assert "would be taken over" in take_over("Bank", dry_run=True)
    assert positions(BankRecords) == []


def test_unknown_applications_are_named(former: None) -> None:
    """An application of the old tables that the setting lacks stops the command before anything is written."""
    with pytest.raises(CommandError, match="'Archive', which EVENTSOURCING does not have"):
        take_over()
    with pytest.raises(CommandError, match="no application 'Nope'"):
        take_over("Nope")
    assert positions(BankRecords) == []


def test_tables_that_are_not_there(former: None) -> None:
    """The command names a table that the database lacks."""
    with connections["ledger"].cursor() as cursor:
        cursor.execute("DROP TABLE notification_tracking")
    with pytest.raises(CommandError, match="no table 'notification_tracking'"):
        take_over("Bank")


def test_events_that_cannot_be_read(former: None) -> None:
    """With another key nothing is taken over, and the first event is named without its state."""
    other = {**KEYS, "CIPHER_KEY": KEYS["CIPHER_KEY"].replace("Y2", "Z2")}
    with override_settings(EVENTSOURCING={**SETTING, "Bank": {**SETTING["Bank"], "ENV": other}}):
        with pytest.raises(CommandError, match=r"Event 1 of Bank .* cannot be read"):
            take_over("Bank")
        assert positions(BankRecords) == []


def test_tables_with_events_of_their_own(former: None) -> None:
    """Events are not mixed with those that an application has already."""
    get_application(Bank).open_account("Eve")
    with pytest.raises(CommandError, match="Nothing was taken over"):
        take_over("Bank")
    assert positions(BankRecords) == [1]


DIFFERENCES = {
    "UPDATE bank_events SET state = X'00' WHERE notification_id = 9": "Event 9 of Bank .* another state",
    "DELETE FROM bank_events WHERE notification_id = 9": "Event 9 of Bank .* is missing",
    "DELETE FROM bank_events WHERE notification_id = 14": "Event 14 of Bank .* is missing",
    "DELETE FROM stored_events WHERE id = 9": "Event 9 of Bank .* is not among",
    "UPDATE shop_tracking SET notification_id = 11": "up to position 12",
}


def test_what_differs_is_named(former: None) -> None:
    """A second run compares again, and names what differs."""
    take_over("Bank", "Shop")
    for statement, problem in DIFFERENCES.items():
        with as_test_case(DjangoBank("ledger", "")), connections["ledger"].cursor() as cursor:
            cursor.execute(statement)
            assert cursor.rowcount == 1
            with pytest.raises(CommandError, match=problem):
                take_over("Bank", "Shop")


def test_another_block_is_refused(former: None) -> None:
    """An import refuses to be part of another transaction, whose rollback would leave positions used up."""
    with transaction.atomic(using="ledger"), pytest.raises(RuntimeError, match="durable"):
        take_over("Bank")


def test_a_missing_version_is_refused(former: None) -> None:
    """An aggregate that has lost an event is named, and nothing is taken over."""
    landing.stored_events().objects.using("ledger").filter(pk=8).delete()
    with pytest.raises(CommandError, match="4 events up to version 5"):
        take_over("Bank")
    assert positions(BankRecords) == []


def test_settings_of_the_old_package_are_refused() -> None:
    """A variable that the old package read is refused with the remedy, and not ignored."""
    from flask_eventsourcing.contrib.django.configuring import configured

    for env, remedy in (({"DJANGO_DB_ALIAS": "ledger"}, "'DATABASE'"), ({"BANK_DJANGO_DB_ALIAS": "x"}, "'DATABASE'")):
        wrong = {"Bank": {"APPLICATION": "tests.domain.Bank", "ENV": env}}
        with override_settings(EVENTSOURCING=wrong), pytest.raises(ConfigurationError, match=remedy):
            configured()


# ------------------------------------------------------------------------------------------- sync_followers

made: list[Any] = []


def get_runner() -> Any:
    """What ``EVENTSOURCING_RUNNER`` names: one that was made for the test."""
    return made[-1]


@pytest.fixture
def runner(former: None) -> Iterator[Any]:
    """A system of the bank and the shop that follows it, with what was taken over."""
    take_over("Bank", "Shop")
    made.append(SingleThreadedRunner(System(pipes=[[Bank, Shop]]), env=dict(runner_env())))
    with override_settings(EVENTSOURCING_RUNNER=f"{__name__}.get_runner"):
        yield made[-1]
    made.pop().stop()


def sync(*names: str, status: int = 0, **options: Any) -> str:
    """Run the command and return what it prints."""
    output = StringIO()
    with pytest.raises(SystemExit, match=str(status)) if status else nullcontext():
        call_command("sync_followers", *names, stdout=output, stderr=output, no_color=True, **options)
    return output.getvalue()


def forgive_mallory() -> None:
    """Let the shop have processed the event that it fails with."""
    ShopRecords.Tracking.objects.using("ledger").filter(application_name="Bank").update(notification_id=13)


def test_followers_are_synchronised(runner: Any) -> None:
    """Followers process what they have not seen, from where they were with the old package."""
    forgive_mallory()
    said = sync(verbosity=2)
    assert "All followers selected for synchronization.\n[1/1] Synchronizing Shop... OK\n" in said
    assert "\t 1 event from Bank processed" in said
    assert runner.get(Shop).has_voucher("Dan")
    assert "0 events from Bank" in sync("Shop", verbosity=2)
    assert sync(verbosity=0) == ""


def test_dry_run_of_followers(runner: Any) -> None:
    """A dry run processes, and rolls all back."""
    forgive_mallory()
    said = sync(dry_run=True, verbosity=2)
    assert "OK (dry-run)\n\t 1 event from Bank processed" in said
    assert positions(ShopRecords) == OF_SHOP
    assert "1 event from Bank" in sync(verbosity=2)


def test_a_follower_that_fails(runner: Any) -> None:
    """A failing follower is reported, stays before the event, and makes the command exit with 1."""
    assert "Shop... FAILED\nThere were errors" in sync(status=1)
    assert "Caught a EventSourcingError: Not for Mallory." in sync(status=1, verbosity=2, dry_run=True)
    assert positions(ShopRecords) == OF_SHOP
    assert runner.get(Shop).recorder.max_tracking_id("Bank") == 12


def test_unknown_followers(runner: Any) -> None:
    """An unknown follower is named, with the known ones."""
    with pytest.raises(CommandError, match=r"selected: Nope\. The known followers are: Shop"):
        sync("Nope")


def test_where_the_runner_is(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner is an attribute of an app's configuration, named or the only one; anything else is refused."""
    forgive_mallory()
    config = apps.get_app_config("ledger")
    monkeypatch.setattr(config, "runner", runner, raising=False)
    with override_settings(EVENTSOURCING_RUNNER="ledger.runner"):
        assert "OK" in sync()
    with override_settings(EVENTSOURCING_RUNNER=None):
        assert "OK" in sync()
        monkeypatch.setattr(config, "second", runner, raising=False)
        with pytest.raises(CommandError, match="2 runners"):
            sync()
    for wrong in ("ledger.nothing", "nowhere", 5, f"{__name__}.made"):
        with override_settings(EVENTSOURCING_RUNNER=wrong), pytest.raises(CommandError, match="must be 'app_label"):
            sync()


# ------------------------------------------------------------------------------------------- djangoevents

AnyAccount: Any = Account


def deposited(event: JournalEvent) -> dict[str, Any]:
    """Return what an event of any version of the schema says."""
    cents = event.data.get("cents")
    return {"amount": Decimal(event.data["amount"]) if cents is None else Decimal(cents) / 100}


MAPPING: dict[tuple[str, str], Converted | None] = {
    ("accounts.aggregates", "Account.Opened"): (AnyAccount.Opened, lambda event: {"owner": event.data["owner"]}),
    ("accounts.aggregates", "Account.Deposited"): (AnyAccount.Deposited, deposited),
    ("miracles.aggregates", "Miracle.Happened"): None,
}


@pytest.fixture
def journal(url: str) -> Iterator[None]:
    """A database with the journal of djangoevents beside empty tables of this package."""
    with project.database("ledger", url), override_settings(EVENTSOURCING=SETTING):
        load(FORMER / "event_journal.sql")
        yield


def import_journal(mapping: Any = None, **options: Any) -> Imported:
    """Call the function."""
    return import_event_journal(Bank, MAPPING if mapping is None else mapping, using="ledger", **options)


@pytest.mark.parametrize("url", ["sqlite-file", pytest.param("postgresql", marks=pytest.mark.long)], indirect=True)
def test_journal_is_taken_over(journal: None) -> None:
    """Events of the journal become those of today's classes, with their dates, ids, metadata and positions."""
    assert import_journal(dry_run=True).events == 3
    assert positions(BankRecords) == []
    assert import_journal() == Imported("Bank", 3, 8, was_there=False)
    assert import_journal().was_there
    account: Any = get_application(Bank).repository.get(UUID("6deaca4c-d866-4b28-9878-8814a55a4688"))
    opened = datetime(2018, 1, 15, 6, 40, 1, 250000, UTC)
    assert (account.owner, account.balance, account.created_on) == ("Ada", Decimal("3.30"), opened)
    stored = BankRecords.StoredEvent.objects.using("ledger").get(pk=3)
    assert (stored.recorded_at, stored.metadata) == (opened, {"command_id": "123", "user": "ada"})
    assert stored.event_id == UUID("a2f5c6d0-f9c1-11e7-8f1a-0242ac110002")
    account.deposit(Decimal(1))
    assert get_application(Bank).save(account)[0].notification.id == 9


def wrong(event: JournalEvent) -> dict[str, Any]:
    """Return what comes back as something else."""
    return {"owner": ("Ada", "Bob")}


UNFIT: list[tuple[dict[tuple[str, str], Any], type[Exception], str]] = [
    ({("miracles.aggregates", "Miracle.Happened"): ...}, ConfigurationError, r"'Miracle.Happened'\)\. Add them"),
    (dict.fromkeys(MAPPING), ConfigurationError, "nothing to take over"),
    ({("accounts.aggregates", "Account.Opened"): None}, ImportedEventsError, "2 events up to version 3"),
    (
        {("accounts.aggregates", "Account.Opened"): (AnyAccount.Opened, lambda event: {})},
        ImportedEventsError,
        "Event 3 of the journal .*owner",
    ),
    (
        {("accounts.aggregates", "Account.Opened"): (AnyAccount.Opened, lambda event: {"owner": {"Ada"}})},
        ImportedEventsError,
        "Event 3 of Bank .*cannot be stored",
    ),
    (
        {("accounts.aggregates", "Account.Deposited"): (AnyAccount.Deposited, lambda event: {"amount": 1 / 0})},
        ImportedEventsError,
        "Event 7 of the journal .*ZeroDivisionError",
    ),
    (
        {("accounts.aggregates", "Account.Deposited"): (AnyAccount.Deposited, lambda event: {"amount": Rounded(1)})},
        ImportedEventsError,
        "Event 7 of Bank .*with different values",
    ),
]


class Rounded(int):
    """A number that comes back as another kind."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rounded) and int(self) == int(other)

    __hash__ = int.__hash__


def test_mapping_that_does_not_fit(journal: None) -> None:
    """A class that the mapping lacks, and an event that cannot be converted or read back, are named before a commit."""
    for changed, error, problem in UNFIT:
        mapping = {key: value for key, value in {**MAPPING, **changed}.items() if value is not ...}
        with pytest.raises(error, match=problem):
            import_journal(mapping)
        assert positions(BankRecords) == []


# ------------------------------------------------------------------------------------------- the page

PROGRAM = """
import io
from django.apps import apps
from django.core.management import call_command
from django.db import connection
from eventsourcing.persistence import StoredEvent
from bank.domain import Account, Bank
from bank.journal import take_over
from bank.models import ShopRecords
from bank.shop import Shop, Voucher
from bank.tasks import Errand
from flask_eventsourcing.contrib.django import get_application
from flask_eventsourcing.contrib.django.imports import landing

call_command("migrate", verbosity=0)
tables = landing.stored_events(), landing.snapshots(), landing.notification_tracking(), landing.event_journal()
with connection.schema_editor() as editor:
    for each in tables:
        editor.create_model(each)

def store(position, name, aggregate):
    for event in aggregate.collect_events():
        made = get_application(name).mapper.to_stored_event(event)
        tables[0].objects.create(id=position, application_name=name, originator_id=made.originator_id,
                                 originator_version=1, topic=made.topic, state=made.state)

store(1, "Bank", Account("Ada"))
store(2, "Shop", Voucher("Ada"))
store(3, "Bank", Account("Bob"))
tables[2].objects.create(application_name="Shop", upstream_application_name="Bank", notification_id=1)
call_command("import_eventsourcing_django")
call_command("sync_followers", no_color=True)
bank = apps.get_app_config("bank").bank
print([each.id for each in bank.notification_log.select(1, 10)], ShopRecords.StoredEvent.objects.count())
errand = Errand()
errand.name("Bread")
old = b'{"title":"Bread","timestamp":"2018-01-15 06:40:01.25"}'
topic = "bank.tasks:Task.Named"
read = bank.mapper.to_domain_event(StoredEvent(errand.id, 2, topic, old))
print(errand.label, read.label, bank.mapper.to_stored_event(errand.collect_events()[1]).topic == topic)
call_command("eventsourcing", "run", "--once", verbosity=0)
bank_events = apps.get_model("bank", "BankStoredEvent")
bank_events.objects.all().delete()
tables[3].objects.create(id=5, event_id="a2f5c6d0-f9c1-11e7-8f1a-0242ac110002", event_data='{"owner":"Cyd"}',
    aggregate_id="6deaca4c-d866-4b28-9878-8814a55a4688", aggregate_version=0, metadata="null",
    create_date="2018-01-15 06:40:01+00:00", module_name="accounts.aggregates", class_name="Account.Opened")
print(take_over(), bank_events.objects.get().recorded_at)
"""


def test_the_page(tmp_path: Path) -> None:
    """The project of the page works, and its commands print what it says."""
    project_of_page = bank_project(tmp_path)
    shown = files(ROOT / "docs" / "django-migrating.md", "project")
    project_of_page.append("site_of_bank/settings.py", shown.pop("settings.py"))
    for name in ("bank/models.py", "bank/projections.py"):
        project_of_page.append(name, shown.pop(name))
    for name, text in shown.items():
        project_of_page.write(name, text)
    head, _, _ = shown["bank/apps.py"].partition("    @property")
    project_of_page.write("bank/apps.py", f"{head}    def ready(self):\n        self.bank = get_application('Bank')\n")
    project_of_page.manage("makemigrations", "bank")
    project_of_page.write("bank/apps.py", shown["bank/apps.py"])
    said = project_of_page.manage("shell", "-v", "0", "-c", PROGRAM)
    page = (ROOT / "docs" / "django-migrating.md").read_text()
    consoles = [each.split("\n```")[0] for each in page.split("```console\n$ python manage.py ")[1:]]
    assert len(consoles) == 2
    for console in consoles:
        assert console.partition("\n")[2] in said
    assert "[1, 3] 2\nBread Bread True" in said
    assert "Dear Bob, welcome." in said
    assert "events=1, position=5, was_there=False, snapshots=0, tracking=0) 2018-01-15 06:40:01+00:00" in said
