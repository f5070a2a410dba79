"""Processes that fork while a SQLite file is in use: each commit is stored, or refused with an error.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flask_eventsourcing import InheritedDatabaseError
from flask_eventsourcing.persistence import forks
from tests.bank import Site, make_site
from tests.integration.sqlite_processes import (
    Client,
    Processes,
    first_process,
    look_in_and_leave,
    safe_engine,
)
from tests.length import examples
from tests.unit.test_lifecycle_fork import fork_in_c, in_child

KINDS = (
    *("write", "read", "hold", "release", "open_raw", "close_raw", "dispose", "fork python", "fork c", "look"),
    *("end", "end at once", "write", "write", "fork python", "look"),
)
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3)), min_size=4, max_size=16)
LOST = [("write", 0), ("fork python", 0), ("write", 1), ("dispose", 0), ("look", 0), ("write", 1), ("write", 1)]
"""So commits were lost."""


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """The process from which the others are forked."""
    with first_process() as made:
        yield made


@dataclass
class Model:
    """What a process has open, as far as it matters for those that it forks."""

    client: Client
    held: bool = False
    raw: bool = False
    idle: bool = False
    refuses: bool = False

    def forked(self, client: Client, how: str) -> Model:
        """Return the model of a process that is forked from this one."""
        open_at_fork = self.held or self.raw or (self.idle and how == "c")
        if how == "python":
            self.idle = False
        return Model(client, refuses=self.refuses or open_at_fork)

    def done(self, command: str) -> None:
        """Note what is open now."""
        if command == "hold":
            self.held = True
        elif command == "release":
            self.idle |= self.held
            self.held = False
        elif command in ("open_raw", "close_raw"):
            self.raw = command == "open_raw"
        elif command == "dispose":
            self.idle = False
        else:
            self.idle = True


@dataclass
class Run:
    """Steps of processes on one file."""

    processes: Processes
    path: str
    living: list[Model] = field(default_factory=list)
    told: list[int] = field(default_factory=list)

    def take(self, kind: str, which: int) -> None:
        """Take a step, and compare the answer with what was to be expected."""
        process = self.living[which % len(self.living)]
        command, _, how = kind.partition(" ")
        if command == "look":
            look_in_and_leave(self.path)
        elif command == "fork":
            self.living.append(process.forked(self.processes.fork(process.client, how), how))
        elif command == "end":
            if len(self.living) > 1:
                self.living.remove(process)
                process.client.end(how)
        elif command == "open_raw" and process.refuses:
            # Of what is opened past the engine nobody knows.
            return
        else:
            self._tell(process, command)

    def _tell(self, process: Model, command: str) -> None:
        number = len(self.told)
        answer = process.client.tell(command, number)
        refuses = process.refuses and command in ("write", "read", "hold")
        assert answer == ("InheritedDatabaseError" if refuses else "done"), (command, process)
        if not refuses:
            process.done(command)
            if command == "write":
                self.told.append(number)


@settings(max_examples=examples(25), deadline=None, database=None)
@given(steps=STEPS, links=st.sampled_from(["file", "symbolic", "relative"]))
@example(steps=LOST, links="file")
@example(
    steps=[("hold", 0), ("fork python", 0), ("read", 1), ("release", 0), ("fork python", 0), ("write", 2)], links="file"
)
@example(steps=[("open_raw", 0), ("fork python", 0), ("write", 1), ("fork python", 1), ("read", 2)], links="symbolic")
def test_what_was_told_is_stored(processes: Processes, steps: list[tuple[str, int]], links: str) -> None:
    """Whatever is open when processes fork, each commit that returned is stored, and what could be lost is refused.

    A process that inherits nothing open is not refused.
    """
    with TemporaryDirectory() as folder:
        real = path = f"{folder}/numbers.db"
        if links == "symbolic":
            path = f"{folder}/link.db"
            Path(path).symlink_to(real)
        elif links == "relative":
            path = os.path.relpath(real, Path(__file__).parents[2])
        with closing(sqlite3.connect(real)) as connection:
            connection.execute("CREATE TABLE number (value INTEGER)").close()
        run = Run(processes, real, [Model(processes.fork(processes.first, "python"))])
        assert run.living[0].client.tell("open", path) == "done"
        try:
            for kind, which in steps:
                run.take(kind, which)
        finally:
            for process in run.living:
                process.client.end("normally")
        with (
            closing(sqlite3.connect(real)) as connection,
            closing(connection.execute("SELECT value FROM number")) as rows,
        ):
            assert sorted(value for (value,) in rows) == run.told


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site on a SQLite file that was used before."""
    made = make_site(f"sqlite:///{tmp_path / 'bank.db'}", EVENTSOURCING_LOCK_TIMEOUT=20)
    made.opened()
    yield made
    made.close()


