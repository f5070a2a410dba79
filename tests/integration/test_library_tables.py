"""Tables that the library's own modules made can be taken over, and theirs can read ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import InfrastructureFactory, IntegrityError, Tracking
from sqlalchemy.engine import make_url

from flask_eventsourcing import persistence
from flask_eventsourcing.persistence import Factory, SQLAlchemyTrackingRecorder
from tests.bank import make_site
from tests.domain import Account, Bank, in_threads

PURPOSES = ("events", "snapshots", "tracking")


class TheirBank(Bank):
    """The bank on the library's own module."""

    name = "Bank"
    is_snapshotting_enabled = True


def postgres_env(url: str) -> dict[str, str]:
    """Return the environment of the library's PostgreSQL module for a database."""
    parts = make_url(url)
    return {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": parts.database or "",
        "POSTGRES_HOST": str(parts.host or parts.query.get("host") or ""),
        "POSTGRES_PORT": str(parts.port or 5432),
        "POSTGRES_USER": parts.username or "",
        "POSTGRES_PASSWORD": parts.password or "none",
    }


@pytest.fixture(params=["eventsourcing.postgres", "eventsourcing.sqlite"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A database's address, for us, and for a module of the library's."""
    if request.param == "eventsourcing.sqlite":
        path = tmp_path / "bank.db"
        return f"sqlite:///{path}", {"PERSISTENCE_MODULE": request.param, "SQLITE_DBNAME": str(path)}
    url: str = request.getfixturevalue("postgres_url")
    return url, postgres_env(url)


@pytest.fixture
def on_postgres(postgres_url: str) -> tuple[str, dict[str, str]]:
    """The same for PostgreSQL only."""
    return postgres_url, postgres_env(postgres_url)


@pytest.fixture(name="theirs")
def library_application(on_postgres: tuple[str, dict[str, str]]) -> Iterator[TheirBank]:
    """The library's own application, whose construction makes its tables."""
    with TheirBank(env=on_postgres[1]) as application:
        tracking = application.factory.tracking_recorder()
        tracking.insert_tracking(Tracking("upstream", 3))
        yield application


def deposits(bank: Bank, account_id: UUID) -> list[int]:
    """Return the versions in the log."""
    return [
        n.originator_version for n in bank.notification_log.select(start=1, limit=10) if n.originator_id == account_id
    ]


def test_library_tables_can_be_taken_over(theirs: TheirBank, on_postgres: tuple[str, dict[str, str]]) -> None:
    """Tables that the library's PostgreSQL module made are used as they are: read, continued, in conflict."""
    account_id = theirs.open_account("Ada")
    theirs.deposit(account_id, 5)
    theirs.take_snapshot(account_id)
    site = make_site(on_postgres[0], TheirBank, EVENTSOURCING_POSTGRES_ORDER="table-lock")
    with site.app.app_context():
        bank = site.bank
        assert bank.balance(account_id) == 5
        assert deposits(bank, account_id) == [1, 2]
        assert bank.factory.tracking_recorder().max_tracking_id("upstream") == 3
        stale = bank.account(account_id)
        stale.deposit(1)
        bank.deposit(account_id, 7)
        site.db.session.commit()
        with pytest.raises(IntegrityError):
            bank.save(stale)
        site.db.session.rollback()
        several = [Account("Bob"), Account("Cleo")]
        bank.save(*several)
        site.db.session.commit()
    assert theirs.balance(account_id) == 12
    assert deposits(theirs, account_id) == [1, 2, 3]
    theirs.deposit(account_id, 1)
    assert site.balance(account_id) == 13
    site.close()


def test_library_tables_are_those_that_we_make(theirs: TheirBank, on_postgres: tuple[str, dict[str, str]]) -> None:
    """If the library made the tables, none is missing, and only nullable columns are added."""
    site = make_site(on_postgres[0], TheirBank)
    engine = sa.create_engine(on_postgres[0])
    inspector = sa.inspect(engine)
    preparer = engine.dialect
    for purpose in PURPOSES:
        table = site.es.models[TheirBank].tables[purpose]
        found = {c["name"]: (str(c["type"]), c["nullable"]) for c in inspector.get_columns(table.name)}
        ours = {c.name: (str(c.type.compile(preparer)), bool(c.nullable)) for c in table.columns}
        assert {name: ours[name] for name in found} == found
        assert all(nullable for name, (_, nullable) in ours.items() if name not in found)
    engine.dispose()
    site.close()


def test_library_reads_ours(on_postgres: tuple[str, dict[str, str]]) -> None:
    """The library's PostgreSQL module reads the tables that we made, as they are, and can go on with them."""
    site = make_site(on_postgres[0], TheirBank)
    with site.app.app_context():
        account_id = site.bank.open_account("Ada")
        site.bank.deposit(account_id, 5)
        site.bank.take_snapshot(account_id)
        site.bank.factory.tracking_recorder().insert_tracking(Tracking("upstream", 4))
        site.db.session.commit()
    with TheirBank(env={**on_postgres[1], "CREATE_TABLE": "n"}) as theirs:
        assert theirs.balance(account_id) == 5
        past: Account = theirs.repository.get(account_id, version=1)
        assert past.balance == 0
        assert deposits(theirs, account_id) == [1, 2]
        assert theirs.factory.tracking_recorder().max_tracking_id("upstream") == 4
    # To write, it makes the database's types and functions that it needs; the tables are there.
    with TheirBank(env=on_postgres[1]) as theirs:
        theirs.factory.tracking_recorder().insert_tracking(Tracking("upstream", 5))
        theirs.deposit(account_id, 1)
        assert theirs.balance(account_id) == 6
    assert site.balance(account_id) == 6
    site.close()


def test_stored_state_is_the_librarys(database: tuple[str, dict[str, str]]) -> None:
    """Rows that we write have the bytes that the library writes: topic and state are the same."""
    site = make_site(database[0])
    with site.app.app_context():
        site.bank.open_account("Ada")
        site.db.session.commit()
        row = site.db.session.scalars(sa.select(site.es.StoredEvent)).one()
        stored = site.bank.mapper.to_stored_event(next(iter(site.bank.events.get(UUID(str(row.originator_id))))))
        assert (row.topic, bytes(row.state)) == (stored.topic, stored.state)
    site.close()


STANDALONE = {"PERSISTENCE_MODULE": "flask_eventsourcing.persistence"}


@pytest.mark.parametrize("prefix", ["", "BANK_"])
def test_standalone_module(database: tuple[str, dict[str, str]], prefix: str) -> None:
    """As the library's ``PERSISTENCE_MODULE``, with no Flask, the package needs an address and makes its tables."""
    env = {**STANDALONE, f"{prefix}SQLALCHEMY_DATABASE_URI": database[0], "CREATE_TABLE": "y"}
    with TheirBank(env=env) as bank:
        account_id = bank.open_account("Ada")
        bank.deposit(account_id, 5)
        bank.take_snapshot(account_id)
        tracking = bank.factory.tracking_recorder()
        assert isinstance(tracking, SQLAlchemyTrackingRecorder)
        tracking.insert_tracking(Tracking("upstream", 1))
        stale = bank.account(account_id)
        stale.deposit(1)
        bank.deposit(account_id, 1)
        with pytest.raises(IntegrityError):
            bank.save(stale)
    with TheirBank(env={**env, "CREATE_TABLE": "n"}) as bank:
        assert bank.balance(account_id) == 6
        assert deposits(bank, account_id) == [1, 2, 3]
        assert bank.factory.tracking_recorder().max_tracking_id("upstream") == 1


def test_standalone_module_in_memory() -> None:
    """An in-memory database is one database for all threads of the application."""
    env = {**STANDALONE, "SQLALCHEMY_DATABASE_URI": "sqlite://", "CREATE_TABLE": "y"}
    with Bank(env=env) as bank:
        account_id = bank.open_account()

        def client() -> None:
            for _ in range(10):
                bank.open_account()

        in_threads([client] * 4)
        assert bank.recorder.max_notification_id() == 41
        assert bank.balance(account_id) == 0


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "SQLALCHEMY_DATABASE_URI"),
        ({"SQLALCHEMY_DATABASE_URI": "sqlite://", "ORIGINATOR_ID_TYPE": "int"}, "ORIGINATOR_ID_TYPE must be"),
        ({"FLASK_EVENTSOURCING_DATASTORE": "gone"}, "datastore that is gone"),
        ({"SQLALCHEMY_DATABASE_URI": "sqlite://", "APPLICATION_RECORDER_TOPIC": "tests.domain:Bank"}, "derive it from"),
    ],
)
def test_standalone_module_says_what_is_wrong(env: dict[str, str], message: str) -> None:
    """A missing or bad variable is an error of the library's that names it."""
    with pytest.raises(Exception, match=message) as raised:
        Bank(env={**STANDALONE, **env})
    assert type(raised.value).__module__.startswith(("eventsourcing.", "flask_eventsourcing."))


def test_library_finds_one_factory() -> None:
    """The package exposes exactly one concrete factory class, as the library counts them."""
    found = [
        each
        for each in vars(persistence).values()
        if isinstance(each, type) and issubclass(each, InfrastructureFactory) and each is not InfrastructureFactory
    ]
    assert found == [Factory]
