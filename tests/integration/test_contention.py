"""Writers on one SQLite file.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flask_eventsourcing import WriteTimeoutError
from tests.bank import Site, make_site
from tests.domain import in_threads

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A SQLite file."""
    return tmp_path / "bank.db"


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold SQLite's write lock; it lets go when its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            if process.stdin is not None:
                process.stdin.close()


def deposits(site: Site, threads: int, accounts: int, seconds: float) -> float:
    """Deposit with read-modify-write requests, check that nothing is lost, and return the deposits a second."""
    ids = [site.opened() for _ in range(accounts)]
    counts = [0] * threads
    deadline = time.monotonic() + seconds

    def client(number: int) -> None:
        account_id = ids[number % accounts]

        @site.es.retry_on_conflict(times=10)
        def view() -> str:
            site.bank.deposit(account_id, 1)
            site.note(f"{account_id} {number} {counts[number]}")
            return "done"

        while time.monotonic() < deadline:
            answer = site.answer(view)
            assert answer.status_code == 200, answer.text
            counts[number] += 1

    in_threads([lambda number=number: client(number) for number in range(threads)])  # type: ignore[misc]
    assert sum(site.balance(account_id) or 0 for account_id in ids) == sum(counts)
    assert min(counts) > 0
    return sum(counts) / seconds


@pytest.mark.parametrize("accounts", [1, 4])
def test_threads_lose_nothing(path: Path, accounts: int) -> None:
    """8 threads of read-modify-write requests on one file: nothing is locked, lost, or answered with 500."""
    site = make_site(f"sqlite:///{path}")
    deposits(site, threads=8, accounts=accounts, seconds=2)
    events, notes = site.stored()
    assert events == notes + accounts
    site.close()


@pytest.mark.torture
@pytest.mark.parametrize("accounts", [1, 8])
def test_eight_threads_are_not_much_slower_than_one(path: Path, accounts: int) -> None:
    """8 threads get, in all, at least half the updates a second that one thread alone gets."""
    site = make_site(f"sqlite:///{path}")
    alone = deposits(site, threads=1, accounts=1, seconds=10)
    together = deposits(site, threads=8, accounts=accounts, seconds=10)
    assert together > alone / 2
    site.close()


def test_rows_alone_queue_too(path: Path) -> None:
    """Requests that read and then write rows of the ORM only are not told that the database is locked either."""
    site = make_site(f"sqlite:///{path}")
    account_id = site.opened()

    def client(number: int) -> None:
        for count in range(15):
            with site.app.app_context():
                site.bank.balance(account_id)
                site.note(f"{number} {count}")
                site.db.session.commit()

    in_threads([lambda number=number: client(number) for number in range(8)])  # type: ignore[misc]
    assert site.stored() == (1, 120)
    site.close()


def test_reader_does_not_wait_for_a_writer(path: Path) -> None:
    """While a transaction that has written is open, others read the committed state at once."""
    site = make_site(f"sqlite:///{path}", EVENTSOURCING_LOCK_TIMEOUT=20)
    account_id = site.opened()
    seen: list[int | None] = []
    with site.app.app_context():
        site.bank.deposit(account_id, 5)
        started = time.monotonic()
        in_threads([lambda: seen.append(site.balance(account_id))])
        assert time.monotonic() - started < 10
        site.db.session.commit()
    assert seen == [0]
    site.close()


def test_another_process_that_holds_the_lock_is_told(path: Path) -> None:
    """A write that another process keeps out ends with a clear error after the timeout, and later ones succeed."""
    site = make_site(f"sqlite:///{path}", EVENTSOURCING_LOCK_TIMEOUT=0.2)
    account_id = site.opened()
    with held_by_another_process(path):
        with site.app.app_context():
            account = site.bank.account(account_id)
            account.deposit(1)
            with pytest.raises(WriteTimeoutError, match=r"within 0\.2 s .*another process holds") as raised:
                site.bank.save(account)
            assert "EVENTSOURCING_LOCK_TIMEOUT" in str(raised.value)
            site.db.session.rollback()
            assert site.bank.balance(account_id) == 0
        # A thread that is not the one above can try too: the turn was given back.
        with pytest.raises(WriteTimeoutError, match="another process holds"):
            site.elsewhere(lambda: site.bank.deposit(account_id, 1))
    site.elsewhere(lambda: site.bank.deposit(account_id, 1))
    assert site.balance(account_id) == 1
    site.close()


def test_write_waits_for_another_process(path: Path) -> None:
    """A write waits for another process that lets go within the timeout."""
    site = make_site(f"sqlite:///{path}", EVENTSOURCING_LOCK_TIMEOUT=20)
    account_id = site.opened()
    with held_by_another_process(path) as process:
        assert process.stdin is not None
        timer = threading.Timer(0.3, process.stdin.close)
        timer.start()
        site.elsewhere(lambda: site.bank.deposit(account_id, 1))
        timer.join()
    assert site.balance(account_id) == 1
    site.close()


def test_open_transaction_of_another_thread_is_told(path: Path) -> None:
    """A thread that waits too long for another's transaction gets the remedy, and the other can still commit."""
    site = make_site(f"sqlite:///{path}", EVENTSOURCING_LOCK_TIMEOUT=0.2)
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 1)
        with pytest.raises(WriteTimeoutError, match="another thread's transaction"):
            site.elsewhere(site.bank.open_account)
        site.db.session.commit()
    site.elsewhere(lambda: site.bank.deposit(account_id, 1))
    assert site.balance(account_id) == 2
    site.close()


def test_journal_mode_is_wal_unless_switched_off(tmp_path: Path) -> None:
    """A file is switched to WAL, which lets readers pass; with EVENTSOURCING_SQLITE_WAL = False it is left as it is."""
    for wal, mode in ((True, "wal"), (False, "delete")):
        site = make_site(f"sqlite:///{tmp_path / mode}.db", EVENTSOURCING_SQLITE_WAL=wal)
        assert journal_mode(site) == mode
        site.opened()
        assert site.stored() == (1, 0)
        site.close()


def journal_mode(site: Site) -> str:
    """Return the journal mode of a site's file."""
    with site.app.app_context():
        return str(site.db.session.execute(site.db.text("PRAGMA journal_mode")).scalar_one())
