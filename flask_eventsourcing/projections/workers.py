"""Runs several consumers in one process, a thread each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from .consumers import Consumer
from .runners import Runner

logger = logging.getLogger(__name__)


class Worker:
    """Runs consumers until it is told to stop, each in a thread with an application context of its own.

    :param once: end as soon as each has reached the head of its log.
    """

    def __init__(self, consumers: Sequence[Consumer], *, once: bool = False) -> None:
        self.stopping = threading.Event()
        self.once = once
        self.runners = [Runner(consumer, self.stopping) for consumer in consumers]
        self.errors: list[Exception] = []

    def stop(self) -> None:
        """End the run after the batches in progress; returns at once, and may be called in a signal handler."""
        self.stopping.set()

    def run(self, tick: Callable[[], None] | None = None, period: float = 0.2) -> Sequence[Exception]:
        """Run, and return the errors that ended consumers; blocks until all have ended.

        :param tick: called every *period* seconds meanwhile, in this thread.
        """
        waves = [self.runners]
        if self.once:
            # Reactions go as far as the models of their projection, so they come when that has ended.
            reactions = [runner for runner in self.runners if runner.consumer.kind == "reactions"]
            waves = [[runner for runner in self.runners if runner not in reactions], reactions]
        for wave in waves:
            if not self.stopping.is_set():
                self._run_wave(wave, tick, period)
        self.stop()
        return self.errors

    def _run_wave(self, runners: Sequence[Runner], tick: Callable[[], None] | None, period: float) -> None:
        threads = [
            threading.Thread(target=self._run_one, args=(runner,), name=f"projection {runner.name}")
            for runner in runners
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                if tick is not None:
                    tick()
                for thread in threads:
                    thread.join(period / len(threads))
        except BaseException:
            self.stop()
            raise
        finally:
            for thread in threads:
                thread.join()

    def _run_one(self, runner: Runner) -> None:
        try:
            runner.run(once=self.once)
        except Exception as error:
            # Reported by run(); the other consumers go on.
            logger.error("%s", error, exc_info=error.__cause__)
            self.errors.append(error)
