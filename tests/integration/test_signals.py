"""The signal ``events_recorded``.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import Notification

from flask_eventsourcing import events_recorded
from tests.bank import Site
from tests.domain import Account, Bank, Shop
from tests.integration.conftest import MakeSite

Call = tuple[object, Bank, Sequence[Notification]]


@pytest.fixture
def listen() -> Callable[[Site], list[Call]]:
    """Returns the calls that a receiver gets."""

    def connect(site: Site) -> list[Call]:
        calls: list[Call] = []

        def hear(sender: object, application: Bank, notifications: Sequence[Notification]) -> None:
            calls.append((sender, application, notifications))

        events_recorded.connect(hear, site.app, weak=False)
        return calls

    return connect


def test_sent_after_the_commit(site: Site, listen: Callable[[Site], list[Call]]) -> None:
    """A receiver gets app, application and notifications in the order of the log, after the commit and once."""
    calls = listen(site)
    with site.app.app_context():
        account = Account("Ada")
        account.deposit(1)
        site.bank.save(account)
        site.bank.open_account("Bob")
        assert calls == []
        site.db.session.commit()
        ((sender, application, notifications),) = calls
        assert sender is site.app
        assert application is site.bank
        assert isinstance(notifications, tuple)
        assert [n.topic.rpartition(":")[2] for n in notifications] == [
            "Account.Created",
            "Account.Deposited",
            "Account.Created",
        ]
        log = site.bank.notification_log.select(start=1, limit=10)
        assert list(notifications) == list(log)
        site.db.session.commit()
        assert len(calls) == 1


def test_not_sent_for_a_rollback(site: Site, listen: Callable[[Site], list[Call]]) -> None:
    """A rollback sends no signal, and the next commit sends none for the events that were rolled back."""
    calls = listen(site)
    with site.app.app_context():
        site.bank.open_account()
        site.db.session.rollback()
        site.note()
        site.db.session.commit()
    assert calls == []


def test_not_sent_for_a_commit_that_fails(site: Site, listen: Callable[[Site], list[Call]]) -> None:
    """A commit that the database refuses sends nothing."""
    calls = listen(site)
    with site.app.app_context():
        site.bank.open_account()
        site.db.session.add(site.Note(text=None))
        with pytest.raises(sa.exc.IntegrityError):
            site.db.session.commit()
        site.db.session.rollback()
    assert calls == []


def test_receiver_may_use_the_session(site: Site) -> None:
    """A receiver may read, write and commit with ``db.session``, and save events, which are signalled in turn."""
    topics: list[str] = []

    def hear(sender: object, application: Bank, notifications: Sequence[Notification]) -> None:
        for notification in notifications:
            topics.append(notification.topic.rpartition(".")[2])
            if topics[-1] == "Created":
                site.note(application.account(notification.originator_id).owner)
                application.deposit(notification.originator_id, 10)
                site.db.session.commit()

    with events_recorded.connected_to(hear, site.app), site.app.app_context():
        account_id = site.bank.open_account("Ada")
        site.db.session.commit()
    assert topics == ["Created", "Deposited"]
    assert site.stored() == (2, 1)
    assert site.balance(account_id) == 10


def test_receiver_that_fails_does_not_fail_the_commit(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A receiver's error is logged; the commit has succeeded, and the other receivers are called."""
    heard: list[int] = []

    def fail(sender: object, **_: Any) -> None:
        raise KeyError("receiver")

    def hear(sender: object, notifications: Sequence[Notification], **_: Any) -> None:
        heard.append(len(notifications))

    def view() -> str:
        site.bank.open_account()
        site.db.session.commit()
        return "done"

    with (
        events_recorded.connected_to(fail, site.app),
        events_recorded.connected_to(hear, site.app),
        events_recorded.connected_to(fail, site.app),
    ):
        assert site.answer(view).status_code == 200
    assert heard == [1]
    assert site.stored() == (1, 0)
    (record,) = [r for r in caplog.records if "events_recorded" in r.getMessage()]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


def test_sent_once_for_each_application(new_site: MakeSite, listen: Callable[[Site], list[Call]]) -> None:
    """A commit with events of two applications sends one signal for each, with its own events."""
    site = new_site(Bank, Shop)
    calls = listen(site)
    with site.app.app_context():
        site.es[Bank].open_account()
        site.es[Shop].open_account()
        site.es[Bank].open_account()
        site.db.session.commit()
        assert [(application, len(notifications)) for _, application, notifications in calls] == [
            (site.es[Bank], 2),
            (site.es[Shop], 1),
        ]


def test_sender_is_the_app(new_site: MakeSite, listen: Callable[[Site], list[Call]]) -> None:
    """A receiver that is connected to one Flask app does not hear of another's events."""
    site, other = new_site(), new_site()
    calls = listen(other)
    site.opened()
    assert calls == []
    other.opened()
    assert len(calls) == 1
