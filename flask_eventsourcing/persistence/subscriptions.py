"""Waits for new events of a log on a connection that the server notifies: one of its own, or one of the process."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from ..lifecycle import ProcessLock, keep_for_ever
from ..tailing import Waiter

logger: logging.Logger = logging.getLogger(__name__)

SLICE = 0.1
"""Seconds after which a wait on a connection checks whether it was told to stop."""
PAUSE = 1.0
"""Seconds between tries to listen."""

Receive = Callable[[Any, float], Collection[str]]


class ListenWaiter(Waiter):
    """Waits for notifications of the server, on a connection of its own that it opens again when it is lost.

    :param engine: where to connect to; the connection is taken out of the pool.
    :param channel: the name that writers notify.
    :param receive: waits for a number of seconds on a driver's connection, and returns the channels notified.
    """

    # A lost connection loses notifications, and a rollback that uncovers later events sends none.
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
        """Wait for a notification. Without a connection to listen on, sleep for that time."""
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
            logger.warning("Listening on %s was interrupted and begins again: %s", self._channel, error)
            self._drop()
            return None

    def _listen(self) -> Any:
        driver = listening_connection(self._engine)
        # No other code and no pool has the connection.
        with ExitStack() as failed:
            failed.callback(driver.close)
            execute(driver, "LISTEN", self._channel)
            failed.pop_all()
        return driver

    def rest(self) -> None:
        """Stop listening, since the server keeps all notifications until the last listener has read them."""
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
        """Separate from the connection of the parent process, without closing it."""
        if self._pid != os.getpid():
            keep_for_ever(self._driver)
            self._driver, self._pid = None, os.getpid()


def listening_connection(engine: Engine) -> Any:
    """Return a driver's connection in autocommit, which is taken out of the pool."""
    fairy = engine.raw_connection()
    driver: Any = fairy.driver_connection
    fairy.detach()
    # A listener of the user's may have begun a transaction.
    driver.rollback()
    driver.autocommit = True
    return driver


def execute(driver: Any, verb: str, channel: str) -> None:
    """Run LISTEN or UNLISTEN for a channel."""
    # Without the preparer, which doubles percent signs: the statement goes to the driver without parameters.
    name = channel.replace('"', '""')
    cursor = driver.cursor()
    try:
        cursor.execute(f'{verb} "{name}"')
    finally:
        cursor.close()


def receive(driver: Any, seconds: float) -> set[str]:
    """Wait for a notification on a driver connection that yields them, and return the notified channels."""
    return {each.channel for each in driver.notifies(timeout=seconds, stop_after=1)}


def poll(driver: Any, seconds: float) -> set[str]:
    """Wait for a notification on a driver connection that must be polled."""
    readable, _, _ = select.select([driver], [], [], seconds)
    if not readable:
        return set()
    driver.poll()
    heard = {each.channel for each in driver.notifies}
    driver.notifies.clear()
    return heard


class Listener:
    """Listens in a thread of its own, which ends with the last waiter.

    :param receive: waits for a number of seconds on a driver's connection, and returns the channels notified.
    """

    def __init__(self, engine: Engine, receive: Receive) -> None:
        self._engine = engine
        self._receive = receive
        self._lock = threading.Lock()
        self._waiters: set[SharedWaiter] = set()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def add(self, waiter: SharedWaiter) -> None:
        """Add a waiter; the first one begins the thread."""
        with self._lock:
            self._waiters.add(waiter)
            if self._thread is None:
                self._ended = threading.Event()
                self._thread = threading.Thread(target=self._run, args=(self._ended,), name="listener", daemon=True)
                self._thread.start()

    def remove(self, waiter: SharedWaiter) -> None:
        """Remove a waiter; after the last one, the connection is closed."""
        with self._lock:
            self._waiters.discard(waiter)
            if self._waiters or self._thread is None:
                return
            thread, self._thread = self._thread, None
            self._ended.set()
        thread.join()

    def _run(self, ended: threading.Event) -> None:
        error_class: Any = getattr(self._engine.dialect.dbapi, "Error", Exception)
        while not ended.is_set():
            try:
                self._listen(ended)
            except (error_class, SQLAlchemyError, OSError) as error:
                # Meanwhile, the waiters look into the log from time to time.
                logger.warning("Listening was interrupted and begins again: %s", error)
                ended.wait(PAUSE)

    def _listen(self, ended: threading.Event) -> None:
        driver = listening_connection(self._engine)
        channels: set[str] = set()
        try:
            while not ended.is_set():
                with self._lock:
                    wanted = {waiter.channel for waiter in self._waiters}
                for channel in wanted - channels:
                    execute(driver, "LISTEN", channel)
                for channel in channels - wanted:
                    execute(driver, "UNLISTEN", channel)
                # There may have been news before listening began.
                new, channels = wanted - channels, wanted
                self._tell(new or self._receive(driver, SLICE))
        finally:
            driver.close()

    def _tell(self, channels: Collection[str]) -> None:
        with self._lock:
            for waiter in self._waiters:
                if waiter.channel in channels:
                    waiter.news.set()


class SharedWaiter(Waiter):
    """Waits for notifications of one channel, which the shared listener receives."""

    # Rarely: only a rollback uncovers events of other writers without a notification.
    first: float = 0.02
    # As for a waiter that listens by itself.
    longest: float = 1.0

    def __init__(self, listener: Listener, channel: str) -> None:
        super().__init__()
        self.channel = channel
        self.news: threading.Event = threading.Event()
        # There may have been news before.
        self.news.set()
        self._listener = listener
        listener.add(self)

    def wait(self, seconds: float) -> bool:
        """Wait for a notification."""
        if not self.news.wait(seconds):
            return False
        self.news.clear()
        return True

    def close(self) -> None:
        """Stop waiting."""
        super().close()
        self._listener.remove(self)


_listeners: weakref.WeakValueDictionary[tuple[int, int], Listener] = weakref.WeakValueDictionary()


def listener_of(engine: Engine, receive: Receive) -> Listener:
    """Return the listener of this process for an engine."""
    key = (os.getpid(), id(engine))
    # The listener keeps the engine alive, so that no other engine gets its id.
    return _listeners.get(key) or _listeners.setdefault(key, Listener(engine, receive))
