"""Forks of SQLite: a process whose threads write forks children that write, while another program opens and closes."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from flask_eventsourcing import InheritedDatabaseError
from tests.integration.sqlite_processes import INSERT, safe_engine

LOOK_IN = """
import sqlite3, sys, time
while True:
    connection = sqlite3.connect(sys.argv[1], timeout=60)
    connection.execute("SELECT count(*) FROM number").fetchall()
    connection.close()
    time.sleep(0.003)
"""
THREADS, WRITES, PATIENCE = 2, 8, 300


@dataclass
class ForkingWriters:
    """Writers that fork, and what happened; what processes tell is a line in a file of their own."""

    folder: Path
    engine: sa.Engine = field(init=False)
    over: threading.Event = field(default_factory=threading.Event)
    told: list[int] = field(default_factory=list)
    children: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        self.path = self.folder / "numbers.db"
        self.engine = safe_engine(str(self.path))
        with self.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE number (value INTEGER)")

    def write(self, first: int) -> None:
        """Write in a thread of the parent; now and then close the pool, or keep a session open for a while."""
        chance = random.Random(first)
        number = first
        while not self.over.is_set():
            with self.engine.begin() as connection:
                connection.exec_driver_sql(INSERT, (number,))
            self.told.append(number)
            number += THREADS
            if chance.random() < 0.1:
                self.engine.dispose()
            elif chance.random() < 0.02:
                with self.engine.connect() as connection:
                    connection.exec_driver_sql("SELECT count(*) FROM number").scalar()
                    time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.01))

    def child(self, number: int) -> None:
        """Write numbers, and tell each after its commit."""
        with (self.folder / f"told {number}").open("w") as file:
            try:
                for each in range(WRITES):
                    with self.engine.begin() as connection:
                        connection.exec_driver_sql(INSERT, (-number * WRITES - each,))
                    print(-number * WRITES - each, file=file, flush=True)
                    time.sleep(random.uniform(0, 0.03))
                    if each == WRITES // 2:
                        self.engine.dispose()
            except InheritedDatabaseError:
                print("refused", file=file, flush=True)

    def fork(self) -> int:
        """Fork a child, and return its process id."""
        self.children += 1
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            self.child(self.children)
            status = 0
        finally:
            os._exit(status)

    def run(self, seconds: float) -> None:
        """Let it loose."""
        threads = [threading.Thread(target=self.write, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        killed: set[int] = set()
        living: list[int] = []
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end or self.children < 5:
                living.append(self.fork())
                time.sleep(random.uniform(0, 0.05))
                if random.random() < 0.1:
                    os.kill(living[-1], signal.SIGKILL)
                    killed.add(living[-1])
                if len(living) > 6:
                    self.reap(living.pop(0), killed)
        finally:
            self.over.set()
            for thread in threads:
                thread.join(PATIENCE)
            for child in living:
                self.reap(child, killed)
        self.engine.dispose()

    @staticmethod
    def reap(child: int, killed: set[int]) -> None:
        """Wait for a child, which must not hang."""
        killer = threading.Timer(PATIENCE, os.kill, (child, signal.SIGABRT))
        killer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killer.cancel()
        assert status == 0 or (child in killed and status == -signal.SIGKILL), f"a child hung or failed: {status}"

    def check(self) -> None:
        """See that all that was told is stored, and little else: what a killed process had no time to tell."""
        told = set(self.told)
        for path in self.folder.glob("told *"):
            lines = path.read_text().split()
            self.refused += "refused" in lines
            told |= {int(line) for line in lines if line != "refused"}
        with closing(sqlite3.connect(self.path)) as connection:
            with closing(connection.execute("SELECT value FROM number")) as rows:
                stored = [value for (value,) in rows]
            with closing(connection.execute("PRAGMA integrity_check")) as rows:
                assert rows.fetchall() == [("ok",)]
        assert sorted(told - set(stored)) == []
        assert len(stored) == len(set(stored))
        assert len(set(stored) - told) <= self.children * 0.5


def run_and_check(folder: Path, seconds: float) -> ForkingWriters:
    """Let writers fork for a while, and check what is stored."""
    made = ForkingWriters(folder)
    command = [sys.executable, "-c", LOOK_IN, str(made.path)]
    with subprocess.Popen(command) as other:
        try:
            made.run(seconds)
        finally:
            other.terminate()
    made.check()
    return made


def test_no_commit_of_a_forked_process_is_lost(tmp_path: Path) -> None:
    """What parent and children were told to be committed is stored, whatever forks, closes and is killed meanwhile."""
    run_and_check(tmp_path, 3)


@pytest.mark.torture
def test_no_commit_of_a_forked_process_is_lost_in_a_minute(tmp_path: Path) -> None:
    """The same for a minute, in which few children are refused."""
    made = run_and_check(tmp_path, 60)
    assert made.children > 100
    assert made.refused < made.children / 4
