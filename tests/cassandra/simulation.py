"""A cluster and processes in one thread: time-outs of unknown outcome, stale reads and crashes at every step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

import greenlet
from eventsourcing.persistence import IntegrityError, OperationalError, StoredEvent, Tracking

from flask_eventsourcing.cassandra.queueing import Pace, Queue, Ticket
from flask_eventsourcing.cassandra.reading import Reader
from flask_eventsourcing.cassandra.rows import (
    Append,
    Horizon,
    Key,
    MaybeDoneError,
    NotDoneError,
    Row,
    bucket_of,
    stream_rows,
)
from flask_eventsourcing.cassandra.writing import Writer
from flask_eventsourcing.exceptions import CommitOutcomeUnknownError

PATIENCE = 3.0
AGGREGATES = [UUID(int=number) for number in range(1, 4)]


class Crash(BaseException):
    """The process is killed."""


class Cluster:
    """What the nodes have.

    :param draw: what decides.
    :param faults: the part of calls that do not go as they should.
    """

    def __init__(self, draw: random.Random, faults: float) -> None:
        self.draw, self.faults = draw, faults
        self.rows: dict[int, Row] = {}
        self.unseen: set[int] = set()
        """Rows that are decided, but which a plain read may miss."""
        self.hanging: dict[int, Row] = {}
        """Proposals that the next writer may complete."""
        self.flags: set[int] = set()
        self.streams: dict[Key, dict[int, bytes]] = {}
        self.upstream: dict[str, int] = {}
        self.horizon = Horizon()
        self.clock = 0.0
        self.hub = greenlet.getcurrent()

    def step(self) -> None:
        """Let others go on, or be killed."""
        self.clock += 0.001
        if greenlet.getcurrent() is not self.hub:
            self.hub.switch()

    def fails(self) -> bool:
        """Whether something goes wrong now."""
        return self.draw.random() < self.faults

    def decide(self, position: int) -> None:
        """Complete a proposal that hangs, or see nothing of it."""
        hanging = self.hanging.get(position)
        if hanging is not None and position not in self.rows and self.draw.random() < 0.5:
            self.rows[position] = hanging

    def read(self, position: int) -> Row | None:
        """Return a row as it is."""
        row = self.rows.get(position)
        return replace(row, indexed=True) if row is not None and position in self.flags else row


class SimulatedStore:
    """What one process sees of the cluster.

    :param cluster: where it is kept.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def _ask(self) -> None:
        self._cluster.step()
        if self._cluster.fails():
            raise NotDoneError("no answer")

    def insert(self, row: Row) -> Row | None:
        """Insert a row, as a conditional insert does it."""
        cluster, position = self._cluster, row.position
        self._ask()
        outcome = cluster.draw.choice(["hangs", "unseen", "lost"]) if cluster.fails() else "told"
        if outcome == "hangs":
            if position not in cluster.rows:
                cluster.hanging[position] = row
            raise MaybeDoneError("timed out")
        if outcome == "lost":
            raise MaybeDoneError("timed out")
        cluster.decide(position)
        found = cluster.read(position)
        if found is None:
            cluster.rows[position] = row
        cluster.hanging.pop(position, None)
        if outcome == "unseen":
            cluster.unseen.add(position)
            cluster.step()
            raise MaybeDoneError("timed out")
        # A writer that lost has seen the row. Others may not see it yet.
        if found is None:
            cluster.unseen.discard(position)
        cluster.step()
        return found

    def read_rows(self, position: int, limit: int, *, states: bool) -> Sequence[Row]:
        """Read plainly."""
        self._ask()
        cluster = self._cluster
        for bucket in (bucket_of(position), bucket_of(position) + 1):
            rows = [
                each
                for each in (cluster.read(at) for at in sorted(cluster.rows) if at >= position)
                if each is not None and bucket_of(each.position) == bucket and self._sees(each)
            ]
            if rows:
                return rows[:limit]
        return []

    def _sees(self, row: Row) -> bool:
        cluster = self._cluster
        return row.position not in cluster.unseen or cluster.draw.random() < 0.5

    def read_row(self, position: int) -> Row | None:
        """Read so that what hangs is settled."""
        self._ask()
        self._cluster.decide(position)
        self._cluster.hanging.pop(position, None)
        self._cluster.unseen.discard(position)
        return self._cluster.read(position)

    def row_before(self, position: int) -> int | None:
        """Read plainly."""
        self._ask()
        cluster = self._cluster
        near = (bucket_of(position), bucket_of(position) - 1)
        found = [at for at, row in cluster.rows.items() if at <= position and bucket_of(at) in near and self._sees(row)]
        return max(found, default=None)

    def last_version(self, originator_id: Key) -> int | None:
        """Read a stream."""
        self._ask()
        return max(self._cluster.streams.get(originator_id, {}), default=None)

    def last_versions(self, originator_ids: Sequence[Key]) -> Mapping[Key, int]:
        """Read several streams."""
        self._ask()
        streams = self._cluster.streams
        return {each: max(streams[each]) for each in originator_ids if streams.get(each)}

    def tracked(self, name: str) -> int | None:
        """Read how far an upstream application was processed."""
        self._ask()
        return self._cluster.upstream.get(name)

    def has_snapshot(self, originator_id: Key, version: int) -> bool:
        """There are none."""
        return False

    def index(self, row: Row) -> None:
        """Write streams one by one."""
        cluster = self._cluster
        self._ask()
        for together in stream_rows(row):
            for each in together:
                known = cluster.streams.setdefault(each.originator_id, {})
                known[each.version] = each.content.state
            cluster.step()
            if cluster.fails():
                raise MaybeDoneError("timed out")
        for part in row.parts:
            if part.upstream is not None:
                known_position = cluster.upstream.get(part.upstream, 0)
                cluster.upstream[part.upstream] = max(known_position, part.upstream_position or 0)

    def flag(self, row: Row) -> None:
        """Set the flag, or lose it."""
        self._cluster.step()
        if not self._cluster.fails():
            self._cluster.flags.add(row.position)

    def read_horizon(self) -> Horizon:
        """Read it."""
        self._ask()
        return self._cluster.horizon

    def move_horizon(self, horizon: Horizon) -> None:
        """Move it."""
        self._ask()
        self._cluster.horizon = max(self._cluster.horizon, horizon)

    def now(self) -> float:
        """Return the time, which passes with each step of any process."""
        return self._cluster.clock

    def sleep(self, seconds: float) -> None:
        """Let others go on."""
        end = self._cluster.clock + seconds
        while self._cluster.clock < end:
            self._cluster.clock += seconds / 4
            self._cluster.step()


