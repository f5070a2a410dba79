"""Hundreds of apps in one process leave nothing behind.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any
from weakref import ref

import psutil
import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm

from flask_eventsourcing import EventSourcing
from tests.bank import Site, make_app, make_site
from tests.domain import Bank
from tests.unit.test_lifecycle_fork import in_child

MOST_BLOCKS = 150


def use_and_close(uri: str) -> None:
    """Make an app, use its application, and close it."""
    site = make_site(uri, create=False)
    with site.app.app_context():
        site.db.create_all()
        site.bank.open_account()
        site.db.session.commit()
    site.close()


def descriptors() -> int:
    """Return how many files and connections this process has open."""
    return psutil.Process().num_fds()


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("file", 60),
        pytest.param("memory", 60, marks=pytest.mark.long),
        pytest.param("memory", 225, marks=pytest.mark.torture),
        pytest.param("file", 225, marks=pytest.mark.torture),
    ],
)
def test_hundreds_of_apps_leave_nothing(kind: str, number: int, tmp_path: Path) -> None:
    """Apps made, used and closed in one process leave no thread, no connection, and no growing memory."""
    uri = "sqlite://" if kind == "memory" else f"sqlite:///{tmp_path / 'bank.db'}"
    for _ in range(number // 4):
        use_and_close(uri)
    gc.collect()
    threads, files = threading.active_count(), descriptors()
    blocks = []
    for _ in range(2):
        for _ in range(number):
            use_and_close(uri)
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert threading.active_count() == threads
    assert descriptors() <= files + 2
    # An app with its models takes thousands of blocks of memory; some dozens are what libraries keep for good.
    assert (blocks[1] - blocks[0]) / number < MOST_BLOCKS


def test_apps_leave_no_connection_to_postgresql(postgres_url: str) -> None:
    """Apps that are closed leave no connection at the server."""
    for _ in range(10):
        use_and_close(postgres_url)
    site = make_site(postgres_url, create=False)
    assert connections(site, 1) == 1
    site.close()


def test_close_gives_connections_back(postgres_url: str) -> None:
    """``es.close()`` closes the idle connections of its database."""
    site, other = make_site(postgres_url), make_site(postgres_url, create=False)
    site.opened()
    assert connections(other, 2) == 2
    site.es.close()
    assert connections(other, 1) == 1
    other.close()
    site.close()


def connections(site: Site, expected: int) -> int:
    """Count the connections that the server has to a site's database, as soon as there are so many."""
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with site.app.app_context():
        deadline = time.monotonic() + 10
        # A server process takes a moment to end, also one of a test that has had the database before.
        while True:
            found = int(site.db.session.execute(site.db.text(count)).scalar_one())
            if found == expected or time.monotonic() > deadline:
                return found
            site.db.session.rollback()


def test_app_is_garbage_once_it_is_dropped() -> None:
    """An app that nobody holds any more is collected with its application, though the extension object lives on."""
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bank)

    def make() -> tuple[ref[object], ref[object]]:
        app = make_app("sqlite://")
        db.init_app(app)
        es.init_app(app)
        with app.app_context():
            return ref(app), ref(es.application)

    app, application = make()
    gc.collect()
    assert app() is None
    assert application() is None


def test_listeners_hold_for_every_session() -> None:
    """Sessions have the extension's listeners once, however many factories came and went."""
    for _ in range(50):
        with orm.scoped_session(orm.sessionmaker())() as session:
            dispatch: Any = session.dispatch
            assert [len(dispatch.after_transaction_end), len(dispatch.before_commit), len(dispatch.after_commit)] == [
                1
            ] * 3


def test_forked_process_uses_connections_of_its_own(postgres_url: str) -> None:
    """A process forked after use constructs its own application on connections of its own, and both go on."""
    check_fork(postgres_url)


def test_forked_process_on_sqlite(tmp_path: Path) -> None:
    """The same on a SQLite file."""
    check_fork(f"sqlite:///{tmp_path / 'bank.db'}")


def check_fork(uri: str) -> None:
    """Use an app, fork, use it in the child and then in the parent."""
    site = make_site(uri)
    account_id = site.opened()
    with site.app.app_context():
        parents = id(site.bank)

    def child() -> list[object]:
        with site.app.app_context():
            same = id(site.bank) == parents
            site.bank.deposit(account_id, 5)
            site.db.session.commit()
        balance = site.balance(account_id)
        site.es.close()
        return [same, balance, os.getpid() != parent]

    parent = os.getpid()
    assert in_child(child) == [False, 5, True]
    with site.app.app_context():
        assert id(site.bank) == parents
        site.bank.deposit(account_id, 2)
        site.db.session.commit()
    assert site.balance(account_id) == 7
    site.close()


@pytest.mark.parametrize("database", ["sqlite://", "sqlite:///bank.db"])
def test_init_app_opens_no_connection(database: str) -> None:
    """Making an app connects to nothing, so that an app that is never used has nothing to close."""
    opened: list[int] = []

    def connect() -> sqlite3.Connection:
        opened.append(1)
        return sqlite3.connect(":memory:", check_same_thread=False)

    site = make_site(database, create=False, SQLALCHEMY_ENGINE_OPTIONS={"creator": connect})
    assert opened == []
    with site.app.app_context():
        site.db.session.execute(sa.text("SELECT 1"))
    assert opened == [1]
    site.close()
