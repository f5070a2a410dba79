"""Measures projections: how fast they catch up, and how long after a commit it can be read in the read model.

``python -m benchmarks.projections`` starts the servers that it needs. The library's own runner is measured beside this
package on PostgreSQL; on SQLite and MariaDB it has no subscription.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.runners import Progress, Runner
from flask_eventsourcing.projections.workers import Worker

from .contenders import flask_app
from .databases import DATABASES, Database
from .domain import Account, Bench, originator, states

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
HEADING = "## Projections\n"
ACCOUNTS = (100, 1_000, 10_000)
BLOCK = 1_000
COMMITS = 200
"""Commits per second while the latency is measured."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    events: int = 200_000
    library: int = 5_000
    """Events for the library's runner, whose rate does not depend on how many there are."""
    seconds: float = 10.0
    rounds: int = 3


@dataclass
class Figures:
    """What was measured on one database, round by round."""

    version: str
    rates: dict[int, list[float]] = field(default_factory=dict)
    """This package's events per second by the number of accounts."""
    library: dict[int, list[float]] = field(default_factory=dict)
    medians: list[float] = field(default_factory=list)
    """Milliseconds from the commit of an event to that of the read model."""
    tails: list[float] = field(default_factory=list)
    """The 95th percentile."""


@dataclass
class Books:
    """An app with a projection that keeps the balance of each account."""

    app: Flask
    db: SQLAlchemy
    es: EventSourcing
    Balance: Any

    def worker(self, *, once: bool) -> Worker:
        """Return what runs it."""
        return Worker(self.app.extensions["eventsourcing"].projections.runnable(), once=once)

    def close(self) -> None:
        """Close every connection."""
        self.es.close(self.app)


def open_books(url: sa.URL) -> Books:
    """Make the app and its tables."""
    app = flask_app(url, 5)
    db = SQLAlchemy()
    base: Any = db.Model
    body = {
        "__tablename__": "balances",
        "account_id": orm.mapped_column(sa.Uuid(), primary_key=True),
        "amount": orm.mapped_column(sa.BigInteger, nullable=False),
    }
    balance: Any = type(base)("Balance", (base,), body)
    es = EventSourcing(db=db, application=Bench)

    @es.projection
    class Balances(ModelProjection):
        models = (balance,)

        @on(Account.Opened)  # type: ignore[attr-defined]
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(balance(account_id=event.originator_id, amount=0))

        @on(Account.Moved)  # type: ignore[attr-defined]
        def moved(self, event: Any, session: orm.Session) -> None:
            session.get_one(balance, event.originator_id).amount += event.amount

    db.init_app(app)
    es.init_app(app)
    with app.app_context():
        db.create_all()
    return Books(app, db, es, balance)


def events_of(count: int, accounts: int) -> Iterator[list[StoredEvent]]:
    """Make blocks of events in which the accounts take turns, so that a batch touches as many as it can."""
    made = states()
    block: list[StoredEvent] = []
    for number in range(count):
        round_number, account = divmod(number, accounts)
        topic, state = made[min(round_number, len(made) - 1)]
        block.append(StoredEvent(originator(account), round_number + 1, topic, state))
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def fill(recorder: Any, count: int, accounts: int) -> None:
    """Append events."""
    for block in events_of(count, accounts):
        recorder.insert_events(block)


def catch_up(url: sa.URL, count: int, accounts: int) -> float:
    """Return the events per second at which this package's projection catches up."""
    books = open_books(url)
    try:
        with books.app.app_context():
            application = books.es.application
        fill(application.recorder, count, accounts)
        begin = time.perf_counter()
        errors = books.worker(once=True).run(period=0.02)
        elapsed = time.perf_counter() - begin
        with books.app.app_context():
            found = books.db.session.scalar(sa.select(sa.func.count()).select_from(books.Balance))
        if errors or found != min(accounts, count):
            raise RuntimeError(f"The projection has {found} of {accounts} accounts: {errors}")
    finally:
        books.close()
    return count / elapsed


def catch_up_library(url: sa.URL, count: int, accounts: int) -> float:
    """Return the events per second of the library's runner, with a view that does the same upsert."""
    from .library_view import BalancesProjection, BalancesView, ProjectionRunner, environment

    env = environment(url)
    application = Bench(env=env)
    fill(application.recorder, count, accounts)
    application.close()
    begin = time.perf_counter()
    with ProjectionRunner(
        application_class=Bench, projection_class=BalancesProjection, view_class=BalancesView, env=env
    ) as runner:
        while (runner.view.max_tracking_id(Bench.name) or 0) < count:
            time.sleep(0.02)
        return count / (time.perf_counter() - begin)


