"""Engines that a user has set up in a way of his own: they work, or are refused with the reason.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent

from flask_eventsourcing import AbortedTransactionError, ConfigurationError
from flask_eventsourcing.persistence import DialectOptions
from flask_eventsourcing.persistence.dialects import dialect_for
from tests.bank import Site
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_mariadb, on_postgresql, on_sqlite_file


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
