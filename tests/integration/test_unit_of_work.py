"""Events and models in one transaction.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import ProgrammingError
from flask import abort
from sqlalchemy import orm

from flask_eventsourcing import MissingTableError, current_application
from tests.bank import Site
from tests.domain import Account, Bank, in_thread
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files


def test_deposit_and_row_commit_together(site: Site) -> None:
    """A deposit and a row of the ORM are both stored by one ``db.session.commit()``."""
    account_id = site.opened()
    with site.app.app_context():
        site.note()
        site.bank.deposit(account_id, 5)
        site.db.session.commit()
    assert site.stored() == (2, 1)
    assert site.balance(account_id) == 5


def test_deposit_and_row_roll_back_together(site: Site) -> None:
    """A deposit and a row of the ORM are both gone after one ``db.session.rollback()``."""
    account_id = site.opened()
    with site.app.app_context():
        site.note()
        site.bank.deposit(account_id, 5)
        site.db.session.rollback()
        assert site.bank.balance(account_id) == 0
    assert site.stored() == (1, 0)


def test_row_that_fails_takes_the_deposit_with_it(site: Site) -> None:
    """If the database refuses the row at the commit, the deposit is not stored either."""
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 5)
        site.db.session.add(site.Note(text=None))
        with pytest.raises(sa.exc.IntegrityError):
            site.db.session.commit()
        site.db.session.rollback()
    assert site.stored() == (1, 0)


def test_view_that_fails_stores_nothing(site: Site) -> None:
    """An exception in a view leaves neither events nor rows, and the client gets 500."""

    def view() -> Any:
        site.note()
        site.bank.open_account()
        raise KeyError("view")

    assert site.answer(view).status_code == 500
    assert site.stored() == (0, 0)


def test_view_that_aborts_stores_nothing(site: Site) -> None:
    """A view that aborts after saving leaves nothing, and the client gets the view's status."""

    def view() -> Any:
        site.bank.open_account()
        abort(409)

    assert site.answer(view).status_code == 409
    assert site.stored() == (0, 0)


def test_same_request_reads_what_it_saved(site: Site) -> None:
    """Before the commit, the request that saved sees its events: aggregates, rows of the record class."""
    with site.app.app_context():
        account_id = site.bank.open_account()
        site.bank.deposit(account_id, 3)
        assert site.bank.balance(account_id) == 3
        versions = sa.select(site.es.StoredEvent.originator_version).order_by("originator_version")
        assert site.db.session.scalars(versions).all() == [1, 2]
        site.db.session.rollback()


@on_files
def test_nothing_is_durable_before_the_commit(site: Site) -> None:
    """Another connection sees what was saved only after the commit."""
    with site.app.app_context():
        site.bank.open_account()
        site.note()
        site.db.session.flush()
        seen: list[tuple[int, int]] = []
        in_thread(lambda: seen.append(site.stored()))
        site.db.session.commit()
        in_thread(lambda: seen.append(site.stored()))
    assert seen == [(0, 0), (1, 1)]


@on_files
def test_durable_for_the_next_process(uri: str, site: Site) -> None:
    """What was committed is there for the next process that opens the database."""
    account_id = site.opened()
    engine = sa.create_engine(uri, poolclass=sa.NullPool)
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT originator_id, originator_version, topic FROM bank_events")).all()
    assert len(rows) == 1
    assert str(rows[0][0]).replace("-", "") == account_id.hex
    assert rows[0][2] == "tests.domain:Account.Created"


def test_several_aggregates_in_one_save(site: Site) -> None:
    """The events of one save are contiguous in the log and in the order given."""
    with site.app.app_context():
        accounts = [Account(name) for name in ("Ada", "Bob", "Cleo")]
        for account in accounts:
            account.deposit(1)
        recordings = site.bank.save(*accounts)
        site.db.session.commit()
        positions = [recording.notification.id for recording in recordings]
        assert positions == list(range(positions[0], positions[0] + 6))
        log = site.bank.notification_log.select(start=1, limit=10)
        assert [n.originator_id for n in log] == [a.id for a in accounts for _ in range(2)]


