"""Workers that are killed, stopped and cut off under load: no event is applied twice or missed."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flask_eventsourcing.projections.checkpoint import LEASE, CheckpointRow
from flask_eventsourcing.projections.consumers import Consumer
from tests.torture.ledger import ACCOUNTS, Account, Moved, make_books

ROOT = Path(__file__).parents[2]
WORKERS = 3
PERIOD = 2.0
LOAD_PAUSE = 0.004
PATIENCE = 60.0

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.xdist_group("torture-projections")


@dataclass
class Outcome:
    """What the torture has shown."""

    takeovers: list[float] = field(default_factory=list)
    """Seconds from a kill until another worker has moved the position."""
    events: int = 0
    twice: int = 0
    missed: int = 0
    right: bool = False
    exits: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        times = sorted(self.takeovers)
        middle = times[len(times) // 2] if times else 0.0
        return (
            f"{self.events} events, {len(times)} kills, takeover median {middle:.2f} s, "
            f"longest {max(times, default=0):.2f} s, {self.twice} applied twice, {self.missed} missed"
        )


class Torture:
    """Three workers and a load."""

    def __init__(self, url: str, lock: str, fence: str) -> None:
        self.arguments = [url, lock, fence]
        self.books = make_books(url, lock)
        self.consumer: Consumer = self.books.app.extensions["eventsourcing"].projections.find("Totals")
        self.engine = self.consumer.application.engine
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.ready: set[int] = set()
        self.over = threading.Event()
        self.outcome = Outcome()
        self.troubles: list[BaseException] = []
        self.loading = threading.Thread(target=self.load)
        with self.books.app.app_context():
            self.books.db.create_all()
            accounts = [Account() for _ in range(ACCOUNTS)]
            self.books.es.application.save(*accounts)
            self.books.db.session.commit()
            self.ids = [account.id for account in accounts]

    def start_worker(self, code: str = "ledger") -> None:
        """Start another worker."""
        command = [sys.executable, "-c", f"from tests.torture.{code} import main; main()", *self.arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.workers[worker.pid] = worker

    def wait_for_workers(self) -> None:
        """Wait until every worker says that it is ready."""
        for pid in set(self.workers) - self.ready:
            output = self.workers[pid].stdout
            assert output is not None
            assert output.readline() == b"ready\n"
            self.ready.add(pid)

    def load(self) -> None:
        """Commit events, some in blocks, until it is over."""
        chance = random.Random(1)
        try:
            with self.books.app.app_context():
                while not self.over.is_set():
                    account: Account = self.books.es.application.repository.get(chance.choice(self.ids))
                    for _ in range(chance.choice([1, 1, 1, 5])):
                        account.move(chance.randint(-100, 100))
                    self.books.es.application.save(account)
                    self.books.db.session.commit()
                    time.sleep(LOAD_PAUSE)
        except BaseException as error:  # noqa: BLE001  # raised in the test's own thread
            self.troubles.append(error)

    def row(self) -> CheckpointRow | None:
        """Read the projection's row."""
        return self.consumer.checkpoint.read()

    def active(self) -> tuple[int, CheckpointRow]:
        """Wait for a worker that is at work, and return its process id and the row."""
        deadline = time.monotonic() + PATIENCE
        first: CheckpointRow | None = None
        while time.monotonic() < deadline:
            row = self.row()
            if row is not None and row.runner is not None:
                pid = int(row.runner.rpartition(":")[2])
                if pid in self.workers and first is not None and first.token == row.token:
                    if row.position > first.position:
                        return pid, row
                else:
                    first = row
            time.sleep(0.005)
        raise AssertionError(f"no worker is at work after {PATIENCE:g} s: {self.row()}")

    def kill(self) -> None:
        """Kill the worker that is at work, and measure how long it takes until another goes on."""
        # A Python that is only just starting cannot take over, and does not listen to signals yet.
        self.wait_for_workers()
        pid, _ = self.active()
        victim = self.workers.pop(pid)
        victim.send_signal(signal.SIGKILL)
        _end(victim)
        killed = time.monotonic()
        # Measured before its replacement starts, so that it is the others who take over.
        self.active()
        self.outcome.takeovers.append(time.monotonic() - killed)
        self.start_worker()

    def cut_off(self) -> None:
        """Take the right to run away from the worker that is at work, without its knowing."""
        pid, _ = self.active()
        if self.consumer.leased:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(LEASE + 1)
            os.kill(pid, signal.SIGCONT)
        elif self.engine.dialect.name == "postgresql":
            self.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
        else:
            lock: Any = self.consumer.lock()
            holder = self.execute("SELECT IS_USED_LOCK(:name)", **lock.parameters())
            with suppress(sa.exc.DBAPIError):
                self.execute(f"KILL {holder or 0}")

    def execute(self, statement: str, **parameters: Any) -> Any:
        """Execute a statement on a connection of its own."""
        with self.engine.connect() as connection:
            result = connection.execute(sa.text(statement), parameters)
            return result.scalar() if result.returns_rows else None

    def judge(self) -> Outcome:
        """End the load, let the workers come to the end of the log, end them, and compare."""
        self.over.set()
        self.loading.join()
        deadline = time.monotonic() + PATIENCE
        head = self.consumer.application.high_water_mark()
        while (row := self.row()) is None or row.position < head:
            assert time.monotonic() < deadline, f"the workers do not reach the end of the log: {row}"
            time.sleep(0.02)
        self.wait_for_workers()
        for worker in self.workers.values():
            worker.send_signal(signal.SIGTERM)
        self.outcome.exits = {worker.wait(PATIENCE) for worker in self.workers.values()}
        self.compare()
        return self.outcome

    def compare(self) -> None:
        """Compare the read model with the log."""
        moves: Counter[Any] = Counter()
        amounts: Counter[Any] = Counter()
        logged: set[tuple[str, int]] = set()
        position = 0
        while page := self.consumer.application.read_log(position, 1000, None, ()):
            for notification in page:
                happened = self.consumer.application.mapper.to_domain_event(notification)
                if isinstance(happened, Moved):
                    moves[happened.originator_id] += 1
                    amounts[happened.originator_id] += happened.amount
                    logged.add((str(happened.originator_id), happened.originator_version))
            position = page[-1].id
        with self.books.app.app_context():
            totals = self.books.db.session.scalars(sa.select(self.books.Total)).all()
            columns = sa.select(self.books.Line.account_id, self.books.Line.version)
            lines = Counter((account_id, version) for account_id, version in self.books.db.session.execute(columns))
            found = {total.account_id: (total.moves, total.amount) for total in totals}
        self.outcome.events = len(logged)
        self.outcome.twice = sum(count - 1 for count in lines.values())
        self.outcome.missed = len(logged - set(lines))
        self.outcome.right = found == {key: (moves[key], amounts[key]) for key in moves}

    def close(self) -> None:
        """End what is left."""
        self.over.set()
        self.loading.join()
        for worker in self.workers.values():
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            _end(worker)
        self.books.es.close()


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.wait()
    if worker.stdout is not None:
        worker.stdout.close()