class QuickWriter(Writer):
    """A writer that moves the horizon often."""

    horizon_rows = 4
    most_rows = 8
    fresh_rows = 1


class Company(Queue):
    """A queue in which other threads of the process wait too; they have no life of their own.

    :param draw: what decides.
    :param make: makes the append of another thread, or None.
    """

    def __init__(self, draw: random.Random, make: Callable[[], Append | None]) -> None:
        super().__init__()
        self._draw, self._make = draw, make
        self.tickets: list[Ticket] = []

    def take(self, taken: Sequence[Ticket]) -> list[Ticket]:
        """Let others queue, and take what can be committed together."""
        for _ in range(self._draw.choice([0, 0, 1, 3])):
            append = self._make()
            if append is not None:
                self.tickets.append(Ticket(append))
                self._waiting.append(self.tickets[-1])
        return super().take(taken)

    def hand_over(self) -> None:
        """No thread leads: the waiting ones give up."""
        self._waiting.clear()
        super().hand_over()


class Simulation:
    """Some writers and a reader on one cluster.

    :param seed: decides everything.
    :param writer: the class of the writers.
    :param prepare: changes a writer or reader before it is used.
    """

    def __init__(self, seed: int, writer: type[Writer] = QuickWriter, prepare: Callable[[object], object] = id) -> None:
        self.draw = random.Random(seed)
        self.cluster = Cluster(self.draw, self.draw.choice([0.0, 0.05, 0.2]))
        self._writer, self._prepare = writer, prepare
        self.acknowledged: dict[UUID, int] = {}
        self.refused: set[UUID] = set()
        self.tailed: list[tuple[int, Key, int]] = []
        self._companies: list[Company] = []
        self._number = 0

    def run(self) -> None:
        """Run it, and check what is promised.

        :raises AssertionError: when something is not as promised.
        """
        crashes = self.draw.choice([0, 1, 3])
        processes = [self._process() for _ in range(self.draw.randint(2, 4))]
        tail = greenlet.greenlet(self._tail, self.cluster.hub)
        left = 600
        while processes and left:
            left -= 1
            process = self.draw.choice([*processes, tail])
            if process is not tail and crashes and self.draw.random() < 0.02:
                crashes -= 1
                kill(process)
                processes.remove(process)
                processes.append(self._process())
                continue
            process.switch()
            processes = [each for each in processes if not each.dead]
        for each in [*processes, tail]:
            kill(each)
        self.check()

    def _process(self) -> greenlet.greenlet:
        return greenlet.greenlet(self._write, self.cluster.hub)

    def new_writer(self) -> tuple[SimulatedStore, Writer]:
        """Start a process."""
        store = SimulatedStore(self.cluster)
        writer = self._writer(store, PATIENCE, Pace(store, self.draw))
        self._prepare(writer)
        return store, writer

    def _write(self) -> None:
        store, writer = self.new_writer()
        known: dict[Key, int] = {}
        company = Company(self.draw, lambda: self._append(store, known))
        writer._queue = company
        self._companies.append(company)
        for _ in range(self.draw.randint(2, 6)):
            self._append_once(store, writer, known)

    def _append_once(self, store: SimulatedStore, writer: Writer, known: dict[Key, int]) -> None:
        append = self._append(store, known)
        if append is None:
            return
        try:
            position = writer.append(append)
        except IntegrityError:
            self.refused.add(append.id)
            known.clear()
        except CommitOutcomeUnknownError:
            known.clear()
        except OperationalError:
            self.refused.add(append.id)
        else:
            self.acknowledged[append.id] = position
            known.update({event.originator_id: event.originator_version for event in append.events})

    def _told(self, ticket: Ticket) -> None:
        if ticket.position is not None:
            self.acknowledged[ticket.append.id] = ticket.position
        elif isinstance(ticket.error, IntegrityError):
            self.refused.add(ticket.append.id)

    def _append(self, store: SimulatedStore, known: dict[Key, int]) -> Append | None:
        events: list[StoredEvent] = []
        tracking = None
        try:
            for key in self.draw.sample(AGGREGATES, self.draw.choice([0, 1, 1, 1, 2])):
                if key not in known or self.draw.random() < 0.3:
                    known[key] = store.last_version(key) or 0
                for more in range(self.draw.choice([1, 1, 2])):
                    self._number += 1
                    state = str(self._number).encode()
                    events.append(StoredEvent(key, known[key] + 1 + more, "topic", state))
            if not events or self.draw.random() < 0.2:
                tracking = Tracking("upstream", (store.tracked("upstream") or 0) + 1)
        except NotDoneError:
            return None
        return Append(events=events, tracking=tracking)

    def _tail(self) -> None:
        store, writer = self.new_writer()
        reader = Reader(store, writer, PATIENCE)
        self._prepare(reader)
        while True:
            self.cluster.step()
            self._read_on(reader)

    def _read_on(self, reader: Reader) -> None:
        after = self.tailed[-1][0] if self.tailed else 0
        try:
            page = reader.page(after + 1, self.draw.choice([1, 2, 10]), None, ())
        except OperationalError:
            return
        for each in page:
            stream = self.cluster.streams.get(each.originator_id, {})
            assert set(range(1, each.originator_version + 1)) <= set(stream), "handed out before it was indexed"
            self.tailed.append((each.id, each.originator_id, each.originator_version))

    def check(self) -> None:
        """Check the log, and what can be done afterwards."""
        for ticket in (each for company in self._companies for each in company.tickets):
            self._told(ticket)
        self.cluster.faults = 0.0
        for position in list(self.cluster.hanging):
            self.cluster.decide(position)
        self._check_outcomes()
        # Each aggregate can be changed by a process that starts, after it was read once more at most.
        store, writer = self.new_writer()
        for key in AGGREGATES:
            self._change(store, writer, key)
        reader = Reader(store, writer, PATIENCE)
        self._prepare(reader)
        for _ in range(100):
            # A plain read may miss the last row for some time.
            if len(self.tailed) < len(self._log()):
                self._read_on(reader)
        self._check_log()

    def _change(self, store: SimulatedStore, writer: Writer, key: UUID) -> None:
        for tries in range(2):
            version = (store.last_version(key) or 0) + 1
            try:
                append = Append(events=[StoredEvent(key, version, "topic", b"last")])
                self.acknowledged[append.id] = writer.append(append)
            except IntegrityError:
                assert tries == 0, "an aggregate cannot be changed any more"
            else:
                return

    def _chain(self) -> list[Row]:
        return [self.cluster.rows[position] for position in sorted(self.cluster.rows)]

    def _log(self) -> list[tuple[int, Key, int]]:
        return [(position, key, version) for row in self._chain() for position, key, version, _ in row.located()]

    def _check_outcomes(self) -> None:
        recorded = Counter(part.id for row in self._chain() for part in row.parts)
        assert set(self.acknowledged) <= set(recorded), "lost"
        assert not self.refused & set(recorded), "refused, and recorded"
        assert set(recorded.values()) <= {1}, "recorded twice"

    def _check_log(self) -> None:
        self._check_outcomes()
        end, tracked, versions = 1, 0, dict.fromkeys(AGGREGATES, 0)
        for row in self._chain():
            assert row.position == end, "rows do not touch"
            end = row.end
            for _, key, version, _ in row.located():
                assert isinstance(key, UUID)
                assert version == versions[key] + 1, "versions do not follow each other"
                versions[key] = version
            for part in row.parts:
                if part.upstream_position is not None:
                    assert part.upstream_position > tracked, "processed twice"
                    tracked = part.upstream_position
        assert self.tailed == self._log(), "the reader saw another log"
        for key, version in versions.items():
            assert sorted(self.cluster.streams.get(key, {})) == list(range(1, version + 1)), "a stream is not the log"


def kill(process: greenlet.greenlet) -> None:
    """Kill a process where it stands."""
    if not process.dead:
        try:
            process.throw(Crash)
        except Crash:
            return
