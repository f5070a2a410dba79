"""Processes that open, close, fork and write one SQLite file as they are told, each over a socket of its own.

``python -m tests.integration.sqlite_processes <folder>`` is the first of them. It never opens a file, so that what is
forked from it is as good as a program of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sqlalchemy as sa

from flask_eventsourcing.lifecycle import keep_for_ever
from flask_eventsourcing.persistence import DialectOptions
from flask_eventsourcing.persistence.dialects.sqlite import SQLiteDialect
from flask_eventsourcing.persistence.forks import drop_inherited_connections, leave_inherited_connections
from tests.unit.test_lifecycle_fork import fork_in_c

PATIENCE = 120
INSERT, SELECT = "INSERT INTO number (value) VALUES (?)", "SELECT count(*) FROM number"


def safe_engine(path: str) -> sa.Engine:
    """Make an engine as the extension prepares it."""
    engine = sa.create_engine(f"sqlite:///{path}")
    SQLiteDialect(engine, DialectOptions(lock_timeout=20)).prepare_engine()
    drop_inherited_connections(engine)
    return engine


class Process:
    """What one of the processes has open, and what it does when it is told so."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.begin()

    def begin(self) -> None:
        """Begin with nothing of the parent's but the engine."""
        self.held: list[Any] = []
        self.raw: list[sqlite3.Connection] = []
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(self.address)
        self.lines = self.socket.makefile("r")

    def serve(self) -> None:
        """Do what is told, to the end."""
        while line := self.lines.readline():
            command, argument = json.loads(line)
            if command == "end":
                if argument == "at once":
                    os._exit(0)
                return
            try:
                result = getattr(self, command)(argument)
            except Exception as error:  # noqa: BLE001  # told to the test
                result = type(error).__name__
            self.socket.sendall(json.dumps(result).encode() + b"\n")

    def open(self, path: str) -> str:
        """Make the engine."""
        self.path = path
        self.engine = safe_engine(path)
        return "done"

    def write(self, number: int) -> str:
        """Write a number, and commit it."""
        with self.engine.begin() as connection:
            connection.exec_driver_sql(INSERT, (number,))
        return "done"

    def read(self, _: Any) -> str:
        """Read in a session that is closed."""
        with self.engine.connect() as connection:
            connection.exec_driver_sql(SELECT).scalar()
        return "done"

    def hold(self, _: Any) -> str:
        """Read, and keep the connection in use."""
        connection = self.engine.connect()
        connection.exec_driver_sql(SELECT).scalar()
        self.held.append(connection)
        return "done"

    def release(self, _: Any) -> str:
        """Give back what is in use."""
        while self.held:
            self.held.pop().close()
        return "done"

    def open_raw(self, _: Any) -> str:
        """Open the file past SQLAlchemy."""
        connection = sqlite3.connect(self.path)
        with closing(connection.execute(SELECT)) as cursor:
            cursor.fetchall()
        self.raw.append(connection)
        return "done"

    def close_raw(self, _: Any) -> str:
        """Close what was opened past SQLAlchemy."""
        while self.raw:
            self.raw.pop().close()
        return "done"

    def dispose(self, _: Any) -> str:
        """Close the pool."""
        self.engine.dispose()
        return "done"

    def fork(self, how: str) -> int:
        """Fork a process that is told what to do over a socket of its own; returns its id."""
        child = fork_in_c() if how == "c" else os.fork()
        if child == 0:
            if how == "c":
                leave_inherited_connections()
            for each in (self.held, self.raw, self.socket, self.lines):
                keep_for_ever(each)
            # The parent's end is to be seen by who tells it what to do.
            os.close(self.socket.fileno())
            self.begin()
            return os.getpid()
        return child


class Client:
    """Tells one process what to do."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.lines = connection.makefile("r")

    def tell(self, command: str, argument: Any = None) -> Any:
        """Tell it, and return its answer."""
        self.socket.sendall(json.dumps([command, argument]).encode() + b"\n")
        return json.loads(self.lines.readline())

    def end(self, how: str) -> None:
        """Tell it to end, and wait until it has."""
        self.socket.sendall(json.dumps(["end", how]).encode() + b"\n")
        self.lines.readline()
        self.close()

    def close(self) -> None:
        """Close the connection to it."""
        self.lines.close()
        self.socket.close()


class Processes:
    """The processes of a test."""

    def __init__(self, listener: socket.socket, first: Client) -> None:
        self.listener = listener
        self.first = first

    def fork(self, parent: Client, how: str) -> Client:
        """Fork a process, and return what tells it what to do."""
        pid = parent.tell("fork", how)
        child = accept(self.listener)
        assert json.loads(child.lines.readline()) == pid
        return child


def accept(listener: socket.socket) -> Client:
    """Wait for a process that connects."""
    connection, _ = listener.accept()
    connection.settimeout(PATIENCE)
    return Client(connection)


@contextmanager
def first_process() -> Iterator[Processes]:
    """Start the first process, and end it."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen()
        listener.settimeout(PATIENCE)
        command = [sys.executable, "-m", "tests.integration.sqlite_processes", address]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as program:
            first = accept(listener)
            try:
                yield Processes(listener, first)
            finally:
                first.close()
                program.wait(PATIENCE)


def look_in_and_leave(path: str) -> int:
    """Open and close the file as another program does; returns how many numbers it saw."""
    with closing(sqlite3.connect(path, timeout=20)) as connection, closing(connection.execute(SELECT)) as cursor:
        found: int = cursor.fetchone()[0]
    return found


if __name__ == "__main__":
    # Its children are waited for by nobody.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    Process(sys.argv[1]).serve()
