"""Engines that a user has set up in a way of his own: they work, or are refused with the reason.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent
from psycopg.rows import namedtuple_row
from psycopg2.extras import NamedTupleCursor  # type: ignore[import-untyped]

from flask_eventsourcing import AbortedTransactionError, ConfigurationError
from flask_eventsourcing.persistence import DialectOptions
from flask_eventsourcing.persistence.dialects import dialect_for
from tests.bank import Site, make_site
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files, on_mariadb, on_postgresql, on_sqlite_file


def deposits(site: Site, accounts: list[UUID], times: int) -> int:
    """Let a client for each account pay in by plain requests, and return how many of them failed."""

    def view(account_id: UUID) -> Any:
        def deposit() -> str:
            site.bank.deposit(account_id)
            site.db.session.commit()
            return "ok"

        return deposit

    def client(account_id: UUID) -> int:
        return sum(site.answer(view(account_id)).status_code != 200 for _ in range(times))

    with ThreadPoolExecutor(len(accounts)) as clients:
        return sum(clients.map(client, accounts))


@on_sqlite_file
def test_begin_of_sqlalchemys_recipe_queues(new_site: MakeSite) -> None:
    """With SQLAlchemy's own recipe for SQLite's transactions, no request fails at once with "database is locked"."""
    site = new_site(PROPAGATE_EXCEPTIONS=False)
    with site.app.app_context():
        engine = site.db.engine

    @sa.event.listens_for(engine, "connect")
    def leave_transactions_to_us(driver: Any, record: Any) -> None:
        driver.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    engine.dispose()
    accounts = [site.opened() for _ in range(4)]
    assert deposits(site, accounts, 20) == 0
    assert [site.balance(account_id) for account_id in accounts] == [20] * 4
    with site.app.app_context():
        site.bank.deposit(accounts[0])
        savepoint = site.db.session.begin_nested()
        site.bank.deposit(accounts[1])
        savepoint.rollback()
        site.db.session.commit()
    assert [site.balance(account_id) for account_id in accounts[:2]] == [21, 20]


def isolated(new_site: MakeSite) -> Site:
    """A site whose transactions are told when a row has changed since their snapshot."""
    options = {"connect_args": {"init_command": "SET innodb_snapshot_isolation = ON"}}
    return new_site(SQLALCHEMY_ENGINE_OPTIONS=options, PROPAGATE_EXCEPTIONS=False)


@on_mariadb
def test_snapshot_isolation_is_no_conflict_of_those_with_nothing_in_common(new_site: MakeSite) -> None:
    """Counting positions does not end a transaction, also if the server refuses changed rows."""
    site = isolated(new_site)
    accounts = [site.opened() for _ in range(4)]
    assert deposits(site, accounts, 15) == 0
    with site.app.app_context():
        site.bank.balance(accounts[0])
        site.elsewhere(lambda: site.bank.deposit(accounts[1]))
        site.bank.deposit(accounts[0])
        site.db.session.commit()
    assert [site.balance(account_id) for account_id in accounts[:2]] == [16, 16]


@on_mariadb
def test_changed_row_ends_the_transaction(new_site: MakeSite) -> None:
    """If the server ends the transaction because of a changed row, nothing is stored, and the error is a conflict."""
    site = isolated(new_site)
    with site.app.app_context():
        site.note("one")
        site.db.session.commit()
        site.db.session.scalars(sa.select(site.Note)).all()

        def change() -> None:
            site.db.session.execute(sa.update(site.Note).values(text="two"))

        site.elsewhere(change)
        site.bank.open_account()
        with pytest.raises(sa.exc.DBAPIError) as raised:
            site.db.session.execute(sa.update(site.Note).values(text="three"))
        dialect: Any = site.bank.recorder.dialect  # type: ignore[attr-defined]
        assert dialect.is_conflict(raised.value)
        assert dialect.is_over(site.db.session.connection())
        with pytest.raises(AbortedTransactionError):
            site.db.session.commit()
        site.db.session.rollback()
    assert site.stored() == (0, 1)


@on_mariadb
def test_conflict_of_a_recorder_with_a_changed_row_is_the_librarys(new_site: MakeSite) -> None:
    """Two saves of the same version are the library's conflict, whatever error the server has for it."""
    site = isolated(new_site)
    account_id = site.opened()
    with site.app.app_context():
        account = site.bank.account(account_id)
        site.elsewhere(lambda: site.bank.deposit(account_id))
        account.deposit(1)
        with pytest.raises(IntegrityError) as raised:
            site.bank.save(account)
        assert site.bank.recorder.dialect.is_conflict(raised.value)  # type: ignore[attr-defined]
        site.db.session.rollback()
    assert site.balance(account_id) == 1


@pytest.mark.parametrize(
    "options", [{"isolation_level": "AUTOCOMMIT"}, {"execution_options": {"isolation_level": "AUTOCOMMIT"}}]
)
def test_engine_that_commits_each_statement_is_refused(uri: str, options: dict[str, Any]) -> None:
    """Where each statement is committed by itself, nothing is one transaction: it is refused at the start."""
    engine = sa.create_engine(uri, **options)
    with pytest.raises(ConfigurationError, match="commits each statement by itself"):
        dialect_for(engine, DialectOptions())
    engine.dispose()


