"""Subscriptions: iterators over an application's log that wait at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from eventsourcing.persistence import (
    ApplicationRecorder,
    InterfaceError,
    Notification,
    OperationalError,
    Subscription,
)

from .dialects.waiting import Waiter

logger = logging.getLogger(__name__)

PAGE = 500
SHORTEST_WAIT = 0.005
GROWTH = 1.5
LONGEST_PAUSE = 5.0
"""Seconds between tries to reach a database that cannot be reached."""


class LogReader(Protocol):
    """A recorder whose log can be read with a connection of its own, and waited for."""

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

    def waiter(self) -> Waiter:
        """Return what waits for news."""


class LogSubscription(Subscription[ApplicationRecorder]):
    """Reads the log in pages, and waits at its end as the database allows: for a notification, or polling.

    It has no thread: reading and waiting happen in ``next()``, in the thread that iterates. :meth:`stop` may be called
    from any thread. While the database cannot be reached it tries again, and goes on where it was.
    """

    def __init__(self, recorder: ApplicationRecorder, gt: int | None = None, topics: Sequence[str] = ()) -> None:
        super().__init__(recorder=recorder, gt=gt, topics=topics)
        self._reader: LogReader = recorder  # type: ignore[assignment]
        self._waiter = self._reader.waiter()
        self._page: Sequence[Notification] = ()
        self._index = 0

    def __exit__(self, *args: object, **kwargs: object) -> None:
        super().__exit__(*args, **kwargs)
        self._waiter.close()

    def stop(self) -> None:
        """End the iteration, waking it if it waits."""
        super().stop()
        self._waiter.stopped.set()

    def __next__(self) -> Notification:
        """Return the next event, waiting for it if need be."""
        if self._index == len(self._page) and not self._has_been_stopped:
            self._page, self._index = self._next_page(), 0
        if self._has_been_stopped:
            self._waiter.close()
            raise StopIteration
        notification = self._page[self._index]
        self._index += 1
        self._last_notification_id = notification.id
        return notification

    def _next_page(self) -> Sequence[Notification]:
        wait = pause = SHORTEST_WAIT
        while not self._has_been_stopped:
            try:
                page = self._reader.read_log(
                    self._last_notification_id, PAGE, topics=self._topics, inclusive_of_start=False
                )
            except (OperationalError, InterfaceError) as error:
                logger.warning("The log cannot be read now, next try in %.3g s: %s", pause, error)
                self._waiter.stopped.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if page:
                return page
            pause = SHORTEST_WAIT
            # After news that is not to be seen yet, because of a writer in progress, look again soon.
            news = self._waiter.wait(wait)
            wait = SHORTEST_WAIT if news else min(wait * GROWTH, self._waiter.longest)
        return ()
