"""What a unit of work promises, on every host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from sqlalchemy import orm

from flask_eventsourcing.exceptions import CommitInsideUnitError, RollbackOnlyError
from flask_eventsourcing.persistence.dialects.event_tables import ConflictError
from flask_eventsourcing.signals import events_recorded
from tests.domain import conflict_with, in_threads
from tests.hosts.sites import HostSite


@contextmanager
def recorded() -> Iterator[list[tuple[object, int]]]:
    """Note what the signal tells: the application, and how many events."""
    heard: list[tuple[object, int]] = []

    def hear(sender: object, application: object, notifications: Any) -> None:
        heard.append((application, len(notifications)))

    with events_recorded.connected_to(hear):
        yield heard


def test_events_and_models_commit_together(site: HostSite) -> None:
    """A transaction commits the events and the rows that were added beside them."""
    with site.host.context(), site.host.transaction():
        site.bank.open_account()
        site.note()
    assert site.stored() == (1, 1)


def test_events_and_models_roll_back_together(site: HostSite) -> None:
    """An error rolls both back, and no signal is sent."""

    def fail() -> None:
        with site.host.context(), site.host.transaction():
            site.bank.open_account()
            site.note()
            raise KeyError

    with recorded() as heard:
        with pytest.raises(KeyError):
            fail()
        assert heard == []
    assert site.stored() == (0, 0)


def test_session_commits_and_rolls_back_what_was_saved(site: HostSite) -> None:
    """Outside of a unit of work, what was saved in a session is stored when that commits, and not before."""
    with site.working():
        site.bank.open_account()
        site.note()
        site.rollback()
        site.bank.open_account()
        site.commit()
    assert site.stored() == (1, 0)


def test_unit_within_a_unit_joins_it(site: HostSite) -> None:
    """The outermost unit commits; if an inner one fails, the outer one fails too, even if the error is caught."""
    with site.host.context(), site.host.transaction():
        site.bank.open_account()
        with site.host.transaction():
            site.bank.open_account()
    assert site.stored() == (2, 0)

    def go_on_after_an_error() -> None:
        with site.host.context(), site.host.transaction():
            site.bank.open_account()
            with suppress(KeyError), site.host.transaction():
                raise KeyError

    with pytest.raises(RollbackOnlyError):
        go_on_after_an_error()
    assert site.stored() == (2, 0)


def test_savepoint_takes_its_events_along(site: HostSite) -> None:
    """Events of a savepoint that is rolled back are neither stored nor announced; those around it are."""
    with recorded() as heard:
        with site.host.context(), site.host.transaction() as session:
            account_id = site.bank.open_account()
            savepoint = session.begin_nested()
            site.bank.deposit(account_id)
            savepoint.rollback()
            assert site.bank.balance(account_id) == 0
            with session.begin_nested():
                site.bank.deposit(account_id, 7)
        assert sum(count for _, count in heard) == 2
    assert site.stored() == (2, 0)
    with site.host.context(), site.host.transaction():
        assert site.bank.balance(account_id) == 7


@pytest.mark.parametrize("url", ["sqlite-file", "postgresql"], indirect=True)
def test_commit_that_the_driver_refuses_stores_nothing(site: HostSite) -> None:
    """Events are not announced when somebody commits the driver's connection and the database refuses that."""
    engine = site.host.datastore.engine
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", lambda driver, _: driver.execute("PRAGMA foreign_keys = ON").close())
        engine.dispose()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE parent (id integer PRIMARY KEY)")
        connection.exec_driver_sql("CREATE TABLE child (id integer REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    with recorded() as heard:
        with site.working():
            site.bank.open_account()
            connection = site.session.connection()
            connection.exec_driver_sql("INSERT INTO child VALUES (7)")
            with pytest.raises(site.host.datastore.dialect.driver_error):
                connection.connection.driver_connection.commit()  # type: ignore[union-attr]
            with suppress(sa.exc.SQLAlchemyError):
                connection.exec_driver_sql("SELECT 1")
            site.rollback()
        assert heard == []
    assert site.stored() == (0, 0)


def test_commit_of_a_connection_that_is_refused_leaves_nothing_in_it(site: HostSite) -> None:
    """What a unit of work has saved stays out of the connection's next transaction, after a commit past the session."""

    def go_on_after_the_refusal() -> None:
        with site.host.context(), site.host.transaction() as session:
            site.bank.open_account()
            with pytest.raises(CommitInsideUnitError):
                session.connection().commit()

    with recorded() as heard:
        with pytest.raises((RollbackOnlyError, sa.exc.InvalidRequestError)):
            go_on_after_the_refusal()
        assert site.stored() == (0, 0)
        with suppress(CommitInsideUnitError), site.host.context(), site.host.transaction() as session:
            site.bank.open_account()
            session.connection().commit()
        assert heard == []
        assert site.stored() == (0, 0)
        with site.host.context(), site.host.transaction():
            site.note()
    assert site.stored() == (0, 1)


def test_conflict_is_raised_at_save(site: HostSite) -> None:
    """A save of an aggregate that another transaction has changed is refused, and nothing of it is stored."""
    account_id = site.opened()
    with site.host.context():
        with site.host.transaction():
            save = conflict_with(site.bank, account_id)
        site.elsewhere(lambda: site.bank.deposit(account_id))
        with pytest.raises(IntegrityError), site.host.transaction():
            save()
    assert site.stored() == (2, 0)


def test_conflict_is_tried_again(site: HostSite) -> None:
    """A function under ``retry`` is run again as a whole until it succeeds."""
    account_id = site.opened()
    tries = []

    def pay_in() -> None:
        account = site.bank.account(account_id)
        tries.append(account.version)
        if len(tries) < 3:
            # As another transaction would do it that commits in between; on one database file it would have to wait.
            raise ConflictError
        account.deposit(10)
        site.note()
        site.bank.save(account)

    with site.host.context():
        site.host.retry(pay_in, 3)
    assert len(tries) == 3
    assert site.stored() == (2, 1)


def test_units_that_race_all_succeed(site: HostSite) -> None:
    """Threads that change one aggregate at once lose no update."""
    account_id = site.opened()

    def pay_in() -> None:
        for _ in range(5):
            with site.host.context():
                site.host.retry(lambda: site.bank.deposit(account_id), 20)
            time.sleep(0.001)

    in_threads([pay_in] * 4)
    with site.host.context(), site.host.transaction():
        assert site.bank.balance(account_id) == 20


def test_function_waits_for_the_commit(site: HostSite) -> None:
    """Functions for after the commit are called then, and not after a rollback."""
    called: list[str] = []

    def call_after(what: str) -> None:
        unit = site.host.unit()
        assert unit is not None
        unit.on_commit(lambda: called.append(what))

    with site.host.context():
        with site.host.transaction():
            call_after("committed")
            assert called == []
        with suppress(KeyError), site.host.transaction():
            call_after("rolled back")
            raise KeyError
    assert called == ["committed"]


def test_functions_after_the_commit_do_not_stop_each_other(site: HostSite, caplog: pytest.LogCaptureFixture) -> None:
    """If a function fails after the commit, it is logged; the others are called, and the signal is sent."""
    called: list[str] = []

    def fail() -> None:
        called.append("failed")
        raise IntegrityError

    def save() -> None:
        unit = site.host.unit()
        assert unit is not None
        unit.on_commit(fail)
        unit.on_commit(lambda: called.append("called"))
        site.bank.open_account()

    with recorded() as heard, site.host.context():
        site.host.retry(save, 3)
        assert heard == [(site.bank, 1)]
    assert called == ["failed", "called"]
    assert [each.getMessage().split(",")[0] for each in caplog.records] == ["The commit succeeded"]
    assert site.stored() == (1, 0)


def test_listener_that_raises_after_the_commit_swallows_nothing(site: HostSite) -> None:
    """An error of a listener for SQLAlchemy's ``after_commit`` is raised by the unit; the signal is sent."""

    def fail(session: Any) -> None:
        called.append("raised")
        raise KeyError

    def save() -> orm.Session:
        with suppress(KeyError), site.host.transaction() as session:
            sa.event.listen(session, "after_commit", fail, insert=True)
            site.bank.open_account()
            called.append("saved")
        return session

    called: list[str] = []
    with recorded() as heard, site.host.context():
        sa.event.remove(save(), "after_commit", fail)
        assert called == ["saved", "raised"]
        assert heard == [(site.bank, 1)]
    assert site.stored() == (1, 0)


def test_function_waits_for_the_rollback(site: HostSite) -> None:
    """Functions for after a rollback, also of a savepoint, are called then, and not after the commit."""
    called: list[str] = []

    def call_after(what: str) -> None:
        unit = site.host.unit()
        assert unit is not None
        unit.on_rollback(lambda: called.append(what))

    with site.working():
        call_after("rolled back")
        site.rollback()
        call_after("transaction")
        with site.session.begin_nested():
            call_after("released")
        with suppress(KeyError), site.session.begin_nested():
            call_after("savepoint")
            raise KeyError
        assert called == ["rolled back", "savepoint"]
        site.session.close()
        site.rollback()
        assert sorted(called[2:]) == ["released", "transaction"]
        call_after("committed")
        site.commit()
        site.rollback()
    assert len(called) == 4


def test_signal_names_the_application(site: HostSite) -> None:
    """``events_recorded`` is sent once for a transaction, after its commit, with the application and its events."""
    with recorded() as heard, site.host.context():
        with site.host.transaction():
            account_id = site.bank.open_account()
            site.bank.deposit(account_id)
            assert heard == []
        assert heard == [(site.bank, 2)]


def test_log_is_read_outside_of_a_session(site: HostSite) -> None:
    """The log shows what is committed, in its order."""
    account_id = site.opened()
    with site.host.context(), site.host.transaction():
        site.bank.deposit(account_id)
    found = site.bank.recorder.select_notifications(1, 10)
    assert [(each.id, each.originator_version) for each in found] == [(1, 1), (2, 2)]
