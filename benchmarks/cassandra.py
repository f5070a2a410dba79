"""Measures appends to a log in Cassandra beside conditional inserts by the bare driver, on three nodes.

``python -m benchmarks.cassandra`` starts the nodes, as the tests do. Each writer is a process of its own, and what is
compared is measured in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from statistics import median
from typing import Any
from uuid import UUID, uuid4

from eventsourcing.persistence import StoredEvent

HEADING = "## Cassandra\n"
STATE = b"x" * 200
HEAD = UUID(int=0)
"""The partition at whose end all insert."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a process does.

    :param kind: ``log``, ``own`` for inserts in partitions of their own, or ``head`` for those at the end of one.
    """

    kind: str
    threads: int
    processes: int
    contact_points: list[str] = dataclasses.field(default_factory=list)
    port: int = 0
    keyspace: str = "bench"
    seconds: float = 1.0


@dataclasses.dataclass
class Rates:
    """What was measured, round by round: saves a second, and the 99th percentile of their seconds."""

    rates: list[float] = dataclasses.field(default_factory=list)
    slow: list[float] = dataclasses.field(default_factory=list)


PAIRS: dict[str, tuple[Work, Work, float]] = {
    "one writer": (Work("log", 1, 1), Work("own", 1, 1), 0.45),
    "16 threads of one process": (Work("log", 16, 1), Work("own", 16, 1), 0.8),
    "4 processes with 4 threads": (Work("log", 4, 4), Work("head", 1, 4), 0.9),
}
"""What is compared with what, and the ratio that is wanted."""


def work(plan: Work) -> None:
    """Save until the time is over, and print how long each took."""
    from flask_eventsourcing.cassandra import CassandraSettings, Connection

    settings = CassandraSettings(tuple(plan.contact_points), plan.keyspace, port=plan.port, patience=60.0)
    connection = Connection(settings)
    save = {"log": saving, "own": inserting, "head": at_the_head}[plan.kind](connection)
    save()
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + plan.seconds
    found: list[float] = []

    def go_on() -> None:
        while (began := time.monotonic()) < end:
            save()
            found.append(time.monotonic() - began)

    threads = [threading.Thread(target=go_on) for _ in range(plan.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connection.close()
    print(json.dumps(found))


def saving(connection: Any) -> Callable[[], object]:
    """Return what saves one event of a new aggregate."""
    from flask_eventsourcing.cassandra import CassandraApplicationRecorder
    from flask_eventsourcing.cassandra.recording import Log

    recorder = CassandraApplicationRecorder(Log(connection, "bench"))
    return lambda: recorder.insert_events([StoredEvent(uuid4(), 1, "topic", STATE)])


def inserting(connection: Any) -> Callable[[], object]:
    """Return what inserts one row in a partition of its own."""
    statement = connection.prepare(INSERT.format(connection.settings.keyspace))
    return lambda: connection.execute(statement, (uuid4(), 1, STATE)).one()


def at_the_head(connection: Any) -> Callable[[], object]:
    """Return what inserts one row at the end of a partition that others fill too."""
    statement = connection.prepare(INSERT.format(connection.settings.keyspace))
    position = 1

    def insert() -> None:
        nonlocal position
        while not connection.execute(statement, (HEAD, position, STATE)).one().applied:
            position += 1
        position += 1

    return insert


INSERT = "INSERT INTO {}.bare (key, position, state) VALUES (?, ?, ?) IF NOT EXISTS"
TABLE = "CREATE TABLE IF NOT EXISTS {}.bare (key uuid, position bigint, state blob, PRIMARY KEY (key, position))"


def start_behind(connection: Any, appends: int) -> str:
    """Save in a process that starts so many appends behind the end of a log, and say how long it took."""
    from flask_eventsourcing.cassandra.inspecting import Schema
    from flask_eventsourcing.cassandra.recording import Log
    from tests.cassandra.old_log import Start, fill

    Schema(connection, {"old": "uuid"}).create()
    fill(Log(connection, "old"), appends)
    log = Log(connection, "old")
    read: list[float] = []
    began = time.monotonic()
    with Start(log).counted(lambda: read.append(time.monotonic())):
        log.append([StoredEvent(uuid4(), 1, "topic", STATE)])
    ready = time.monotonic() - read[-1]
    return (
        f"A process that starts {appends:,} appends behind the end of a log, none of them indexed, has read them in "
        f"{read[-1] - began:.1f} s. Its first save is done {ready:.2f} s later.\n"
    )


def measure(plan: Work, figures: Rates) -> None:
    """Let the processes of a plan work at the same time, and note their rate."""
    line = [sys.executable, "-m", "benchmarks.cassandra", "--work", json.dumps(dataclasses.asdict(plan))]
    started = [
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(plan.processes)
    ]
    for each in started:
        if each.stdout is None or each.stdout.readline() != "ready\n":
            raise RuntimeError("a process of the benchmark did not start")
    _begin(started)
    said = [json.loads(each.communicate()[0]) for each in started]
    found = sorted(seconds for each in said for seconds in each)
    figures.rates.append(len(found) / plan.seconds)
    figures.slow.append(found[len(found) * 99 // 100])


def _begin(started: list[subprocess.Popen[str]]) -> None:
    for each in started:
        if each.stdin is not None:
            each.stdin.write("go\n")
            each.stdin.flush()


def missing() -> str | None:
    """Return what is missing for nodes."""
    if any(find_spec(name) is None for name in ("cassandra", "pytest", "psutil")):
        return "cassandra-driver, pytest and psutil are needed"
    import pytest

    from tests.cassandra_nodes import require_cassandra

    try:
        require_cassandra()
    except (pytest.skip.Exception, pytest.fail.Exception) as error:
        return str(error)
    return None


@contextmanager
def three_nodes() -> Iterator[list[str]]:
    """Run three nodes, and give their addresses with their port."""
    from tests.cassandra_nodes import cassandra_cluster
    from tests.servers import ServerFolder

    folder = ServerFolder.create()
    try:
        with cassandra_cluster(folder) as nodes:
            yield [node.url for node in nodes]
    finally:
        folder.remove()


def run(urls: list[str], rounds: int, seconds: float, appends: int = 100_000) -> str:
    """Measure on nodes, and return the section.

    :param appends: how far behind the end of a log a process starts.
    """
    from flask_eventsourcing.cassandra import CassandraSettings, Connection
    from flask_eventsourcing.cassandra.inspecting import Schema

    points, port = [url.partition(":")[0] for url in urls], int(urls[0].partition(":")[2])
    connection = Connection(CassandraSettings((points[0],), f"bench_{uuid4().hex}", len(urls), port=port))
    keyspace = connection.settings.keyspace
    schema = Schema(connection, {"bench": "uuid"})
    schema.create()
    connection.execute(TABLE.format(keyspace), timeout=60, host=connection.nodes()[0])
    schema.create()
    found = {name: (Rates(), Rates()) for name in PAIRS}
    for number in range(rounds):
        for name, (ours, bare, _) in PAIRS.items():
            pair = list(zip((ours, bare), found[name], strict=True))
            for plan, figures in pair[:: -1 if number % 2 else 1]:
                place = dataclasses.replace(plan, contact_points=points, port=port, keyspace=keyspace, seconds=seconds)
                measure(place, figures)
            print(f"round {number + 1}, {name}: {found[name]}", file=sys.stderr, flush=True)
    started = start_behind(connection, appends)
    connection.execute(f"DROP KEYSPACE {keyspace}", timeout=60)
    connection.close()
    return f"{to_markdown(found, rounds)}\n{started}"


def to_markdown(found: dict[str, tuple[Rates, Rates]], rounds: int) -> str:
    """Return the section."""
    text = (
        f"Three nodes on one machine, {rounds} rounds, load {os.getloadavg()[0]:.1f}. Saves of one event a second, and "
        "conditional inserts a second by the bare driver: in partitions of their own, in the last line at the end of "
        "one. The ratio is the median of those of each round.\n"
    )
    lines = ["| writers | saves | bare | ratio | wanted | p99 of a save, s |", "|---|---:|---:|---|---:|---:|"]
    for name, (ours, bare) in found.items():
        ratios = [one / other for one, other in zip(ours.rates, bare.rates, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        rates = f"{median(ours.rates):,.0f} | {median(bare.rates):,.0f}"
        lines.append(f"| {name} | {rates} | {spread} | {PAIRS[name][2]:g} | {median(ours.slow):.2f} |")
    return "\n".join([HEADING, text, *lines]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    parser = argparse.ArgumentParser("python -m benchmarks.cassandra", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", nargs="+", metavar="HOST:PORT", help="nodes that run; otherwise three are started")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(Work(**json.loads(options.work)))
        return
    if (reason := missing()) is not None:
        print(f"Cassandra is left out: {reason}.", file=sys.stderr)
        return
    rounds, seconds, appends = (1, 1.0, 1_000) if options.quick else (options.rounds, 5.0, 100_000)
    if options.nodes:
        print(run(options.nodes, rounds, seconds, appends), flush=True)
        return
    with three_nodes() as urls:
        print(run(urls, rounds, seconds, appends), flush=True)


if __name__ == "__main__":
    main()