@contextmanager
def torture(url: str, lock: str, fence: str = "fenced") -> Iterator[Torture]:
    """Workers under load."""
    tortured = Torture(url, lock, fence)
    tortured.loading.start()
    try:
        for _ in range(WORKERS):
            tortured.start_worker()
        tortured.active()
        yield tortured
    finally:
        tortured.close()
    assert not tortured.troubles, tortured.troubles


def run(url: str, lock: str, seconds: float, period: float = PERIOD, fence: str = "fenced") -> Outcome:
    """Kill the active worker every few seconds, and cut it off in between."""
    with torture(url, lock, fence) as tortured:
        until = time.monotonic() + seconds
        number = 0
        while time.monotonic() < until:
            started = time.monotonic()
            tortured.kill()
            number += 1
            if number % 3 == 2:
                tortured.cut_off()
            time.sleep(max(0.0, started + period - time.monotonic()))
        outcome = tortured.judge()
    print(outcome)  # noqa: T201  # `make torture ARGS=-s` shows it
    return outcome


def check(outcome: Outcome) -> None:
    """Check that nothing was applied twice or missed, that the read model is right, and that others took over."""
    assert (outcome.twice, outcome.missed, outcome.right) == (0, 0, True)
    assert outcome.exits == {0}
    assert outcome.takeovers
    assert max(outcome.takeovers) < 5


def url_of(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    url: str = f"sqlite:///{tmp_path}/ledger.db" if database == "sqlite" else request.getfixturevalue(database)
    return url


@pytest.mark.parametrize(
    ("database", "lock"),
    [
        ("postgres_url", "database"),
        pytest.param("postgres_url", "lease", marks=pytest.mark.long),
        pytest.param("mariadb_url", "database", marks=pytest.mark.long),
        pytest.param("sqlite", "database", marks=pytest.mark.long),
    ],
)
def test_killed_workers(database: str, lock: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Others take over from workers that are killed or cut off, and every event is applied once."""
    check(run(url_of(database, request, tmp_path), lock, seconds=3, period=1.0))


@pytest.mark.torture
@pytest.mark.parametrize("lock", ["database", "lease"])
@pytest.mark.parametrize("database", ["postgres_url", "mariadb_url", "sqlite"])
def test_workers_killed_for_a_minute(database: str, lock: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same holds for a minute, with a kill every two seconds."""
    check(run(url_of(database, request, tmp_path), lock, seconds=60))


@pytest.mark.long
def test_without_the_fence_events_are_applied_twice(postgres_url: str) -> None:
    """With the fence taken away the same torture finds events applied twice, so its silence means something."""
    with torture(postgres_url, "database", "unfenced") as tortured:
        for _ in range(10):
            tortured.cut_off()
            time.sleep(0.5)
        assert tortured.judge().twice > 0
