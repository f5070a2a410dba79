"""Commits of one event on a host, beside the host's own commits of one row, which are the limit."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import sqlalchemy as sa

from .databases import DATABASES, Database

OpenBoth = Callable[[sa.URL], tuple[Callable[[], None], Callable[[], None], Callable[[], None]]]
"""Returns what commits an event, what commits a row, and what closes both."""


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


def measure(open_both: OpenBoth, database: Database, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Return the rates of events and of rows, round by round."""
    url = database.create_empty()
    save, insert, close = open_both(url)
    try:
        rates(save, insert, seconds / 5)
        return [rates(save, insert, seconds) for _ in range(rounds)]
    finally:
        close()
        database.drop(url)


def to_markdown(heading: str, limit: float, found: Sequence[tuple[str, list[tuple[float, float]]]], rounds: int) -> str:
    """Return the section."""
    text = (
        f"Commits a second in one thread, median of {rounds} rounds; the ratio is the median of those of each round. "
        f"It is to be at least {limit}.\n"
    )
    lines = [heading, text, "| database | one event | one row | ratio |", "|---|---|---|---|"]
    for version, measured in found:
        ratios = [event / row for event, row in measured]
        event, row = (median(each) for each in zip(*measured, strict=True))
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        lines.append(f"| {version} | {event:,.0f} | {row:,.0f} | {spread} |")
    return "\n".join(lines) + "\n"


def report(
    arguments: list[str] | None, program: str, description: str, heading: str, limit: float, open_both: OpenBoth
) -> None:
    """Measure, and print the section.

    :param program: the module's name, after ``python -m``.
    :param limit: what the commits of an event are to come to, as a part of those of a row.
    """
    parser = argparse.ArgumentParser(f"python -m {program}", description=description)
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
                found.append((database.version(), measure(open_both, database, rounds, seconds)))
    print(to_markdown(heading, limit, found, rounds), flush=True)
