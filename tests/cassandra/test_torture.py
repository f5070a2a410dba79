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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import IntegrityError, OperationalError

from tests.cassandra_nodes import Node, ahead_of_time
from tests.length import IS_LONG

if TYPE_CHECKING:
    from tests.cassandra.tortured import Plan

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.xdist_group("cassandra-cluster")

SECONDS = 60 if IS_LONG else 20
LONGEST = 2
"""How many times as long it may take until writers were killed at each step, and a node was."""
PROCESSES = 4
STORMS = 5
"""Storms within which a protection has to be found missing."""
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
    clocks: Sequence[Sequence[str]] = ((),)
    """What wraps the nodes that come back, in turns."""
    nodes_killed: int = 0

    def run(self, seconds: float) -> None:
        """Run it, also again."""
        self._stop.unlink(missing_ok=True)
        self.over.clear()
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
        for node, clock in zip(itertools.cycle(self.nodes), itertools.cycle(self.clocks), strict=False):
            if self.over.wait(BETWEEN):
                return
            node.kill()
            self.nodes_killed += 1
            self.over.wait(DOWN)
            node.wrapper = clock
            node.start()
            node.wait()

    def _follow(self) -> None:
        with Reading(self.plan) as reader:
            while not self.over.wait(0.01):
                # While a node that is back is not known to the others yet, two of three may be down for them.
                with suppress(OperationalError):
                    self.read_on(reader)

    def read_on(self, reader: Any) -> int:
        """Read what is there now."""
        after = self.seen[-1][0] if self.seen else 0
        page = reader.page(after + 1, 100, None, ())
        self.seen += [(each.id, str(each.originator_id), each.originator_version) for each in page]
        return len(page)

    def set_clocks(self) -> None:
        """Let all nodes have the machine's clock again: others use the cluster too."""
        for node in self.nodes:
            if node.wrapper:
                node.kill()
                node.wrapper = ()
                node.start()
                node.wait()

    def journals(self) -> list[dict[str, Any]]:
        """Return what processes have said."""
        from tests.cassandra.tortured import read_journal

        return [line for path in self.folder.iterdir() if path.suffix != ".log" for line in read_journal(path)]


class Reading:
    """A block with a reader of the log, as another process has one."""

    def __init__(self, plan: Plan) -> None:
        from flask_eventsourcing.cassandra.reading import Reader
        from tests.cassandra.sabotage import TOUCHING, leave_gaps
        from tests.cassandra.tortured import FaultyStore, prepared

        self.connection = plan.connection()
        store = FaultyStore(self.connection, plan)
        self.reader = Reader(store, prepared(plan, store), self.connection.settings.patience)
        self.patch = pytest.MonkeyPatch()
        self.bucket = plan.bucket
        if plan.lacks == TOUCHING:
            leave_gaps(self.reader)

    def __enter__(self) -> Any:
        self.patch.setattr("flask_eventsourcing.cassandra.rows.BUCKET", self.bucket)
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
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
    with Reading(replace(torture.plan, faults=0.0, lacks="")) as reader:
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


def clocks(folder: Path, apart: bool) -> Sequence[Sequence[str]]:
    """Return what wraps the nodes that come back: in turns a clock that is ahead, and their own, if they are apart."""
    return [ahead_of_time(folder, 30), ()] if apart else [()]


def test_nothing_is_lost_while_writers_and_nodes_are_killed(cluster: list[Node], tmp_path: Path) -> None:
    """What was acknowledged is in the log once, a reader skips nothing, and every aggregate can be changed then.

    Plain reads are stale now and then, the log goes through many buckets, and nodes come back with other clocks.
    """
    torture_for(SECONDS, cluster, tmp_path, apart=True)


@pytest.mark.torture
@pytest.mark.parametrize("apart", [False, True], ids=["one clock", "clocks apart"])
def test_nothing_is_lost_in_two_minutes(apart: bool, cluster: list[Node], tmp_path: Path) -> None:
    """The same for longer, so that every step is reached while each node is down."""
    torture_for(120, cluster, tmp_path, apart=apart)


@pytest.mark.torture
@pytest.mark.parametrize("protection", ["check of the winner", "same id again", "touching"])
def test_torture_finds_what_is_missing(protection: str, cluster: list[Node], tmp_path: Path) -> None:
    """Without one of its protections the log breaks a promise on nodes too, so this test would notice."""
    plan = replace(prepare(cluster, tmp_path), lacks=protection, faults=0.1)
    torture = Torture(plan, cluster, tmp_path)
    found = ""
    for _ in range(STORMS):
        torture.run(15)
        try:
            check(torture)
        except (AssertionError, IntegrityError) as error:
            found = f"{type(error).__name__}: {error}"
            break
    logger.info("%s: %s", protection, found)
    assert found


def torture_for(seconds: float, nodes: list[Node], folder: Path, *, apart: bool) -> None:
    """Torture nodes and processes for some seconds, and check what is left."""
    torture = Torture(prepare(nodes, folder), nodes, folder, clocks=clocks(nodes[0].folder.parent, apart))
    with ExitStack() as stack:
        stack.callback(torture.set_clocks)
        torture.run(seconds)
        assert torture.failures == []
        figures = check(torture)
    logger.info("%s", figures)
    assert figures["done"] > 0
    assert torture.nodes_killed
    if IS_LONG:
        from tests.cassandra.tortured import STEPS

        assert set(STEPS) <= set(torture.killed)
