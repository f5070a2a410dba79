"""Savepoints, ``db.session.begin_nested()``.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from typing import Any, cast

import pytest

from flask_eventsourcing import events_discarded, events_recorded
from tests.bank import Site
from tests.domain import Account, Bank


def listen(site: Site) -> list[str]:
    """Return a list that fills with the owners of the accounts that are recorded; kept alive by the site."""
    owners: list[str] = []

    def hear(sender: object, application: Bank, notifications: Any) -> None:
        # From the event itself: what is signalled wrongly may not be stored.
        owners.extend(cast(Any, application.mapper.to_domain_event(n)).owner for n in notifications)

    events_recorded.connect(hear, site.app, weak=False)
    return owners


def open_and_fail(site: Site, owner: str) -> None:
    """Open an account in a savepoint that is rolled back."""

    def work() -> None:
        with site.db.session.begin_nested():
            site.bank.open_account(owner)
            site.note(owner)
            raise KeyError

    with pytest.raises(KeyError):
        work()


def test_rolled_back_savepoint_is_gone_and_the_rest_stays(site: Site) -> None:
    """Events of a savepoint that is rolled back are not stored; those before and after it are."""
    owners = listen(site)
    with site.app.app_context():
        site.bank.open_account("before")
        open_and_fail(site, "within")
        site.bank.open_account("after")
        site.db.session.commit()
    assert site.stored() == (2, 0)
    assert owners == ["before", "after"]


def test_released_savepoint_stays(site: Site) -> None:
    """What was saved in a savepoint that succeeded is stored with the commit and not before."""
    owners = listen(site)
    with site.app.app_context():
        with site.db.session.begin_nested():
            site.bank.open_account("within")
            site.note()
        assert owners == []
        site.db.session.commit()
    assert site.stored() == (1, 1)
    assert owners == ["within"]


def test_released_savepoint_goes_with_its_transaction(site: Site) -> None:
    """A savepoint that succeeded is gone when the transaction is rolled back, and no signal names it."""
    owners = listen(site)
    with site.app.app_context():
        with site.db.session.begin_nested():
            site.bank.open_account("within")
        site.db.session.rollback()
    assert site.stored() == (0, 0)
    assert owners == []


def test_savepoints_in_savepoints(site: Site) -> None:
    """Of nested savepoints an inner one that succeeded goes with the outer one that did not."""
    owners = listen(site)
    with site.app.app_context():
        with site.db.session.begin_nested():
            site.bank.open_account("outer")
            open_and_fail(site, "inner, failed")
            with site.db.session.begin_nested():
                site.bank.open_account("inner")
        savepoint = site.db.session.begin_nested()
        site.bank.open_account("outer, failed")
        with site.db.session.begin_nested():
            site.bank.open_account("inner of failed")
        savepoint.rollback()
        site.db.session.commit()
    assert site.stored() == (2, 0)
    assert owners == ["outer", "inner"]


def test_only_a_rolled_back_savepoint_needs_no_commit(site: Site) -> None:
    """A view whose only events went with a savepoint has nothing to commit, and is not refused."""

    def view() -> str:
        open_and_fail(site, "within")
        return "done"

    assert site.answer(view).status_code == 200
    assert site.stored() == (0, 0)


def test_guard_names_only_what_is_left(site: Site) -> None:
    """A forgotten commit is reported for pending events, not for those that were already rolled back."""
    discarded: list[int] = []

    def hear(sender: object, application: Bank, notifications: Any) -> None:
        discarded.append(len(notifications))

    def view() -> str:
        site.bank.open_account("outer")
        open_and_fail(site, "within")
        return "done"

    with events_discarded.connected_to(hear, site.app):
        assert site.answer(view).status_code == 500
    assert discarded == [1]


def test_aggregate_can_be_saved_again_after_its_savepoint_failed(site: Site) -> None:
    """After a savepoint was rolled back, the aggregate is read as it was before it, and the version is free again."""
    account_id = site.opened()
    with site.app.app_context():
        savepoint = site.db.session.begin_nested()
        site.bank.deposit(account_id, 100)
        savepoint.rollback()
        assert site.bank.balance(account_id) == 0
        site.bank.deposit(account_id, 5)
        site.db.session.commit()
    assert site.balance(account_id) == 5
    assert site.stored() == (2, 0)


def test_log_has_no_event_of_a_failed_savepoint(site: Site) -> None:
    """The application's log has no event that was rolled back with a savepoint."""
    with site.app.app_context():
        for number in range(3):
            open_and_fail(site, f"failed {number}")
            site.bank.open_account(f"{number}")
        site.bank.save(Account("x"), Account("y"))
        site.db.session.commit()
        log = site.bank.notification_log.select(start=1, limit=10)
        assert [site.bank.account(n.originator_id).owner for n in log] == ["0", "1", "2", "x", "y"]
        assert [n.id for n in log] == sorted(n.id for n in log)
