"""Subscriptions: iterators over an application's log that wait at its end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from eventsourcing.persistence import ApplicationRecorder, Notification, Subscription

PAGE = 500
SHORTEST_WAIT = 0.005
LONGEST_WAIT = 0.25


class LogReader(Protocol):
    """A recorder whose log can be read with a connection of its own."""

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


class PollingSubscription(Subscription[ApplicationRecorder]):
    """Reads the log in pages and polls at its end, at intervals that grow while nothing comes.

    It has no thread: reading happens in :meth:`__next__`, in the thread that iterates. :meth:`stop` may be called from
    any thread and wakes it at once.
    """

    def __init__(self, recorder: ApplicationRecorder, gt: int | None = None, topics: Sequence[str] = ()) -> None:
        super().__init__(recorder=recorder, gt=gt, topics=topics)
        self._page: Sequence[Notification] = ()
        self._index = 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the iteration, waking it if it waits."""
        super().stop()
        self._stopped.set()

    def __next__(self) -> Notification:
        """Return the next event, waiting for it if need be."""
        wait = SHORTEST_WAIT
        while not self._stopped.is_set():
            if self._index < len(self._page):
                notification = self._page[self._index]
                self._index += 1
                self._last_notification_id = notification.id
                return notification
            self._page, self._index = self._read_page(), 0
            if not self._page:
                self._stopped.wait(wait)
                wait = min(wait * 1.5, LONGEST_WAIT)
        raise StopIteration

    def _read_page(self) -> Sequence[Notification]:
        reader: LogReader = self._recorder  # type: ignore[assignment]
        return reader.read_log(self._last_notification_id, PAGE, topics=self._topics, inclusive_of_start=False)