class _Watched(Progress):
    """Notes when each position was committed."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "position":
            vars(self).setdefault("moved", []).append((time.time(), value))


def latency(url: sa.URL, seconds: float) -> list[float]:
    """Return the milliseconds from each commit of a writer in another process to that of the read model."""
    books = open_books(url)
    stop = threading.Event()
    (consumer,) = books.app.extensions["eventsourcing"].projections.runnable()
    runner = Runner(consumer, stop)
    runner.progress = watched = _Watched()
    moves: list[tuple[float, int]] = vars(watched)["moved"]
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        command = [sys.executable, "-m", "benchmarks.projections", "--write", url.render_as_string(False), str(seconds)]
        written = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        commits = [(float(at), int(position)) for at, position in map(str.split, written.stdout.splitlines())]
        deadline = time.monotonic() + 30
        while moves[-1][1] < commits[-1][1] and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
        books.close()
    moved = iter(moves)
    visible, reached = next(moved)
    found = []
    for committed, position in commits[COMMITS:]:
        while reached < position:
            visible, reached = next(moved)
        # The read model may be there before the writer hears of its own commit.
        found.append(max(0.0, visible - committed) * 1000)
    return found


def write(url: sa.URL, seconds: float) -> None:
    """Commit at a steady rate, and print when each position was committed."""
    books = open_books(url)
    lines = []
    with books.app.app_context():
        accounts = [Account("Ada") for _ in range(100)]
        books.es.application.save(*accounts)
        books.db.session.commit()
        begin = time.time()
        for number in range(int(seconds * COMMITS) + COMMITS):
            time.sleep(max(0.0, begin + number / COMMITS - time.time()))
            account = accounts[number % len(accounts)]
            account.move(1, "EUR", "reference", "purpose")
            recordings = books.es.application.save(account)
            books.db.session.commit()
            lines.append(f"{time.time()} {recordings[-1].notification.id}")
    books.close()
    sys.stdout.write("\n".join(lines) + "\n")


def measure(database: Database, settings: Settings) -> Figures:
    """Measure in rounds, in each of which this package and the library take turns."""
    figures = Figures(database.version())
    for round_number in range(settings.rounds):
        for accounts in ACCOUNTS:
            with fresh(database) as url:
                rate = catch_up(url, settings.events, accounts)
            figures.rates.setdefault(accounts, []).append(rate)
            _say(f"{database.title}, round {round_number + 1}, {accounts} accounts: {rate:,.0f} events/s")
            if database.name == "postgresql":
                with fresh(database) as url:
                    rate = catch_up_library(url, settings.library, accounts)
                figures.library.setdefault(accounts, []).append(rate)
                _say(f"{database.title}, round {round_number + 1}, {accounts} accounts: library {rate:,.0f} events/s")
        with fresh(database) as url:
            found = latency(url, settings.seconds)
        figures.medians.append(median(found))
        figures.tails.append(quantiles(found, n=20)[-1])
        _say(f"{database.title}, round {round_number + 1}: {figures.medians[-1]:.1f}, {figures.tails[-1]:.1f} ms")
    return figures


@contextmanager
def fresh(database: Database) -> Iterator[sa.URL]:
    """A database without tables."""
    url = database.create_empty()
    try:
        yield url
    finally:
        with suppress(sa.exc.SQLAlchemyError):
            database.drop(url)


def to_markdown(found: Sequence[Figures], settings: Settings) -> str:
    """Return the section of the page."""
    rows = [
        HEADING,
        (
            f"Measured by `python -m benchmarks.projections` in {settings.rounds} rounds. Each figure is the median, "
            "followed by the lowest and the highest.\n"
        ),
        "| catching up, events/s | accounts | this | ProjectionRunner of the library | this / library |",
        "|---|---:|---:|---:|---:|",
    ]
    for figures in found:
        for accounts, rates in figures.rates.items():
            library = figures.library.get(accounts, [])
            ratio = _spread([a / b for a, b in zip(rates, library, strict=True)], 1) if library else ""
            other = _spread(library) if library else ""
            rows.append(f"| {figures.version} | {accounts:,} | {_spread(rates)} | {other} | {ratio} |")
    rows += ["", f"| latency under {COMMITS} commits/s, ms | median | 95th percentile |", "|---|---:|---:|"]
    rows += [f"| {f.version} | {_spread(f.medians, 1)} | {_spread(f.tails, 1)} |" for f in found]
    rows += [
        "",
        (
            f"- Catching up: a log of {settings.events:,} events, and {settings.library:,} for the library, whose "
            "rate is the same from the first event to the last. The accounts take turns, so a batch touches as many "
            "of them as possible. The projection adds to a balance with `session.get()`. The library's view does the "
            "same with one `INSERT ... ON CONFLICT DO UPDATE` for each event, in one transaction with the tracking. "
            "The library has no subscription on SQLite, and no recorders for MariaDB."
        ),
        (
            "- Latency is the time from the return of `commit()` in a writer, in another process, to the return of the "
            "commit of the read model. On PostgreSQL the worker is notified, elsewhere it polls."
        ),
        "",
    ]
    return "\n".join(rows)


def _spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def section() -> str:
    """Return the section as it is in the page, for a new page to keep."""
    content = PAGE.read_text() if PAGE.exists() else ""
    return content[content.index(HEADING) :] if HEADING in content else ""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    parser = argparse.ArgumentParser("python -m benchmarks.projections", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round on little data, to see that it works")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--publish", action="store_true", help="put the section at the end of docs/benchmarks.md")
    parser.add_argument("--write", nargs=2, metavar=("URL", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        write(sa.make_url(options.write[0]), float(options.write[1]))
        return
    settings = Settings(2_000, 200, 1.0, 1) if options.quick else Settings(rounds=options.rounds)
    found = []
    with tempfile.TemporaryDirectory(prefix="flask-eventsourcing-bench-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        for database_name in options.databases:
            missing = DATABASES[database_name].missing()
            if missing:
                _say(f"{DATABASES[database_name].title} is left out: {missing}.")
                continue
            database = DATABASES[database_name](Path(name))
            with ExitStack() as stack:
                stack.callback(database.stop)
                database.start()
                found.append(measure(database, settings))
    text = to_markdown(found, settings)
    print(text, flush=True)
    if options.publish:
        page = PAGE.read_text()
        before = page[: page.index(HEADING)] if HEADING in page else page.rstrip("\n") + "\n\n"
        PAGE.write_text(before + text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.projections import main as run

    run()
