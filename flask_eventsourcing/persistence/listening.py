"""One connection on which a process listens for all of its runners."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from ..tailing import Waiter
from .subscriptions import SLICE, execute, listening_connection

logger: logging.Logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between tries to listen."""

Receive = Callable[[Any, float], Collection[str]]


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
                # Meanwhile, the waiters look from time to time.
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

    # Not at once: only a writer that rolls back uncovers events of others without a notification.
    first: float = 0.02
    # As for one that listens by itself.
    longest: float = 1.0

    def __init__(self, listener: Listener, channel: str) -> None:
        super().__init__()
        self.channel = channel
        self.news: threading.Event = threading.Event()
        # There may have been some before.
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
    # It keeps the engine, so that no other one gets its id.
    return _listeners.get(key) or _listeners.setdefault(key, Listener(engine, receive))
