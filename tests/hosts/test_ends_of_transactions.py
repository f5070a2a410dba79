"""The unit of work follows the database's transaction, by whatever way it ends, on every host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import product
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.exceptions import CommitInsideUnitError, RollbackOnlyError
from flask_eventsourcing.persistence.dialects import is_in_memory
from tests.hosts.sites import HostSite
from tests.hosts.test_units_of_work import recorded

# SQLAlchemy's own warning of a session whose connection was committed or rolled back past it.
pytestmark = pytest.mark.filterwarnings("ignore:.*transaction already deassociated:sqlalchemy.exc.SAWarning")


def is_shared(site: HostSite, way: str) -> bool:
    """Whether it is the one driver connection of a database in memory, which nobody ends past its owner."""
    return way == "driver" and is_in_memory(site.host.datastore.engine.url)


def of_connection(site: HostSite) -> sa.Connection:
    """Return the session's connection."""
    return site.session.connection()


def text(site: HostSite, statement: str) -> None:
    """Run a textual statement in the session."""
    site.session.execute(sa.text(statement))


def driver(site: HostSite) -> Any:
    """Return the driver's connection."""
    return of_connection(site).connection.driver_connection


ROLLBACKS: dict[str, Callable[[HostSite], Any]] = {
    "session": lambda site: site.rollback(),
    "connection": lambda site: of_connection(site).rollback(),
    "text": lambda site: text(site, "ROLLBACK"),
    "driver": lambda site: driver(site).rollback(),
}


@pytest.mark.parametrize("way", ROLLBACKS)
def test_rollback_by_any_way_is_a_rollback(site: HostSite, way: str) -> None:
    """Events that are rolled back, in any way, are neither stored nor announced nor left pending."""
    if is_shared(site, way):
        return
    with recorded() as heard:
        with site.working():
            site.bank.open_account()
            ROLLBACKS[way](site)
            unit = site.host.open_unit()
            assert unit is None or unit.batches == []
            with suppress(sa.exc.SQLAlchemyError):
                # Rolled back past it, the session may refuse to commit.
                site.commit()
        assert heard == []
    assert site.stored() == (0, 0)


COMMITS: dict[str, Callable[[HostSite], Any]] = {
    "session": lambda site: site.commit(),
    "connection": lambda site: of_connection(site).commit(),
    "text": lambda site: text(site, "COMMIT"),
    "driver": lambda site: driver(site).commit(),
}


@pytest.mark.parametrize("way", COMMITS)
def test_commit_by_any_way_is_a_commit(site: HostSite, way: str) -> None:
    """Events that are committed, in any way, are stored and announced once."""
    if is_shared(site, way):
        return
    with recorded() as heard:
        with site.working():
            site.bank.open_account()
            COMMITS[way](site)
            unit = site.host.open_unit()
            assert unit is None or unit.batches == []
            with suppress(sa.exc.SQLAlchemyError):
                site.rollback()
        assert [count for _, count in heard] == [1]
    assert site.stored() == (1, 0)


@pytest.mark.parametrize("url", ["postgresql-psycopg2"], indirect=True)
@pytest.mark.parametrize("site", ["flask", "plain sessionmaker"], indirect=True)
@pytest.mark.parametrize("look", [test_rollback_by_any_way_is_a_rollback, test_commit_by_any_way_is_a_commit])
def test_transactions_of_psycopg2_are_followed(site: HostSite, look: Callable[[HostSite, str], None]) -> None:
    """A connection that is written in C, as psycopg2's, is committed and rolled back like any other."""
    look(site, "driver")


@pytest.mark.parametrize("url", ["postgresql-psycopg2"], indirect=True)
@pytest.mark.parametrize("site", ["flask"], indirect=True)
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_another_transaction_of_psycopg2_is_another(site: HostSite, end: str) -> None:
    """Events are not taken for stored, nor for lost, because another transaction has begun on the connection since."""
    with recorded() as heard:
        with site.working():
            site.bank.open_account()
            getattr(driver(site), end)()
            driver(site).cursor().execute("SELECT 1")
            with suppress(sa.exc.SQLAlchemyError):
                site.commit()
        assert [count for _, count in heard] == [1] * (end == "commit")
    assert site.stored() == (int(end == "commit"), 0)


@pytest.mark.parametrize("same", [False, True], ids=["another account", "the same account"])
def test_events_of_others_at_a_lost_position_are_not_ours(site: HostSite, same: bool) -> None:
    """Events that are rolled back past the session are not taken for those of others that get their positions."""
    if is_shared(site, "driver"):
        return
    account_id, other_id = site.opened(), site.opened()
    with site.working():
        site.bank.deposit(account_id, 7)
        driver(site).rollback()
        site.elsewhere(lambda: site.bank.deposit(account_id if same else other_id, 9))
        with recorded() as heard:
            with suppress(sa.exc.SQLAlchemyError):
                # Rolled back past it, the session may refuse to commit.
                site.commit()
            assert heard == []
    assert site.stored() == (3, 0)


@pytest.mark.parametrize("savepoint", [False, True])
def test_what_is_unknown_is_not_announced(site: HostSite, savepoint: bool) -> None:
    """Events are announced only if the database says that they are there, not if SQLAlchemy cannot ask it any more."""
    if is_shared(site, "driver"):
        return
    with recorded() as heard:
        with site.working(), suppress(sa.exc.SQLAlchemyError, RollbackOnlyError):
            site.session.begin_nested()
            with site.host.transaction():
                # The savepoint is gone too, which SQLAlchemy does not know.
                driver(site).rollback()
                if savepoint:
                    text(site, "SAVEPOINT mine")
                site.bank.open_account()
        assert heard == []
    assert site.stored() == (0, 0)


