"""Applications of a Django project whose events are in Cassandra."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.core.management import CommandError, call_command
from django.db import connections, transaction
from django.test import override_settings
from eventsourcing.persistence import IntegrityError

from flask_eventsourcing import events_recorded
from flask_eventsourcing.contrib.django import (
    close_application,
    get_application,
    init_application,
    project_site,
    retry_on_conflict,
    wait_for,
)
from flask_eventsourcing.contrib.django.configuring import configured
from flask_eventsourcing.contrib.django.hosting import site
from flask_eventsourcing.contrib.django.system_checks import check_setting
from flask_eventsourcing.exceptions import ApplicationInitializedError, ConfigurationError
from flask_eventsourcing.persistence.dialects.event_tables import ConflictError
from tests.cassandra_nodes import keyspace_on
from tests.django_host import project
from tests.django_host.test_projections import quiet, run, status
from tests.domain import Bank, in_thread

__all__ = ["quiet"]
PLACE = "cassandra:{}"
pytestmark = pytest.mark.usefixtures("driver")


def cluster(server: str = "127.0.0.1:9", keyspace: str = "bank", **others: Any) -> dict[str, Any]:
    """Return what the setting says of a cluster."""
    host, _, port = server.partition(":")
    found = {"CONTACT_POINTS": [host], "PORT": int(port), "KEYSPACE": keyspace, "REPLICATION": 1, "PATIENCE": 60}
    return {key: value for key, value in (found | others).items() if value is not ...}


def setting(**others: Any) -> Any:
    """Have the project have the bank alone, with these values."""
    return override_settings(EVENTSOURCING={"Bank": {"APPLICATION": "tests.domain.Bank", **others}})


def command(*arguments: str) -> str:
    """Call a command, and return what it prints."""
    output = StringIO()
    call_command("eventsourcing", *arguments, stdout=output)
    return output.getvalue()


@pytest.fixture(scope="module")
def keyspace(cassandra_server: str) -> Iterator[str]:
    """A keyspace with the tables of the bank, which the tests of the module share."""
    with keyspace_on(cassandra_server) as name, setting(CASSANDRA=cluster(cassandra_server, name)):
        call_command("eventsourcing", "init-db", stdout=StringIO())
        yield name


@pytest.fixture
def bank(cassandra_server: str, keyspace: str, tmp_path: Path) -> Iterator[Bank]:
    """The bank, with the models of its projection in a database of the test."""
    with (
        project.database("ledger", f"sqlite:///{tmp_path / 'models.db'}"),
        setting(CASSANDRA=cluster(cassandra_server, keyspace), DATABASE="ledger"),
    ):
        yield get_application(Bank)


def amounts() -> dict[UUID, int]:
    """Return what the projection has written."""
    from tests.django_host.ledger.models import Balance

    return dict(Balance.objects.using("ledger").values_list("account_id", "amount"))


def test_application(bank: Bank) -> None:
    """There is one application, which can be closed and used again; a save is stored, whatever is rolled back."""
    told: list[Any] = []

    def receive(sender: Bank, application: Bank, notifications: tuple[Any, ...]) -> None:
        told.append((sender, [each.id for each in notifications]))

    with events_recorded.connected_to(receive, bank), transaction.atomic(using="ledger"):
        account_id = bank.open_account()
        transaction.set_rollback(True, using="ledger")
    assert told == [(bank, [bank.recorder.max_notification_id()])]
    with pytest.raises(ApplicationInitializedError):
        init_application()
    close_application()
    again = init_application()
    assert again is get_application("Bank") is not bank
    assert again.repository.get(account_id).version == 1


def test_projection(bank: Bank, cassandra_server: str, keyspace: str) -> None:
    """A projection follows the log and writes Django's models; commands show and rebuild it, and callers can wait."""
    account_id = bank.open_account()
    bank.deposit(account_id, 5)
    run(alias=PLACE.format(keyspace))
    wait_for("Balances", bank.recorder.max_notification_id(), timeout=60)
    assert amounts()[account_id] == 5
    assert status(alias=PLACE.format(keyspace)).position == bank.recorder.max_notification_id()
    bank.deposit(account_id, 6)
    assert "Balances" in command("status")
    command("run", "--once")
    assert amounts()[account_id] == 11
    command("rebuild", "Balances", "--offline")
    assert amounts()[account_id] == 11
    checked = command("check")
    assert f"keyspace {keyspace}" in checked
    assert "table ledger_balance ok" in checked
    assert command("init-db") == "All tables are there.\n"


def test_conflict_is_tried_again(bank: Bank) -> None:
    """A function is run again after a conflict only if it has saved nothing in that try."""
    tries: list[int] = []

    @retry_on_conflict(times=2)
    def deposit(*, saves: bool) -> None:
        tries.append(1)
        if saves:
            bank.open_account()
        if len(tries) < 3:
            raise IntegrityError

    deposit(saves=False)
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(IntegrityError):
        deposit(saves=True)
    assert len(tries) == 1