def test_connection_that_commits_each_statement_is_refused(site: Site) -> None:
    """A session whose connection was set to commit each statement is refused at the first save."""
    with site.app.app_context():
        site.db.session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(ConfigurationError, match="commits each statement by itself"):
            site.bank.open_account()
        site.db.session.rollback()
    assert site.stored() == (0, 0)


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_driver_that_commits_each_statement_is_refused(new_site: MakeSite) -> None:
    """A driver that was told to commit each statement is refused at the first save, though SQLAlchemy sees nothing."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"autocommit": True}})
    with site.app.app_context():
        if site.db.engine.dialect.name == "mysql":
            sa.event.listen(site.db.engine, "checkout", lambda driver, *_: driver.autocommit(True))
        with pytest.raises(ConfigurationError, match="commits each statement by itself"):
            site.bank.open_account()
        site.db.session.rollback()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@on_postgresql
def test_listener_that_sets_something_at_each_checkout(uri: str, driver: str) -> None:
    """What a listener sets at each checkout, and does not commit, holds outside of sessions too."""
    site = make_site(sa.make_url(uri).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False))
    account_id = site.opened()
    with site.app.app_context():
        recorder: Any = site.bank.recorder
        engine = site.db.engine

    @sa.event.listens_for(engine, "checkout")
    def set_reader(driver: Any, *_: Any) -> None:
        with closing(driver.cursor()) as cursor:
            cursor.execute("SET app.reader = 'ada'")

    assert recorder.insert_events([StoredEvent(account_id, version, "t", b"") for version in (2, 3)]) == [2, 3]
    assert len(recorder.select_notifications(None, 10)) == 3
    with recorder.datastore.reading(join=False) as read:
        assert read.connection.exec_driver_sql("SELECT current_setting('app.reader')").scalar() == "ada"
    lock = recorder.dialect.runner_lock("projection")
    assert lock.acquire()
    lock.release()
    with closing(recorder.waiter()) as waiter:
        waiter.wait(0.001)
        assert not waiter.wait(0.001)
    assert not recorder.dialect.shares_connections()
    site.close()


def by_driver(uri: str, driver: str, **options: Any) -> Site:
    """Make tables as another engine would, and a site whose engine has options."""
    make_site(uri).close()
    url = sa.make_url(uri).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    return make_site(url, create=False, SQLALCHEMY_ENGINE_OPTIONS=options)


def use(site: Site) -> None:
    """Save one event and many, have a conflict, and read all of that within a session and outside."""
    account_id = site.opened(2)
    with site.app.app_context():
        recorder: Any = site.bank.recorder
        recorder.insert_events([StoredEvent(account_id, version, "t", b"") for version in range(3, 160)])
        site.db.session.commit()
        with pytest.raises(IntegrityError):
            recorder.insert_events([StoredEvent(account_id, 2, "t", b"")])
        site.db.session.rollback()
        assert len(recorder.select_events(account_id)) == 159
        assert recorder.find_recorded([1])[1].metadata
    recorder.insert_events([StoredEvent(account_id, 160, "t", b"")])
    assert recorder.select_notifications(None, 1000)[-1].id == recorder.high_water_mark()
    assert recorder.fitting(0, 10) == 10
    assert recorder.find_recorded([1])[1].metadata


@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 10}], ids=str)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@on_postgresql
def test_engine_that_streams_results(uri: str, driver: str, options: dict[str, Any]) -> None:
    """An engine that streams what it reads stores events as any other: what is written is not streamed."""
    site = by_driver(uri, driver, execution_options=options)
    use(site)
    site.close()


@on_files
def test_session_that_streams_results(site: Site) -> None:
    """A session whose connection streams what it reads saves events too."""
    with site.app.app_context():
        site.db.session.connection(execution_options={"stream_results": True})
        account_id = site.bank.open_account()
        site.bank.deposit(account_id)
        site.db.session.commit()
    assert site.balance(account_id) == 1


@pytest.mark.parametrize(
    ("driver", "option"),
    [("psycopg", {"row_factory": namedtuple_row}), ("psycopg2", {"cursor_factory": NamedTupleCursor})],
    ids=["psycopg", "psycopg2"],
)
@on_postgresql
def test_rows_that_are_named_tuples(uri: str, driver: str, option: dict[str, Any]) -> None:
    """A driver may be told to return named tuples, which refuse two columns of one name."""
    site = by_driver(uri, driver, connect_args=option)
    use(site)
    assert site.app.test_cli_runner().invoke(args=["eventsourcing", "check"]).exit_code == 0
    site.close()


def refuse_json(text: str) -> Any:
    """Refuse to decode JSON that the models of the user did not write."""
    raise TypeError("not of this app")


@pytest.mark.parametrize("function", [refuse_json, lambda text: ("decoded", text)], ids=["refuses", "changes"])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@on_postgresql
def test_json_deserializer_is_for_models_of_ones_own(uri: str, driver: str, function: Callable[[str], Any]) -> None:
    """An engine's ``json_deserializer`` has nothing to do with the metadata of events, through recorder and ORM."""
    site = by_driver(uri, driver, json_deserializer=function)
    use(site)
    with site.app.app_context():
        first = site.db.session.scalars(sa.select(site.es.StoredEvent).order_by("notification_id").limit(1)).one()
        assert first.event_metadata == site.bank.recorder.find_recorded([1])[1].metadata  # type: ignore[attr-defined]
    site.close()


@on_postgresql
def test_transaction_of_two_phases_notifies_nobody(site: Site) -> None:
    """A transaction of two phases sends no notification, because the server would not prepare it."""
    with site.app.app_context():
        recorder: Any = site.bank.recorder
        said: list[str] = []
        sa.event.listen(site.db.engine, "before_cursor_execute", lambda *arguments: said.append(arguments[2]))
        with site.db.engine.connect() as connection, connection.begin_twophase():
            recorder.dialect.append(connection, recorder.events_table, [StoredEvent(uuid4(), 1, "a:b", b"")])
            assert said
            assert not any("pg_notify" in statement for statement in said)
        site.bank.open_account()
        assert any("pg_notify" in statement for statement in said)
        site.db.session.rollback()
