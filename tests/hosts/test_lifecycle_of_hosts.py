"""One application in a process, on every host."""

from __future__ import annotations

import os

import pytest

from flask_eventsourcing.persistence.dialects import is_in_memory
from tests.domain import in_threads
from tests.hosts.sites import HostSite


def test_threads_that_race_construct_one(site: HostSite) -> None:
    """Threads that ask for the application at once all get the same."""
    found: list[object] = []

    def look() -> None:
        with site.host.context():
            found.append(site.bank)

    in_threads([look] * 8)
    assert len(found) == 8
    assert len({id(each) for each in found}) == 1


def test_closed_application_is_constructed_again(site: HostSite) -> None:
    """After ``close()`` the next use constructs another one, and closing twice does no harm."""
    with site.host.context():
        first = site.bank
    site.close()
    site.close()
    with site.host.context():
        assert site.bank is not first
    if not is_in_memory(site.host.datastore.engine.url):
        # The other kind is gone with its one connection.
        account_id = site.opened()
        with site.host.context(), site.host.transaction():
            assert site.bank.balance(account_id) == 0


def test_forked_process_constructs_its_own(site: HostSite) -> None:
    """A forked process has an application of its own, and both processes work."""
    account_id = site.opened()
    with site.host.context():
        before = id(site.bank)
    child = os.fork()
    if child == 0:
        try:
            with site.host.context(), site.host.transaction():
                site.bank.deposit(account_id, 5)
                other = id(site.bank)
            os._exit(0 if other != before else 2)
        except BaseException:  # noqa: BLE001
            # The test's own clean-up must not run in the child.
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    in_memory = is_in_memory(site.host.datastore.engine.url)
    with site.host.context(), site.host.transaction():
        # The child of an in-memory database has a copy of its own.
        assert site.bank.balance(account_id) == (0 if in_memory else 5)


def test_forked_process_leaves_its_parents_transaction_alone(site: HostSite) -> None:
    """A rollback of a process stores nothing, even if a child forked in the transaction runs the commit."""
    account_id = site.opened()

    def leave() -> None:
        child = -1
        try:
            with site.host.context(), site.host.transaction():
                site.bank.deposit(account_id)
                child = os.fork()
                if child:
                    os.waitpid(child, 0)
                    raise KeyError
        finally:
            if child == 0:
                # The test's own clean-up must not run in the child.
                os._exit(0)

    with pytest.raises(KeyError):
        leave()
    with site.host.context(), site.host.transaction():
        assert site.bank.balance(account_id) == 0
