"""The order of the log, and conflicts, on a cluster of MariaDB servers that all take writes.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError

from flask_eventsourcing import AbortedTransactionError
from tests import servers
from tests.bank import Site, make_site
from tests.domain import in_threads
from tests.galera import catch_up

pytestmark = pytest.mark.xdist_group("galera")

THREADS = 6
UNITS = 15


@pytest.fixture
def make_sites(galera_urls: list[str]) -> Iterator[Callable[..., list[Site]]]:
    """Makes the same site on each node, with one new database of them all."""
    made: list[Site] = []

    with servers.mariadb_database(galera_urls[0]) as url:
        database = sa.make_url(url).database

        def make(**config: Any) -> list[Site]:
            for node in galera_urls:
                uri = sa.make_url(node).set(database=database).render_as_string(hide_password=False)
                made.append(make_site(uri, create=not made, **config))
                catch_up(uri)
            return made

        yield make
        for site in made:
            site.close()


def answers_conflicts(site: Site) -> None:
    """Answer 409 where the library's error comes to the app."""
    site.app.register_error_handler(IntegrityError, lambda error: (str(error), 409))


def positions(site: Site) -> list[int]:
    """Return every position that a node has."""
    catch_up(site.app.config["SQLALCHEMY_DATABASE_URI"])
    with site.app.app_context():
        order = site.es.StoredEvent.notification_id
        return list(site.db.session.scalars(sa.select(order).order_by(order)))


def test_second_of_two_nodes_is_told_of_the_conflict(make_sites: Callable[..., list[Site]]) -> None:
    """Of two units that append on two nodes at a time, the later one's commit fails with the library's error."""
    here, there, _ = make_sites()

    @here.es.transactional
    def overtaken() -> None:
        here.bank.open_account("lost")
        here.note("lost")
        there.elsewhere(lambda: there.bank.open_account("kept"))

    with here.app.app_context():
        with pytest.raises(IntegrityError, match="Another writer was first"):
            overtaken()
        with here.es.transaction():
            here.bank.open_account("next")
    assert here.stored() == (2, 0)
    assert positions(there) == [1, 2]


def test_unit_that_goes_on_after_the_conflict_is_told(make_sites: Callable[..., list[Site]]) -> None:
    """A unit that another node has overtaken gets the library's error when it saves again, and nothing is stored."""
    here, there, _ = make_sites()
    again: list[int] = []

    @here.es.transactional
    def overtaken() -> None:
        here.bank.open_account("lost")
        there.elsewhere(lambda: there.bank.open_account("kept"))
        catch_up(here.app.config["SQLALCHEMY_DATABASE_URI"])
        try:
            here.bank.open_account("lost, too")
        except IntegrityError:
            again.append(1)
            raise

    with here.app.app_context(), pytest.raises(IntegrityError):
        overtaken()
    assert again == [1]
    assert positions(here) == positions(there) == [1]


def test_caught_error_of_an_overtaken_unit_cannot_be_committed(make_sites: Callable[..., list[Site]]) -> None:
    """If the session's own statement got the conflict and the program went on, the commit raises an error."""
    here, there, _ = make_sites()
    with here.app.app_context():
        here.bank.open_account("lost")
        there.elsewhere(lambda: there.bank.open_account("kept"))
        catch_up(here.app.config["SQLALCHEMY_DATABASE_URI"])
        with pytest.raises(sa.exc.OperationalError, match="1213"):
            here.db.session.execute(sa.text("SELECT 1"))
        with pytest.raises(AbortedTransactionError):
            here.db.session.commit()
        here.db.session.rollback()
    assert positions(here) == [1]


