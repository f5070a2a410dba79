"""A rebuild of a long log: its memory, its speed from the first part to the last, its readers and writers."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import psutil
import pytest
import sqlalchemy as sa

from flask_eventsourcing.projections.rebuilding import Rebuild
from tests.projections.desk_hosts import FlaskDesk, make_desk

ROOT = Path(__file__).parents[2]
ACCOUNTS = 1000
PARTS = 10
MEGABYTE = 1024 * 1024
MOST = 40 * MEGABYTE
"""By how much the memory of a process that rebuilds may grow."""


def fill(desk: FlaskDesk, events: int) -> list[UUID]:
    """Fill the log, as a writer does that saves many events at a time; return the accounts' ids."""
    with desk.context() as bank:
        ids = [bank.open_account() for _ in range(ACCOUNTS)]
        desk.session.commit()
        each = (events - ACCOUNTS) // ACCOUNTS
        for account_id in ids:
            account = bank.account(account_id)
            for _ in range(each):
                account.deposit(1)
            bank.save(account)
            desk.session.commit()
    return ids


class Meter:
    """Notes how far a rebuild is, what memory and what time of the processor it has taken, as it goes on."""

    def __init__(self, rebuild: Rebuild, events: int) -> None:
        self.marks: list[tuple[int, float, int]] = []
        self._rebuild = rebuild
        self._steps = [events * part // PARTS for part in range(1, PARTS)]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Meter:
        self._note(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._note(self._rebuild.runner.progress.position)

    def _note(self, position: int) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append((position, used.ru_utime + used.ru_stime, psutil.Process().memory_info().rss))

    def _run(self) -> None:
        while self._steps and not self._ended.wait(0.02):
            position = self._rebuild.runner.progress.position
            if position >= self._steps[0]:
                self._note(position)
                while self._steps and position >= self._steps[0]:
                    self._steps.pop(0)


def rebuild_in_this_process(uri: str, events: int) -> None:
    """Rebuild, and print the marks."""
    desk = make_desk(uri)
    desk.balances()
    rebuild = Rebuild(desk.consumer())
    gc.collect()
    with Meter(rebuild, events) as meter:
        began = time.monotonic()
        rebuilt = rebuild.run()
        seconds = time.monotonic() - began
    assert rebuilt is not None
    print(json.dumps({"events": rebuilt.events, "seconds": seconds, "marks": meter.marks}))  # noqa: T201
    desk.close()


class Beside:
    """Readers and a writer beside the rebuild."""

    def __init__(self, desk: FlaskDesk, ids: list[UUID]) -> None:
        self.desk = desk
        self.ids = ids
        self.seen: set[tuple[int, bool]] = set()
        self.written = 0
        self._least = 0

    def read(self, stop: threading.Event) -> None:
        """See how many rows there are, and whether each has what the log had before."""
        model = self.desk.Balance
        query = sa.select(sa.func.count(), sa.func.min(model.amount)).select_from(model)
        while not stop.wait(0.1):
            with self.desk.context():
                count, least = self.desk.session.execute(query).one()
            self.seen.add((count, least >= self._least))

    def write(self, stop: threading.Event) -> None:
        """Pay in."""
        while not stop.wait(0.05):
            self.desk.deposit(self.ids[self.written % ACCOUNTS], 1)
            self.written += 1

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Run them."""
        self._least = min(self.desk.amounts().values())
        stop = threading.Event()
        threads = [threading.Thread(target=each, args=(stop,)) for each in (self.read, self.write)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def rates(marks: list[tuple[int, float, int]]) -> list[float]:
    """Return the events for each second of the processor, by part."""
    return [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(marks) if b[1] > a[1] and b[0] > a[0]]


def rebuild_long_log(uri: str, events: int) -> dict[str, object]:
    """Rebuild in a process of its own, beside readers and a writer; return its figures."""
    desk = make_desk(uri, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 10})
    desk.balances()
    ids = fill(desk, events)
    desk.run_once()
    beside = Beside(desk, ids)
    command = [sys.executable, "-m", "tests.torture.test_long_rebuild", uri, str(events)]
    with beside.at_work(), desk.running():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    desk.run_once()
    assert beside.seen == {(ACCOUNTS, True)}
    assert beside.written > 0
    with desk.context() as bank:
        for account_id in ids[:: ACCOUNTS // 20]:
            assert desk.amounts()[account_id] == bank.account(account_id).balance
    desk.close()
    return found


def check_memory(found: dict[str, object], events: int) -> None:
    """Check that the memory has stayed as it was after the first part."""
    marks: list[tuple[int, float, int]] = found["marks"]  # type: ignore[assignment]
    assert int(str(found["events"])) >= events
    # The caches of the libraries are filled by the first part.
    grown = max(rss for _, _, rss in marks[1:]) - marks[1][2]
    assert grown < MOST, [rss // MEGABYTE for _, _, rss in marks]


def check_speed(found: dict[str, object]) -> None:
    """Check that the last parts have not taken more of the processor than the first."""
    marks: list[tuple[int, float, int]] = found["marks"]  # type: ignore[assignment]
    speeds = rates(marks[1:])
    third = max(1, len(speeds) // 3)
    assert sum(speeds[-third:]) > sum(speeds[:third]) / 2, speeds


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"])
def test_a_long_log(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A rebuild's memory does not grow with the log; readers see whole tables, and writers go on."""
    check_memory(rebuild_long_log(address(database, request, tmp_path), 12_000), 12_000)


@pytest.mark.torture
@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"])
def test_a_million_events(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same with a million events, the last of which take no more of the processor than the first."""
    found = rebuild_long_log(address(database, request, tmp_path), 1_000_000)
    print(json.dumps(found))  # noqa: T201
    check_memory(found, 1_000_000)
    check_speed(found)


def address(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of an empty database."""
    if database == "sqlite":
        return f"sqlite:///{tmp_path / 'bank.db'}"
    url: str = request.getfixturevalue("mariadb_url" if database == "mariadb" else "postgres_url")
    return url


if __name__ == "__main__":
    rebuild_in_this_process(sys.argv[1], int(sys.argv[2]))
