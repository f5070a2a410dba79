"""Waits until a projection has dealt with an event, so that a client can read what it has written."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from eventsourcing.persistence import Recording

from ..exceptions import ProjectionHaltedError, UncommittedEventsError
from ..persistence.dialects.waiting import ListenWaiter, Waiter
from .consumers import Consumer, ProjectionHost
from .control import HALTED
from .runners import halted_message

SHORTEST_WAIT = 0.002
GROWTH = 1.5
LONGEST_WAIT = 0.1
MOST_IDLE = 8


class Waiters:
    """The connections that listen for moved positions, kept for the next one who waits."""

    def __init__(self, host: ProjectionHost) -> None:
        self.host = host
        self._idle: list[tuple[int, Waiter]] = []
        self._lock = threading.Lock()

    def take(self) -> Waiter:
        """Return a waiter that nobody else uses now; those of another process are left alone."""
        channel = self.host.channel
        if channel is None:
            return Waiter()
        with self._lock:
            while self._idle:
                pid, waiter = self._idle.pop()
                if pid == os.getpid():
                    return waiter
        return ListenWaiter(self.host.engine, channel)

    def give_back(self, waiter: Waiter) -> None:
        """Keep a waiter for the next one."""
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
    """Return the last position of what ``Application.save()`` has returned, or of an iterable of positions.

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
    """Block until a projection has dealt with what was recorded.

    :raises UncommittedEventsError: when the current session has events that are not committed: nobody can see them.
    :raises ProjectionHaltedError: when the projection stands before that.
    :raises TimeoutError: after *timeout* seconds.
    """
    unit = consumer.host.binding.open_unit()
    if unit is not None and unit.batches:
        raise UncommittedEventsError("wait_for waits for committed events: call db.session.commit() before it.")
    position = last_position(recordings)
    if consumer.projection_class.inline or position == 0 or _has_reached(consumer, position):
        return
    deadline = time.monotonic() + timeout
    waiter = waiters.take()
    try:
        wait = SHORTEST_WAIT
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(
                    f"{consumer.name} has not reached position {position} within {timeout:g} s: "
                    "is 'flask eventsourcing run' running?"
                )
            news = waiter.wait(min(wait, remaining))
            wait = SHORTEST_WAIT if news else min(wait * GROWTH, LONGEST_WAIT)
            if _has_reached(consumer, position):
                return
    finally:
        waiters.give_back(waiter)


def _has_reached(consumer: Consumer, position: int) -> bool:
    row = consumer.control.read()
    if row is None:
        return False
    if row.state == HALTED and row.position < position:
        raise ProjectionHaltedError(halted_message(consumer.name, row.failed_position, row.error))
    return row.position >= position
