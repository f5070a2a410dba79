"""Starts web servers, sends them requests, and asks the database's server which process has used which connection."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import sqlalchemy as sa

from tests.bank import Site, make_site
from tests.domain import until
from tests.servers import ServerFolder, free_port, postgres_database, require, start_postgres

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SETTINGS = "log_statement = 'all'\nlog_line_prefix = '%p %d '\n"
MARK = re.compile(r"/\* process=(\d+) \*/")
GRACEFUL = ["--die-on-term", "--hook-master-start", "unix_signal:15 gracefully_kill_them_all"]
UWSGI: dict[str, list[str]] = {
    "prefork": ["--processes", "3"],
    "prefork-threads": ["--processes", "2", "--threads", "4", "--enable-threads"],
    "prefork-four": ["--processes", "4", "--threads", "2", "--enable-threads"],
    "lazy-apps": ["--processes", "3", "--lazy-apps"],
    "lazy-apps-threads": ["--processes", "2", "--threads", "4", "--enable-threads", "--lazy-apps"],
    "gevent": ["--processes", "2", "--gevent", "50", "--gevent-early-monkey-patch"],
    "gevent-lazy-apps": ["--processes", "2", "--gevent", "50", "--gevent-early-monkey-patch", "--lazy-apps"],
}
GUNICORN: dict[str, list[str]] = {
    "sync": ["--workers", "3", "--worker-class", "sync"],
    "gthread": ["--workers", "2", "--worker-class", "gthread", "--threads", "4"],
    "gthread-four": ["--workers", "4", "--worker-class", "gthread", "--threads", "2"],
    "gevent": ["--workers", "2", "--worker-class", "gevent"],
}


@dataclass
class Database:
    """A database of its own whose server logs every statement."""

    url: str
    log: Path
    site: Site = field(init=False)

    def __post_init__(self) -> None:
        self.site = make_site(self.url)

    def opened(self, count: int) -> list[UUID]:
        """Open accounts."""
        return [self.site.opened() for _ in range(count)]

    def balances(self, accounts: Sequence[UUID]) -> list[int | None]:
        """Read what is in accounts."""
        return [self.site.balance(account) for account in accounts]

    def names(self) -> tuple[set[str], set[str]]:
        """Return the owners of the accounts, and the texts of the notes."""
        with self.site.app.app_context():
            states = self.site.db.session.scalars(sa.select(self.site.es.StoredEvent.state)).all()
            notes = set(self.site.db.session.scalars(sa.select(self.site.Note.text)).all())
        return {found["owner"] for state in states if "owner" in (found := json.loads(bytes(state)))}, notes

    def activity(self) -> dict[int, set[int]]:
        """Return the marks of processes by connection, as ``pg_stat_activity`` shows them now."""
        found: dict[int, set[int]] = defaultdict(set)
        with self.site.app.app_context():
            rows = self.site.db.session.execute(
                sa.text("SELECT pid, query FROM pg_stat_activity WHERE datname = current_database()")
            ).all()
        for pid, query in rows:
            found[pid].update(map(int, MARK.findall(query)))
        return found

    def logged(self) -> dict[int, set[int]]:
        """Return the marks of processes by connection, as the server's log has them."""
        found: dict[int, set[int]] = defaultdict(set)
        prefix = re.compile(rf"(\d+) {sa.make_url(self.url).database} ")
        for line in self.log.read_text(errors="replace").splitlines():
            if (start := prefix.match(line)) and (mark := MARK.search(line)):
                found[int(start[1])].add(int(mark[1]))
        return found


@contextmanager
def logged_database(server_folder: ServerFolder) -> Iterator[Database]:
    """Make a database on a PostgreSQL server that logs every statement with its connection."""
    server = server_folder.shared("postgres-logged", lambda folder: start_postgres(folder, SETTINGS))
    folder = Path(str(sa.make_url(server.url).query["host"]))
    with postgres_database(server.url) as url:
        database = Database(url, folder / "log")
        try:
            yield database
        finally:
            database.site.close()


@dataclass
class Served:
    """A web server that runs."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    closed: Path

    def ask(self, path: str, method: str = "POST", timeout: float = 60) -> dict[str, Any]:
        """Send a request on a connection of its own, and return the answer; anything but 200 is an error."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            return ask(connection, path, method)

    def load(
        self,
        paths: Sequence[str],
        clients: int = 16,
        *,
        keep_alive: bool = False,
        timeout: float = 60,
        patience: float = 300,
    ) -> Answers:
        """Send requests from so many clients, and return what was answered to each and what failed.

        :param patience: seconds after which what was not sent yet has failed.
        """
        answers = Answers()
        left = iter(paths)
        lock = threading.Lock()
        end = time.monotonic() + patience

        def client() -> None:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            while True:
                with lock:
                    path = next(left, None)
                    if path is not None and time.monotonic() > end:
                        answers.failed |= dict.fromkeys([path, *left], "not sent in time")
                        path = None
                if path is None:
                    connection.close()
                    return
                try:
                    answer = ask(connection, path)
                    answers.done[path].append(answer)
                except (HTTPException, OSError, AnswerError) as error:
                    answers.failed[path] = f"{type(error).__name__}: {error}"
                    connection.close()
                if not keep_alive:
                    connection.close()

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def settle(self) -> None:
        """Wait until the server has started whatever it starts, and says no more.

        A worker of uWSGI that still loads the app does not hear that it is to end, and is killed a minute later.
        """
        command = list(map(str, self.process.args)) if isinstance(self.process.args, list) else []
        if "--lazy-apps" in command:
            loading = int(command[command.index("--processes") + 1])
            until(lambda: self.log.read_text(errors="replace").count(" ready in ") >= loading)
        size = -1
        while size != (size := self.log.stat().st_size):
            time.sleep(0.7)

    def end(self, number: int = signal.SIGTERM, patience: float = 60) -> int:
        """Send the server a signal, and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(patience)

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes but the first."""
        return psutil.Process(self.process.pid).children(recursive=True)


