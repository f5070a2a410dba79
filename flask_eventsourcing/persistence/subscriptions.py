"""Waiting at the end of a log, and subscriptions: iterators over a log that wait there."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from eventsourcing.persistence import (
    ApplicationRecorder,
    InterfaceError,
    Notification,
    OperationalError,
    Subscription,
)
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from ..failures import OnError
from ..lifecycle import PerProcess, ProcessLock, keep_for_ever

logger: logging.Logger = logging.getLogger(__name__)

SLICE = 0.1
"""Seconds after which a wait on a connection looks whether it was told to stop."""
PAGE, FIRST_PAGE = 500, 10
SHORTEST_WAIT = 0.005
GROWTH = 1.5
LONGEST_PAUSE = 5.0
"""Seconds between tries to reach a database that cannot be reached."""


class Waiter:
    """Waits for a time, or until :attr:`stopped` is set."""

    longest: float = 0.25
    """Seconds after which to look into the log although there was no news."""

    def __init__(self) -> None:
        # By its name at the time of the call, as gevent may put another in its place.
        self._stopped = PerProcess(lambda: threading.Event())  # noqa: PLW0108

    @property
    def stopped(self) -> threading.Event:
        """Set in order to end the waiting, in this process."""
        return self._stopped.get()

    def wait(self, seconds: float) -> bool:
        """Wait, and return whether there may be new events."""
        self.stopped.wait(seconds)
        return False

    def rest(self) -> None:
        """Hear nothing until the next :meth:`wait`."""

    def close(self) -> None:
        """Give up what the waiter holds."""
        self.stopped.set()


class ListenWaiter(Waiter):
    """Waits for notifications of the server, on a connection of its own that it opens again when it is lost.

    :param engine: where to connect to; the connection is taken out of the pool.
    :param channel: the name that writers notify.
    :param receive: waits for a number of seconds on a driver's connection, and returns the channels notified.
    """

    # Notifications can be lost with the connection, and a roll-back that uncovers later events sends none.
    longest: float = 1.0

    def __init__(self, engine: Engine, channel: str, receive: Callable[[Any, float], Collection[str]]) -> None:
        super().__init__()
        self._engine = engine
        self._channel = channel
        self._receive = receive
        self._lock = ProcessLock()
        self._driver: Any = None
        self._pid = os.getpid()
        self._resting = False

    def wait(self, seconds: float) -> bool:
        """Wait for a notification; without a connection to listen on, only for the time to pass."""
        deadline = time.monotonic() + seconds
        while not self.stopped.is_set():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            with self._lock:
                self._leave_inherited()
                heard = self._hear(min(remaining, SLICE))
            if heard is None:
                return super().wait(remaining)
            if heard:
                return True
        return False

    def _hear(self, seconds: float) -> bool | None:
        """Return whether there was a notification, or None when listening is not possible now."""
        error_class: Any = getattr(self._engine.dialect.dbapi, "Error", Exception)
        try:
            if self._driver is None:
                # There may have been news before listening began.
                self._driver = self._listen()
                return True
            if self._resting:
                execute(self._driver, "LISTEN", self._channel)
                self._resting = False
                return True
            return bool(self._receive(self._driver, seconds))
        except (error_class, SQLAlchemyError, OSError) as error:
            logger.warning("Listening on %s was interrupted and is taken up again: %s", self._channel, error)
            self._drop()
            return None

    def _listen(self) -> Any:
        driver = listening_connection(self._engine)
        # Nobody else knows of the connection, and no pool.
        with OnError(lambda _: driver.close()):
            execute(driver, "LISTEN", self._channel)
        return driver

    def rest(self) -> None:
        """Stop listening: the server keeps all notifications until the last listener has read them."""
        error_class: Any = getattr(self._engine.dialect.dbapi, "Error", Exception)
        with self._lock:
            if self._driver is None or self._resting:
                return
            try:
                execute(self._driver, "UNLISTEN", self._channel)
                self._resting = True
            except (error_class, SQLAlchemyError, OSError) as error:
                logger.info("The connection that listened on %s is lost: %s", self._channel, error)
                self._drop()

    def _drop(self) -> None:
        driver, self._driver = self._driver, None
        self._resting = False
        if driver is not None:
            driver.close()

    def close(self) -> None:
        """Stop waiting, and close the connection."""
        super().close()
        with self._lock:
            self._leave_inherited()
            self._drop()

    def _leave_inherited(self) -> None:
        """Part from the connection of the process from which this one was forked, without closing it."""
        if self._pid != os.getpid():
            keep_for_ever(self._driver)
            self._driver, self._pid = None, os.getpid()


def listening_connection(engine: Engine) -> Any:
    """Return a driver's connection, out of the pool, on which each statement counts at once."""
    fairy = engine.raw_connection()
    driver: Any = fairy.driver_connection
    fairy.detach()
    driver.autocommit = True
    return driver


def execute(driver: Any, verb: str, channel: str) -> None:
    """Listen on a channel, or no more."""
    # Not the preparer's way, which doubles percent signs: the statement goes to the driver without parameters.
    name = channel.replace('"', '""')
    cursor = driver.cursor()
    try:
        cursor.execute(f'{verb} "{name}"')
    finally:
        cursor.close()


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

    def fitting(self, after: int, limit: int) -> int:
        """Return how many of the next events, up to a limit, are not too large to be read at once."""

    def waiter(self) -> Waiter:
        """Return what waits for news."""

    def cause(self, position: int, is_over: Callable[[], bool]) -> AbstractContextManager[object]:
        """Return a context in which saved events have an event of this log as their cause."""


class LogSubscription(Subscription[ApplicationRecorder]):
    """Reads the log in pages, and waits at its end for a notification, or polls if the database has none.

    It has no thread: it reads and waits in ``next()``, in the thread that iterates. :meth:`stop` may be called from any
    thread. While the database cannot be reached it tries again, and then goes on where it was.
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
        """The block of the event that was returned last: what is saved before the next one is caused by it."""

    def __exit__(self, *args: object, **kwargs: object) -> None:
        super().__exit__(*args, **kwargs)
        self._handled.close()
        self._waiter.close()

    def stop(self) -> None:
        """End the iteration, waking it if it waits."""
        super().stop()
        self._waiter.stopped.set()

    def __next__(self) -> Notification:
        """Return the next event; wait for it if necessary."""
        self._handled.close()
        if self._index == len(self._page) and not self._has_been_stopped:
            self._page, self._index = self._next_page(), 0
        if self._has_been_stopped:
            self._waiter.close()
            raise StopIteration
        notification = self._page[self._index]
        self._index += 1
        self._last_notification_id = notification.id
        # A loop may be left without a word.
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
            # After news that is not to be seen yet, because of a writer in progress, look again soon.
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


def receive(driver: Any, seconds: float) -> set[str]:
    """Wait for a notification on a driver connection that yields them, and return the channels that had some."""
    return {each.channel for each in driver.notifies(timeout=seconds, stop_after=1)}


def poll(driver: Any, seconds: float) -> set[str]:
    """Wait for one on a driver connection that is to be polled."""
    readable, _, _ = select.select([driver], [], [], seconds)
    if not readable:
        return set()
    driver.poll()
    heard = {each.channel for each in driver.notifies}
    driver.notifies.clear()
    return heard