@pytest.mark.parametrize("end", ["rollback", "error", "teardown"])
def test_overtaken_unit_can_be_rolled_back(
    make_sites: Callable[..., list[Site]], end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A unit that another node has overtaken can be rolled back, or fail with an error of its own, like any other."""
    here, there, _ = make_sites()
    caplog.clear()

    def overtaken() -> None:
        here.note("lost")
        here.bank.open_account("lost")
        there.elsewhere(lambda: there.bank.open_account("kept"))
        catch_up(here.app.config["SQLALCHEMY_DATABASE_URI"])
        if end == "error":
            raise KeyError

    with here.app.app_context():
        if end == "error":
            with pytest.raises(KeyError):
                here.es.transactional(overtaken)()
        else:
            overtaken()
        if end == "rollback":
            here.db.session.rollback()
            here.bank.open_account("next")
            here.db.session.commit()
    # The end of the application context tells of the events that it dropped; nobody tells of a failure.
    assert [record.message for record in caplog.records if record.name != here.app.logger.name] == []
    assert here.stored() == (2 if end == "rollback" else 1, 0)


@pytest.mark.parametrize("retried", [False, True])
def test_view_is_told_at_the_commit_after_it(make_sites: Callable[..., list[Site]], retried: bool) -> None:
    """In the mode ``request`` an error handler sees the conflict; with ``retry_on_conflict`` the view is run again."""
    here, there, _ = make_sites(EVENTSOURCING_COMMIT="request")
    answers_conflicts(here)
    tries: list[int] = []

    def view() -> str:
        tries.append(1)
        here.bank.open_account(f"try {len(tries)}")
        if len(tries) == 1:
            there.elsewhere(lambda: there.bank.open_account("kept"))
        return "done"

    answer = here.answer(here.es.retry_on_conflict(view) if retried else view)
    assert answer.status_code == (200 if retried else 409)
    assert len(tries) == (2 if retried else 1)
    assert positions(here) == ([1, 2] if retried else [1])


def in_units(site: Site, account_id: UUID) -> None:
    """Pay in, in a unit that is run again."""
    with site.app.app_context():
        site.es.retry_on_conflict(times=40)(site.bank.deposit)(account_id)


def in_views(site: Site, account_id: UUID) -> None:
    """Pay in, in a view that is run again."""

    @site.es.retry_on_conflict(times=40)
    def view() -> str:
        site.bank.deposit(account_id)
        return "done"

    assert site.answer(view).status_code == 200


def by_hand(site: Site, account_id: UUID) -> None:
    """Pay in outside an application context, where recorders commit for themselves, until it succeeds."""
    with site.app.app_context():
        bank = site.bank
    while True:
        try:
            bank.deposit(account_id)
        except IntegrityError:
            continue
        return


@pytest.mark.parametrize(
    ("mode", "pay_in"),
    [("explicit", in_units), ("request", in_views), ("save", by_hand)],
    ids=["explicit", "request", "by-hand"],
)
@pytest.mark.parametrize("accounts", [1, THREADS])
def test_writers_on_all_nodes_lose_nothing(
    make_sites: Callable[..., list[Site]], mode: str, pay_in: Callable[[Site, UUID], None], accounts: int
) -> None:
    """All writers on all nodes succeed, positions have no gaps, and a reader on one node skips none of them."""
    sites = make_sites(EVENTSOURCING_COMMIT=mode)
    account_ids = [sites[0].opened() for _ in range(accounts)]
    for site in sites:
        catch_up(site.app.config["SQLALCHEMY_DATABASE_URI"])
    seen: list[int] = []
    done = threading.Event()

    def follow() -> None:
        while True:
            last_round = done.is_set()
            if last_round:
                catch_up(sites[2].app.config["SQLALCHEMY_DATABASE_URI"])
            with sites[2].app.app_context():
                recorder: Any = sites[2].bank.recorder
            page = recorder.read_log(seen[-1] if seen else None, 10, inclusive_of_start=False)
            seen.extend(notification.id for notification in page)
            if last_round and not page:
                return

    def write(number: int) -> None:
        for _ in range(UNITS):
            pay_in(sites[number % 3], account_ids[number % accounts])

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        in_threads([partial(write, number) for number in range(THREADS)], patience=120)
    finally:
        done.set()
        reader.join()
    expected = list(range(1, accounts + THREADS * UNITS + 1))
    assert [positions(site) for site in sites] == [expected] * 3
    assert seen == expected
    assert sum(sites[1].balance(account_id) or 0 for account_id in account_ids) == THREADS * UNITS
