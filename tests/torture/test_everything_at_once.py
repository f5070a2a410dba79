"""Everything at once that happens to projections: the read model equals the log in the end, or a state says why not."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import PersistenceError

from flask_eventsourcing.exceptions import CheckpointError, ProjectionBusyError
from flask_eventsourcing.persistence.dialects import is_outage
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.upkeep import pause, resume
from flask_eventsourcing.projections.upkeep.following import status_of
from tests.torture.ledger import Account
from tests.torture.test_projections import LOAD_PAUSE, PATIENCE, Torture, url_of

KEPT = "kept_"
"""What the copies of tables begin with that a restore in place takes."""
pytestmark = pytest.mark.xdist_group("torture-projections")


class EverythingAtOnce(Torture):
    """Workers with new, slow and old code, under a load, and operators that do not coordinate."""

    def __init__(self, url: str, lock: str) -> None:
        super().__init__(url, lock, "fenced")
        self.chance = random.Random()
        self.steps: list[Callable[[], Any]] = []
        self.done: list[str] = []
        with self.books.app.app_context():
            everything = self.books.db.metadata.sorted_tables
        self.tables = [table for table in everything if not table.name.endswith("snapshots")]

    def load(self) -> None:
        """Commit events until it is over; those that a restore takes away, or that have a conflict, are given up."""
        chance = random.Random(1)
        with self.books.app.app_context():
            while not self.over.is_set():
                try:
                    account: Account = self.books.es.application.repository.get(chance.choice(self.ids))
                    account.move(chance.randint(-100, 100))
                    self.books.es.application.save(account)
                    self.books.db.session.commit()
                except (PersistenceError, sa.exc.DBAPIError):
                    self.books.db.session.rollback()
                except BaseException as error:  # noqa: BLE001  # raised in the test's own thread
                    self.troubles.append(error)
                    return
                time.sleep(LOAD_PAUSE)

    def rebuild(self) -> None:
        """Rebuild, as one of two operators that do it at the same time."""

        def one() -> None:
            try:
                Rebuild(self.consumer).run()
            except ProjectionBusyError:
                self.done.append("busy")
            except Exception as error:  # noqa: BLE001  # raised in the test's own thread
                if not is_outage(error):
                    self.troubles.append(error)

        operators = [threading.Thread(target=one) for _ in range(2)]
        for operator in operators:
            operator.start()
        for operator in operators:
            operator.join()

    def pause(self) -> None:
        """Pause the projection, and let it go on."""
        with suppress(CheckpointError):
            pause(self.consumer, by="test", reason="test")
            time.sleep(0.3)
            resume(self.consumer, by="test", reason="test")

    def keep(self) -> None:
        """Copy every table, as a backup."""
        with self.engine.begin() as connection:
            for table in self.tables:
                connection.exec_driver_sql(f"DROP TABLE IF EXISTS {KEPT}{table.name}")
        with self.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            for table in self.tables:
                connection.exec_driver_sql(f"CREATE TABLE {KEPT}{table.name} AS SELECT * FROM {table.name}")

    def restore(self) -> None:
        """Restore every table in place, to what it was a moment ago."""
        if self.engine.dialect.name == "mysql":
            # Its DDL commits, so that its copies would not be of one moment.
            return
        self.keep()
        time.sleep(0.3)
        with self.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                names = ", ".join(table.name for table in self.tables)
                connection.exec_driver_sql(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")
            for table in reversed(self.tables):
                connection.exec_driver_sql(f"DELETE FROM {table.name}")
            for table in self.tables:
                connection.exec_driver_sql(f"INSERT INTO {table.name} SELECT * FROM {KEPT}{table.name}")

    def fail_over(self) -> None:
        """Let the server refuse writes for a moment, and end every connection."""
        if self.engine.dialect.name != "postgresql":
            return
        name = self.execute("SELECT current_database()")
        for value in ("on", "off"):
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("SET default_transaction_read_only = off")
                connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")
                connection.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            time.sleep(0.3)

    def strike(self) -> None:
        """Do one of these things, and go on where the database was in the way."""
        if not self.steps:
            self.steps = [self.restore, self.rebuild, self.fail_over, self.pause, self.kill_any]
            self.chance.shuffle(self.steps)
        step = self.steps.pop()
        try:
            step()
        except sa.exc.DBAPIError as error:
            if not is_outage(error):
                raise
        else:
            self.done.append(step.__name__)

    def kill_any(self) -> None:
        """Kill one of the workers, and start another."""
        self.wait_for_workers()
        pid = self.chance.choice(sorted(self.workers))
        victim = self.workers.pop(pid)
        victim.kill()
        victim.wait()
        if victim.stdout is not None:
            victim.stdout.close()
        self.start_worker()

    def end(self) -> str:
        """End the load, wait until a worker is at the end of the log or a state says why not; return the state."""
        self.over.set()
        self.loading.join()
        with suppress(CheckpointError):
            resume(self.consumer, by="test", reason="its end")
        deadline = time.monotonic() + PATIENCE
        while True:
            status = status_of(self.consumer)
            if status.lag_events == 0 and status.state in ("running", "stopped"):
                return status.state
            if status.state not in ("running", "stopped"):
                return status.state
            assert time.monotonic() < deadline, status
            time.sleep(0.05)


def run_and_compare(url: str, lock: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything happen at once, and compare."""
    torture = EverythingAtOnce(url, lock)
    torture.loading.start()
    try:
        torture.start_worker("old_ledger")
        torture.active()
        # From here on the code before is old.
        assert Rebuild(torture.consumer).run() is not None
        torture.start_worker()
        monkeypatch.setenv("LEDGER_SECONDS", "0.3")
        torture.start_worker()
        monkeypatch.delenv("LEDGER_SECONDS")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not torture.troubles:
            torture.strike()
        state = torture.end()
        torture.compare()
        print(url.partition(":")[0], lock, state, torture.outcome, torture.done)  # noqa: T201  # with ARGS=-s
        if state in ("running", "stopped"):
            assert (torture.outcome.twice, torture.outcome.missed, torture.outcome.right) == (0, 0, True)
        assert Rebuild(torture.consumer).run() is not None
        torture.compare()
        assert (torture.outcome.twice, torture.outcome.missed, torture.outcome.right) == (0, 0, True)
    finally:
        torture.close()
    assert not torture.troubles, torture.troubles


@pytest.mark.parametrize(
    "seconds", [pytest.param(6, marks=pytest.mark.long), pytest.param(60, marks=pytest.mark.torture)]
)
@pytest.mark.parametrize(
    ("database", "lock"),
    [("postgres_url", "database"), ("postgres_url", "lease"), ("mariadb_url", "database"), ("sqlite", "database")],
)
def test_everything_at_once(
    database: str,
    lock: str,
    seconds: float,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Takeovers, restores, failovers, two operators, slow handlers and old code: the read model is right in the end."""
    run_and_compare(url_of(database, request, tmp_path), lock, seconds, monkeypatch)