def test_large_save(site: Site) -> None:
    """A save of very many events is one, too: contiguous in the log, and all of it or nothing."""
    with site.app.app_context():
        account = Account("Ada")
        for _ in range(2999):
            account.deposit(1)
        positions = [recording.notification.id for recording in site.bank.save(account)]
        assert positions == list(range(positions[0], positions[0] + 3000))
        site.db.session.rollback()
        assert site.stored() == (0, 0)
        site.bank.open_account("Bob")
        site.db.session.commit()
    assert site.stored() == (1, 0)


def test_two_commits_in_one_request(site: Site) -> None:
    """A view may commit several times; each time what was saved so far is stored."""

    def view() -> str:
        site.bank.open_account()
        site.db.session.commit()
        site.bank.open_account()
        site.db.session.rollback()
        site.bank.open_account()
        site.db.session.commit()
        return "ok"

    assert site.answer(view).status_code == 200
    assert site.stored() == (2, 0)


def test_current_application_is_the_same_object(site: Site) -> None:
    """In views ``current_application`` stands for the application of the current app."""
    with site.app.app_context():
        assert current_application.repository is site.bank.repository
        assert isinstance(current_application, Bank)


@pytest.mark.parametrize("action", ["save", "read", "log"])
def test_missing_table_says_which_and_what_to_run(new_site: MakeSite, action: str) -> None:
    """Without its tables the application says which is missing and what to run, and no driver's error escapes."""
    site = new_site(create=False)
    with site.app.app_context():
        actions: dict[str, Any] = {
            "save": site.bank.open_account,
            "read": lambda: site.bank.account(uuid4()),
            "log": lambda: site.bank.notification_log.select(start=1, limit=1),
        }
        with pytest.raises(MissingTableError, match=r"bank_(events|tracking)") as raised:
            actions[action]()
        assert "flask eventsourcing init-db" in str(raised.value)
        assert isinstance(raised.value, ProgrammingError)
        site.db.session.rollback()


def test_tables_may_be_created_after_the_first_failure(new_site: MakeSite) -> None:
    """An application that met a missing table works once the table is there, without a restart."""
    site = new_site(create=False)
    with site.app.app_context():
        with pytest.raises(MissingTableError):
            site.bank.open_account()
        site.db.session.rollback()
        site.db.create_all()
        site.bank.open_account()
        site.db.session.commit()
    assert site.stored() == (1, 0)


@on_files
def test_session_of_an_engine_that_the_user_makes(site: Site, uri: str) -> None:
    """A session on an engine of the same address can be lent, also if Flask-SQLAlchemy has added to that address."""
    engine = sa.create_engine(uri)
    with site.app.app_context(), orm.Session(engine) as session, site.es.using(session):
        site.bank.open_account()
        session.commit()
    engine.dispose()
    assert site.stored() == (1, 0)


def test_scoped_session_can_be_lent(site: Site) -> None:
    """``es.using()`` takes the current session of a ``scoped_session``, such as ``db.session`` is."""
    with site.app.app_context():
        with site.es.using(site.db.session) as used:
            assert used is site.db.session()
            site.bank.open_account()
            used.commit()
        scoped = orm.scoped_session(orm.sessionmaker(site.db.engine))
        with site.es.using(scoped):
            site.bank.open_account()
        scoped.commit()
        scoped.remove()
    assert site.stored() == (2, 0)


def test_sessions_that_were_lent_are_forgotten(site: Site) -> None:
    """A context that lasts keeps the sessions with events that are in doubt, and none of those that have ended."""
    with site.app.app_context():
        found = []
        for number in range(20):
            session = orm.Session(site.db.engine)
            with session, site.es.using(session):
                site.bank.open_account()
                if number % 2:
                    session.commit()
            found.append(weakref.ref(session))
            del session
        gc.collect()
        assert sum(each() is not None for each in found) <= 1
    assert site.stored() == (10, 0)
