"""``es.transaction()`` and ``@es.transactional``.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing, NotInitializedError, RollbackOnlyError, events_recorded
from tests.bank import Site, make_app
from tests.domain import Bank


def inner_that_fails(site: Site) -> None:
    """Fail in an inner unit of work."""
    with site.es.transaction():
        site.bank.open_account("inner")
        raise KeyError("inner")


def test_success_commits(site: Site) -> None:
    """A unit of work commits events and rows at its end; it gives the session."""
    with site.app.app_context():
        with site.es.transaction() as session:
            assert session is site.db.session()
            site.bank.open_account()
            site.note()
        site.db.session.rollback()
    assert site.stored() == (1, 1)


def test_error_rolls_back_and_passes(site: Site) -> None:
    """A unit of work that fails stores nothing, and its error is raised unchanged."""
    error = KeyError("view")

    def work() -> None:
        with site.es.transaction():
            site.bank.open_account()
            site.note()
            raise error

    with site.app.app_context(), pytest.raises(KeyError) as raised:
        work()
    assert raised.value is error
    assert site.stored() == (0, 0)


def test_inner_joins_the_outer(site: Site) -> None:
    """An inner unit of work commits nothing: the outermost commits once, and an error there takes all."""
    commits: list[int] = []

    def hear(sender: object, notifications: Any, **_: Any) -> None:
        commits.append(len(notifications))

    def nested(error: type[Exception] | None = None) -> None:
        with site.es.transaction():
            site.bank.open_account()
            with site.es.transaction():
                site.bank.open_account()
            assert commits in ([], [2])
            if error:
                raise error

    with site.app.app_context(), events_recorded.connected_to(hear, site.app):
        nested()
        assert commits == [2]
        with pytest.raises(KeyError):
            nested(KeyError)
    assert commits == [2]
    assert site.stored() == (2, 0)


def test_caught_inner_failure_rolls_the_outer_back(site: Site) -> None:
    """After a caught error of an inner unit everything is rolled back, and the outer unit raises an error."""

    def outer() -> None:
        with site.es.transaction():
            site.bank.open_account("outer")
            with pytest.raises(KeyError):
                inner_that_fails(site)
            site.note()

    with site.app.app_context():
        with pytest.raises(RollbackOnlyError, match="savepoint"):
            outer()
        assert site.stored() == (0, 0)
        with site.es.transaction():
            site.bank.open_account("next")
    assert site.stored() == (1, 0)


def test_inner_failure_passes_as_itself(site: Site) -> None:
    """An inner unit's error that is not caught is what the caller gets."""

    def outer() -> None:
        with site.es.transaction():
            inner_that_fails(site)

    with site.app.app_context(), pytest.raises(KeyError, match="inner"):
        outer()
    assert site.stored() == (0, 0)


def test_savepoint_within_a_unit_may_fail(site: Site) -> None:
    """A savepoint is the way to let a part fail: the unit goes on and commits the rest."""

    def part() -> None:
        with site.db.session.begin_nested():
            site.bank.open_account("part")
            raise KeyError

    with site.app.app_context():
        with site.es.transaction():
            site.bank.open_account("outer")
            with pytest.raises(KeyError):
                part()
        site.db.session.rollback()
    assert site.stored() == (1, 0)


def test_view_in_a_transaction_needs_no_commit(site: Site) -> None:
    """A view decorated with ``transactional`` is committed when it returns and rolled back when it raises."""

    @site.es.transactional
    def view(owner: str = "Ada") -> str:
        """Open an account."""
        site.bank.open_account(owner)
        site.note(owner)
        if owner == "Mallory":
            raise KeyError
        return owner

    assert view.__name__ == "view"
    assert view.__doc__ == "Open an account."
    assert site.answer(view).text == "Ada"
    assert site.answer(lambda: view("Bob")).text == "Bob"
    assert site.answer(lambda: view(owner="Mallory")).status_code == 500
    assert site.stored() == (2, 2)


def test_commit_that_fails_is_rolled_back(site: Site) -> None:
    """If the database refuses the commit, the error passes and the session can be used again."""
    with site.app.app_context():

        def work() -> None:
            with site.es.transaction():
                site.bank.open_account()
                site.note("same")

        work()
        with pytest.raises(Exception, match=r"UNIQUE|unique|Duplicate"):
            work()
        assert site.stored() == (1, 1)
        with site.es.transaction():
            site.bank.open_account()
    assert site.stored() == (2, 1)


def test_unit_needs_an_app_context(site: Site) -> None:
    """Outside an application context a unit of work says what it needs."""
    with pytest.raises(NotInitializedError, match="application context"):
        site.es.transaction()
    with pytest.raises(NotInitializedError, match="application context"):
        site.es.transactional(lambda: None)()
    with pytest.raises(NotInitializedError, match="application context"):
        site.es.retry_on_conflict(lambda: None)()


def test_work_before_the_unit_belongs_to_it(site: Site) -> None:
    """Work of the session before the unit is committed with it, as there is one transaction."""
    with site.app.app_context():
        site.bank.open_account()
        with site.es.transaction():
            site.note()
    assert site.stored() == (1, 1)


def test_unit_begins_a_session_that_does_not_begin_by_itself(uri: str) -> None:
    """With ``autobegin=False`` a unit of work begins the session, in every try, and commands need no transaction."""
    db = SQLAlchemy(session_options={"autobegin": False})
    es = EventSourcing[Bank](db=db, application=Bank)
    app = make_app(uri)
    db.init_app(app)
    es.init_app(app)
    tries: list[int] = []

    @es.retry_on_conflict
    def open_account() -> UUID:
        tries.append(1)
        account_id = es.application.open_account()
        if len(tries) == 1:
            raise es.application.recorder.dialect.conflict_error  # type: ignore[attr-defined]
        return account_id

    with app.app_context():
        db.create_all()
        account_id = open_account()
        with es.transaction():
            es.application.deposit(account_id, 5)
        with db.session.begin():
            assert es.application.balance(account_id) == 5
            assert len(es.application.recorder.select_notifications(None, 10)) == 2
    for words in (["check"], ["erase", str(account_id), "--yes"], ["erase", str(account_id), "--yes"], ["status"]):
        assert app.test_cli_runner().invoke(args=["eventsourcing", *words]).exit_code == 0
    es.close(app)