SAVEPOINTS: dict[str, tuple[Callable[[HostSite], Any], Callable[[HostSite, Any], Any]]] = {
    "session": (lambda site: site.session.begin_nested(), lambda site, savepoint: savepoint.rollback()),
    "connection": (lambda site: of_connection(site).begin_nested(), lambda site, savepoint: savepoint.rollback()),
    "text": (lambda site: text(site, "SAVEPOINT mine"), lambda site, _: text(site, "ROLLBACK TO SAVEPOINT mine")),
}


@pytest.mark.parametrize("way", SAVEPOINTS)
def test_savepoint_by_any_way_takes_its_events_along(site: HostSite, way: str) -> None:
    """Events of a savepoint that is rolled back are not announced, and the others are."""
    begin, roll_back = SAVEPOINTS[way]
    with recorded() as heard:
        with site.working():
            account_id = site.bank.open_account()
            savepoint = begin(site)
            site.bank.deposit(account_id, 7)
            roll_back(site, savepoint)
            site.commit()
        assert [count for _, count in heard] == [1]
    assert site.stored() == (1, 0)


def nothing(site: HostSite) -> None:
    """Do nothing before."""


def read(site: HostSite) -> None:
    """Read, so that the session's transaction begins."""
    site.session.execute(sa.select(site.Note.id)).all()


def event(site: HostSite) -> None:
    """Save an event."""
    site.bank.open_account()


def row(site: HostSite) -> None:
    """Write a row of one's own."""
    site.session.execute(sa.insert(site.Note).values(text="note"))


@pytest.mark.parametrize("way", ["session", "connection", "text"])
def test_only_the_unit_commits_inside_a_unit(site: HostSite, way: str) -> None:
    """A commit inside a unit, by other code, is refused and stores nothing, also if there are rows alone."""

    def unit(before: Callable[..., None], write: Callable[..., None], nested: bool) -> None:
        with site.working():
            before(site)
            with site.host.transaction():
                write(site)
                with site.session.begin_nested() if nested else nullcontext():
                    COMMITS[way](site)

    for each in product([nothing, read], [event, row], [False, True]):
        with pytest.raises(CommitInsideUnitError):
            unit(*each)
        assert site.stored() == (0, 0)


@pytest.mark.parametrize("way", ["session", "connection", "text"])
def test_rollback_inside_a_unit_rolls_all_of_it_back(site: HostSite, way: str) -> None:
    """Half of a unit of work is never committed: a rollback inside it rolls all of it back."""

    def unit(before: Callable[..., None], write: Callable[..., None]) -> None:
        with site.working():
            before(site)
            with site.host.transaction():
                write(site)
                ROLLBACKS[way](site)
                with suppress(sa.exc.SQLAlchemyError):
                    site.bank.open_account()
                    site.note()

    for each in product([nothing, read], [event, row]):
        with pytest.raises(RollbackOnlyError):
            unit(*each)
        assert site.stored() == (0, 0)


def test_session_of_ones_own_may_commit_inside_a_unit(site: HostSite) -> None:
    """Only commits of the unit's session are refused; other sessions may commit."""
    if is_in_memory(site.host.datastore.engine.url):
        return
    with site.working(), site.host.transaction():
        site.session.execute(sa.select(site.Note.id)).all()
        with orm.Session(site.host.datastore.engine) as own:
            own.add(site.Note(text="note"))
            own.commit()
            own.execute(sa.insert(site.Note).values(text="other"))
            own.connection().commit()
    assert site.stored() == (0, 2)


def test_closed_session_is_told(site: HostSite, caplog: pytest.LogCaptureFixture) -> None:
    """Uncommitted events of a closed session are not stored, and the log says so."""
    with site.working():
        site.bank.open_account()
        site.session.close()
    assert "1 event" in caplog.text
    assert site.stored() == (0, 0)


def test_events_of_a_transaction_of_the_caller(site: HostSite) -> None:
    """In a transaction that the caller has begun on a connection, events are stored when that is committed."""
    if is_in_memory(site.host.datastore.engine.url):
        return
    with site.host.context(), site.host.datastore.engine.connect() as connection:
        outer = connection.begin()
        with site.host.using(connection) as session:
            account_id = site.bank.open_account()
            session.commit()
            assert site.bank.balance(account_id) == 0
        outer.rollback()
    assert site.stored() == (0, 0)


CHILD = "CREATE TABLE child (of_note INTEGER REFERENCES note (id) DEFERRABLE INITIALLY DEFERRED)"


def test_commit_that_the_database_refuses_is_none(site: HostSite) -> None:
    """Events are neither stored nor announced if the database refuses the commit, for a deferred constraint."""
    engine = site.host.datastore.engine
    if engine.dialect.name not in ("sqlite", "postgresql"):
        # No other database here looks at a constraint at the commit.
        return
    with engine.begin() as connection:
        connection.exec_driver_sql(CHILD)
    with recorded() as heard:
        with site.working():
            if engine.dialect.name == "sqlite":
                text(site, "PRAGMA foreign_keys = ON")
            site.bank.open_account()
            text(site, "INSERT INTO child VALUES (99)")
            with pytest.raises(sa.exc.IntegrityError):
                site.commit()
            site.rollback()
        assert heard == []
    assert site.stored() == (0, 0)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE child")
