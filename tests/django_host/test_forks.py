"""A Django project whose process forks while connections are open: idle ones, those of a pool, and other threads'."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from flask_eventsourcing.exceptions import InheritedDatabaseError
from tests.django_host import project
from tests.django_host.conftest import DATABASES, DjangoBank
from tests.unit.test_lifecycle_fork import fork_in_c, in_child

SERVERS = DATABASES[1:]
SESSION = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}
FORKS: dict[str, Callable[[], int]] = {"python": os.fork, "c": fork_in_c}


def read_beside(site: DjangoBank) -> None:
    """Read past the transaction of a block, which takes a connection of our own, and leaves it idle."""
    datastore: Any = site.bank.recorder.datastore  # type: ignore[attr-defined]
    with site.atomic(), datastore.reading(join=False) as reading:
        reading.connection.exec_driver_sql("SELECT 1").close()


def session(site: DjangoBank) -> int:
    """Return the number that the server has given to this thread's session."""
    with site.connection.cursor() as cursor:
        cursor.execute(SESSION[site.connection.vendor])
        found: int = cursor.fetchone()[0]
    return found


@contextmanager
def open_elsewhere(site: DjangoBank) -> Iterator[None]:
    """Within it, another thread has a connection that is open and idle."""
    is_open, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        site.bank.notification_log.select(1, 10)
        is_open.set()
        is_over.wait(60)
        site.connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    is_open.wait(60)
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize("url", DATABASES[:1], indirect=True)
def test_idle_connections_to_a_sqlite_file(site: DjangoBank) -> None:
    """Idle connections to a SQLite file are closed before a fork, also those that Django does not know."""
    account_id = site.opened()
    read_beside(site)

    def child() -> Any:
        site.bank.deposit(account_id)
        read_beside(site)
        return site.bank.balance(account_id)

    assert in_child(child) == 1
    read_beside(site)
    site.bank.deposit(account_id)
    assert site.bank.balance(account_id) == 2


@pytest.mark.parametrize("url", DATABASES[:1], indirect=True)
def test_fork_in_a_transaction_without_a_block(site: DjangoBank) -> None:
    """With autocommit off, a fork does not roll back what was saved, and the child cannot commit it."""
    site.connection.set_autocommit(False)
    site.opened()
    site.note()

    def child() -> Any:
        try:
            site.opened()
        except InheritedDatabaseError:
            return "refused"
        return "done"

    assert in_child(child) == "refused"
    site.connection.commit()
    site.connection.set_autocommit(True)
    assert site.stored() == (1, 1)


@pytest.mark.parametrize("url", DATABASES[:1], indirect=True)
@pytest.mark.parametrize("opened", ["beside", "elsewhere"])
def test_sqlite_file_that_is_open_at_a_fork(site: DjangoBank, opened: str) -> None:
    """Where a file is open at a fork, be it by another thread, every thread of the child refuses it."""
    account_id = site.opened()

    def refused(refused_by: Callable[[Callable[[], Any]], Any]) -> str:
        try:
            refused_by(lambda: site.bank.deposit(account_id))
        except InheritedDatabaseError:
            return "refused"
        return "done"

    def child() -> Any:
        return [refused(lambda function: function()), refused(in_another_thread)]

    if opened == "beside":
        read_beside(site)
        site.connection.close()
        assert in_child(child, fork=fork_in_c) == ["refused", "refused"]
    else:
        site.connection.close()
        with open_elsewhere(site):
            assert in_child(child) == ["refused", "refused"]
    assert site.bank.balance(account_id) == 0


def in_another_thread(function: Callable[[], Any]) -> None:
    """Call a function in a thread, and raise its error here."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            function()
        except InheritedDatabaseError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error


@pytest.mark.parametrize("url", SERVERS, indirect=True)
@pytest.mark.parametrize("fork", FORKS)
def test_sessions_of_a_server(site: DjangoBank, fork: str) -> None:
    """A forked process has sessions of its own on a server, and leaves those of its parent as they are."""
    account_id = site.opened()
    read_beside(site)
    before = session(site)

    def child() -> Any:
        site.bank.deposit(account_id)
        read_beside(site)
        found = session(site)
        site.connection.close()
        return found

    assert in_child(child, fork=FORKS[fork]) != before
    site.bank.deposit(account_id)
    read_beside(site)
    assert session(site) == before
    assert site.bank.balance(account_id) == 2


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("fork", FORKS)
def test_pool_at_a_fork(url: str, fork: str) -> None:
    """A forked process makes a pool of psycopg's of its own, and takes no connection of its parent's."""
    options = {**project.database_settings(url)["OPTIONS"], "pool": {"min_size": 2, "max_size": 3, "timeout": 20}}
    # An alias of its own, as Django has pools by their aliases.
    alias = f"pooled_{fork}"
    with project.database(alias, url, OPTIONS=options), project.applications(Bank=alias), ExitStack() as stack:
        site = DjangoBank(alias, url)
        stack.callback(site.connection.close_pool)
        stack.callback(site.connection.close)
        account_id = site.opened()
        site.connection.pool.wait(60)
        before = {session(site), site.elsewhere(lambda: session(site))}

        def child(is_first: Callable[[], object]) -> Any:
            is_first()
            found = {session(site), site.elsewhere(lambda: session(site))}
            site.bank.deposit(account_id)
            site.connection.close()
            site.connection.close_pool()
            return sorted(found & before)

        assert in_child(lambda: child(lambda: site.bank.deposit(account_id, 0)), fork=FORKS[fork]) == []
        # A connection that a thread has is its own affair; those in the pool are not given to Django's ORM.
        site.connection.close()
        assert in_child(lambda: child(site.note), fork=FORKS[fork]) == []
        site.bank.deposit(account_id)
        assert site.bank.balance(account_id) == 3
