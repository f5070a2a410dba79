"""A process of the torture: threads that save, and that may be killed at a step of the protocol.

``python -m tests.cassandra.tortured`` reads its plan as JSON from its first argument. It writes down what it is about
to save, and what it was told, before it goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from eventsourcing.persistence import IntegrityError, OperationalError, StoredEvent, Tracking

from flask_eventsourcing.cassandra import CassandraSettings, Connection, rows
from flask_eventsourcing.cassandra.rows import Append, Horizon, Key, MaybeDoneError, NotDoneError, Row, stream_rows
from flask_eventsourcing.cassandra.store import CassandraStore
from flask_eventsourcing.cassandra.writing import Writer
from flask_eventsourcing.exceptions import CommitOutcomeUnknownError
from tests.cassandra.sabotage import TOUCHING, leave_gaps, without

THREADS = 4
AGGREGATES = [UUID(int=number) for number in range(1, 13)]
HOT = AGGREGATES[0]
STEPS = (
    "before the insert",
    "during the insert",
    "after the insert",
    "between streams",
    "after the index",
    "after the flag",
    "before the horizon",
    "after the horizon",
)
"""Where a process can be killed."""


@dataclasses.dataclass
class Plan:
    """What a process does.

    :param step: where it is killed, or empty.
    """

    contact_points: list[str]
    port: int
    keyspace: str
    prefix: str
    journal: str
    stop: str
    """A file, which is there when it is over."""
    seed: int
    step: str = ""
    bucket: int = 400
    """Positions in a partition, few, so that all of them cross from one into the next."""
    faults: float = 0.02
    """The part of the plain reads that miss a late row, and of the inserts whose answer is lost."""
    lacks: str = ""
    """The protection that its writers or its readers do without."""

    def connection(self) -> Connection:
        """Return a connection with the cluster."""
        settings = CassandraSettings(tuple(self.contact_points), self.keyspace, 3, port=self.port, patience=30.0)
        return Connection(settings)


class FaultyStore(CassandraStore):
    """A store of which some plain reads are stale, and some answers are lost."""

    def __init__(self, connection: Connection, plan: Plan) -> None:
        super().__init__(connection, plan.prefix)
        self._faults = plan.faults
        self._draw = random.Random()

    def insert(self, row: Row) -> Row | None:
        """Insert a row."""
        found = super().insert(row)
        if self._draw.random() < self._faults:
            raise MaybeDoneError("the answer was lost")
        return found

    def read_rows(self, position: int, limit: int, *, states: bool) -> Sequence[Row]:
        """Read rows, as from nodes that have not got one of the last ones yet."""
        found = list(super().read_rows(position, limit, states=states))
        if found and self._draw.random() < self._faults:
            found.remove(self._draw.choice(found[-4:]))
        return found


class KillingStore(FaultyStore):
    """A store that kills its process when it has reached a step some times."""

    def __init__(self, connection: Connection, plan: Plan, draw: random.Random) -> None:
        super().__init__(connection, plan)
        self._step = plan.step
        self._left = 1 if "horizon" in plan.step else draw.randint(3, 12)
        self._lock = threading.Lock()

    def _reach(self, step: str) -> None:
        if step == self._step and self._is_last():
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_last(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0

    def insert(self, row: Row) -> Row | None:
        """Insert a row."""
        self._reach("before the insert")
        if self._step == "during the insert" and self._is_last():
            threading.Timer(random.uniform(0.0005, 0.02), os.kill, (os.getpid(), signal.SIGKILL)).start()
        found = super().insert(row)
        self._reach("after the insert")
        return found

    def index(self, row: Row) -> None:
        """Write the streams of a row."""
        if self._step == "between streams" and len(list(stream_rows(row))) > 1 and self._is_last():
            # Only those of the first aggregate.
            (first, *_) = list(stream_rows(row))
            for batch in self._batches(first):
                self.connection.execute(batch)
            os.kill(os.getpid(), signal.SIGKILL)
        super().index(row)
        self._reach("after the index")

    def flag(self, row: Row) -> None:
        """Flag a row."""
        super().flag(row)
        self._reach("after the flag")

    def move_horizon(self, horizon: Horizon) -> None:
        """Move the horizon."""
        self._reach("before the horizon")
        super().move_horizon(horizon)
        self._reach("after the horizon")


class OftenMoving(Writer):
    """A writer that moves the horizon often."""

    horizon_rows = 40
    fresh_rows = 8


def prepared(plan: Plan, store: CassandraStore) -> Writer:
    """Return a writer as the plan has it."""
    writer = without(plan.lacks, OftenMoving)(store, store.connection.settings.patience)
    if plan.lacks == TOUCHING:
        leave_gaps(writer)
    return writer


class Journal:
    """What a process says of its saves: it outlives a SIGKILL.

    :param path: a file.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **line: Any) -> None:
        """Write one thing down."""
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return what a process has said."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def repeat(work: Callable[[], Any]) -> Any:
    """Read, again and again until there is an answer."""
    while True:
        try:
            return work()
        except (NotDoneError, MaybeDoneError):
            time.sleep(0.05)


def next_append(store: CassandraStore, draw: random.Random) -> Append:
    """Make the next save of some aggregates, by what their streams say now."""
    keys: list[UUID] = [HOT] if draw.random() < 0.3 else draw.sample(AGGREGATES, draw.choice([1, 1, 2]))
    events = []
    for key in keys:
        version = (repeat(partial(store.last_version, key)) or 0) + 1
        more = range(draw.choice([1, 1, 3]))
        events += [StoredEvent(key, version + each, "topic", os.urandom(draw.randint(1, 200))) for each in more]
    tracking = None
    if draw.random() < 0.05:
        tracking = Tracking("upstream", (repeat(lambda: store.tracked("upstream")) or 0) + 1)
    return Append(events, tracking)


def save(store: CassandraStore, writer: Writer, journal: Journal, draw: random.Random) -> None:
    """Save once, and write down what came of it."""
    append = next_append(store, draw)
    told = str(append.id)
    journal.write(tries=told, events=[[str(each.originator_id), each.originator_version] for each in append.events])
    began = time.monotonic()
    try:
        position = writer.append(append)
    except IntegrityError:
        journal.write(refused=told)
    except CommitOutcomeUnknownError:
        journal.write(unknown=told)
    except OperationalError:
        journal.write(failed=told)
    else:
        journal.write(done=told, position=position, seconds=time.monotonic() - began)


def run(plan: Plan) -> None:
    """Save from some threads until the time is over."""
    draw = random.Random(plan.seed)
    connection = plan.connection()
    store = KillingStore(connection, plan, draw)
    rows.BUCKET = plan.bucket
    writer = prepared(plan, store)
    journal = Journal(plan.journal)
    stop = Path(plan.stop)

    def work(seed: int) -> None:
        own = random.Random(seed)
        while not stop.exists():
            save(store, writer, journal, own)
            time.sleep(own.uniform(0, 0.03))

    threads = [threading.Thread(target=work, args=(draw.random(),)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connection.close()
    journal.write(ended=True)


def changed_once_more(store: CassandraStore, writer: Writer, key: Key) -> int:
    """Change an aggregate, having read it once more at most; return the version."""
    for tries in range(2):
        version = (repeat(lambda: store.last_version(key)) or 0) + 1
        try:
            writer.append(Append([StoredEvent(key, version, "topic", b"last")]))
        except IntegrityError:
            if tries:
                raise
        else:
            return int(version)
    raise RuntimeError("unreachable")


if __name__ == "__main__":
    run(Plan(**json.loads(sys.argv[1])))
