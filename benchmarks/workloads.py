"""What is measured: each workload opens a contender on a database and returns a rate."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import sqlalchemy as sa

from .contenders import Contender, Worker
from .databases import Database
from .domain import LENGTH, new_events, originator
from .log import read_log
from .memory import growth

logger = logging.getLogger(__name__)

HOLD = 0.005
"""Seconds between save and commit."""
WARM_UP = 8
"""Commits of each thread before it is measured; psycopg prepares a statement when it comes the sixth time."""


@dataclass(frozen=True)
class Settings:
    """How long is measured, and on how much data."""

    seconds: float = 1.0
    small: int = 10_000
    log: int = 100_000
    memory: int = 1_000_000


@dataclass(frozen=True)
class Measurement:
    """What was measured once: a rate, or a size, and how many units failed."""

    value: float
    failures: int = 0


class Workload(ABC):
    """Something that contenders do in turn."""

    unit = "events/s"
    most_rounds: int | None = None
    """How often at most it is measured."""

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title

    def suits(self, contender: type[Contender]) -> bool:
        """Whether a contender can do it."""
        return True

    @abstractmethod
    def run(self, database: Database, contender: type[Contender], settings: Settings) -> Measurement:
        """Measure once."""


class Commit(Workload):
    """One writer commits *size* events at a time."""

    def __init__(self, name: str, title: str, size: int) -> None:
        super().__init__(name, title)
        self._size = size

    def run(self, database: Database, contender: type[Contender], settings: Settings) -> Measurement:
        """Measure on a fresh copy of the filled tables."""
        with database.copy(contender, settings.small) as url, _opened(contender, url) as (_, worker):

            def commit() -> int:
                worker.insert(new_events(self._size))
                worker.commit()
                return self._size

            return Measurement(_rate(commit, settings.seconds))


class Read(Workload):
    """One reader reads, or rebuilds, an aggregate of 100 events at a time."""

    unit = "aggregates/s"

    def __init__(self, name: str, title: str, *, rebuild: bool) -> None:
        super().__init__(name, title)
        self._rebuild = rebuild

    def suits(self, contender: type[Contender]) -> bool:
        """A driver does not rebuild."""
        return contender.rebuilds or not self._rebuild

    def run(self, database: Database, contender: type[Contender], settings: Settings) -> Measurement:
        """Measure, checking that each read finds all of the events."""
        numbers = random.Random(1)
        accounts = settings.small // LENGTH
        with _opened(contender, database.template(contender, settings.small)) as (_, worker):
            function = worker.rebuild if self._rebuild else worker.read

            def read() -> int:
                found = function(originator(numbers.randrange(accounts)))
                worker.rollback()
                if found != LENGTH:
                    raise RuntimeError(f"{contender.title} found {found} of {LENGTH} events.")
                return 1

            return Measurement(_rate(read, settings.seconds))


class Log(Workload):
    """One reader reads the whole log, page by page."""

    def run(self, database: Database, contender: type[Contender], settings: Settings) -> Measurement:
        """Measure, checking that each pass finds all of the events."""
        with _opened(contender, database.template(contender, settings.log)) as (_, worker):

            def read() -> int:
                found = read_log(worker)
                if found != settings.log:
                    raise RuntimeError(f"{contender.title} found {found} of {settings.log} events in the log.")
                return found

            return Measurement(_rate(read, settings.seconds))


class Concurrent(Workload):
    """Several threads commit one event at a time, each pausing for a time between save and commit."""

    unit = "commits/s"

    def __init__(self, name: str, title: str, threads: int, pause: float) -> None:
        super().__init__(name, title)
        self._threads = threads
        self._pause = pause

    def run(self, database: Database, contender: type[Contender], settings: Settings) -> Measurement:
        """Measure on a fresh copy of the filled tables."""
        with (
            database.copy(contender, settings.small) as url,
            _opened(contender, url, self._threads + 2) as (opened, _),
        ):
            return _Crowd(opened, self._threads, self._pause, settings.seconds).run()


class Memory(Workload):
    """How much memory a process takes that reads a long log to its end, above what it had after the first page."""

    unit = "MiB"
    most_rounds = 2

    def run(self, database: Database, contender: type[Contender], settings: Settings) -> Measurement:
        """Measure in a process of its own."""
        url = database.template(contender, settings.memory)
        return Measurement(growth(contender.name, database.name, url, settings.memory) / 2**20)


class _Crowd:
    """Threads that begin together, once each has its connection and its prepared statements."""

    def __init__(self, contender: Contender, threads: int, pause: float, seconds: float) -> None:
        self._contender = contender
        self._pause = pause
        self._seconds = seconds
        self._barrier = threading.Barrier(threads, self._begin, timeout=120)
        self._until = 0.0
        self._lock = threading.Lock()
        self.commits = 0
        self.failures = 0
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def run(self) -> Measurement:
        """Let them work."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if self._barrier.broken:
            raise RuntimeError(f"The threads of {self._contender.title} did not get ready in time.")
        return Measurement(self.commits / self._seconds, self.failures)

    def _begin(self) -> None:
        self._until = time.perf_counter() + self._seconds

    def _work(self) -> None:
        commits = failures = 0
        with self._contender.worker() as worker:
            for _ in range(WARM_UP):
                self._commit(worker)
            with suppress(threading.BrokenBarrierError):
                self._barrier.wait()
            while time.perf_counter() < self._until:
                done = self._commit(worker)
                failures += not done
                # What is committed too late does not count.
                commits += done and time.perf_counter() < self._until
        with self._lock:
            self.commits += commits
            self.failures += failures

    def _commit(self, worker: Worker) -> bool:
        try:
            worker.insert(new_events(1))
            if self._pause:
                time.sleep(self._pause)
            worker.commit()
        except Exception:  # whatever a contender raises under load is counted
            logger.debug("A unit failed.", exc_info=True)
            worker.rollback()
            return False
        return True


@contextmanager
def _opened(contender: type[Contender], url: sa.URL, connections: int = 2) -> Iterator[tuple[Contender, Worker]]:
    gc.collect()
    opened = contender(url, connections)
    try:
        with opened.worker() as worker:
            yield opened, worker
    finally:
        opened.close()


def _rate(function: Callable[[], int], seconds: float) -> float:
    _repeat(function, seconds / 4)
    count, elapsed = _repeat(function, seconds)
    return count / elapsed


def _repeat(function: Callable[[], int], seconds: float) -> tuple[int, float]:
    count = 0
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not count:
        count += function()
    return count, elapsed


def _concurrent(threads: int, pause: float) -> Concurrent:
    name = f"threads-{threads}" + ("-hold" if pause else "")
    committers = "1 committer" if threads == 1 else f"{threads} committers"
    return Concurrent(name, f"{committers}, {pause * 1000:g} ms before commit", threads, pause)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Commit("commit-1", "commit of 1 event", 1),
        Commit("commit-100", "commit of 100 events", 100),
        Read("read-100", "aggregate of 100 events, records", rebuild=False),
        Read("rebuild-100", "aggregate of 100 events, rebuilt", rebuild=True),
        Log("log", "log of 100,000 events"),
        *(_concurrent(threads, pause) for pause in (0, HOLD) for threads in (1, 4, 16, 32)),
        Memory("memory", "memory for a log of 1,000,000 events"),
    )
}
