"""The status of projections, and waiting until one has handled an event."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from eventsourcing.persistence import Recording
from sqlalchemy.engine import Connection

from ...exceptions import OldSnapshotError, ProjectionHaltedError, UncommittedEventsError
from ...persistence.dialects.catalogs import naming_lack
from ...persistence.dialects.locks import OpenWriter
from ...tailing import Waiter
from ..checkpoint import HALTED, PAUSED, CheckpointRow
from ..consumers import Consumer, ProjectedApplication
from ..consumers.belonging import Belonging, Mismatch
from ..consumers.inline import applied_inline, find_not_applied
from ..runners import stopped_message
from ..runners.pace import Backoff

SHORTEST_WAIT = 0.002
GROWTH = 1.5
LONGEST_WAIT = 0.1
MOST_IDLE = 8
LOOK_EVERY = 1.0
"""Seconds after which a wait checks again whether the projection fits its log and its tables."""


@dataclass(frozen=True)
class ProjectionStatus:
    """The state of one projection, of the reactions of one, or of a rebuild.

    ``state`` is ``inline``, ``halted``, ``paused``, ``running`` or ``stopped``. It is a fault if it is ``ahead of its
    log``, ``another log``, ``tables missing``, ``tables made again``, ``not applied inline``, ``old code`` (this
    process would stand by), or ``held back`` by a transaction that has been open for longer than
    ``EVENTSOURCING_STALL_LIMIT``. Then, and if it is paused, ``problem`` has the remedy.

    ``head`` is the last committed position. ``writer`` is the oldest transaction that keeps readers from reaching the
    head, and ``writer_seconds`` its age, or None if the role may not see it. ``lag_events`` counts the events of its
    topics that it has not handled, ``lag_seconds`` is the age of the first of them. ``since`` is when the runner took
    over. ``code_changed`` says that the code of this process differs from that of the last rebuild. ``changed_by`` and
    ``reason`` are those of the operator who paused, resumed, skipped or reset it last.
    """

    name: str
    application: str
    state: str
    position: int
    head: int
    lag_events: int
    lag_seconds: float | None
    runner: str | None
    since: datetime | None
    error: str | None
    failed_position: int | None
    dead_letters: int
    waiting: int
    problem: str | None = None
    code_changed: bool = False
    writer: str | None = None
    writer_seconds: float | None = None
    changed_by: str | None = None
    reason: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether it runs, or need not run, and nothing was set aside. Otherwise an operator has to do something."""
        return self.state in ("running", "inline") and not self.dead_letters

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict for JSON. Times are in ISO 8601."""
        values = asdict(self)
        values["since"] = None if self.since is None else self.since.isoformat()
        return values


@dataclass(frozen=True)
class Health:
    """The state of all projections of a host. It is what a view for monitoring returns, as JSON."""

    projections: tuple[ProjectionStatus, ...]

    @property
    def ok(self) -> bool:
        """Whether each of them is healthy. Answer 503 where it is False."""
        return all(projection.healthy for projection in self.projections)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict for JSON, with the key ``ok`` and the list ``projections``. Times are in ISO 8601."""
        return {"ok": self.ok, "projections": [projection.to_dict() for projection in self.projections]}


def status_of(consumer: Consumer) -> ProjectionStatus:
    """Return the status of a consumer, from its row, its lock and its log."""
    mark = consumer.application.high_water_mark()
    inline = consumer.kind == "projection" and consumer.projection_class.inline
    belonging = Belonging(consumer)
    with _reading(consumer) as connection:
        found = consumer.checkpoint.read(connection)
        row = found or CheckpointRow.never_run(consumer.name)
        end, writer = consumer.application.log.look_for_writer(connection, mark)
        running = _is_running(consumer, connection, row)
        failed, waiting = consumer.application.dead_letters.count(connection, consumer.name)
        mismatch = _mismatch(belonging, connection, found)
        position, topics, not_applied = _progress(consumer, connection, row, mark, end)
        mismatch = mismatch or not_applied
    if mismatch is None and not inline:
        mismatch = _problem(belonging, row, running, mark, end, writer)
    mismatch = _paused(consumer, row, mismatch)
    state = _state(row, inline=inline, running=running)
    return ProjectionStatus(
        name=consumer.name,
        application=consumer.application.name,
        state=state if mismatch is None else mismatch.state,
        position=position,
        head=end,
        lag_events=sum(topics.values()),
        lag_seconds=_age(consumer, position, mark, list(topics)) if topics else 0.0,
        **_runner(row, running=running),
        error=row.error,
        failed_position=row.failed_position,
        dead_letters=failed,
        waiting=waiting,
        problem=None if mismatch is None else mismatch.text,
        code_changed=belonging.has_changed_code(row),
        **_writer(writer),
        changed_by=row.changed_by,
        reason=row.reason,
    )


