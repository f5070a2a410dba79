"""An aggregate object whose events were lost is refused by ``save()``, on every host and database."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from eventsourcing.persistence import IntegrityError

from flask_eventsourcing.applications import environment, refuse_stale_aggregates
from flask_eventsourcing.exceptions import StaleAggregateError
from flask_eventsourcing.persistence import Datastore
from flask_eventsourcing.persistence.dialects.event_tables import ConflictError
from tests.domain import Account, Bank
from tests.hosts.sites import HostSite


def versions(site: HostSite, account_id: Any) -> list[int]:
    """Return the versions of an account that are stored."""
    return [each.originator_version for each in site.bank.events.get(account_id)]


def test_object_whose_events_were_rolled_back_is_refused(site: HostSite) -> None:
    """Changed and saved again after a rollback, an object is refused with its name, and leaves no gap."""
    account_id = site.opened()
    with site.working():
        account = site.bank.account(account_id)
        account.deposit(1)
        site.bank.save(account)
        site.rollback()
        account.deposit(2)
        with pytest.raises(StaleAggregateError, match=f"Account {account_id} .*rolled back.*read it again"):
            site.bank.save(account)
        site.commit()
        assert versions(site, account_id) == [1]
        site.rollback()


def test_object_without_a_further_change_is_refused_too(site: HostSite) -> None:
    """An object that is saved again after a rollback is refused, also if it has no new events."""
    with site.working():
        account = Account("Ada")
        site.bank.save(account)
        site.rollback()
        with pytest.raises(StaleAggregateError):
            site.bank.save(account)
        site.rollback()
    assert site.stored() == (0, 0)


def test_object_of_a_failed_savepoint_is_refused(site: HostSite) -> None:
    """What was saved in a savepoint is refused after its rollback, what was saved around it is not."""
    account_id, other_id = site.opened(), site.opened()
    with site.working():
        kept, lost = site.bank.account(other_id), site.bank.account(account_id)
        kept.deposit(1)
        site.bank.save(kept)
        savepoint = site.session.begin_nested()
        lost.deposit(1)
        site.bank.save(lost)
        savepoint.rollback()
        kept.deposit(1)
        site.bank.save(kept)
        lost.deposit(1)
        with pytest.raises(StaleAggregateError):
            site.bank.save(lost)
        site.commit()
        assert (versions(site, other_id), versions(site, account_id)) == ([1, 2, 3], [1])
        site.rollback()


def test_released_savepoint_stands_or_falls_with_the_transaction(site: HostSite) -> None:
    """An object that was saved in a savepoint is refused when that was released and the transaction rolled back."""
    account_id = site.opened()
    with site.working():
        account = site.bank.account(account_id)
        with site.session.begin_nested(), site.session.begin_nested():
            account.deposit(1)
            site.bank.save(account)
        account.deposit(1)
        site.bank.save(account)
        site.rollback()
        with pytest.raises(StaleAggregateError):
            site.bank.save(account)
        site.rollback()


@pytest.mark.parametrize("end", ["close", "rollback", "reset"])
def test_object_is_refused_whatever_ended_the_transaction(site: HostSite, end: str) -> None:
    """An object is refused after every kind of rollback of its session."""
    account_id = site.opened()
    with site.working():
        account = site.bank.account(account_id)
        account.deposit(1)
        site.bank.save(account)
        getattr(site.session, end)()
        with pytest.raises(StaleAggregateError):
            site.bank.save(account)
        site.rollback()


def test_object_that_was_read_before_a_retried_function_is_refused(site: HostSite) -> None:
    """An object from before a conflict is refused in the next try, with or without a further change."""
    account_id = site.opened()
    with site.host.context(), site.host.transaction():
        account = site.bank.account(account_id)
    site.elsewhere(lambda: site.bank.deposit(account_id, 100))
    tries: list[int] = []

    def pay() -> None:
        tries.append(account.balance)
        if not account.balance:
            account.deposit(-1)
        site.bank.save(account)

    with site.host.context(), pytest.raises(StaleAggregateError, match="could not be stored"):
        site.host.retry(pay, 5)
    assert len(tries) == 2
    with site.host.context(), site.host.transaction():
        assert site.bank.balance(account_id) == 100


def test_object_whose_unit_is_tried_again_is_refused(site: HostSite) -> None:
    """A new aggregate that was made before a retried function is refused in the second try."""
    account = Account("Ada")
    tries: list[int] = []

    def save() -> None:
        site.bank.save(account)
        tries.append(1)
        raise ConflictError

    with site.host.context(), pytest.raises(StaleAggregateError):
        site.host.retry(save, 5)
    assert tries == [1]
    assert site.stored() == (0, 0)


def test_object_that_was_read_uncommitted_is_refused(site: HostSite) -> None:
    """An object that was read with uncommitted events of another object is refused when they are rolled back."""
    account_id = site.opened()
    with site.working():
        site.bank.deposit(account_id, 5)
        account = site.bank.account(account_id)
        assert account.balance == 5
        site.rollback()
        account.deposit(1)
        with pytest.raises(StaleAggregateError, match="was read with events"):
            site.bank.save(account)
        site.rollback()
        site.bank.deposit(account_id, 1)
        site.commit()
        assert versions(site, account_id) == [1, 2]
        site.rollback()


def test_all_objects_of_a_refused_save_are_refused(site: HostSite) -> None:
    """If a save is refused, all of its objects are refused afterwards, because their events were removed too."""
    account_id = site.opened()
    with site.working():
        lost, other = site.bank.account(account_id), Account("Bob")
        lost.deposit(1)
        site.bank.save(lost)
        site.rollback()
        for _ in range(2):
            with pytest.raises(StaleAggregateError):
                site.bank.save(other, lost)
        with pytest.raises(StaleAggregateError):
            site.bank.save(other)
        site.rollback()


def test_object_may_be_used_on_as_long_as_its_events_are_there(site: HostSite) -> None:
    """An object that is saved, committed, changed and saved again stays in use, and so does one that was read again."""
    with site.working():
        account = Account("Ada")
        for _ in range(3):
            site.bank.save(account)
            account.deposit(1)
            site.bank.save(account)
            again = site.bank.account(account.id)
            again.deposit(1)
            site.bank.save(again)
            site.commit()
            account = again
        with suppress(KeyError), site.session.begin_nested():
            site.bank.save(Account("Bob"))
            raise KeyError
        account.deposit(1)
        site.bank.save(account)
        site.commit()
        assert versions(site, account.id) == list(range(1, 9))
        site.rollback()


def test_object_that_was_only_looked_at_is_not_refused(site: HostSite) -> None:
    """An object that was saved without a change is not refused after a rollback or a failed save."""
    account_id, other_id = site.opened(), site.opened()
    with site.working():
        account, other = site.bank.account(account_id), site.bank.account(other_id)
        other.deposit(1)
        site.bank.save(other, account)
        site.rollback()
        account.deposit(1)
        site.bank.save(account)
        site.commit()
        assert (versions(site, account_id), versions(site, other_id)) == ([1, 2], [1])
        site.rollback()


def test_events_without_an_object_are_saved(site: HostSite) -> None:
    """Events that are saved without an aggregate object can be saved again after a rollback."""
    account_id = site.opened()
    with site.working():
        account = site.bank.account(account_id)
        account.deposit(1)
        (event,) = account.collect_events()
        for _ in range(2):
            site.bank.save(event)
            seen = site.bank.account(account_id)
            site.rollback()
            with pytest.raises(StaleAggregateError):
                site.bank.save(seen)
            site.rollback()
        site.bank.save(event)
        site.commit()
        assert versions(site, account_id) == [1, 2]
        site.rollback()


def test_conflict_outside_of_a_session_is_known(site: HostSite) -> None:
    """Where each save commits on its own, an object that had a conflict is refused as well."""
    of_host = site.host.datastore
    alone = Datastore(of_host.engine, of_host.options, of_host.tables)
    bank = Bank(env=environment(alone, {}, "Bank"))
    for _ in range(2):
        refuse_stale_aggregates(bank)
    account_id = bank.open_account()
    stale, fresh = bank.account(account_id), bank.account(account_id)
    fresh.deposit(1)
    bank.save(fresh)
    stale.deposit(1)
    with pytest.raises(IntegrityError):
        bank.save(stale)
    with pytest.raises(StaleAggregateError):
        bank.save(stale)
    fresh.deposit(1)
    bank.save(fresh)
    assert bank.balance(account_id) == 2
    bank.close()


def test_two_changed_objects_of_one_aggregate_are_refused(site: HostSite) -> None:
    """Two changed objects of one aggregate are refused in one ``save()``, and each can be saved by itself."""
    account_id = site.opened()
    with site.working():
        one, other = site.bank.account(account_id), site.bank.account(account_id)
        one.deposit(1)
        other.deposit(2)
        with pytest.raises(StaleAggregateError, match=f"Two objects of Account {account_id}"):
            site.bank.save(one, other)
        site.bank.save(one)
        site.commit()
        assert versions(site, account_id) == [1, 2]
        site.rollback()


def test_changed_object_beside_an_unchanged_one_is_followed(site: HostSite) -> None:
    """Of two objects of one aggregate in one ``save()`` the changed one is refused if its events are lost."""
    account_id = site.opened()
    with site.working():
        for first in (True, False):
            one, other = site.bank.account(account_id), site.bank.account(account_id)
            one.deposit(1)
            site.bank.save(*(one, other) if first else (other, one))
            site.rollback()
            with pytest.raises(StaleAggregateError):
                site.bank.save(one)
            other.deposit(2)
            site.bank.save(other)
            site.commit()
        assert versions(site, account_id) == [1, 2, 3]
        site.rollback()
