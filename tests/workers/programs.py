"""Starts the programs of task queues, and reads what they did."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.servers import Process

ROOT = Path(__file__).parents[2]
PATIENCE = 400.0


@dataclass
class Workspace:
    """Where one test's programs keep their data, and what they need to know."""

    folder: Path
    database: str
    redis: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the programs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASK_", "CELERY_", "RQ_"))}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]),
            "QUEUE_DATABASE": self.database,
            "QUEUE_REDIS": self.redis,
            "QUEUE_LOG": str(self.folder / "happened"),
        }

    def happened(self, what: str) -> list[int]:
        """Return the ids of the processes in which something happened."""
        path = self.folder / "happened"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(pid) for name, pid in (line.rsplit(" ", 1) for line in lines) if name == what]

    def query(self, text: str) -> list[tuple[Any, ...]]:
        """Return what a query finds in the database."""
        engine = sa.create_engine(self.database, poolclass=sa.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(text)]

    def python(self, code: str) -> str:
        """Run a line of Python in the environment of the programs, and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @contextmanager
    def program(self, *command: str, **variables: str) -> Iterator[Program]:
        """Run a program of this Python's environment, ``python -m …``, and end it by its id."""
        log = self.folder / "program.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        program = Program(process, log)
        try:
            yield program
        finally:
            if process.poll() is None:
                Process.of(process.pid).stop(15, patience=30)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)


@dataclass
class Program:
    """A program that runs."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + patience
        while not condition():
            assert self.process.poll() is None, self.output[-6000:]
            assert time.monotonic() < deadline, self.output[-6000:]
            time.sleep(0.05)

    def end(self, patience: float = 60) -> None:
        """Ask it to end, and see that it does."""
        self.process.terminate()
        assert self.process.wait(patience) in {0, -15}, self.output[-6000:]


def expected_work(numbers: range) -> tuple[set[str], Counter[int]]:
    """Return what is stored in the end: the rows' texts, and how many deposits each shared account has."""
    good = [number for number in numbers if number % 10]
    return {f"task {number}" for number in good}, Counter(number % 5 for number in good)
