"""Locks: one for each projection, so that one process runs it, and the write queue of a SQLite database.

Some databases have locks that belong to a connection and end with it, so that a killed process frees its own at once.
Elsewhere, and behind a proxy that shares connections among clients, there is a lease that is renewed.

The owner of a write queue is a connection and never a thread: an async view changes threads between a save and its
commit, greenlets share one, and the system uses the identifier of a thread again.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ...exceptions import WriteTimeoutError
from ...tailing import Waiter
from .event_tables import EventTable
from .swapping import ForSwaps

NAMESPACE = "flask_eventsourcing"


class OpenWriter(NamedTuple):
    """A transaction in progress that has appended to a log, and so holds its readers back."""

    name: str
    """Such as ``process 4711``."""
    seconds: float | None
    """Seconds since it began; None if this role may not see that."""
    remedy: str
    """What ends it."""


def utc_now() -> datetime:
    """Return the time in UTC, without a time zone, as in the tables of projections."""
    return datetime.now(UTC).replace(tzinfo=None)


@cache
def _clock(sql: str, seconds: float) -> sa.ColumnElement[datetime]:
    return sa.literal_column(sql.format(seconds), sa.DateTime())


class RunnerLock(ABC):
    """The right to run one projection.

    :param name: of the table and the projection.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    @property
    def leased(self) -> bool:
        """Whether the right is a lease, kept in the projection's row, rather than a lock of the server."""
        return False

    @abstractmethod
    def acquire(self) -> bool:
        """Take the lock if it is free, and return whether it is held now."""

    @abstractmethod
    def check(self) -> None:
        """Raise an error when the lock was lost since it was taken."""

    @abstractmethod
    def release(self) -> None:
        """Give the lock back."""

    def leave(self) -> None:
        """Leave the server on which the lock is."""
        self.release()

    @abstractmethod
    def is_held(self, connection: Connection, leased_until: datetime | None) -> bool:
        """Whether the lock is taken now."""


FARTHEST = 60
"""Seconds. If a lease ends later than this, the clock was wrong when it was taken."""


class Lease(RunnerLock):
    """No lock: the claim in the projection's row holds until its time is over.

    :param time_in: of the dialect: the database's clock, as those of processes may be wrong.
    """

    def __init__(self, engine: Engine, name: str, time_in: Callable[[float], sa.ColumnElement[datetime]]) -> None:
        super().__init__(engine, name)
        self._time_in = time_in

    @property
    def leased(self) -> bool:
        """Return True."""
        return True

    def acquire(self) -> bool:
        """Return True: the claim decides."""
        return True

    def check(self) -> None:
        """Do nothing: a renewal of the lease shows whether it was lost."""

    def release(self) -> None:
        """Do nothing: the claim is released."""

    def is_held(self, connection: Connection, leased_until: datetime | None) -> bool:
        """Whether the lease is valid."""
        if leased_until is None:
            return False
        until = sa.literal(leased_until, sa.DateTime())
        return bool(connection.scalar(sa.select(until.between(self._time_in(0), self._time_in(FARTHEST)))))


LOOK_AGAIN = 0.5
"""Seconds after which a waiting thread checks whether the owner of the queue still exists."""


class _Place:
    """The place of an owner, or of a waiting thread.

    The connection is held weakly: a connection that is gone, or a closed one of SQLAlchemy's, does not own the queue
    any more. SQLAlchemy's may be closed without the driver's, after a listener has refused its commit.
    """

    __slots__ = ("called", "over", "owner", "thread")

    def __init__(self, owner: object) -> None:
        self.owner = weakref.ref(owner)
        # Only to refuse at once that a thread waits for itself.
        self.thread = weakref.ref(threading.current_thread())
        self.called: threading.Event | None = None
        """Set for a waiting thread when it acquires the queue."""
        self.over = False

    def is_left(self) -> bool:
        owner = self.owner()
        return self.over or owner is None or bool(getattr(owner, "closed", False))


