"""A worker: it runs consumers in threads, until each has ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from ..exceptions import HandlerError, ProjectionHaltedError
from ..persistence.dialects import hide_values
from .consumers import Consumer
from .runners import Runner

logger: logging.Logger = logging.getLogger(__name__)


class Worker:
    """Runs consumers until it is stopped, each in a thread of its own. A worker runs once.

    :param once: end when each has reached the end of its log, including events that reactions have saved meanwhile.
    """

    def __init__(self, consumers: Sequence[Consumer], *, once: bool = False) -> None:
        self.stopping: threading.Event = threading.Event()
        self.once = once
        self.runners: list[Runner] = [Runner(consumer, self.stopping) for consumer in consumers]
        self.errors: list[Exception] = []
        self._failed: set[Runner] = set()
        self._begun = threading.Lock()

    @property
    def is_idle(self) -> bool:
        """Whether each consumer has halted, or was ended by an error."""
        return all(runner.progress.halted is not None or runner in self._failed for runner in self.runners)

    def stop(self) -> None:
        """End the run after the batches in progress. It returns at once, and may be called in a signal handler."""
        self.stopping.set()

    def run(self, tick: Callable[[], None] | None = None, period: float = 0.2) -> Sequence[Exception]:
        """Run until all consumers have ended, and return the errors that ended them.

        It blocks. Call :meth:`stop` in a signal handler or in another thread to end it.

        :param tick: called every *period* seconds, in this thread.
        :raises RuntimeError: when it was run before.

        .. versionchanged:: 0.1.0 A worker runs once.
        """
        if not self._begun.acquire(blocking=False):
            raise RuntimeError("This worker was run before: make another Worker with the same consumers.")
        if self.once:
            self._run_once(tick, period)
        else:
            self._run_wave(self.runners, tick, period)
        self.stop()
        return self.errors

    def _run_once(self, tick: Callable[[], None] | None, period: float) -> None:
        """Run projections and then their reactions, and again as long as these have saved events."""
        runners = self.runners
        while runners and not self.stopping.is_set():
            # Reactions go as far as the models of their projection, so they come when that has ended.
            reactions = [runner for runner in runners if runner.consumer.kind == "reactions"]
            for wave in ([runner for runner in runners if runner not in reactions], reactions):
                if not self.stopping.is_set():
                    self._run_wave(wave, tick, period)
            if not any(runner.progress.has_saved for runner in reactions):
                return
            runners = [runner for runner in runners if runner not in self._failed]

    def _run_wave(self, runners: Sequence[Runner], tick: Callable[[], None] | None, period: float) -> None:
        threads = [
            threading.Thread(target=self._run_one, args=(runner,), name=f"projection {runner.name}")
            for runner in runners
        ]
        for thread in threads:
            thread.start()
        try:
            with ExitStack() as interrupted:
                interrupted.callback(self.stop)
                while any(thread.is_alive() for thread in threads):
                    if tick is not None:
                        tick()
                    for thread in threads:
                        thread.join(period / len(threads))
                interrupted.pop_all()
        finally:
            for thread in threads:
                thread.join()

    def _run_one(self, runner: Runner) -> None:
        try:
            runner.run(once=self.once)
        except BaseException as error:  # noqa: BLE001  # reported by run()
            # Handlers may raise anything. The error ends this thread only, and the others go on.
            self._failed.add(runner)
            self.errors.append(_told(runner, error))


def _told(runner: Runner, error: BaseException) -> Exception:
    """Log why a consumer has ended, and return the error that ``run()`` reports."""
    if not isinstance(error, Exception):
        # The operator must not take it for an orderly end.
        logger.error("%s has ended", runner.name, exc_info=error)
        ended = HandlerError(f"{runner.name} was ended by {type(error).__name__}.")
        ended.__cause__ = error
        return ended
    hide_values(error)
    # The traceback of a handler was logged with its first try.
    logger.error("%s", error, exc_info=None if isinstance(error, ProjectionHaltedError) else error.__cause__)
    return error
