"""The queue of the threads of a process that write to one SQLite database."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from typing import Any, NamedTuple

from ...exceptions import WriteTimeoutError

LOOK_AGAIN = 0.5
"""Seconds after which one who waits looks whether the connection that has the turn is still there."""


class Turn(NamedTuple):
    """Who has the turn, or waits for it. The connection is held weakly: one that is gone has the turn no longer."""

    thread: int
    connection: weakref.ref[Any]


class Gate:
    """The turn to use a database, of one connection at a time, and of one thread where they share the connection.

    ``threading.Lock`` would not do: the turn may be given back by another thread than the one that took it, and a
    thread that waits for itself is to be told so at once.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._owner: Turn | None = None
        self._waiting: deque[tuple[Turn, threading.Event]] = deque()

    def acquire(self, connection: object, timeout: float) -> None:
        """Take the turn for a connection of this thread, first come first served, waiting up to *timeout* seconds.

        :raises WriteTimeoutError: when it does not come, or when this thread has it for another connection.
        """
        wanted = Turn(threading.get_ident(), weakref.ref(connection))
        with self._lock:
            owner = self._owner
            if owner is None or owner.connection() is None:
                self._owner = wanted
                return
            if owner.thread == wanted.thread:
                if owner.connection() is connection:
                    return
                raise WriteTimeoutError(
                    f"This thread has an open write transaction on {self.name} in another session: "
                    "commit or roll it back before writing through a second one."
                )
            place = (wanted, threading.Event())
            self._waiting.append(place)
        if not self._wait(place, timeout):
            raise WriteTimeoutError(
                f"Waited {timeout:g} s for another thread's transaction on {self.name}: end transactions with "
                "db.session.commit() or .rollback(), keep them short, or raise EVENTSOURCING_LOCK_TIMEOUT."
            )

    def _wait(self, place: tuple[Turn, threading.Event], timeout: float) -> bool:
        """Wait in the queue, and leave it when the time is over; returns whether the turn came."""
        called = place[1]
        deadline = time.monotonic() + timeout
        while not called.wait(max(0, min(LOOK_AGAIN, deadline - time.monotonic()))):
            with self._lock:
                # Nobody is told when a connection that has the turn is collected.
                if self._owner is None or self._owner.connection() is None:
                    self._call_next()
                if called.is_set():
                    return True
                if time.monotonic() >= deadline:
                    self._waiting.remove(place)
                    return False
        return True

    def release(self, connection: object) -> None:
        """Give the turn, if this connection has it, to the one that has waited longest."""
        with self._lock:
            if self._owner is not None and self._owner.connection() is connection:
                self._call_next()

    def _call_next(self) -> None:
        self._owner = None
        if self._waiting:
            self._owner, called = self._waiting.popleft()
            called.set()

    def is_mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner is not None and self._owner.thread == threading.get_ident()


_gates: weakref.WeakValueDictionary[tuple[int, str], Gate] = weakref.WeakValueDictionary()


def gate_for(name: str) -> Gate:
    """Return the gate of a database file; a forked process has its own, as the parent's may be taken for ever."""
    key = (os.getpid(), name)
    # Not under the lock: it too may have been held by another thread at the time of a fork.
    gate = _gates.get(key)
    if gate is None:
        gate = Gate(name)
        gate = _gates.setdefault(key, gate)
    return gate
