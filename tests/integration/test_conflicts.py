"""Optimistic concurrency: a conflict is raised by ``save()``, and affects nothing else.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, OperationalError, PersistenceError
from sqlalchemy import orm

from flask_eventsourcing import AbortedTransactionError, StaleAggregateError, WriteTimeoutError
from tests.bank import Site
from tests.domain import Account, conflict_with
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_postgresql


def beaten(site: Site) -> tuple[Callable[[], None], Account]:
    """Read an account that another request then changes; return the late save, and the account."""
    account_id = site.opened()
    stale = site.bank.account(account_id)
    stale.deposit(1000)
    site.db.session.rollback()
    site.elsewhere(lambda: site.bank.deposit(account_id, 1))
    return lambda: _save(site, stale), stale


def _save(site: Site, *accounts: Account) -> None:
    site.bank.save(*accounts)


def test_conflict_is_raised_at_save(site: Site) -> None:
    """The second of two saves gets the library's ``IntegrityError`` from ``save()``, also as its first statement."""
    with site.app.app_context():
        save_late, stale = beaten(site)
        with pytest.raises(IntegrityError):
            save_late()
        site.db.session.rollback()
    assert site.balance(stale.id) == 1
    assert site.stored() == (2, 0)


def test_conflict_after_other_work(site: Site) -> None:
    """A conflict after rows and events were written in the same transaction raises the same error."""
    with site.app.app_context():
        save_late, _ = beaten(site)
        site.note()
        site.bank.open_account()
        with pytest.raises(IntegrityError):
            save_late()
        site.db.session.rollback()
    assert site.stored() == (2, 0)


def test_none_of_several_events_stays(site: Site) -> None:
    """If one of the aggregates of a save is in conflict, none of its events is stored, not even in this session."""
    with site.app.app_context():
        _, stale = beaten(site)
        fresh = Account("Bob")
        fresh.deposit(1)
        stale.deposit(2)
        with pytest.raises(IntegrityError), site.db.session.begin_nested():
            _save(site, fresh, stale)
        assert site.bank.balance(fresh.id) is None
        site.db.session.commit()
    assert site.stored() == (2, 0)


@pytest.mark.parametrize("uri", ["sqlite-file", "sqlite-memory", "mariadb"], indirect=True)
@pytest.mark.parametrize("events", [1, 2000])
def test_caught_conflict_leaves_none_of_its_save(site: Site, events: int) -> None:
    """Where the database lets go on after a caught conflict, none of that save's events is stored, and the rest is."""
    with site.app.app_context():
        _, stale = beaten(site)
        fresh = Account("Bob")
        for _ in range(events - 1):
            fresh.deposit(1)
        site.note()
        with pytest.raises(IntegrityError):
            _save(site, fresh, stale)
        site.db.session.commit()
        assert site.bank.balance(fresh.id) is None
    assert site.stored() == (2, 1)


def test_session_can_be_used_after_rollback(site: Site) -> None:
    """After a conflict and a rollback the same request can read the new state, save and commit."""
    with site.app.app_context():
        save_late, stale = beaten(site)
        with pytest.raises(IntegrityError):
            save_late()
        site.db.session.rollback()
        site.bank.deposit(stale.id, 10)
        site.note()
        site.db.session.commit()
    assert site.balance(stale.id) == 11
    assert site.stored() == (3, 1)


def test_session_can_be_used_after_a_savepoint(site: Site) -> None:
    """A conflict within a savepoint rolls back the savepoint only; earlier work is committed."""
    with site.app.app_context():
        save_late, stale = beaten(site)
        site.note()
        with pytest.raises(IntegrityError), site.db.session.begin_nested():
            save_late()
        site.bank.deposit(stale.id, 10)
        site.db.session.commit()
    assert site.balance(stale.id) == 11
    assert site.stored() == (3, 1)


def test_conflict_within_one_session(site: Site) -> None:
    """Two states of one aggregate in the same request are a conflict too."""
    account_id = site.opened()
    with site.app.app_context():
        save_late = conflict_with(site.bank, account_id)
        site.bank.deposit(account_id, 1)
        with pytest.raises(IntegrityError):
            save_late()
        site.db.session.rollback()
    assert site.balance(account_id) == 0