@contextmanager
def _reading(consumer: Consumer) -> Iterator[Connection]:
    """Open a connection whose errors name a missing table of this package."""
    application = consumer.application
    with (
        application.engine.connect() as connection,
        naming_lack(application.datastore.dialect, *application.models.tables.values()),
    ):
        yield connection


def _progress(
    consumer: Consumer, connection: Connection, row: CheckpointRow, mark: int, end: int
) -> tuple[int, dict[str, int], Mismatch | None]:
    """Return how far a consumer is, what it has still to do by topic, and whether it lacks events before that."""
    if consumer.kind == "projection" and consumer.projection_class.inline:
        return applied_inline(consumer, connection, row, mark, end)
    if row.position >= end:
        return row.position, {}, None
    topics = consumer.count_topics(connection, row.position, end, exact=False)
    return row.position, topics, find_not_applied(consumer, connection, row, mark)


def _is_running(consumer: Consumer, connection: Connection, row: CheckpointRow) -> bool:
    return row.token is not None and consumer.lock().is_held(connection, row.leased_until)


def _problem(
    belonging: Belonging, row: CheckpointRow, running: bool, mark: int, end: int, writer: OpenWriter | None
) -> Mismatch | None:
    found = None if running else belonging.find_old_code(row)
    return found if found is not None or row.state == HALTED else belonging.find_stall(mark, end, writer)


def _paused(consumer: Consumer, row: CheckpointRow, mismatch: Mismatch | None) -> Mismatch | None:
    if row.state != PAUSED:
        return mismatch
    text = stopped_message(consumer, row)
    return Mismatch(PAUSED, text if mismatch is None else f"{text} {mismatch.text}")


def _state(row: CheckpointRow, *, inline: bool, running: bool) -> str:
    return "inline" if inline else "halted" if row.state == HALTED else "running" if running else "stopped"


def _runner(row: CheckpointRow, *, running: bool) -> dict[str, Any]:
    return {"runner": row.runner if running else None, "since": _aware(row.running_since) if running else None}


def _writer(writer: OpenWriter | None) -> dict[str, Any]:
    return {} if writer is None else {"writer": writer.name, "writer_seconds": writer.seconds}


def _mismatch(belonging: Belonging, connection: Connection, row: CheckpointRow | None) -> Mismatch | None:
    if row is None:
        return belonging.find_missing(connection) or belonging.find_orphan(connection)
    return belonging.find_mismatch(connection, row)


def _aware(time: datetime | None) -> datetime | None:
    return None if time is None else time.replace(tzinfo=UTC)


def _age(consumer: Consumer, position: int, mark: int, topics: Sequence[str]) -> float | None:
    found = consumer.application.read_log(position, 1, mark, topics)
    if not found:
        return 0.0
    timestamp = consumer.application.time_of(found[0])
    return None if timestamp is None else max(0.0, (datetime.now(UTC) - timestamp).total_seconds())


class Waiters:
    """The connections that listen for moved positions, kept for later calls."""

    def __init__(self, application: ProjectedApplication) -> None:
        self.application = application
        self._idle: list[tuple[int, Waiter]] = []
        self._lock = threading.Lock()

    def take(self) -> Waiter:
        """Return a waiter that is not in use; those of a parent process are not used."""
        with self._lock:
            while self._idle:
                pid, waiter = self._idle.pop()
                if pid == os.getpid():
                    return waiter
        return self.application.datastore.dialect.update_waiter(self.application.models.tables["projections"])

    def give_back(self, waiter: Waiter) -> None:
        """Keep a waiter for the next call."""
        waiter.rest()
        with self._lock:
            if len(self._idle) < MOST_IDLE:
                self._idle.append((os.getpid(), waiter))
                return
        waiter.close()

    def close(self) -> None:
        """Close the connections of this process."""
        with self._lock:
            idle, self._idle = self._idle, []
        for pid, waiter in idle:
            if pid == os.getpid():
                waiter.close()


