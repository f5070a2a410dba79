"""Connections as Django keeps them: several databases, replicas, pools, and connections that are closed or lost."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from django.core.management import CommandError, call_command
from django.db import DataError, InterfaceError, OperationalError, close_old_connections, connections, router
from django.test import override_settings
from eventsourcing.persistence import InterfaceError as LibraryInterfaceError
from eventsourcing.persistence import OperationalError as LibraryOperationalError

from flask_eventsourcing.contrib.django import get_application, wait_for
from flask_eventsourcing.contrib.django.projecting import projections
from flask_eventsourcing.persistence.dialects import postgresql_drivers
from tests.django_host import project
from tests.django_host.conftest import DATABASES, DjangoBank, UndoneError
from tests.django_host.test_forks import read_beside
from tests.domain import Bank, Shop


class ToReplica:
    """A router that sends all reads to a replica."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        """Return the replica."""
        return "replica"


def test_two_aliases(site: DjangoBank, tmp_path: Path) -> None:
    """Applications in two databases each follow the transaction of their own, and announce only their commits."""
    with (
        project.database("shop", f"sqlite:///{tmp_path / 'shop.db'}"),
        project.applications(Bank="ledger", Shop="shop"),
    ):
        bank, shop = get_application(Bank), get_application(Shop)
        other = DjangoBank("shop", "")
        with site.atomic():
            bank.open_account()
            with other.rolled_back():
                shop.open_account()
                bank.open_account()
        assert len(bank.notification_log.select(1, 10)) == 2
        assert shop.notification_log.select(1, 10) == []
        with other.atomic(), site.rolled_back():
            shop.open_account()
            bank.open_account()
        assert len(bank.notification_log.select(1, 10)) == 2
        assert len(shop.notification_log.select(1, 10)) == 1


def test_router_to_a_replica(site: DjangoBank, tmp_path: Path) -> None:
    """A router that sends reads to a replica does not send the log, aggregates and projections there."""
    from tests.django_host.ledger.models import BankRecords
    from tests.django_host.test_projections import balances, run

    with (
        project.database("replica", f"sqlite:///{tmp_path / 'replica.db'}"),
        override_settings(DATABASE_ROUTERS=[f"{__name__}.ToReplica"]),
    ):
        assert router.db_for_read(BankRecords.StoredEvent) == "replica"
        account_id = site.opened()
        site.bank.deposit(account_id, 3)
        assert site.bank.balance(account_id) == 3
        assert len(site.bank.notification_log.select(1, 10)) == 2
        assert BankRecords.StoredEvent.objects.count() == 0
        run()
        assert balances(site) == {account_id: 3}


@pytest.mark.parametrize("max_age", [0, None])
def test_old_connections_are_closed(site: DjangoBank, max_age: int | None) -> None:
    """Between two saves connections may be closed as old, whatever ``CONN_MAX_AGE`` is."""
    connections.settings[site.alias]["CONN_MAX_AGE"] = max_age
    site.connection.close()
    account_id = site.opened()
    for number in range(3):
        close_old_connections()
        assert (site.connection.connection is None) is (max_age == 0)
        site.bank.deposit(account_id)
        assert site.bank.balance(account_id) == number + 1


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_pool(url: str) -> None:
    """With a pool of psycopg each thread gets a free connection, and everything that is saved is stored."""
    from django.db import transaction

    options = {**project.database_settings(url)["OPTIONS"], "pool": {"min_size": 1, "max_size": 2, "timeout": 20}}
    with project.database("pooled", url, OPTIONS=options, CONN_MAX_AGE=0), project.applications(Bank="pooled"):
        site = DjangoBank("pooled", url)
        account_id = site.opened()
        for _ in range(4):
            site.connection.close()
            site.elsewhere(lambda: site.bank.deposit(account_id))
            with transaction.atomic(using="pooled"):
                site.bank.deposit(account_id)
            with site.rolled_back():
                site.bank.deposit(account_id)
        assert site.bank.balance(account_id) == 8
        site.connection.close()
        site.connection.close_pool()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_pool_is_left_to_the_threads(url: str) -> None:
    """What is read beside a transaction takes no connection of psycopg's pool, whose threads would wait for it."""
    from django.db import transaction

    options = {**project.database_settings(url)["OPTIONS"], "pool": {"min_size": 1, "max_size": 1, "timeout": 1}}
    with project.database("small", url, OPTIONS=options, CONN_MAX_AGE=0), project.applications(Bank="small"):
        site = DjangoBank("small", url)
        with ExitStack() as stack:
            stack.callback(site.connection.close_pool)
            stack.callback(site.connection.close)
            with transaction.atomic(using="small"):
                read_beside(site)
                site.opened()
            site.connection.close()
            assert site.stored() == (1, 0)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("is_local", [False, True])
