"""Keeps the right to run a projection while its runner is at work or waits."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from .control import Control, ControlRow, FencedError
from .locks import RunnerLock
from .outages import is_outage

logger = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between two beats."""


class Heartbeat:
    """A thread that renews a runner's lease, or sees whether the connection with its lock still lives.

    A handler may take longer than a lease lasts, and a firewall or a server closes a connection that is idle for long.
    A process that is stopped or killed has no heartbeat.
    """

    def __init__(self, control: Control, claimed: ControlRow, lock: RunnerLock) -> None:
        self._control = control
        self._claimed = claimed
        self._lock = lock
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"heartbeat of {control.name}", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raise the error with which the right was lost, if it was.

        :raises FencedError: when another runner has it.
        """
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._ended.wait(PERIOD):
            try:
                if self._lock.leased:
                    self._control.renew(self._claimed)
                else:
                    self._lock.check()
            except Exception as error:  # noqa: BLE001
                # Raised in the runner's thread by check().
                if self._lock.leased and is_outage(error) and not isinstance(error, FencedError):
                    logger.info("%s: its lease could not be renewed in time: %s", self._control.name, error)
                    continue
                self._error = error
                return
