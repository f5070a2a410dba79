"""Commits of one event on a host, beside the host's own commits of one row, which are the limit."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median

import sqlalchemy as sa

from .databases import DATABASES, Database

EVENT = "one event"
Commits = dict[str, Callable[[], None]]
"""What commits, by its name; that of an event is the first."""
Opener = Callable[[sa.URL], AbstractContextManager[Commits]]
Hosts = Mapping[str, tuple[Opener, float]]
"""By its name, what opens a host, and what commits of events are to come to, as a part of those of the first rows."""


def rates(commits: Commits, seconds: float) -> dict[str, float]:
    """Return how many commits of each there are a second, called in turns, as a machine's speed changes."""
    spent, count = dict.fromkeys(commits, 0.0), 0
    while sum(spent.values()) < len(commits) * seconds:
        for name, commit in commits.items():
            begun = time.perf_counter()
            commit()
            spent[name] += time.perf_counter() - begun
        count += 1
    return {name: count / each for name, each in spent.items()}


def measure(database: Database, opener: Opener, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Return the rates, round by round."""
    url = database.create_empty()
    try:
        with opener(url) as commits:
            rates(commits, seconds / 5)
            return [rates(commits, seconds) for _ in range(rounds)]
    finally:
        database.drop(url)


def to_lines(version: str, host: str, measured: Sequence[dict[str, float]]) -> list[str]:
    """Return the rows of the table."""
    lines = []
    for name in list(measured[0])[1:]:
        ratios = [each[EVENT] / each[name] for each in measured]
        event, row = (median(each[key] for each in measured) for key in (EVENT, name))
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        lines.append(f"| {version} | {host} | {name} | {event:,.0f} | {row:,.0f} | {spread} |")
    return lines


def to_markdown(heading: str, hosts: Hosts, lines: Sequence[str], rounds: int) -> str:
    """Return the section."""
    limits = ", ".join(f"{limit} on {host}" for host, (_, limit) in hosts.items())
    text = (
        f"Commits a second in one thread, median of {rounds} rounds; the ratio is the median of those of each round. "
        f"The first of a host's is to be at least {limits}.\n"
    )
    head = ["| database | host | beside | events | rows | ratio |", "|---|---|---|---:|---:|---|"]
    return "\n".join([heading, text, *head, *lines]) + "\n"


def report(arguments: list[str] | None, program: str, description: str, heading: str, hosts: Hosts) -> None:
    """Measure, and print the section.

    :param program: the module's name, after ``python -m``.
    """
    parser = argparse.ArgumentParser(f"python -m {program}", description=description)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--hosts", nargs="+", choices=hosts, default=list(hosts))
    options = parser.parse_args(arguments)
    rounds, seconds = (1, 0.2) if options.quick else (options.rounds, 1.0)
    lines: list[str] = []
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
                for host in options.hosts:
                    lines += to_lines(database.version(), host, measure(database, hosts[host][0], rounds, seconds))
    print(to_markdown(heading, hosts, lines, rounds), flush=True)