def test_search_path_that_moves(site: DjangoBank, is_local: bool) -> None:
    """Within a block the search path may move from tenant to tenant: what each of them has saved is committed."""
    from tests.django_host.ledger.models import BankRecords

    def move(tenant: str, statement: str = "SET {}search_path TO {}") -> None:
        with site.connection.cursor() as cursor:
            cursor.execute(statement.format("LOCAL " if is_local and site.connection.in_atomic_block else "", tenant))

    def count(tenant: str) -> int:
        move(tenant)
        return int(BankRecords.StoredEvent.objects.using(site.alias).count())

    for tenant in ("ada", "eve"):
        move(tenant, "CREATE SCHEMA {1}")
        move(tenant)
        with site.connection.schema_editor() as editor:
            for model in BankRecords.models:
                editor.create_model(model)
    with site.atomic():
        move("ada")
        site.opened()
        with suppress(DataError), site.atomic(), site.connection.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")
        move("eve")
        site.opened()
        site.opened()
    assert (count("ada"), count("eve")) == (1, 2)
    with site.rolled_back():
        move("ada")
        site.opened()
        move("eve")
    assert (count("ada"), count("eve")) == (1, 2)


def make_tenant(site: DjangoBank, tenant: str) -> None:
    """Make the tables in a schema of their own."""
    from tests.django_host.ledger.models import Balance, BankRecords

    with site.connection.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {tenant}; SET search_path TO {tenant}")
    with site.connection.schema_editor() as editor:
        for model in (*BankRecords.models, Balance):
            editor.create_model(model)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("is_asked", [False, True])
def test_connections_beside_a_search_path(site: DjangoBank, monkeypatch: pytest.MonkeyPatch, is_asked: bool) -> None:
    """Connections beside the thread's look for tables where its search path leads, on older servers too."""
    from tests.django_host.test_projections import balances, run

    if is_asked:
        # As of a server that does not tell by itself.
        monkeypatch.setattr(postgresql_drivers, "told", lambda driver, name: None)

    def move(tenant: str) -> None:
        with site.connection.cursor() as cursor:
            cursor.execute(f"SET search_path TO {tenant}")

    datastore: Any = site.bank.recorder.datastore  # type: ignore[attr-defined]
    site.opened()
    run()
    accounts = {}
    for number, tenant in enumerate(("ada", "eve"), start=2):
        make_tenant(site, tenant)
        accounts[tenant] = {site.opened() for _ in range(number)}
        with site.atomic(), datastore.reading(join=False) as reading:
            found = reading.connection.exec_driver_sql("SELECT count(*) FROM bank_events")
            assert found.scalar_one() == number
        # A run closes the connection of its thread at its end.
        run()
        move(tenant)
        assert set(balances(site)) == accounts[tenant]
        wait_for("Balances", number)
    move("public")
    assert len(balances(site)) == 1
    read_beside(site)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_workers_of_two_tenants(site: DjangoBank, url: str) -> None:
    """Projections of the same name in two schemas of a database do not wait for each other."""
    make_tenant(site, "ada")
    make_tenant(site, "eve")
    with ExitStack() as stack:
        taken: list[bool] = []
        for tenant in ("ada", "eve", "ada"):
            alias = f"{tenant}{len(taken)}"
            options = {**project.database_settings(url)["OPTIONS"], "options": f"-c search_path={tenant}"}
            stack.enter_context(project.alias(alias, url, OPTIONS=options))
            stack.enter_context(project.applications(Bank=alias))
            lock = projections().bound[alias].find("Balances").lock()
            stack.callback(lock.release)
            taken.append(lock.acquire())
        assert taken == [True, True, False]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_several_hosts(url: str) -> None:
    """HOST and PORT may name several servers of which one takes writes, as Django's driver allows."""
    known = sa.make_url(url)
    host, port = str(known.query.get("host") or known.host), known.port or 5432
    several = {"HOST": f"{host},{host}", "PORT": f"{port},{port}", "OPTIONS": {"target_session_attrs": "read-write"}}
    with project.database("ledger", url, **several), project.applications(Bank="ledger"):
        site = DjangoBank("ledger", url)
        account_id = site.opened()
        read_beside(site)
        assert site.bank.balance(account_id) == 0


def checked(site: DjangoBank) -> tuple[bool, str]:
    """Return whether the command finds a fault, and what it says."""
    said = StringIO()
    try:
        call_command("eventsourcing", "check", database=site.alias, stdout=said)
    except (CommandError, SystemExit) as error:
        return True, f"{said.getvalue()}{error}"
    return False, said.getvalue()


