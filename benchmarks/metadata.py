"""Measures what metadata cost: appends with NULLs in their columns, with metadata, and with the index too.

``python -m benchmarks.metadata`` starts the servers that it needs. Each has a database of its own, and takes its turn
many times in a round, so that what else the machine does strikes all of them. What reads the log and aggregates reads
none of these columns; it is measured to see that it is so.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, cast
from uuid import UUID

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing

from .contenders import RecorderWorker, flask_app
from .databases import DATABASES, Database
from .domain import LENGTH, Bench, new_events
from .large_saves import publish
from .log import read_log
from .projections import fresh

HEADING = "## Metadata\n"
KINDS: dict[str, dict[str, Any]] = {
    "NULLs": {"EVENTSOURCING_METADATA": False},
    "metadata": {},
    "metadata and index": {"EVENTSOURCING_CORRELATION_INDEX": True},
}
TURNS = 10
"""How often each takes its turn in a round."""


@dataclass
class Subject:
    """An app whose events have metadata, or NULLs."""

    app: Flask
    es: EventSourcing
    db: SQLAlchemy

    @contextmanager
    def worker(self) -> Iterator[RecorderWorker]:
        """Work in an application context, with a reason put into it."""
        with self.app.app_context(), self.es.event_metadata(reason="import 7"):
            yield RecorderWorker(self.es.application, self.db.session)


def _commit(size: int) -> Callable[[RecorderWorker], int]:
    def commit(worker: RecorderWorker) -> int:
        worker.insert(new_events(size))
        worker.commit()
        return size

    return commit


def _read_aggregate(worker: RecorderWorker) -> int:
    found = worker.read(_ACCOUNT)
    worker.rollback()
    return found


_FILLED = new_events(LENGTH)
_ACCOUNT = cast(UUID, _FILLED[0].originator_id)
WORKLOADS: dict[str, tuple[Callable[[RecorderWorker], int], int]] = {
    "commit of 1 event": (_commit(1), 50),
    "commit of 100 events": (_commit(100), 5),
    "aggregate of 100 events": (_read_aggregate, 20),
    "the log": (read_log, 1),
}
"""What is done, and how often in a turn."""


@dataclass
class Figures:
    """What was measured on one database: events per second, round by round, of each workload and kind."""

    version: str
    rates: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: {name: {kind: [] for kind in KINDS} for name in WORKLOADS}
    )


def measure_round(database: Database, figures: Figures, *, turns: int) -> None:
    """Measure each workload once."""
    with ExitStack() as stack:
        subjects = {kind: _opened(stack, database, settings) for kind, settings in KINDS.items()}
        for name, (function, times) in WORKLOADS.items():
            spent = dict.fromkeys(KINDS, 0.0)
            events = dict.fromkeys(KINDS, 0)
            for turn in range(turns):
                kinds = list(KINDS)
                # Another one is first in each turn.
                for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
                    gc.collect()
                    with subjects[kind].worker() as worker:
                        begin = time.perf_counter()
                        events[kind] += sum(function(worker) for _ in range(times))
                        spent[kind] += time.perf_counter() - begin
            for kind in KINDS:
                figures.rates[name][kind].append(events[kind] / spent[kind])


def _opened(stack: ExitStack, database: Database, settings: dict[str, Any]) -> Subject:
    app = flask_app(stack.enter_context(fresh(database)), 2)
    app.config.update(settings)
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bench)
    db.init_app(app)
    es.init_app(app)
    stack.callback(es.close, app)
    subject = Subject(app, es, db)
    with app.app_context():
        db.create_all()
    with subject.worker() as worker:
        worker.insert(_FILLED)
        worker.commit()
        for _ in range(8):
            _commit(1)(worker)
    return subject


def to_markdown(found: Sequence[Figures], rounds: int) -> str:
    """Return the section of the page."""
    rows = [
        HEADING,
        (
            f"Measured by `python -m benchmarks.metadata` in {rounds} rounds. Each figure is the median of the ratios "
            "of each round, followed by the lowest and the highest.\n"
        ),
        "| speed | database | metadata / NULLs | with the index / without |",
        "|---|---|---:|---:|",
    ]
    for figures in found:
        for name, rates in figures.rates.items():
            nulls, filled, indexed = rates.values()
            rows.append(f"| {name} | {figures.version} | {_ratio(filled, nulls)} | {_ratio(indexed, filled)} |")
    rows += [
        "",
        (
            "- Each event has about 220 bytes of JSON, as above. Its metadata are a reason and the "
            "correlation id of the context. The NULLs are those of `EVENTSOURCING_METADATA = False`."
        ),
        "",
    ]
    return "\n".join(rows)


def _ratio(these: Sequence[float], those: Sequence[float]) -> str:
    ratios = [this / that for this, that in zip(these, those, strict=True)]
    return f"**{median(ratios):.2f}** ({min(ratios):.2f}..{max(ratios):.2f})"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    parser = argparse.ArgumentParser("python -m benchmarks.metadata", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--publish", action="store_true", help="put the section into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    found = []
    with tempfile.TemporaryDirectory(prefix="flask-eventsourcing-bench-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        for database_name in options.databases:
            missing = DATABASES[database_name].missing()
            if missing:
                print(f"{DATABASES[database_name].title} is left out: {missing}.", file=sys.stderr)
                continue
            database = DATABASES[database_name](Path(name))
            with ExitStack() as stack:
                stack.callback(database.stop)
                database.start()
                figures = Figures(database.version())
                for number in range(rounds):
                    measure_round(database, figures, turns=1 if options.quick else TURNS)
                    print(f"{database_name}, round {number + 1}: {figures.rates}", file=sys.stderr, flush=True)
                found.append(figures)
    text = to_markdown(found, rounds)
    print(text, flush=True)
    if options.publish:
        publish(HEADING, text)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.metadata import main as run

    run()
