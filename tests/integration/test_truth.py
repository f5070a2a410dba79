"""However a transaction ends, streams stay whole, and no client is told "done" for events that are not stored.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError

from flask_eventsourcing import RollbackOnlyError
from tests.bank import Site
from tests.domain import Account
from tests.integration.conftest import MakeSite
from tests.integration.unit_steps import STALE

on_mariadb = pytest.mark.parametrize("uri", ["mariadb"], indirect=True)


def versions(site: Site, account_id: UUID) -> list[int]:
    """Return the versions of an account that a new transaction sees."""
    record = site.es.StoredEvent
    chosen = sa.select(record.originator_version).where(record.originator_id == account_id)
    with site.app.app_context():
        return sorted(site.db.session.scalars(chosen))


def listen(site: Site, signal: Any) -> list[int]:
    """Return a list that fills with the versions of the events that a signal names; kept alive by the app."""
    heard: list[int] = []

    def hear(sender: object, application: Any, notifications: Any) -> None:
        heard.extend(notification.originator_version for notification in notifications)

    signal.connect(hear, site.app, weak=False)
    return heard


def deposit(site: Site, account: Account, amount: int) -> None:
    """Change an object, and save it."""
    account.deposit(amount)
    site.bank.save(account)


def roll_back_all(site: Site, save: Callable[[], Any]) -> None:
    """Save, and roll the session back."""
    save()
    site.db.session.rollback()


def roll_back_savepoint(site: Site, save: Callable[[], Any]) -> None:
    """Save in a savepoint that is rolled back."""
    savepoint = site.db.session.begin_nested()
    save()
    savepoint.rollback()


def roll_back_outer_savepoint(site: Site, save: Callable[[], Any]) -> None:
    """Save in a savepoint that is released within one that is rolled back."""
    savepoint = site.db.session.begin_nested()
    with site.db.session.begin_nested():
        save()
    savepoint.rollback()


def fail_to_commit(site: Site, save: Callable[[], Any]) -> None:
    """Save, and have the commit refused because of a row."""
    save()
    site.db.session.add(site.Note(text=None))
    with pytest.raises(sa.exc.IntegrityError):
        site.db.session.commit()
    site.db.session.rollback()


def fail_unit(site: Site, save: Callable[[], Any]) -> None:
    """Save in a unit of work that fails."""

    def unit() -> None:
        with site.es.transaction():
            save()
            raise KeyError

    with pytest.raises(KeyError):
        unit()


LOSSES = [roll_back_all, roll_back_savepoint, roll_back_outer_savepoint, fail_to_commit, fail_unit]


class TestObjectWhoseEventsAreLost:
    """An aggregate object that is used on after its events were rolled back."""

    @pytest.mark.parametrize("loss", LOSSES)
    def test_changed_object_is_refused(self, site: Site, loss: Callable[..., None]) -> None:
        """A change of an object whose events were rolled back is refused, and its stream stays whole."""
        account_id = site.opened()
        with site.app.app_context():
            account = site.bank.account(account_id)
            loss(site, lambda: deposit(site, account, 1))
            with pytest.raises(STALE, match=str(account_id)):
                deposit(site, account, 2)
            site.db.session.commit()
        assert versions(site, account_id) == [1]
        assert site.balance(account_id) == 0

    @pytest.mark.parametrize("loss", LOSSES)
    def test_new_object_is_refused(self, site: Site, loss: Callable[..., None]) -> None:
        """A new aggregate whose first event was rolled back is refused, so that no stream begins with its second."""
        account = Account("Ada")
        with site.app.app_context():
            loss(site, lambda: site.bank.save(account))
            with pytest.raises(STALE):
                deposit(site, account, 2)
            site.db.session.commit()
        assert versions(site, account.id) == []

    @pytest.mark.parametrize("mode", ["explicit", "request", "save"])
    @pytest.mark.parametrize("loss", LOSSES[1:3])
    def test_unchanged_object_is_refused(self, new_site: MakeSite, loss: Callable[..., None], mode: str) -> None:
        """A view that saves the same object again, without a further change, does not answer that it is stored."""
        site = new_site(EVENTSOURCING_COMMIT=mode)
        account_id = site.opened()

        def view() -> str:
            account = site.bank.account(account_id)
            loss(site, lambda: deposit(site, account, 1))
            site.bank.save(account)
            site.db.session.commit()
            return "done"

        assert site.answer(view).status_code == 500
        assert versions(site, account_id) == [1]

    def test_view_that_answers_200_has_destroyed_nothing(self, site: Site) -> None:
        """A view that goes on with the object after a savepoint was rolled back gets an error, not a broken stream."""
        account_id = site.opened()

        def view() -> str:
            account = site.bank.account(account_id)
            roll_back_savepoint(site, lambda: deposit(site, account, 1))
            deposit(site, account, 2)
            site.db.session.commit()
            return "done"

        assert site.answer(view).status_code == 500
        assert site.balance(account_id) == 0

    def test_object_that_was_read_before_the_rollback_is_refused(self, site: Site) -> None:
        """A change that rests on an event that was rolled back leaves no gap in the stream."""
        account_id = site.opened()
        with site.app.app_context():
            site.bank.deposit(account_id, 1)
            account = site.bank.account(account_id)
            site.db.session.rollback()
            with pytest.raises((STALE, IntegrityError)):
                deposit(site, account, 2)
            site.db.session.rollback()
        assert versions(site, account_id) == [1]

    def test_object_that_was_read_again_is_taken(self, site: Site) -> None:
        """After a rollback an object that is read again can be changed and saved."""
        account_id = site.opened()
        with site.app.app_context():
            roll_back_all(site, lambda: site.bank.deposit(account_id, 1))
            site.bank.deposit(account_id, 2)
            site.db.session.commit()
        assert site.balance(account_id) == 2

    def test_object_that_was_committed_is_taken(self, site: Site) -> None:
        """An object may be used for as many saves and commits as one likes, also when others were rolled back."""
        account_id, other = site.opened(), site.opened()
        with site.app.app_context():
            account = site.bank.account(account_id)
            for amount in (1, 2):
                deposit(site, account, amount)
                with site.db.session.begin_nested():
                    deposit(site, account, amount)
                site.db.session.commit()
                roll_back_all(site, lambda: site.bank.deposit(other, 1))
        assert site.balance(account_id) == 6


def overtaken(site: Site, account_id: UUID) -> Account:
    """Return an object that another request overtakes after it was read."""
    account = site.bank.account(account_id)
    site.db.session.rollback()
    site.elsewhere(lambda: site.bank.deposit(account_id, 100))
    return account


class TestObjectThatHadAConflict:
    """An aggregate object that is used on after a conflict."""

    def test_read_before_the_retried_function_and_changed_within(self, site: Site) -> None:
        """An object that was read before the retried function is refused in the second try, not stored on old state."""
        account_id = site.opened()
        with site.app.app_context():
            account = overtaken(site, account_id)
            with pytest.raises(STALE):
                site.es.retry_on_conflict(lambda: deposit(site, account, 1))()
        assert site.balance(account_id) == 100

    def test_changed_before_the_retried_function(self, site: Site) -> None:
        """An object that was changed before the retried function is refused in the second try, which has no events."""
        account_id = site.opened()
        with site.app.app_context():
            account = overtaken(site, account_id)
            account.deposit(1)
            with pytest.raises(STALE):
                site.es.retry_on_conflict(lambda: site.bank.save(account))()
        assert site.balance(account_id) == 100

    def test_loop_by_hand(self, site: Site) -> None:
        """A loop that catches the conflict, rolls back and saves the object again is refused."""
        account_id = site.opened()
        with site.app.app_context():
            account = overtaken(site, account_id)
            with pytest.raises(IntegrityError):
                deposit(site, account, 1)
            site.db.session.rollback()
            with pytest.raises(STALE):
                site.bank.save(account)
            site.db.session.rollback()
        assert site.balance(account_id) == 100

    def test_refusal_is_not_tried_again(self, site: Site) -> None:
        """A refused object is raised at once, however many tries there are."""
        account_id, tries = site.opened(), []

        def work() -> None:
            tries.append(1)
            deposit(site, account, 1)

        with site.app.app_context():
            account = overtaken(site, account_id)
            with pytest.raises(STALE) as raised:
                site.es.retry_on_conflict(times=10)(work)()
        assert len(tries) == 2
        assert not isinstance(raised.value, IntegrityError)


def commit_session(site: Site) -> None:
    """Commit as a helper does that knows no unit of work."""
    site.db.session.commit()


def commit_connection(site: Site) -> None:
    """Commit the connection."""
    site.db.session.connection().commit()


def in_transaction(site: Site, work: Callable[[], Any]) -> None:
    """Do something in a unit of work."""
    with site.es.transaction():
        work()


RUNNERS: list[Callable[[Site, Callable[[], Any]], Any]] = [
    lambda site, work: site.es.transactional(work)(),
    lambda site, work: site.es.retry_on_conflict(work)(),
    in_transaction,
]
runners = pytest.mark.parametrize("run", RUNNERS, ids=["transactional", "retry_on_conflict", "transaction"])


class TestInsideAUnit:
    """Only the unit of work commits what is in it."""

    @runners
    @pytest.mark.parametrize("commit", [commit_session, commit_connection])
    def test_commit_of_a_helper_is_refused(self, site: Site, run: Any, commit: Callable[[Site], None]) -> None:
        """A commit by other code is refused, so a unit that fails afterwards has stored nothing."""
        account_id = site.opened()

        def work() -> None:
            site.bank.deposit(account_id, -10)
            commit(site)

        with site.app.app_context(), pytest.raises(Exception, match=r"(?i)commit"):
            run(site, work)
        assert site.balance(account_id) == 0

    def test_unit_that_runs_again_charges_once(self, site: Site) -> None:
        """If a helper function commits within a retried function that has a conflict, nothing is stored twice."""
        ada, bob, tries = site.opened(), site.opened(), []

        def move() -> str:
            tries.append(1)
            site.bank.deposit(ada, -10)
            site.db.session.commit()
            account = site.bank.account(bob)
            if len(tries) == 1:
                site.elsewhere(lambda: site.bank.deposit(bob, 1))
            deposit(site, account, 10)
            return "moved"

        status = site.answer(site.es.retry_on_conflict(move)).status_code
        assert site.balance(ada) == (-10 if status == 200 else 0)

    @runners
    @pytest.mark.parametrize("end", ["rollback", "close", "reset"])
    def test_unit_with_a_rollback_inside_stores_nothing(self, site: Site, run: Any, end: str) -> None:
        """A helper's rollback is carried out, and the unit stores nothing that it saves afterwards."""
        ada, bob = site.opened(), site.opened()

        def work() -> None:
            site.bank.deposit(ada, -10)
            getattr(site.db.session, end)()
            site.bank.deposit(bob, 10)

        with site.app.app_context(), pytest.raises(RollbackOnlyError):
            run(site, work)
        assert (site.balance(ada), site.balance(bob)) == (0, 0)

    @runners
    def test_unit_whose_session_was_removed_stores_nothing(self, site: Site, run: Any) -> None:
        """The same holds when a helper calls ``db.session.remove()``."""
        ada = site.opened()

        def work() -> None:
            site.bank.deposit(ada, -10)
            site.db.session.remove()

        with site.app.app_context(), pytest.raises(RollbackOnlyError):
            run(site, work)
        assert site.balance(ada) == 0

    @runners
    def test_error_of_the_unit_passes(self, site: Site, run: Any) -> None:
        """After a helper's rollback the unit's own error is what the caller gets."""
        account_id = site.opened()

        def work() -> None:
            site.bank.deposit(account_id, -10)
            site.db.session.rollback()
            raise KeyError("own")

        with site.app.app_context(), pytest.raises(KeyError, match="own"):
            run(site, work)
        assert site.balance(account_id) == 0

    @runners
    def test_savepoint_inside_may_be_rolled_back(self, site: Site, run: Any) -> None:
        """A savepoint that is rolled back within a unit takes only its own events along."""
        account_id = site.opened()

        def work() -> None:
            site.bank.deposit(account_id, 1)
            roll_back_savepoint(site, lambda: site.bank.deposit(account_id, 2))

        with site.app.app_context():
            run(site, work)
        assert site.balance(account_id) == 1