def test_pooler(pgbouncer_url: str) -> None:
    """Behind a PgBouncer in transaction mode, check names the setting that guarantees one runner at a time."""
    from tests.django_host.test_projections import balances, run

    settings = {"PROJECTION_LOCK": "lease", "POSTGRES_NOTIFY": False}
    with project.database("ledger", pgbouncer_url, DISABLE_SERVER_SIDE_CURSORS=True):
        site = DjangoBank("ledger", pgbouncer_url)
        with project.applications(Bank="ledger"):
            is_fault, said = checked(site)
            assert is_fault
            assert "set EVENTSOURCING['Bank']['PROJECTION_LOCK'] to 'lease'" in said
        with project.applications(settings, Bank="ledger"):
            is_fault, said = checked(site)
            assert not is_fault, said
            account_id = site.opened()
            run()
            assert balances(site) == {account_id: 0}


LOST = (OperationalError, InterfaceError, LibraryOperationalError, LibraryInterfaceError)
"""Django's errors where Django runs the statement, and the library's where a recorder does."""
KILL = {
    "postgresql": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid()",
    "mysql": "KILL {}",
}


@pytest.mark.parametrize("url", DATABASES[1:], indirect=True)
def test_server_that_was_restarted(site: DjangoBank) -> None:
    """If the server has ended a connection, one save fails, also within a block, and the next request works."""
    account_id = site.opened()
    for is_inside in (False, True):
        end_connection(site)
        with pytest.raises(LOST):
            deposit(site, account_id, is_inside=is_inside)
        close_old_connections()
        site.bank.deposit(account_id)
    assert site.bank.balance(account_id) == 2
    with pytest.raises(UndoneError):
        deposit(site, account_id, is_inside=True, error=UndoneError)
    assert site.bank.balance(account_id) == 2


@pytest.mark.parametrize("url", DATABASES[1:], indirect=True)
def test_health_checks(site: DjangoBank) -> None:
    """With ``CONN_HEALTH_CHECKS`` a request after a restart does not fail, on whichever connection it works."""
    connections.settings[site.alias] |= {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True}
    account_id = site.opened()
    site.connection.close()
    for number in range(3):
        close_old_connections()
        site.bank.deposit(account_id)
        site.bank.balance(account_id)
        read_beside(site)
        # As many as the pool of our own keeps.
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(site.bank.recorder.datastore.engine.connect())  # type: ignore[attr-defined]
        assert site.bank.balance(account_id) == number + 1
        end_connections(site)
    close_old_connections()
    with site.atomic():
        assert site.bank.balance(account_id) == 3


@pytest.mark.parametrize("url", DATABASES[1:], indirect=True)
def test_connection_that_is_lost_before_a_doubtful_commit(site: DjangoBank) -> None:
    """If the connection is lost before a commit, the error is Django's own, and the next block has a connection."""
    account_id = site.opened()

    def lose() -> None:
        with site.atomic():
            site.bank.deposit(account_id)
            with site.connection.cursor() as cursor:
                cursor.execute("DO $$ BEGIN END $$" if site.connection.vendor == "postgresql" else "DO 1")
            end_connection(site)

    with pytest.raises((OperationalError, InterfaceError)):
        lose()
    with site.atomic():
        site.bank.deposit(account_id)
    assert site.bank.balance(account_id) == 1


def end_connections(site: DjangoBank) -> None:
    """Have the server end all connections to the database."""
    ends = {
        "postgresql": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid()",
        "mysql": "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
    }

    def end() -> None:
        with site.connection.cursor() as cursor:
            cursor.execute(ends[site.connection.vendor])
            rows = cursor.fetchall()
            for (number,) in rows if site.connection.vendor == "mysql" else ():
                cursor.execute(f"KILL {number}")

    site.elsewhere(end)


def deposit(site: DjangoBank, account_id: Any, *, is_inside: bool, error: type[Exception] | None = None) -> None:
    """Pay in, in a block or without one."""
    if not is_inside:
        site.bank.deposit(account_id)
        return
    with site.atomic():
        site.bank.deposit(account_id)
        if error is not None:
            raise error


def end_connection(site: DjangoBank) -> None:
    """Have the server end this thread's connection."""
    vendor = site.connection.vendor
    with site.connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()" if vendor == "postgresql" else "SELECT connection_id()")
        (number,) = cursor.fetchone()

    def end() -> None:
        with site.connection.cursor() as cursor:
            cursor.execute(KILL[vendor].format(number))

    site.elsewhere(end)
