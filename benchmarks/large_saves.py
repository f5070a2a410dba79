"""Measures how long small writers wait while a large save is at work beside them, and an idle transaction.

``python -m benchmarks.large_saves`` starts PostgreSQL. Each small writer is a process of its own, so that what is
measured is the waiting for the database, not that for Python's lock.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing

from .contenders import flask_app
from .databases import DATABASES, Database
from .domain import LENGTH, Bench, new_events
from .projections import PAGE, ROOT, fresh

HEADING = "## Large saves\n"
SIZES = (1_000, 20_000)
WRITERS = 4
PAUSE = 0.002
"""Seconds that a small writer pauses after each commit."""


@dataclass
class Figures:
    """What was measured for saves of one size, round by round; times in milliseconds."""

    alone: list[float] = field(default_factory=list)
    """The longest commit of a small writer in the second before the large save."""
    beside: list[float] = field(default_factory=list)
    """The longest that overlaps with the large save."""
    usual: list[float] = field(default_factory=list)
    """The median of those."""
    large: list[float] = field(default_factory=list)
    """The large save, from the call to the end of its commit."""
    gaps: list[float] = field(default_factory=list)
    """Positions that were drawn and not used."""


def write(url: str) -> None:
    """Commit one event at a time until the input is closed, and print when each began and ended."""
    app, es, db = _open(sa.make_url(url))
    lines: list[str] = []
    with app.app_context():
        recorder = es.application.recorder
        for _ in range(20):
            recorder.insert_events(new_events(1))
            db.session.commit()
        print("ready", flush=True)
        stopped = _closed_input()
        while not stopped():
            begin = time.time()
            recorder.insert_events(new_events(1))
            db.session.commit()
            lines.append(f"{begin} {time.time()}")
            time.sleep(PAUSE)
    es.close(app)
    sys.stdout.write("\n".join(lines) + "\n")


def _closed_input() -> Any:
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    return stop.is_set


def _open(url: sa.URL) -> tuple[Any, EventSourcing, SQLAlchemy]:
    app = flask_app(url, 5)
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bench)
    db.init_app(app)
    es.init_app(app)
    return app, es, db


@contextmanager
def _small_writers(url: sa.URL) -> Any:
    command = [sys.executable, "-m", "benchmarks.large_saves", "--write", url.render_as_string(False)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(WRITERS)
    ]
    commits: list[tuple[float, float]] = []
    try:
        for each in started:
            if each.stdout is None or each.stdout.readline() != "ready\n":
                raise RuntimeError("A small writer did not start.")
        yield commits
    finally:
        for each in started:
            output, _ = each.communicate()
            commits += [(float(begin), float(end)) for begin, end in map(str.split, output.splitlines())]


def measure_one(database: Database, size: int, figures: Figures, *, calm: float) -> None:
    """Measure one large save."""
    with fresh(database) as url:
        app, es, db = _open(url)
        try:
            with app.app_context():
                db.create_all()
                recorder: Any = es.application.recorder
                recorder.insert_events(new_events(2))
                db.session.commit()
            with _small_writers(url) as commits:
                with app.app_context(), db.engine.connect() as idle:
                    dialect: Any = recorder.dialect
                    # It has appended, and does nothing more for as long as this takes.
                    idle_events = new_events(1)
                    dialect.append(idle, recorder.events_table, idle_events)
                    events = [event for _ in range(size // LENGTH) for event in new_events(LENGTH)]
                    time.sleep(calm)
                    begin = time.time()
                    positions = recorder.insert_events(events)
                    db.session.commit()
                    end = time.time()
                    idle.rollback()
                if positions is None or list(positions) != list(range(positions[0], positions[0] + size)):
                    raise RuntimeError("The positions of a large save are not contiguous.")
            with app.app_context():
                stored = db.session.scalar(sa.select(sa.func.count()).select_from(es.StoredEvent)) or 0
                last = recorder.max_notification_id() or 0
        finally:
            es.close(app)
    beside = [(b - a) * 1000 for a, b in commits if b > begin and a < end]
    figures.alone.append(max((b - a) * 1000 for a, b in commits if b <= begin and a > begin - calm))
    figures.beside.append(max(beside))
    figures.usual.append(median(beside))
    figures.large.append((end - begin) * 1000)
    figures.gaps.append(last - stored)


def to_markdown(version: str, found: dict[int, Figures], rounds: int) -> str:
    """Return the section of the page."""
    rows = [
        HEADING,
        (
            f"Measured by `python -m benchmarks.large_saves` on {version} in {rounds} rounds. Each figure is the "
            "median, followed by the lowest and the highest.\n"
        ),
        (
            "| events of the save | the save, ms | longest commit beside it, ms | median beside it, ms "
            "| longest without it, ms | positions not used |"
        ),
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for size, each in found.items():
        columns = [_spread(each.large), *(_spread(v, 1) for v in (each.beside, each.usual, each.alone))]
        rows.append(f"| {size:,} | {' | '.join(columns)} | {_spread(each.gaps)} |")
    rows += [
        "",
        (
            f"- During the save {WRITERS} processes commit one event at a time, each with a pause of {PAUSE * 1000:g} "
            "ms after it, and a transaction that has appended is idle. Each save succeeded at its first call."
        ),
        "- *Longest without it* is the longest commit in the second before the save.",
        "",
    ]
    return "\n".join(rows)


def _spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def publish(heading: str, text: str) -> None:
    """Put a section into the page, in the place of the one with its heading, or at the end."""
    page = PAGE.read_text()
    before, _, rest = page.partition(heading)
    # What other sections follow is kept.
    _, mark, after = rest.partition("\n## ")
    PAGE.write_text(before.rstrip("\n") + "\n\n" + text + (mark + after if mark else ""))


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    parser = argparse.ArgumentParser("python -m benchmarks.large_saves", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round on little data, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--publish", action="store_true", help="put the section into docs/benchmarks.md")
    parser.add_argument("--write", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        write(options.write)
        return
    missing = DATABASES["postgresql"].missing()
    if missing:
        print(f"PostgreSQL is left out: {missing}.", file=sys.stderr)
        return
    rounds = 1 if options.quick else options.rounds
    found = {size: Figures() for size in ((1_000,) if options.quick else SIZES)}
    with tempfile.TemporaryDirectory(prefix="flask-eventsourcing-bench-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        database = DATABASES["postgresql"](Path(name))
        with ExitStack() as stack:
            stack.callback(database.stop)
            database.start()
            for number in range(rounds):
                for size, figures in found.items():
                    measure_one(database, size, figures, calm=0.3 if options.quick else 1.0)
                    print(f"round {number + 1}, {size:,} events: {figures}", file=sys.stderr, flush=True)
            text = to_markdown(database.version(), found, rounds)
    print(text, flush=True)
    if options.publish:
        publish(HEADING, text)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.large_saves import main as run

    run()