def test_host_of_tasks(bank: Bank) -> None:
    """Task queues are told that there is nothing to roll back, and a transaction is refused with the reason."""
    host = project_site().host
    assert host.unit() is None
    with pytest.raises(ConfigurationError, match="A transaction cannot hold events that are in Cassandra"):
        host.transaction().__enter__()


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"CASSANDRA": 5}, r"\['CASSANDRA'\] must be a mapping such as"),
        ({"CASSANDRA": cluster(KEYSPACE=...)}, r"\['KEYSPACE'\] is missing, which has no default"),
        ({"CASSANDRA": cluster(REPLICATION=0)}, r"\['REPLICATION'\] must be how many nodes"),
        ({"CASSANDRA": cluster(CONTACT_POINTS="127.0.0.1")}, r"\['CONTACT_POINTS'\] must be a list"),
        ({"CASSANDRA": cluster(KEYSPACES="bank")}, "has 'KEYSPACES', which nothing reads: the keys are CONTACT_POINTS"),
        ({"CASSANDRA": cluster(USERNAME="ada")}, "'USERNAME' and 'PASSWORD' go together"),
        ({"CASSANDRA": cluster(), "COMMIT": "save"}, "has 'COMMIT', which nothing reads"),
        ({"CASSANDRA": cluster()}, "declares tables for the events of Bank, which are in Cassandra"),
    ],
)
def test_checks(others: dict[str, Any], said: str) -> None:
    """A system check says what is wrong with the setting, with a hint and without any value of the setting."""
    with setting(**others):
        (error,) = [each for each in check_setting() if each.id != "eventsourcing.W002"]
    assert error.hint
    assert error.level >= 40
    assert re.search(said, error.msg)


def test_two_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both drivers at once are refused by a system check, with the reason."""
    from flask_eventsourcing.cassandra import drivers

    monkeypatch.setattr(drivers, "installed", lambda: {"cassandra-driver": "3.30.1", "scylla-driver": "3.29.12"})
    with setting(CASSANDRA=cluster()):
        (error,) = [each for each in check_setting() if each.id == "eventsourcing.E007"]
    assert "are both installed" in error.msg


def test_settings_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of django-cassandra-engine are read, and none of its connections is opened."""
    handler: Any = connections
    engine = {
        "ENGINE": "django_cassandra_engine",
        "NAME": "bank",
        "HOST": "127.0.0.1, 127.0.0.2",
        "USER": "ada",
        "PASSWORD": "secret",
        "OPTIONS": {"replication": {"strategy_class": "SimpleStrategy", "replication_factor": 2}},
    }
    monkeypatch.setitem(handler.settings, "cassandra", engine)
    with setting(DATABASE="cassandra", CASSANDRA={"PATIENCE": 3}):
        one = configured()["Bank"]
    config = one.cassandra
    assert config is not None
    assert (one.place, one.alias) == ("cassandra", "default")
    assert list(config.cassandra_contact_points) == ["127.0.0.1", "127.0.0.2"]
    assert (config.cassandra_keyspace, config.cassandra_replication, config.cassandra_port) == ("bank", 2, 9042)
    assert (config.cassandra_username, config.cassandra_password, config.cassandra_patience) == ("ada", "secret", 3)
    # As the engine leaves them when it has connected.
    engine["OPTIONS"] = {"replication": {"dc1": 3}, "connection": {"auth_provider": object(), "port": 9999}}
    with setting(DATABASE="cassandra"):
        config = configured()["Bank"].cassandra
    assert config is not None
    assert (config.cassandra_replication, config.cassandra_port) == ({"dc1": 3}, 9999)
    del engine["USER"], engine["PASSWORD"]
    with setting(DATABASE="cassandra"), pytest.raises(ConfigurationError, match="has 'auth_provider', which is not"):
        configured()
    # As its test databases leave them.
    engine["OPTIONS"] = {"replication": {"strategy_class": "SimpleStrategy"}}
    with setting(DATABASE="cassandra"):
        assert configured()["Bank"].place == "cassandra"
    del engine["NAME"]
    missing = r"\['KEYSPACE'\] must be a name .* come from DATABASES\['cassandra'\]"
    with setting(DATABASE="cassandra"), pytest.raises(ConfigurationError, match=missing):
        configured()


def test_beside_an_application_in_a_database(cassandra_server: str, keyspace: str, tmp_path: Path) -> None:
    """In a project with both, a function that has saved in Cassandra is not run again; commands ask for one of them."""
    both: dict[str, dict[str, Any]] = {
        "Bank": {"APPLICATION": "tests.domain.Bank", "CASSANDRA": cluster(cassandra_server, keyspace)},
        "Shop": {"APPLICATION": "tests.domain.Shop", "DATABASE": "ledger"},
    }
    tries: list[int] = []

    @retry_on_conflict
    def move(*, saves: bool) -> None:
        tries.append(1)
        if saves:
            get_application(Bank).open_account()
        if len(tries) < 3:
            raise ConflictError

    @retry_on_conflict
    def deposit(account_id: UUID) -> None:
        tries.append(1)
        bank = get_application(Bank)
        account = bank.account(account_id)
        if len(tries) == 1:
            in_thread(lambda: bank.deposit(account_id, 5))
        account.deposit(1)
        bank.save(account)

    with (
        project.database("ledger", f"sqlite:///{tmp_path / 'models.db'}"),
        override_settings(EVENTSOURCING={name: {"DATABASE": "ledger", **one} for name, one in both.items()}),
    ):
        with pytest.raises(IntegrityError):
            move(saves=True)
        assert len(tries) == 1
        tries.clear()
        move(saves=False)
        assert len(tries) == 3
        tries.clear()
        deposit(account_id := get_application(Bank).open_account())
        assert (len(tries), get_application(Bank).account(account_id).balance) == (2, 6)
        assert project_site().host.unit() is not None
        with pytest.raises(CommandError, match=f"--database cassandra:{keyspace} or --database ledger"):
            command("check")
        assert "Bank: log ok" in command("--database", PLACE.format(keyspace), "check")
        with pytest.raises(ConfigurationError, match="The events of Bank are in Cassandra, and in no database"):
            site().database("Bank")
