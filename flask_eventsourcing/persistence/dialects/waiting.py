"""Waiting for news at the end of a log."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from ...lifecycle import PerProcess, ProcessLock, keep_for_ever

logger = logging.getLogger(__name__)

SLICE = 0.1
"""Seconds after which a wait on a connection looks whether it was told to stop."""


class Waiter:
    """Waits for a time, or until :attr:`stopped` is set."""

    longest = 0.25
    """Seconds after which to look into the log although there was no news."""

    def __init__(self) -> None:
        # By its name at the time of the call, as gevent may put another in its place.
        self._stopped = PerProcess(lambda: threading.Event())  # noqa: PLW0108

    @property
    def stopped(self) -> threading.Event:
        """Set in order to end the waiting, in this process."""
        return self._stopped.get()

    def wait(self, seconds: float) -> bool:
        """Wait, and return whether there was news, as far as this waiter can know."""
        self.stopped.wait(seconds)
        return False

    def rest(self) -> None:
        """Hear nothing until the next :meth:`wait`."""

    def close(self) -> None:
        """Give up what the waiter holds."""
        self.stopped.set()


class ListenWaiter(Waiter):
    """Waits on PostgreSQL's ``LISTEN``, on a connection of its own that it opens again when it is lost.

    :param engine: where to connect to; the connection is taken out of the pool.
    :param channel: the name that writers notify.
    """

    # Notifications can be lost with the connection, and a roll-back that uncovers later events sends none.
    longest = 1.0

    def __init__(self, engine: Engine, channel: str) -> None:
        super().__init__()
        self._engine = engine
        self._channel = channel
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
                self._execute(self._driver, self._statement("LISTEN"))
                self._resting = False
                return True
            return self._receive(seconds)
        except (error_class, SQLAlchemyError, OSError) as error:
            logger.warning("Listening on %s was interrupted and is taken up again: %s", self._channel, error)
            self._drop()
            return None

    def _listen(self) -> Any:
        fairy = self._engine.raw_connection()
        driver: Any = fairy.driver_connection
        fairy.detach()
        try:
            driver.autocommit = True
            self._execute(driver, self._statement("LISTEN"))
        except BaseException:
            # Nobody else knows of the connection any more, and no pool.
            driver.close()
            raise
        return driver

    def _statement(self, verb: str) -> str:
        return f"{verb} {self._engine.dialect.identifier_preparer.quote_identifier(self._channel)}"

    @staticmethod
    def _execute(driver: Any, statement: str) -> None:
        cursor = driver.cursor()
        try:
            cursor.execute(statement)
        finally:
            cursor.close()

    def rest(self) -> None:
        """Stop listening: the server keeps all notifications until the last listener has read them."""
        error_class: Any = getattr(self._engine.dialect.dbapi, "Error", Exception)
        with self._lock:
            if self._driver is None or self._resting:
                return
            try:
                self._execute(self._driver, self._statement("UNLISTEN"))
                self._resting = True
            except (error_class, SQLAlchemyError, OSError) as error:
                logger.info("The connection that listened on %s is lost: %s", self._channel, error)
                self._drop()

    def _receive(self, seconds: float) -> bool:
        if self._engine.driver == "psycopg":
            return any(True for _ in self._driver.notifies(timeout=seconds, stop_after=1))
        readable, _, _ = select.select([self._driver], [], [], seconds)
        if not readable:
            return False
        self._driver.poll()
        heard = bool(self._driver.notifies)
        self._driver.notifies.clear()
        return heard

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