@dataclass
class Answers:
    """What requests were answered."""

    done: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> list[dict[str, Any]]:
        """The answers of all requests."""
        return [answer for answers in self.done.values() for answer in answers]

    @property
    def pids(self) -> set[int]:
        """The processes that have answered."""
        return {answer["pid"] for answer in self.all}

    @property
    def backends(self) -> dict[int, set[int]]:
        """The processes by the connection on which they have worked."""
        found: dict[int, set[int]] = defaultdict(set)
        for answer in self.all:
            found[answer["backend"]].add(answer["pid"])
        return found


class AnswerError(Exception):
    """A request was not answered with 200."""


def ask(connection: HTTPConnection, path: str, method: str = "POST") -> dict[str, Any]:
    """Send a request and return the answer."""
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise AnswerError(f"{response.status} {body[:500]!r}")
    answer: dict[str, Any] = json.loads(body)
    return answer


def uwsgi(kind: str, target: str, port: int) -> list[str]:
    """Return the line that starts uWSGI."""
    require(find_spec("uwsgidecorators"), "uWSGI", "pip install 'Flask-EventSourcing[uwsgi]'")
    if "gevent" in kind:
        require(find_spec("gevent"), "gevent", "pip install 'Flask-EventSourcing[gunicorn]'")
    line = [
        str(BIN / "uwsgi"),
        "--http-socket",
        f"127.0.0.1:{port}",
        "--master",
        "--need-app",
        "--die-on-term",
        *GRACEFUL,
    ]
    return [*line, "--disable-logging", *UWSGI[kind], "--module", target]


def gunicorn(kind: str, target: str, port: int, *options: str) -> list[str]:
    """Return the line that starts gunicorn."""
    require(find_spec("gunicorn"), "gunicorn", "pip install 'Flask-EventSourcing[gunicorn]'")
    return [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", *GUNICORN[kind], *options, target]


@contextmanager
def serving(
    line: Callable[[int], list[str]], folder: Path, database: Database | None = None, **variables: str
) -> Iterator[Served]:
    """Run a web server until the end of the block."""
    port = free_port()
    closed, log = folder / "closed", folder / "log"
    closed.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "CLOSED": str(closed),
        "CONSTRUCTED": str(folder / "constructed"),
        "IMPORTED": "used",
        # Newer versions of gunicorn put a control socket there, and otherwise into the user's home.
        "XDG_RUNTIME_DIR": str(folder),
        "DATABASE_URL": database.url if database else "",
        **variables,
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            line(port), cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    served = Served(process, port, log, closed)
    try:
        _wait_for(served)
        yield served
    finally:
        # Its session has no other processes than those that it started.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def _wait_for(served: Served) -> None:
    deadline = time.monotonic() + 60
    while served.process.poll() is None and time.monotonic() < deadline:
        try:
            # A page, or a failure that a test is about, is an answer too.
            with suppress(AnswerError, ValueError):
                served.ask("/", "GET", timeout=10)
            return
        except (OSError, HTTPException):
            time.sleep(0.05)
    raise RuntimeError(f"{served.process.args!r} does not answer:\n{served.log.read_text(errors='replace')[-4000:]}")


def shared(*found: dict[int, set[int]]) -> dict[int, set[int]]:
    """Return the connections that more than one process has used."""
    return {backend: pids for each in found for backend, pids in each.items() if len(pids) > 1}


def check(served: Served, database: Database, count: int = 800) -> Answers:
    """Send requests from 16 clients and check what the promise of one application in every process comes to."""
    accounts = database.opened(16)
    seen: list[dict[int, set[int]]] = []
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.02):
            seen.append(database.activity())

    watcher = threading.Thread(target=watch)
    watcher.start()
    paths = [f"/deposit/{accounts[number % 16]}" for number in range(count)]
    try:
        answers = served.load(paths)
    finally:
        finished.set()
        watcher.join()
    log = served.log.read_text(errors="replace")
    assert answers.failed == {}, log[-3000:]
    assert len(answers.all) == count
    assert {(answer["constructed"], answer["made_in"] == answer["pid"]) for answer in answers.all} == {(1, True)}
    over_time: dict[int, set[int]] = defaultdict(set)
    for each in seen:
        for backend, pids in each.items():
            over_time[backend] |= pids
    logged = database.logged()
    # That the marks are found at all is what makes it a check.
    assert set(answers.backends) <= set(logged)
    assert set(answers.backends) & {backend for backend, pids in over_time.items() if pids}
    assert shared(answers.backends, over_time, logged) == {}
    assert database.balances(accounts) == [sum(f"/deposit/{account}" == path for path in paths) for account in accounts]
    assert "never committed" not in database.names()[0]
    return answers