def test_same_aggregate_twice_in_one_save(site: Site) -> None:
    """One save with two changed objects of one aggregate is refused whole."""
    account_id = site.opened()
    with site.app.app_context():
        first, second = (site.bank.account(account_id) for _ in range(2))
        first.deposit(1)
        second.deposit(2)
        with pytest.raises(StaleAggregateError, match="Two objects"):
            _save(site, first, second)
        site.db.session.rollback()
    assert site.stored() == (1, 0)


@on_postgresql
def test_caught_conflict_cannot_be_committed(site: Site) -> None:
    """A commit after a caught conflict, which PostgreSQL would turn into a rollback, raises an error."""
    with site.app.app_context():
        save_late, _ = beaten(site)
        site.note()
        site.bank.open_account()
        with pytest.raises(IntegrityError):
            save_late()
        with pytest.raises(AbortedTransactionError, match=r"call db\.session\.rollback") as raised:
            site.db.session.commit()
        assert isinstance(raised.value, OperationalError)
        site.db.session.rollback()
    assert site.stored() == (2, 0)


@on_postgresql
def test_caught_conflict_alone_cannot_be_committed(site: Site) -> None:
    """The same holds when the conflict was the first thing that the transaction did."""
    with site.app.app_context():
        save_late, _ = beaten(site)
        with pytest.raises(IntegrityError):
            save_late()
        with pytest.raises(AbortedTransactionError):
            site.db.session.commit()
        site.db.session.rollback()


@on_postgresql
def test_aborted_transaction_refuses_reads_with_the_librarys_error(site: Site) -> None:
    """In an aborted transaction recorders raise the library's errors, not the driver's."""
    with site.app.app_context():
        save_late, stale = beaten(site)
        with pytest.raises(IntegrityError):
            save_late()
        with pytest.raises(PersistenceError):
            site.bank.account(stale.id)
        site.db.session.rollback()
        assert site.bank.balance(stale.id) == 1


def test_thread_does_not_wait_for_its_own_other_session(site: Site) -> None:
    """A second session of a thread that saves the same aggregate fails at once, without harm to the first."""
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 1)
        with site.app.app_context(), pytest.raises(WriteTimeoutError, match="This thread has"):
            site.bank.deposit(account_id, 2)
        site.db.session.commit()
        with site.app.app_context():
            site.bank.deposit(account_id, 4)
            site.db.session.commit()
    assert site.balance(account_id) == 5


@on_postgresql
def test_sessions_of_a_thread_that_have_nothing_in_common(site: Site) -> None:
    """Where writers do not wait for each other, a second session of a thread saves other aggregates."""
    account_id, other = site.opened(), site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 1)
        with site.app.app_context():
            site.bank.deposit(other, 2)
            site.db.session.commit()
        site.db.session.rollback()
        with site.app.app_context():
            site.bank.deposit(account_id, 4)
            site.db.session.commit()
    assert (site.balance(account_id), site.balance(other)) == (4, 2)


@on_postgresql
def test_same_aggregate_of_two_tenants_in_one_thread(new_site: MakeSite) -> None:
    """An aggregate that two schemas have is another one in each."""
    site = new_site(create=False)
    account = Account("Ada")
    with site.app.app_context():
        engine = site.db.engine

    def session_of(schema: str) -> orm.Session:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {schema}")
            connection.exec_driver_sql(f"SET LOCAL search_path = {schema}")
            site.db.metadata.create_all(connection)
        session = orm.Session(engine)
        session.execute(sa.text(f"SET LOCAL search_path = {schema}"))
        return session

    with site.app.app_context():
        first, second = session_of("one"), session_of("two")
        with first, second:
            events = site.bank.mapper.to_stored_event(account.pending_events[0])
            with site.es.using(first):
                site.bank.recorder.insert_events([events])
            with site.es.using(second):
                site.bank.recorder.insert_events([events])
            second.commit()
            first.commit()


@on_postgresql
def test_session_that_has_lost_its_connection_is_no_other_session(new_site: MakeSite) -> None:
    """A session that has lost its connection keeps none from the pool, and blocks no session of its thread."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 1})
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 1)
        site.db.session.connection().invalidate()
        with site.app.app_context():
            site.bank.deposit(account_id, 2)
            site.db.session.commit()
        site.db.session.rollback()
    assert site.balance(account_id) == 2
