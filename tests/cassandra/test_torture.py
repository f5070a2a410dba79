"""Three nodes, of which one at a time is killed, under processes that are killed at each step of the protocol."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from tests.cassandra_nodes import Node
from tests.length import IS_LONG

if TYPE_CHECKING:
    from tests.cassandra.tortured import Plan

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.xdist_group("cassandra-cluster")

SECONDS = 60 if IS_LONG else 20
LONGEST = 3
"""How many times as long it may take until writers were killed at each step, and a node was."""
PROCESSES = 4
DOWN, BETWEEN = 3.0, 4.0
"""Seconds for which a node is down, and for which all are up behind."""


@dataclass
class Torture:
    """Processes that save, nodes that are killed, and a reader that follows the log.

    :param plan: what each process does.
    :param nodes: the nodes.
    :param folder: where processes write down what they do.
    """

    plan: Plan
    nodes: list[Node]
    folder: Path
    seen: list[tuple[int, str, int]] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    nodes_killed: int = 0

    def run(self, seconds: float) -> None:
        """Run it."""
        threads = [threading.Thread(target=each) for each in (self._kill_nodes, self._follow)]
        for thread in threads:
            thread.start()
        try:
            self._run_processes(seconds)
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def _run_processes(self, seconds: float) -> None:
        from tests.cassandra.tortured import STEPS

        began = time.monotonic()
        steps = itertools.cycle(STEPS)
        steady = self._start("")
        victims = [threading.Thread(target=self._run_victims, args=(steps,)) for _ in range(PROCESSES - 1)]
        for thread in victims:
            thread.start()
        left = seconds
        while left > 0 and not self.over.wait(0.2):
            passed = time.monotonic() - began
            left = LONGEST * seconds - passed
            if set(STEPS) <= set(self.killed) and self.nodes_killed:
                left = seconds - passed
        self._stop.touch()
        for thread in victims:
            thread.join()
        if steady.wait() != 0:
            self.failures.append(f"a process ended with {steady.returncode}")

    def _run_victims(self, steps: Iterator[str]) -> None:
        while not self._stop.exists():
            step = next(steps)
            ended = self._start(step).wait()
            if ended == -signal.SIGKILL:
                self.killed[step] += 1
            elif ended != 0:
                self.failures.append(f"a process ended with {ended}")

    @property
    def _stop(self) -> Path:
        return self.folder / "stop.log"

    def _start(self, step: str) -> subprocess.Popen[bytes]:
        name = uuid4().hex
        plan = replace(self.plan, step=step, seed=uuid4().int, journal=str(self.folder / name), stop=str(self._stop))
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.cassandra.tortured", json.dumps(asdict(plan))], stdout=log, stderr=log
            )

    def _kill_nodes(self) -> None:
        for node in itertools.cycle(self.nodes):
            if self.over.wait(BETWEEN):
                return
            node.kill()
            self.nodes_killed += 1
            self.over.wait(DOWN)
            node.start()
            node.wait()

    def _follow(self) -> None:
        with self.reading() as reader:
            while not self.over.wait(0.01):
                self.read_on(reader)

    def reading(self) -> Any:
        """Return a block with a reader of the log, as another process has one."""
        return Reading(self.plan)

    def read_on(self, reader: Any) -> int:
        """Read what is there now."""
        after = self.seen[-1][0] if self.seen else 0
        page = reader.page(after + 1, 100, None, ())
        self.seen += [(each.id, str(each.originator_id), each.originator_version) for each in page]
        return len(page)

    def journals(self) -> list[dict[str, Any]]:
        """Return what processes have said."""
        from tests.cassandra.tortured import read_journal

        return [line for path in self.folder.iterdir() if path.suffix != ".log" for line in read_journal(path)]


class Reading:
    """A block with a reader of the log."""

    def __init__(self, plan: Plan) -> None:
        from flask_eventsourcing.cassandra.recording import Log

        self.connection = plan.connection()
        self.parts = Log(self.connection, plan.prefix).parts

    def __enter__(self) -> Any:
        return self.parts.reader

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def prepare(nodes: list[Node], folder: Path) -> Plan:
    """Make the tables of a new application, and wait until each node has them."""
    from flask_eventsourcing.cassandra.inspecting import Schema
    from tests.cassandra.tortured import Plan

    plan = Plan([node.address for node in nodes], nodes[0].port, f"t{uuid4().hex}", "bank", "", "", 0)
    connection = replace(plan, contact_points=[nodes[0].address]).connection()
    Schema(connection, {plan.prefix: "uuid"}).create()
    connection.close()
    return plan


def check(torture: Torture) -> dict[str, Any]:
    """Check what was promised; return figures."""
    from tests.cassandra.tortured import AGGREGATES, changed_once_more

    said = torture.journals()
    with Reading(torture.plan) as reader:
        store, walker, writer = reader._store, reader._walker, reader._writer
        for key in AGGREGATES:
            changed_once_more(store, writer, key)
        while torture.read_on(reader):
            pass
        rows = list(walker.rows(1))
        streams = {key: store.select("events", key, None, None, desc=False, limit=None) for key in AGGREGATES}
    recorded: dict[str, tuple[int, int]] = {}
    log: list[tuple[int, str, int]] = []
    for row in rows:
        position = row.position
        for part in row.parts:
            assert str(part.id) not in recorded, "recorded twice"
            recorded[str(part.id)] = (position, part.events)
            position += part.size
        log += [(at, str(key), version) for at, key, version, _ in row.located()]
    done = {line["done"]: line["position"] for line in said if "done" in line}
    assert {key: recorded.get(key, (0, 0))[0] for key in done} == done, "acknowledged, and not in the log"
    assert not {line["refused"] for line in said if "refused" in line} & set(recorded), "refused, and recorded"
    assert not {line["failed"] for line in said if "failed" in line} & set(recorded), "failed, and recorded"
    planned = {line["tries"]: len(line["events"]) for line in said if "tries" in line}
    assert all(planned.get(key, events) == events for key, (_, events) in recorded.items()), "recorded in part"
    assert torture.seen == log, "the reader saw another log"
    for key in AGGREGATES:
        versions = [version for _, about, version in log if UUID(about) == key]
        assert versions == list(range(1, len(versions) + 1)), "versions do not follow each other"
        assert [each.originator_version for each in streams[key]] == versions, "a stream is not the log"
    seconds = sorted(line["seconds"] for line in said if "done" in line)
    return {
        "done": len(done),
        "refused": sum("refused" in line for line in said),
        "unknown": sum("unknown" in line for line in said),
        "failed": sum("failed" in line for line in said),
        "rows": len(rows),
        "p50": seconds[len(seconds) // 2],
        "p99": seconds[len(seconds) * 99 // 100],
        "max": seconds[-1],
        "nodes": torture.nodes_killed,
        "killed": dict(torture.killed),
    }


def test_nothing_is_lost_while_writers_and_nodes_are_killed(cluster: list[Node], tmp_path: Path) -> None:
    """What was acknowledged is in the log once, a reader skips nothing, and every aggregate can be changed then."""
    torture_for(SECONDS, cluster, tmp_path)


@pytest.mark.torture
def test_nothing_is_lost_in_two_minutes(cluster: list[Node], tmp_path: Path) -> None:
    """The same for longer, so that every step is reached while each node is down."""
    torture_for(120, cluster, tmp_path)


def torture_for(seconds: float, nodes: list[Node], folder: Path) -> None:
    """Torture nodes and processes for some seconds, and check what is left."""
    torture = Torture(prepare(nodes, folder), nodes, folder)
    torture.run(seconds)
    assert torture.failures == []
    figures = check(torture)
    logger.info("%s", figures)
    assert figures["done"] > 0
    assert torture.nodes_killed
    assert torture.killed