def test_a_session_in_use_is_named_and_its_parent_goes_on(site: Site, tmp_path: Path) -> None:
    """A process forked inside of a transaction refuses the file, for reading too, and the transaction is committed."""
    with site.app.app_context():
        site.bank.open_account()

        def child() -> list[str]:
            found = [site.opened_or_refused()]
            try:
                with site.app.app_context():
                    site.db.session.scalar(sa.text("SELECT 1"))
            except InheritedDatabaseError as error:
                found.append(str(error))
            return found

        for text in in_child(child):
            assert f"{tmp_path / 'bank.db'} was open when this process was forked" in text
            assert "db.session.remove()" in text
        site.db.session.commit()
    assert site.stored()[0] == 2
    # With nothing in use, the next one is not refused.
    assert in_child(site.opened_or_refused) == "opened"
    assert site.stored()[0] == 3


KEEP_OPEN = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("SELECT count(*) FROM bank_events").fetchall()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["bank.db", "bank.db-wal", "bank.db-shm", "hard-link.db", "symlink.db"])
def test_any_descriptor_of_the_file_counts(site: Site, tmp_path: Path, name: str) -> None:
    """A file that the user has opened without the package counts too, until it is closed, by each of its names."""
    os.link(tmp_path / "bank.db", tmp_path / "hard-link.db")
    (tmp_path / "symlink.db").symlink_to("bank.db")
    # Another program keeps the log from being taken away with the last connection.
    command = [sys.executable, "-c", KEEP_OPEN, str(tmp_path / "bank.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        descriptor = os.open(tmp_path / name, os.O_RDONLY)

        def child() -> list[Any]:
            refused = site.opened_or_refused()
            os.close(descriptor)
            return [refused, site.opened_or_refused()]

        refused, then = in_child(child)
        assert f"(as descriptor {descriptor})" in refused
        assert then == "opened"
        os.close(descriptor)
        assert in_child(site.opened_or_refused) == "opened"
        other.communicate()


def test_files_are_told_apart(site: Site, tmp_path: Path) -> None:
    """Another file that is open, an in-memory database, and what the child opens itself are no reason to refuse."""
    memory = make_site("sqlite://")
    account_id = memory.opened()
    with closing(sqlite3.connect(tmp_path / "other.db")) as other, memory.app.app_context():
        other.execute("CREATE TABLE a (b)").close()
        memory.db.session.scalar(sa.text("SELECT 1"))

        def child() -> list[Any]:
            with closing(sqlite3.connect(tmp_path / "bank.db")) as own:
                own.execute("SELECT count(*) FROM bank_events").close()
                return [site.opened_or_refused(), site.opened_or_refused(), memory.balance(account_id)]

        assert in_child(child) == ["opened", "opened", 0]
        memory.db.session.rollback()
    memory.close()


def test_a_fork_in_c_refuses_what_is_idle(site: Site) -> None:
    """Where no hook of Python runs, a process refuses the file while its parent's pool has it open, and not after."""
    assert "was open" in in_child(site.opened_or_refused, fork=fork_in_c)
    with site.app.app_context():
        site.db.engine.dispose()
    assert in_child(site.opened_or_refused, fork=fork_in_c) == "opened"


@pytest.mark.parametrize("which", ["another bind", "static"])
def test_other_engines(which: str, tmp_path: Path) -> None:
    """It holds for an engine without events, and a pool of one connection for all is never closed, but refused."""
    path = str(tmp_path / "numbers.db")
    if which == "static":
        engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.pool.StaticPool)
    else:
        engine = sa.create_engine(f"sqlite:///{path}")
        # In the pool before anybody knows of it.
        engine.connect().close()
    forks.drop_inherited_connections(engine)
    with engine.connect() as connection:
        before = connection.connection.driver_connection
        connection.exec_driver_sql("CREATE TABLE number (value INTEGER)")

    def child() -> str:
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql("INSERT INTO number (value) VALUES (1)")
        except InheritedDatabaseError:
            return "refused"
        return "done"

    assert in_child(child) == ("refused" if which == "static" else "done")
    with engine.connect() as connection:
        assert (connection.connection.driver_connection is before) == (which == "static")
    engine.dispose()


def test_threads_that_write_while_another_forks(tmp_path: Path) -> None:
    """A process forked while other threads write can write, by ``os.fork`` and by ``multiprocessing`` in a thread.

    On a machine so busy that a transaction takes seconds, it may be refused.
    """
    engine = safe_engine(str(tmp_path / "numbers.db"))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE number (value INTEGER)")
    over = threading.Event()
    told: list[int] = []

    def insert(number: int) -> str:
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql("INSERT INTO number (value) VALUES (?)", (number,))
        except InheritedDatabaseError:
            return "refused"
        return "done"

    def write(first: int) -> None:
        number = first
        while not over.is_set():
            insert(number)
            told.append(number)
            number += 10
            time.sleep(0.001)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    try:
        answers = {number: in_child(partial(insert, number), 120) for number in range(-15, 0)}
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(insert(-100) == "refused"))
        starter = threading.Thread(target=process.start)
        starter.start()
        starter.join(120)
        process.join(120)
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert set(answers.values()) <= {"done", "refused"}
    assert list(answers.values()).count("done") > 5
    if process.exitcode == 0:
        answers[-100] = "done"
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT value FROM number").scalars().all()
    assert sorted(found) == sorted([*told, *(number for number, answer in answers.items() if answer == "done")])
    engine.dispose()


