"""Commits of one event in a session of zope.sqlalchemy, beside its own commits of one row, which are the limit.

``python -m benchmarks.zope_sessions`` measures both in one thread, in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa
import zope.sqlalchemy
from sqlalchemy import orm
from transaction import TransactionManager

from flask_eventsourcing.contrib.zope import EventSourcing, event_models

from .databases import DATABASES, Database
from .domain import Bench, new_events

HEADING = "## Sessions of zope.sqlalchemy\n"
LIMIT = 0.85
"""What the commits of an event are to come to, as a part of those of a row."""


def open_both(url: sa.URL) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """Return what commits an event, what commits a row, and what closes both."""
    base: Any = orm.declarative_base()
    models = event_models(base, "Bench")
    body = {
        "__tablename__": "limit_row",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "text": orm.mapped_column(sa.LargeBinary, nullable=False),
    }
    row: Any = type(base)("Row", (base,), body)
    engine = sa.create_engine(url)
    base.metadata.create_all(engine)
    manager = TransactionManager()
    session = orm.scoped_session(orm.sessionmaker(engine))
    zope.sqlalchemy.register(session, transaction_manager=manager)
    es = EventSourcing(Bench, models=models, session=session)
    recorder = es.application.recorder
    state = new_events(1)[0].state

    def save() -> None:
        with manager:
            recorder.insert_events(new_events(1))

    def insert() -> None:
        with manager:
            session.add(row(text=state))

    def close() -> None:
        es.close()
        session.remove()
        engine.dispose()

    return save, insert, close


def rates(one: Callable[[], None], other: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Return how many commits of each there are a second, called in turns, as a machine's speed changes."""
    spent, count = [0.0, 0.0], 0
    while sum(spent) < 2 * seconds:
        for number, commit in enumerate((one, other)):
            begun = time.perf_counter()
            commit()
            spent[number] += time.perf_counter() - begun
        count += 1
    return count / spent[0], count / spent[1]


def measure(database: Database, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Return the rates of events and of rows, round by round."""
    url = database.create_empty()
    save, insert, close = open_both(url)
    try:
        rates(save, insert, seconds / 5)
        return [rates(save, insert, seconds) for _ in range(rounds)]
    finally:
        close()
        database.drop(url)


def to_markdown(found: Sequence[tuple[str, list[tuple[float, float]]]], rounds: int) -> str:
    """Return the section."""
    text = (
        f"Commits a second in one thread, median of {rounds} rounds; the ratio is the median of those of each round. "
        f"It is to be at least {LIMIT}.\n"
    )
    lines = [HEADING, text, "| database | one event | one row | ratio |", "|---|---|---|---|"]
    for version, measured in found:
        ratios = [event / row for event, row in measured]
        event, row = (median(each) for each in zip(*measured, strict=True))
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        lines.append(f"| {version} | {event:,.0f} | {row:,.0f} | {spread} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    parser = argparse.ArgumentParser("python -m benchmarks.zope_sessions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    options = parser.parse_args(arguments)
    rounds, seconds = (1, 0.2) if options.quick else (options.rounds, 1.0)
    found: list[tuple[str, list[tuple[float, float]]]] = []
    for name in options.databases:
        missing = DATABASES[name].missing()
        if missing:
            print(f"{name} is left out: {missing}.", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="flask-eventsourcing-bench-", ignore_cleanup_errors=True) as folder:
            Path(folder).chmod(0o755)
            database = DATABASES[name](Path(folder))
            with ExitStack() as stack:
                stack.callback(database.stop)
                database.start()
                found.append((database.version(), measure(database, rounds, seconds)))
    print(to_markdown(found, rounds), flush=True)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.zope_sessions import main as run

    run()
