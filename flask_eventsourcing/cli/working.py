"""The worker as a process: signals, log lines, progress, exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click
import sqlalchemy as sa
from eventsourcing.persistence import PersistenceError

from ..projections.consumers import Consumer
from ..projections.outages import is_outage
from ..projections.runners import FIRST_PAUSE, LONGEST_PAUSE
from ..projections.workers import Worker
from ..state import EventSourcingState
from .common import clear_errors, message_of, require_tables
from .reporting import Reporter

logger = logging.getLogger(__name__)
PACKAGE = __name__.partition(".")[0]


class Signals:
    """What SIGTERM and SIGINT ask for: the first to end, a second one to end at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, and no more: a handler runs between any two steps of the main thread, locks held or not."""
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle them, where this is the main thread; others have no say in signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def work(state: EventSourcingState, consumers: Sequence[Consumer], *, once: bool, log_every: float) -> None:
    """Run consumers until a signal comes or, with *once*, until they have reached the head.

    :raises click.ClickException: when a table is missing, or a consumer has ended with an error.
    """
    signals = Signals()
    with shown_log(), signals.handled():
        if not _prepare(state, consumers, signals, once=once):
            return
        errors = _run(consumers, signals, once, log_every)
    if errors:
        raise click.ClickException("\n".join(message_of(error) for error in errors))


def _run(consumers: Sequence[Consumer], signals: Signals, once: bool, log_every: float) -> Sequence[Exception]:
    worker = Worker(consumers, once=once)
    reporter = Reporter(worker.runners, log_every)

    def tick() -> None:
        end_if_halted(worker)
        watch(signals, worker.stopping, reporter)

    try:
        errors = worker.run(tick)
    finally:
        reporter.finish_bar()
    reporter.log_lines()
    return errors


def end_if_halted(worker: Worker) -> None:
    """End when nothing is left to run, so that whoever supervises the process sees it."""
    if all(runner.halted is not None for runner in worker.runners):
        worker.stop()


def watch(signals: Signals, stopping: threading.Event, reporter: Reporter) -> None:
    """Pass a signal on, and tell of progress; called in the main thread, a few times a second."""
    if signals.received is not None and not stopping.is_set():
        reporter.finish_bar()
        logger.info("%s: ending after the batch in progress", signal.Signals(signals.received).name)
        stopping.set()
    reporter.tick()


def _prepare(state: EventSourcingState, consumers: Sequence[Consumer], signals: Signals, *, once: bool) -> bool:
    """Wait for the database, check the tables and let halted consumers try again; False when told to end before."""
    pause = FIRST_PAUSE
    while signals.received is None:
        try:
            state.datastore.engine.connect().close()
            require_tables(state)
            for consumer in consumers:
                consumer.control.resume()
        except (sa.exc.SQLAlchemyError, PersistenceError, click.ClickException) as error:
            # Whoever is started together with the database goes on when it is there.
            cause = error.__cause__ if isinstance(error, click.ClickException) else error
            if once or not isinstance(cause, Exception) or not is_outage(cause):
                with clear_errors():
                    raise
            logger.warning("Next try in %.3g s, as the database cannot be reached: %s", pause, cause)
            _sleep(pause, signals)
            pause = min(pause * 2, LONGEST_PAUSE)
        else:
            return True
    return False


def _sleep(seconds: float, signals: Signals) -> None:
    end = time.monotonic() + seconds
    while signals.received is None and time.monotonic() < end:
        time.sleep(0.1)


@contextmanager
def shown_log() -> Iterator[None]:
    """Show what this package logs on standard error, unless the app has configured its logging."""
    package = logging.getLogger(PACKAGE)
    if package.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    # On a terminal a line begins by wiping out the bar that may stand there.
    wipe = "\r\033[K" if sys.stderr.isatty() else ""
    handler.setFormatter(logging.Formatter(f"{wipe}%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    if level == logging.NOTSET:
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