class WriteQueue:
    """The right to use a database, of one owner at a time.

    It is no ``threading.Lock``, because another thread than the one that acquired it may release it, and a thread that
    would wait for itself gets an error at once.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._first: _Place | None = None
        self._waiting: deque[_Place] = deque()

    def acquire(self, owner: object, timeout: float, *, reading: bool = False) -> bool:
        """Acquire the queue for an owner, first come first served, waiting up to *timeout* seconds.

        With *reading* and a transaction of this very thread in the way, nothing is acquired and False is returned.

        :raises WriteTimeoutError: when the queue does not become free, or this thread has acquired it for another.
        """
        place = _Place(owner)
        try:
            with self._lock:
                first = self._first
                if self._is_free():
                    if not self._waiting:
                        self._first = place
                        return True
                elif first is not None and first.owner() is owner:
                    first.thread = place.thread
                    return True
                elif first is not None and first.thread() is threading.current_thread():
                    if reading:
                        return False
                    raise WriteTimeoutError(
                        f"This thread has an open write transaction on {self.name} in another session: "
                        "commit or roll it back before writing through a second one."
                    )
                called = place.called = threading.Event()
                self._waiting.append(place)
        finally:
            self._call_next()
        if not self._wait(place, called, timeout):
            raise WriteTimeoutError(
                f"Waited {timeout:g} s for another thread's transaction on {self.name}: end transactions with "
                "commit() or rollback() (in Flask, db.session.commit()), keep them short, or raise "
                "EVENTSOURCING_LOCK_TIMEOUT."
            )
        return True

    def try_acquire(self, owner: object, *, blocking: bool = True) -> bool:
        """Acquire the queue if it is free. Without *blocking*, it does not even wait for the queue's own lock."""
        place = _Place(owner)
        if not self._lock.acquire(blocking=blocking):
            return False
        try:
            free = self._is_free() and not self._waiting
            if free:
                self._first = place
            return free
        finally:
            self._lock.release()
            self._call_next()

    def _wait(self, place: _Place, called: threading.Event, timeout: float) -> bool:
        """Wait, and leave when the time is over; returns whether the queue is acquired."""
        deadline = time.monotonic() + timeout
        with ExitStack() as interrupted:
            interrupted.callback(self._give_up, place)
            while not called.wait(max(0, min(LOOK_AGAIN, deadline - time.monotonic()))):
                # No one is notified when an owner is garbage-collected.
                self._call_next()
                if time.monotonic() >= deadline:
                    break
            interrupted.pop_all()
        return called.is_set() or not self._leave(place)

    def _give_up(self, place: _Place) -> None:
        if not self._leave(place):
            place.over = True
            self._call_next()

    def _leave(self, place: _Place) -> bool:
        """Stop waiting. Returns False if the queue was handed to this place in the meantime."""
        try:
            with self._lock:
                self._waiting.remove(place)
        except ValueError:
            return False
        finally:
            self._call_next()
        return True

    def release(self, owner: object) -> None:
        """Give the queue, if this owner has it, to the one that has waited longest."""
        first = self._first
        if first is not None and first.owner() is owner:
            first.over = True
            self._call_next()

    def _call_next(self) -> None:
        # The garbage collector may call this while this thread holds the lock, so it must not wait for the lock. Every
        # thread that had the lock comes here afterwards, and sees what was released meanwhile.
        while self._waiting and self._is_free() and self._lock.acquire(blocking=False):
            try:
                if self._waiting and self._is_free():
                    self._first = first = self._waiting.popleft()
                    if first.called is not None:
                        first.called.set()
            finally:
                self._lock.release()

    def _is_free(self) -> bool:
        return self._first is None or self._first.is_left()

    def is_owner(self, owner: object) -> bool:
        """Whether an owner has the queue."""
        first = self._first
        return first is not None and not first.is_left() and first.owner() is owner


_queues: weakref.WeakValueDictionary[tuple[int, str], WriteQueue] = weakref.WeakValueDictionary()


def write_queue_of(name: str) -> WriteQueue:
    """Return the queue of a database. A forked process has its own, because the parent's may be taken for ever."""
    key = (os.getpid(), name)
    # Without a lock, which another thread may have held at the time of a fork.
    queue = _queues.get(key)
    if queue is None:
        queue = WriteQueue(name)
        queue = _queues.setdefault(key, queue)
    return queue


class ForProjections(ForSwaps):
    """The part of a dialect that projections use."""

    engine: Engine
    batch_seconds: float = 0.5
    """Seconds that a batch of a projection takes at most, roughly: a longer one keeps SIGTERM waiting."""
    keeps_microseconds = False
    """Whether a column of SQLAlchemy's ``DateTime`` keeps the microseconds of a time."""

    def is_node(self, connection: Connection | None = None) -> bool:
        """Whether the server is one of several that take writes, each with locks of its own.

        :param connection: to ask on, instead of one from the pool.
        """
        return False

    clock: ClassVar[str] = ""
    """SQL for the time of the database in UTC, so many seconds from now."""

    def time_in(self, seconds: float) -> sa.ColumnElement[datetime]:
        """Return the time of the database in UTC, so many seconds from now: the same expression each time."""
        return _clock(self.clock, seconds)

    locks_what_it_compares = False
    """Whether a change locks the rows that its conditions look for, so that other writers cannot insert such rows."""
    canceled: ClassVar[frozenset[object]] = frozenset()
    """The driver's codes of errors after which the server has ended a statement that took too long."""
    full: ClassVar[frozenset[object]] = frozenset()
    """The codes for a full disk."""
    has_one_writer = False
    """Whether there is one writer at a time, so that a handler that waits is waiting for itself."""

    @staticmethod
    def passes(driver_error: BaseException) -> bool:
        """Whether a driver's error says that a lock was not obtained in time, so that another try may succeed."""
        return False

    @staticmethod
    def is_read_only(driver_error: BaseException) -> bool:
        """Whether a driver's error says that the server takes no writes, such as one that is not the primary."""
        return False

    def runner_lock(self, name: str) -> RunnerLock:
        """Return the lock that lets one process run a projection; here there is none but the lease."""
        return Lease(self.engine, name, self.time_in)

    def shared_waiter(self, table: EventTable) -> Waiter:
        """Return a waiter for news of a log, for one of many runners; here it polls."""
        return Waiter()

    def update_and_notify(
        self, connection: Connection, table: sa.Table, change: sa.Update, message: str, parameters: dict[str, Any]
    ) -> int:
        """Update rows of a table, notify waiting readers, and return how many rows were changed."""
        return connection.execute(change, parameters).rowcount

    def update_waiter(self, table: sa.Table) -> Waiter:
        """Return a waiter for updates of a table; here it polls."""
        return Waiter()

    def free_connections(self, connection: Connection) -> int | None:
        """Return how many more connections the server takes, or None if it does not tell."""
        return None

    def shares_connections(self) -> bool:
        """Whether a proxy gives a connection of the server to other clients between two transactions."""
        return False

    def file_beside(self, connection: Connection) -> Path | None:
        """Return the file of a database with one writer at a time, beside which notes can be kept, or None."""
        return None

    def oldest_writer(self, connection: Connection, table: EventTable) -> OpenWriter | None:
        """Return the oldest transaction that holds readers of a log back. Here none does, because writers queue."""
        return None
