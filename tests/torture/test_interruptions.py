"""Restarts of the server under load, exceptions in the middle of statements: no commit is lost, and no connection."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import PersistenceError

from flask_eventsourcing import CommitOutcomeUnknownError
from tests.bank import Site, make_site
from tests.servers import Server, ServerFolder, forget_killed_connections, restart_postgres, start_postgres

THREADS = 6
LONGEST_PAUSE = 0.01
DRIVERS = ("psycopg.connection", "pymysql.connections", "socket")
"""The modules in which a driver waits for the server."""


class LateError(Exception):
    """As a task queue raises in a signal handler when a job takes too long."""


class Gone(BaseException):
    """As ``gevent.Timeout`` is."""


class Ledger:
    """The outcomes that the writers were told."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.done: set[UUID] = set()
        self.unknown: set[UUID] = set()
        self.failures = 0

    def request(self) -> None:
        """Open an account and commit, as a request does; what is raised says whether that may be stored."""
        account_id: UUID | None = None
        committing = False
        with self.site.app.app_context():
            try:
                account_id = self.site.bank.open_account()
                committing = True
                self.site.db.session.commit()
            except BaseException:
                # Of a commit that was interrupted nobody knows.
                if account_id is not None and committing:
                    self.unknown.add(account_id)
                self.failures += 1
                with suppress(sa.exc.SQLAlchemyError):
                    self.site.db.session.rollback()
                raise
        self.done.add(account_id)

    def check(self) -> None:
        """Check that the log has what was told to be stored, and nothing else, and that each connection is usable."""
        with self.site.app.app_context():
            recorder = self.site.bank.recorder
            pool: Any = self.site.db.engine.pool
        assert pool.checkedout() == 0
        stored = {each.originator_id for each in recorder.select_notifications(None, 1_000_000)}
        assert self.done <= stored
        assert stored <= self.done | self.unknown
        failures = self.failures
        for _ in range(20):
            self.request()
        assert self.failures == failures


def restart_under_load(server: Server, seconds: float) -> Ledger:
    """Restart a server again and again while threads save."""
    site = make_site(server.url, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": THREADS, "max_overflow": 0})
    site.quiet()
    ledger = Ledger(site)
    over = threading.Event()
    surprises: list[BaseException] = []

    def work() -> None:
        while not over.is_set():
            try:
                ledger.request()
            except (PersistenceError, sa.exc.SQLAlchemyError, CommitOutcomeUnknownError):
                # As the server answers while it is away.
                time.sleep(0.01)
            except BaseException as error:
                surprises.append(error)
                raise

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            time.sleep(0.5)
            restart_postgres(server)
        time.sleep(0.5)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    try:
        assert surprises == []
        assert ledger.done
        assert ledger.failures
        ledger.check()
    finally:
        site.close()
        forget_killed_connections()
    return ledger


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.torture)])
def test_restarts_of_the_server_under_load(server_folder: ServerFolder, seconds: float) -> None:
    """However often the server restarts, what was told to be committed is stored, and the pool is whole afterwards."""
    with server_folder.private("restarted", start_postgres) as server:
        restart_under_load(server, seconds)


@contextmanager
def interrupted(chance: Callable[[], float]) -> Iterator[Callable[[], object]]:
    """A function that sets the timer for an exception in the middle of what the driver does next."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Not in what the garbage collector calls meanwhile, where Python drops an exception.
        if frame is not None and frame.f_globals.get("__name__") in DRIVERS:
            raise random.choice((LateError, Gone))

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, chance())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# A driver's own ``__del__`` may wait for the server, and Python drops what is raised there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.torture)])
@pytest.mark.parametrize("database", ["postgres_url", "mariadb_url"])
def test_signals_in_mid_statement(database: str, seconds: float, request: pytest.FixtureRequest) -> None:
    """Wherever in a statement an exception is raised, nothing half is stored and the pool's only place is not lost."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    site = make_site(request.getfixturevalue(database), SQLALCHEMY_ENGINE_OPTIONS=options)
    site.quiet()
    ledger = Ledger(site)
    ledger.request()
    until = time.monotonic() + seconds
    try:
        with interrupted(lambda: random.uniform(0.0001, LONGEST_PAUSE)) as arm:
            while time.monotonic() < until:
                arm()
                try:
                    ledger.request()
                except (LateError, Gone):
                    pass
                except sa.exc.StatementError as error:
                    # SQLAlchemy's own, of what is raised before a statement is sent.
                    if not isinstance(error.orig, LateError):
                        raise
        assert ledger.failures
        ledger.check()
    finally:
        site.close()
