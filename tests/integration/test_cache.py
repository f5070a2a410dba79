"""The aggregate cache, and snapshots.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from flask_eventsourcing import SharedAggregateError
from tests.bank import Site
from tests.domain import Account, Bank, Branch, in_threads
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files


@pytest.fixture(params=["fastforward", "no fastforward", "unlimited"])
def cached(new_site: MakeSite, request: pytest.FixtureRequest) -> Site:
    """A site with a cache."""
    env = {
        "AGGREGATE_CACHE_MAXSIZE": "0" if request.param == "unlimited" else "10",
        "AGGREGATE_CACHE_FASTFORWARD": "n" if request.param == "no fastforward" else "y",
    }
    return new_site(EVENTSOURCING_ENV=env)


def test_cache_is_there_and_used(cached: Site) -> None:
    """The cache that the environment asks for is filled, with what is committed."""
    account_id = cached.opened()
    assert cached.balance(account_id) == 0
    with cached.app.app_context():
        cache: Any = cached.bank.repository.cache
        assert cache.get(account_id).balance == 0
        cached.bank.deposit(account_id, 5)
        cached.db.session.commit()
        assert cached.bank.balance(account_id) == 5
        assert cache.get(account_id).balance == 5


def test_rolled_back_state_is_never_served(cached: Site) -> None:
    """After a rollback the cache serves what is stored, in this request and in the next."""
    account_id = cached.opened()
    with cached.app.app_context():
        cached.bank.deposit(account_id, 5)
        assert cached.bank.balance(account_id) == 5
        cached.db.session.rollback()
        assert cached.bank.balance(account_id) == 0
    assert cached.balance(account_id) == 0


def test_rolled_back_new_aggregate_is_not_there(cached: Site) -> None:
    """An aggregate whose creation was rolled back is not found."""
    with cached.app.app_context():
        account_id = cached.bank.open_account()
        assert cached.bank.balance(account_id) == 0
        cached.db.session.rollback()
        assert cached.bank.balance(account_id) is None
    assert cached.balance(account_id) is None


def test_state_of_a_failed_savepoint_is_never_served(cached: Site) -> None:
    """Events of a savepoint that is rolled back are not in the cache, also after the commit."""
    account_id = cached.opened()
    with cached.app.app_context():
        cached.bank.deposit(account_id, 1)
        savepoint = cached.db.session.begin_nested()
        cached.bank.deposit(account_id, 100)
        assert cached.bank.balance(account_id) == 101
        savepoint.rollback()
        assert cached.bank.balance(account_id) == 1
        cached.db.session.commit()
        assert cached.bank.balance(account_id) == 1
    assert cached.balance(account_id) == 1


def test_cache_is_not_filled_from_a_failed_savepoint(cached: Site) -> None:
    """Aggregates saved or read in a savepoint that is rolled back are not cached by the commit."""
    account_id = cached.opened()
    with cached.app.app_context():
        savepoint = cached.db.session.begin_nested()
        cached.bank.deposit(account_id, 100)
        assert cached.bank.balance(account_id) == 100
        savepoint.rollback()
        cached.note()
        cached.db.session.commit()
    assert cached.balance(account_id) == 0


def test_dropped_events_leave_nothing(cached: Site) -> None:
    """Events that a view forgot to commit are not served by the cache afterwards."""
    account_id = cached.opened()

    def view() -> str:
        cached.bank.deposit(account_id, 5)
        return "done"

    assert cached.answer(view).status_code == 500
    assert cached.balance(account_id) == 0


@on_files
def test_uncommitted_state_is_not_served_to_others(cached: Site) -> None:
    """While a request has not committed, others are served the committed state."""
    account_id = cached.opened()
    seen: list[int | None] = []
    with cached.app.app_context():
        cached.bank.deposit(account_id, 5)
        cached.bank.balance(account_id)
        in_threads([lambda: seen.append(cached.balance(account_id))])
        cached.db.session.commit()
        in_threads([lambda: seen.append(cached.balance(account_id))])
    assert seen == [0, 5]


def test_aggregate_that_is_changed_after_save_does_not_change_the_cache(cached: Site) -> None:
    """Changes that were triggered but never saved do not reach the cache."""
    account_id = cached.opened()
    with cached.app.app_context():
        account = cached.bank.account(account_id)
        account.deposit(5)
        cached.bank.save(account)
        account.deposit(1000)
        cached.db.session.commit()
    assert cached.balance(account_id) == 5


@on_files
def test_deposits_with_a_cache_lose_nothing(new_site: MakeSite) -> None:
    """With a cache, concurrent read-modify-write requests with retries lose no update."""
    site = new_site(EVENTSOURCING_ENV={"AGGREGATE_CACHE_MAXSIZE": "10"})
    account_id = site.opened()

    @site.es.retry_on_conflict(times=20)
    def view() -> str:
        site.bank.deposit(account_id, 1)
        return "done"

    def client() -> None:
        for _ in range(10):
            assert site.answer(view).status_code == 200

    in_threads([client] * 4)
    assert site.balance(account_id) == 40


def snapshots(site: Site) -> list[int]:
    """Return the versions of the snapshots that are stored."""
    with site.app.app_context():
        column = site.es.Snapshot.originator_version
        return list(site.db.session.scalars(sa.select(column).order_by(column)))


def test_snapshots_are_taken_in_the_same_transaction(new_site: MakeSite) -> None:
    """Automatic snapshots are stored with the events that caused them, and go with them."""
    site = new_site(Branch)
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 1)
        site.db.session.rollback()
    assert snapshots(site) == []
    with site.app.app_context():
        for _ in range(4):
            site.bank.deposit(account_id, 1)
        site.db.session.commit()
    assert snapshots(site) == [2, 4]
    assert site.balance(account_id) == 4


def test_snapshot_is_what_is_read(new_site: MakeSite) -> None:
    """A snapshot stands for the events before it, and a past version is read without it."""
    site = new_site(Branch)
    account_id = site.opened()
    with site.app.app_context():
        for _ in range(3):
            site.bank.deposit(account_id, 1)
        site.db.session.commit()
        site.db.session.execute(sa.delete(site.es.StoredEvent).where(site.es.StoredEvent.originator_version == 3))
        assert site.bank.balance(account_id) == 3
        past: Account = site.bank.repository.get(account_id, version=2)
        assert past.balance == 1
        site.db.session.rollback()


def test_snapshot_of_a_failed_savepoint_is_gone(new_site: MakeSite) -> None:
    """A snapshot taken in a savepoint that is rolled back is not stored."""
    site = new_site(Branch)
    account_id = site.opened()
    with site.app.app_context():
        savepoint = site.db.session.begin_nested()
        site.bank.deposit(account_id, 100)
        savepoint.rollback()
        site.note()
        site.db.session.commit()
        assert site.bank.balance(account_id) == 0
    assert snapshots(site) == []


def test_snapshot_on_demand(new_site: MakeSite) -> None:
    """``take_snapshot()`` joins the transaction too; snapshots can be switched on by the environment."""
    site = new_site(EVENTSOURCING_ENV={"IS_SNAPSHOTTING_ENABLED": "y"})
    account_id = site.opened()
    with site.app.app_context():
        site.bank.take_snapshot(account_id)
        site.db.session.rollback()
        assert snapshots(site) == []
        site.bank.take_snapshot(account_id)
        site.db.session.commit()
    assert snapshots(site) == [1]


UNCOPIED: list[tuple[dict[str, str], dict[str, bool]]] = [
    ({}, {"deepcopy_from_cache": False}),
    ({"DEEPCOPY_FROM_AGGREGATE_CACHE": "n"}, {}),
]


@pytest.mark.parametrize(("env", "arguments"), UNCOPIED, ids=["argument", "setting"])
def test_object_that_was_served_uncopied_is_refused(
    new_site: MakeSite, env: dict[str, str], arguments: dict[str, bool]
) -> None:
    """``save()`` refuses an object that the cache served without a copy; others get the stored state."""
    site = new_site(EVENTSOURCING_ENV={"AGGREGATE_CACHE_MAXSIZE": "10"} | env)
    account_id = site.opened()
    for _ in range(2):
        with site.app.app_context():
            read: Any = site.bank.repository.get
            account = read(account_id, **arguments)
            account.deposit(5)
            with pytest.raises(SharedAggregateError, match=r"Account .* the cache"):
                site.bank.save(account)
            site.db.session.rollback()
        assert site.balance(account_id) == 0


def test_copy_of_what_the_cache_has_is_saved(cached: Site) -> None:
    """An object that the cache served as a copy can be changed and saved, each time that it is read."""
    account_id = cached.opened()
    for _ in range(3):
        with cached.app.app_context():
            cached.bank.deposit(account_id, 5)
            cached.db.session.commit()
    assert cached.balance(account_id) == 15


@pytest.mark.parametrize("fastforward", ["y", "n"])
def test_changes_that_nobody_saved_are_not_served(new_site: MakeSite, fastforward: str) -> None:
    """If ``save()`` commits, later changes of the object do not reach the cache."""
    env = {"AGGREGATE_CACHE_MAXSIZE": "10", "AGGREGATE_CACHE_FASTFORWARD": fastforward}
    site = new_site(EVENTSOURCING_ENV=env, EVENTSOURCING_COMMIT="save")
    account = Account("Ada")
    with site.app.app_context():
        site.bank.save(account)
        account.deposit(1000)
    assert site.balance(account.id) == 0
    with site.app.app_context():
        site.bank.deposit(account.id, 1)
    assert site.balance(account.id) == 1
    assert site.stored() == (2, 0)


def test_conflict_takes_a_stale_aggregate_out_of_the_cache(new_site: MakeSite) -> None:
    """Without fast-forward a conflict with another process shows that the cache is old, and the next try reads."""
    env = {"AGGREGATE_CACHE_MAXSIZE": "10", "AGGREGATE_CACHE_FASTFORWARD": "n"}
    site = new_site(EVENTSOURCING_ENV=env)
    account_id = site.opened()
    with site.app.app_context():
        # As another process would do, whose cache is another one.
        other = Bank(env=site.app.extensions["eventsourcing"].env)
        other.deposit(account_id, 5)
        site.db.session.commit()
        other.close()

    @site.es.retry_on_conflict
    def deposit() -> None:
        site.bank.deposit(account_id, 1)

    with site.app.app_context():
        deposit()
    assert site.balance(account_id) == 6


def test_older_state_takes_no_newer_one_out_of_the_cache(new_site: MakeSite) -> None:
    """The cache has the newest committed version, in whatever order threads commit."""
    env = {"AGGREGATE_CACHE_MAXSIZE": "10", "AGGREGATE_CACHE_FASTFORWARD": "n"}
    site = new_site(EVENTSOURCING_ENV=env)
    account_id = site.opened()
    with site.app.app_context():
        cache: Any = site.bank.repository.cache
        old = site.bank.account(account_id)
        site.bank.deposit(account_id, 5)
        site.db.session.commit()
        cache.put(account_id, old)
        assert site.bank.balance(account_id) == 5


@pytest.mark.parametrize("end", ["close", "reset", "remove"])
def test_cache_serves_what_is_stored_whatever_ended_the_transaction(new_site: MakeSite, end: str) -> None:
    """It does not matter how a session was told to drop what was saved."""
    site = new_site(EVENTSOURCING_ENV={"AGGREGATE_CACHE_MAXSIZE": "10", "AGGREGATE_CACHE_FASTFORWARD": "n"})
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 5)
        assert site.bank.balance(account_id) == 5
        getattr(site.db.session, end)()
        site.note()
        site.db.session.commit()
        assert site.bank.balance(account_id) == 0
    assert site.balance(account_id) == 0