def last_position(recordings: Any) -> int:
    """Return the last position in the return value of ``Application.save()``, or in an iterable of positions.

    :raises TypeError: when it is neither.
    """
    if isinstance(recordings, int):
        return recordings
    if isinstance(recordings, Iterable):
        positions = [item.notification.id if isinstance(item, Recording) else item for item in recordings]
        if all(isinstance(position, int) for position in positions):
            return max(positions, default=0)
    raise TypeError(f"wait_for takes the recordings that save() returned, or a position; found {recordings!r}.")


def wait_for(consumer: Consumer, recordings: Any, timeout: float, waiters: Waiters) -> None:
    """Block until a projection has handled the recorded events.

    :raises UncommittedEventsError: when the current session has uncommitted events, which no projection can see.
    :raises ProjectionHaltedError: when the projection has halted or is paused before them.
    :raises TimeoutError: after *timeout* seconds.
    :raises CheckpointMismatchError: when it does not fit its log or its tables, or lacks events as an inline one.
    :raises OldSnapshotError: when the current session's transaction could not see it.
    """
    unit = consumer.application.host.open_unit()
    if unit is not None and unit.batches:
        raise UncommittedEventsError(f"wait_for waits for committed events: call {_ends(consumer)[0]} before it.")
    position = last_position(recordings)
    if position == 0:
        return
    if consumer.projection_class.inline:
        _check_inline(consumer)
        return
    goal = _Goal(consumer, position)
    if not goal.is_reached():
        _wait(goal, timeout, waiters)
    # The caller is going to read in its session, whose snapshot may be older.
    unit = consumer.application.host.unit()
    if unit is not None and unit.has_begun:
        seen = consumer.checkpoint.read(unit.connection())
        if seen is None or seen.position < position:
            raise OldSnapshotError(
                "The session's transaction reads from an older snapshot than the one that has the events: call "
                f"{_ends(consumer)[1]} before wait_for."
            )


def _ends(consumer: Consumer) -> tuple[str, str]:
    return consumer.application.datastore.dialect.options.ends


def _check_inline(consumer: Consumer) -> None:
    """Check that an inline projection has applied every committed event.

    :raises CheckpointMismatchError: when it has not.
    """
    mark = consumer.application.high_water_mark()
    with _reading(consumer) as connection:
        row = consumer.checkpoint.read(connection) or CheckpointRow.never_run(consumer.name)
        mismatch = find_not_applied(consumer, connection, row, mark)
    if mismatch is not None:
        raise mismatch.error


def _wait(goal: _Goal, timeout: float, waiters: Waiters) -> None:
    deadline = time.monotonic() + timeout
    waiter = waiters.take()
    try:
        pause = Backoff(SHORTEST_WAIT, LONGEST_WAIT, GROWTH)
        while True:
            remaining = deadline - time.monotonic()
            if not remaining > 0:
                raise TimeoutError(
                    f"{goal.consumer.name} has not reached position {goal.position} within {timeout:g} s: "
                    f"{_why_not(goal.consumer)}"
                )
            if waiter.wait(min(pause.seconds, remaining)):
                pause.reset()
            else:
                pause.grow()
            if goal.is_reached():
                return
    finally:
        waiters.give_back(waiter)


def _why_not(consumer: Consumer) -> str:
    writer = status_of(consumer).writer
    run = consumer.application.command("run")
    return f"is {run} running?" if writer is None else f"readers wait for {writer}."


class _Goal:
    """A position that is waited for."""

    def __init__(self, consumer: Consumer, position: int) -> None:
        self.consumer = consumer
        self.position = position
        self._looked = -math.inf

    def is_reached(self) -> bool:
        """Whether the projection has dealt with it.

        :raises ProjectionHaltedError: when it stands before that, or does not fit its log or its tables.
        """
        with _reading(self.consumer) as connection:
            found = self.consumer.checkpoint.read(connection)
            row = found or CheckpointRow.never_run(self.consumer.name)
            if time.monotonic() > self._looked + LOOK_EVERY:
                # If it does not fit, its position tells nothing, and no worker would begin.
                self._looked = time.monotonic()
                mismatch = _mismatch(Belonging(self.consumer), connection, found)
                mismatch = mismatch or find_not_applied(self.consumer, connection, row, self.position)
                if mismatch is not None:
                    raise mismatch.error
        if row.state in (HALTED, PAUSED) and row.position < self.position:
            raise ProjectionHaltedError(stopped_message(self.consumer, row))
        return row.position >= self.position
