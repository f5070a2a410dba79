"""Errors after which the database has rolled back more than the statement: nothing is committed by half.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import OperationalError, StoredEvent

from flask_eventsourcing import AbortedTransactionError, WriteTimeoutError
from tests import servers
from tests.bank import Site, make_site
from tests.integration.marks import on_sqlite_file
from tests.servers import ServerFolder, require

FULL = b"x" * 1_000_000


@contextmanager
def full_disk(site: Site) -> Iterator[None]:
    """Let SQLite find no room for more than is there, on the session's connection."""
    driver: Any = site.db.session.connection().connection.driver_connection
    pages = driver.execute("PRAGMA page_count").fetchone()[0]
    driver.execute(f"PRAGMA max_page_count = {pages + 20}")
    yield
    driver.execute("PRAGMA max_page_count = 1000000")


@on_sqlite_file
@pytest.mark.parametrize("then", ["commit", "save", "row"])
def test_full_disk_fails_one_save_alone(site: Site, then: str) -> None:
    """After "disk is full" nothing of that save is stored; the saves before and after it are."""
    site.opened()
    with site.app.app_context():
        recorder: Any = site.bank.recorder
        with full_disk(site):
            site.bank.open_account("before")
            with pytest.raises(OperationalError, match="full"):
                recorder.insert_events([StoredEvent(uuid4(), 1, "a:b", FULL)])
        if then == "row":
            site.note("kept, too")
        if then == "save":
            site.bank.open_account("after")
        site.db.session.commit()
    assert site.stored() == (2 + (then == "save"), int(then == "row"))


@on_sqlite_file
def test_interrupted_save_is_told_as_it_is(site: Site) -> None:
    """If SQLite ends the transaction during a large save, the error says why, and a commit is refused."""
    with site.app.app_context():
        recorder: Any = site.bank.recorder
        site.bank.open_account("lost")
        driver: Any = site.db.session.connection().connection.driver_connection
        driver.set_progress_handler(lambda: 1, 1000)
        account_id = uuid4()
        with pytest.raises(OperationalError, match="interrupted"):
            recorder.insert_events([StoredEvent(account_id, n, "a:b", b"{}") for n in range(1, 501)])
        driver.set_progress_handler(None, 0)
        with pytest.raises(AbortedTransactionError):
            site.db.session.commit()
        site.db.session.rollback()
    assert site.stored() == (0, 0)


@on_sqlite_file
def test_full_disk_that_a_row_met_is_not_committed_by_half(site: Site) -> None:
    """The same holds when a statement of the session's own was the one that failed."""
    with site.app.app_context():
        with full_disk(site):
            site.bank.open_account("lost")
            with pytest.raises(sa.exc.OperationalError, match="full"):
                site.db.session.execute(sa.insert(site.Note).values(text=FULL.decode()))
        with pytest.raises(AbortedTransactionError):
            site.db.session.commit()
        site.db.session.rollback()
    assert site.stored() == (0, 0)


@pytest.fixture
def strict_mariadb_url(server_folder: ServerFolder) -> Iterator[str]:
    """A server that rolls a transaction back when it has waited too long for a lock."""
    require(servers.has_program("mariadbd"), "MariaDB", "apt-get install mariadb-server")

    def start(folder: Any) -> servers.Server:
        return servers.start_mariadb(folder, ["--innodb-rollback-on-timeout"])

    with server_folder.private("mariadb", start) as server, servers.mariadb_database(server.url) as url:
        yield url


def test_timeout_that_rolls_back_is_not_committed_by_half(strict_mariadb_url: str) -> None:
    """If MariaDB is set to roll back after a lock timeout, the transaction cannot be committed after one."""
    site = make_site(strict_mariadb_url, EVENTSOURCING_LOCK_TIMEOUT=1)
    site.opened()
    with site.app.app_context():
        other = site.db.engine.connect()
        other.exec_driver_sql("SELECT * FROM bank_tracking FOR UPDATE")
        site.note("lost")
        site.db.session.flush()
        with pytest.raises(WriteTimeoutError):
            site.bank.open_account("late")
        other.close()
        with pytest.raises(AbortedTransactionError):
            site.db.session.commit()
        site.db.session.rollback()
    assert site.stored() == (1, 0)
    site.close()
