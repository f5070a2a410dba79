"""Subscriptions: iterators over a log that wait for new events at its end. This module knows no database."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from eventsourcing.persistence import (
    ApplicationRecorder,
    InterfaceError,
    Notification,
    OperationalError,
    Subscription,
)

from .lifecycle import PerProcess

logger: logging.Logger = logging.getLogger(__name__)

PAGE, FIRST_PAGE = 500, 1
"""The most events of a page whose size was measured, and of one whose size was not, since it may be empty."""
SHORTEST_WAIT = 0.005
GROWTH = 1.5
LONGEST_PAUSE = 5.0
"""Seconds between tries to reach a database that cannot be reached."""


class Waiter:
    """Wait for a time, or until :attr:`stopped` is set."""

    first: float = 0.0
    """Seconds without news after which to look into the log for the first time."""
    longest: float = 0.25
    """The longest time between two looks."""

    def __init__(self) -> None:
        # Looked up at the time of the call, because gevent may replace it.
        self._stopped = PerProcess(lambda: threading.Event())  # noqa: PLW0108

    @property
    def stopped(self) -> threading.Event:
        """Set it to end the waiting in this process."""
        return self._stopped.get()

    def wait(self, seconds: float) -> bool:
        """Wait, and return whether there may be new events."""
        self.stopped.wait(seconds)
        return False

    def rest(self) -> None:
        """Receive no notifications until the next :meth:`wait`."""

    def close(self) -> None:
        """Release the connection, if the waiter has one."""
        self.stopped.set()


class LogReader(Protocol):
    """A recorder whose log can be read on a separate connection, and followed."""

    def read_log(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
        join: bool = False,
    ) -> Sequence[Notification]:
        """Read the log by position."""

    def fitting(self, after: int, limit: int) -> int:
        """Return how many of the next events to read at once because of their size, up to a limit."""

    def waiter(self) -> Waiter:
        """Return an object that waits for new events."""

    def cause(self, position: int, is_over: Callable[[], bool]) -> AbstractContextManager[object]:
        """Return a context for saves that an event of this log has caused."""


class LogSubscription(Subscription[ApplicationRecorder]):
    """Reads the log in pages, and waits at its end: for a notification if the database has them, else by polling.

    It has no thread: reading and waiting happen in ``next()``, in the thread that iterates. :meth:`stop` may be called
    from any thread. While the database cannot be reached it tries again, and goes on where it was.
    """

    def __init__(self, recorder: ApplicationRecorder, gt: int | None = None, topics: Sequence[str] = ()) -> None:
        super().__init__(recorder=recorder, gt=gt, topics=topics)
        self._reader: LogReader = recorder  # type: ignore[assignment]
        self._waiter = self._reader.waiter()
        self._page: Sequence[Notification] = ()
        self._index = 0
        self._is_behind = False
        """Whether the last page was full."""
        self._handled = ExitStack()
        """The block of the event that was returned last, which is the cause of events saved before the next one."""

    def __exit__(self, *args: object, **kwargs: object) -> None:
        super().__exit__(*args, **kwargs)
        self._handled.close()
        self._waiter.close()

    def stop(self) -> None:
        """End the iteration, also while it waits."""
        super().stop()
        self._waiter.stopped.set()

    def __next__(self) -> Notification:
        """Return the next event, waiting for it if need be."""
        self._handled.close()
        if self._index == len(self._page) and not self._has_been_stopped:
            self._page, self._index = self._next_page(), 0
        if self._has_been_stopped:
            self._waiter.close()
            raise StopIteration
        notification = self._page[self._index]
        self._index += 1
        self._last_notification_id = notification.id
        # Code may leave the loop without closing the iterator.
        living = weakref.ref(self)
        self._handled.enter_context(self._reader.cause(notification.id, lambda: living() is None))
        return notification

    def _next_page(self) -> Sequence[Notification]:
        wait = pause = SHORTEST_WAIT
        while not self._has_been_stopped:
            try:
                page = self._read()
            except (OperationalError, InterfaceError) as error:
                logger.warning("The log cannot be read now, next try in %.3g s: %s", pause, error)
                self._waiter.stopped.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if page:
                return page
            pause = SHORTEST_WAIT
            # After news that cannot be read yet, because a writer is in progress, look again soon.
            news = self._waiter.wait(wait)
            wait = SHORTEST_WAIT if news else min(wait * GROWTH, self._waiter.longest)
        return ()

    def _read(self) -> Sequence[Notification]:
        after, limit = self._last_notification_id, FIRST_PAGE
        if self._is_behind:
            limit = self._reader.fitting(after or 0, PAGE)
        page = self._reader.read_log(after, limit, topics=self._topics, inclusive_of_start=False)
        self._is_behind = len(page) == limit
        return page