def test_a_fork_waits_for_a_long_transaction_only_for_a_moment(site: Site) -> None:
    """A fork beside a thread with a long transaction goes on, and the child refuses the file at once."""
    begun, over = threading.Event(), threading.Event()

    def long() -> None:
        with site.app.app_context():
            site.bank.open_account()
            begun.set()
            over.wait(120)
            site.db.session.commit()

    thread = threading.Thread(target=long)
    thread.start()
    assert begun.wait(120)
    try:
        assert "was open" in in_child(site.opened_or_refused)
    finally:
        over.set()
        thread.join(120)
    assert site.stored()[0] == 2


def test_closing_at_a_fork_and_using_race(tmp_path: Path) -> None:
    """A connection that is closed before a fork just when a thread takes it from the pool is replaced."""
    engine = safe_engine(str(tmp_path / "numbers.db"))
    with engine.connect() as connection:
        record: Any = connection.connection._connection_record
    # As a fork does it when the thread is using the connection already.
    assert record.info.pop(forks.IDLE)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE number (value INTEGER)")
    assert in_child(lambda: engine.connect().close()) is None
    engine.dispose()


EXIT = """
import builtins, sys
from tests.bank import make_site
site = make_site(sys.argv[1])
site.opened()
context = site.app.app_context()
context.push()
site.bank.open_account()
# What is here is collected when the names of modules are gone.
builtins.kept = [site.db.session(), site.db.engine.connect()]
builtins.kept.append(builtins.kept)
"""


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_the_end_of_the_interpreter(kind: str, tmp_path: Path) -> None:
    """A program that ends with connections in use ends without a message."""
    url = "sqlite://" if kind == "memory" else f"sqlite:///{tmp_path / 'bank.db'}"
    done = subprocess.run(
        [sys.executable, "-c", EXIT, url],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("fork", [os.fork, fork_in_c], ids=["python", "c"])
def test_a_child_that_only_ends_leaves_the_log_alone(site: Site, tmp_path: Path, fork: Callable[[], int]) -> None:
    """The end of a process that did nothing does not remove its parent's write-ahead log."""
    with site.app.app_context(), site.db.engine.connect() as held:
        held.exec_driver_sql("SELECT count(*) FROM bank_events").scalar()
        in_child(site.db.engine.dispose, fork=fork)
        assert (tmp_path / "bank.db-wal").exists()
    site.opened()
    assert site.stored()[0] == 2
