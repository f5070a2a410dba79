"""``run`` and ``rebuild`` as processes: signals, log lines, exit status."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any

import sqlalchemy as sa

from ..projections.consumers import Consumer
from ..projections.rebuilding import Estimate, Rebuild, Rebuilt
from ..projections.runners import FIRST_PAUSE, LONGEST_PAUSE
from ..projections.workers import Worker
from . import (
    CommandError,
    Output,
    Subject,
    UnreachableError,
    UsageError,
    clear_errors,
    counted,
    has_terminal,
    message_of,
    named,
    registered,
    require_tables,
)
from .reports import Reporter

logger: logging.Logger = logging.getLogger(__name__)
PACKAGE = __name__.partition(".")[0]

LOG_EVERY = 60.0
"""By default, the seconds between two log lines of each consumer."""
TICK = 0.2
WAITING = (
    "This database has one writer at a time, and {} is rebuilt in one transaction: all writers would wait for its end, "
    "or fail. If they may, give --offline."
)
OWN_CONNECTIONS = 2
"""The connections of a worker beside its pool: one for its locks, and one on which it listens."""


class Signals:
    """SIGTERM and SIGINT: the first signal ends the run after the batch, a second one at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Only note the signal: a handler runs between any two steps of the main thread, even while it holds locks."""
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle them in the main thread; other threads cannot handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def watch(signals: Signals, stopping: threading.Event, reporter: Reporter) -> None:
    """Pass a signal on, and report progress; called in the main thread, a few times a second."""
    if signals.received is not None and not stopping.is_set():
        reporter.finish_bar()
        logger.info("%s: ending after the batch in progress", signal.Signals(signals.received).name)
        stopping.set()
    reporter.tick()


@contextmanager
def shown_log() -> Iterator[None]:
    """Show what this package logs on standard error, unless the app has configured its logging."""
    package = logging.getLogger(PACKAGE)
    if package.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    # On a terminal, each line first clears the bar.
    wipe = "\r\033[K" if has_terminal() else ""
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


# ---------------------------------------------------------------------------------------------------------------- run


def run(
    subject: Subject,
    output: Output,
    names: Sequence[str] = (),
    *,
    everything: bool = False,
    once: bool = False,
    log_every: float = LOG_EVERY,
) -> int:
    """Run projections and reactions until a signal comes or, with *once*, until they have reached the head.

    :raises CommandError: when a table is missing, or one of them has ended with an error.
    """
    consumers = chosen(subject, names, everything)
    signals = Signals()
    with shown_log(), signals.handled():
        if not _prepare(subject, consumers, signals, once=once):
            return 0
        warn_of_connections(consumers)
        worker = Worker(consumers, once=once)
        errors = _run(worker, signals, Reporter(worker.runners, output, log_every))
    if errors:
        raise CommandError("\n".join(message_of(error) for error in errors))
    return 0


def chosen(subject: Subject, names: Sequence[str], everything: bool) -> list[Consumer]:
    """Return the consumers to run.

    :raises CommandError: when a name is unknown or cannot be run.
    """
    known, runnable = subject.consumers(), subject.projections.runnable()
    if names and everything:
        raise UsageError("Give names or --all, not both.")
    if not known:
        raise CommandError(registered(known))
    if names:
        # Each consumer once, in the order of registration.
        found = {consumer for name in names for consumer in _runnable(known, name)}
        return [consumer for consumer in known if consumer in found]
    if not runnable:
        raise CommandError("There is nothing to run: all projections are inline, they run within save().")
    if everything or len({consumer.projection_class for consumer in runnable}) == 1:
        return runnable
    raise UsageError(f"Give the projections to run, or --all. {registered(runnable)}")


def _runnable(known: Sequence[Consumer], name: str) -> list[Consumer]:
    found = named(known, name)
    runnable = [c for c in found if c.kind == "reactions" or not c.projection_class.inline]
    if not runnable:
        raise CommandError(
            f"Projection {name!r} is inline: it runs within save(), in the same transaction, and needs no worker."
        )
    return runnable


def _prepare(subject: Subject, consumers: Sequence[Consumer], signals: Signals, *, once: bool) -> bool:
    """Wait for the database, check the tables and let halted consumers try again; False when told to end before."""
    pause = FIRST_PAUSE
    while signals.received is None:
        try:
            with clear_errors():
                subject.database.engine.connect().close()
                require_tables(subject)
                for consumer in consumers:
                    consumer.checkpoint.resume(consumer.fingerprint)
        except UnreachableError as error:
            # If the worker and the database are started together, the worker waits for the database.
            if once:
                raise
            logger.warning("Next try in %.3g s, as the database cannot be reached: %s", pause, error.__cause__)
            _sleep(pause, signals)
            pause = min(pause * 2, LONGEST_PAUSE)
        else:
            return True
    return False


def _most_of(pool: sa.Pool) -> float:
    """Return the most connections that a pool may have at once."""
    overflow = getattr(pool, "_max_overflow", -1)
    return pool.size() + overflow if isinstance(pool, sa.pool.QueuePool) and overflow >= 0 else math.inf


def warn_of_connections(consumers: Sequence[Consumer]) -> None:
    """Warn if a server has fewer connections left than the worker may need."""
    for application in {consumer.application.engine: consumer.application for consumer in consumers}.values():
        engine, dialect = application.engine, application.datastore.dialect
        with engine.connect() as connection:
            left = dialect.free_connections(connection)
        # Each consumer has two threads: one works, and one checks that the claim is still its own.
        most = min(2 * len(consumers), _most_of(engine.pool))
        if left is not None and left < most + OWN_CONNECTIONS:
            logger.warning(
                "The worker may need %d connections, %d of them of its pool, and the server has %d left: make "
                "pool_size and max_overflow in SQLALCHEMY_ENGINE_OPTIONS smaller, or max_connections larger.",
                most + OWN_CONNECTIONS,
                most,
                left,
            )


def _sleep(seconds: float, signals: Signals) -> None:
    end = time.monotonic() + seconds
    while signals.received is None and time.monotonic() < end:
        time.sleep(0.1)


def _run(worker: Worker, signals: Signals, reporter: Reporter) -> Sequence[Exception]:
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
    """End when no consumer is left to run, so the supervisor of the process notices."""
    if worker.is_idle:
        worker.stop()


# ------------------------------------------------------------------------------------------------------------ rebuild


def rebuild_or_clean(subject: Subject, output: Output, name: str, *, clean: bool, give_up: bool, **how: bool) -> int:
    """Rebuild a projection, or only drop the tables that rebuilds have left.

    :param how: the arguments of :func:`rebuild`.
    :raises UsageError: when the options contradict each other.
    """
    if sum((how["dry_run"], clean, give_up, how["drop_old"] or how["restart"])) > 1:
        raise UsageError("Give one of --dry-run, --clean and --give-up, without --drop-old and --restart.")
    if clean or give_up:
        return drop_left(subject, output, name, give_up=give_up)
    return rebuild(subject, output, name, **how)


def rebuild(
    subject: Subject,
    output: Output,
    name: str,
    *,
    dry_run: bool = False,
    drop_old: bool = False,
    restart: bool = False,
    offline: bool = False,
) -> int:
    """Build new tables of a projection beside the live ones, and swap them.

    :param dry_run: only say how many events there are and how long it would take.
    :param drop_old: drop the replaced tables afterwards.
    :param restart: begin from the start, even if an earlier rebuild can be continued.
    :param offline: let all writers wait, if the database allows no other way.
    :raises CommandError: when it cannot be rebuilt, or was stopped before its end.
    """
    stopping = threading.Event()
    with clear_errors():
        building = _find(subject, name, stopping)
        if building.keeps_writers_waiting and not offline:
            raise CommandError(WAITING.format(building.live.name))
        if dry_run:
            output.write(_estimated(building.estimate()))
            return 0
        done = _build(building, stopping, output, restart)
    if done is None:
        raise CommandError("Stopped before its end. The live tables are unchanged; run it again to go on.")
    _tell(subject, output, done)
    if drop_old:
        with clear_errors():
            for table in building.drop_old():
                output.write(f"Dropped table {table}.")
    return 0


def _tell(subject: Subject, output: Output, done: Rebuilt) -> None:
    for table, (before, after) in done.rows.items():
        output.write(f"{table}: {after:,} rows, {before:,} before.")
    resumed = ", continued from an earlier run" if done.resumed else ""
    output.write(
        f"Rebuilt up to position {done.position} ({done.events:,} events in {_duration(done.seconds)}{resumed})."
    )
    if done.dead_letters:
        waiting = f", {done.waiting} waiting behind" if done.waiting else ""
        letters = counted(done.dead_letters, "dead letter")
        output.write(f"It has set aside {letters}{waiting}: see {subject.command('dead-letters list')}.")


def _estimated(estimate: Estimate) -> str:
    text = f"{estimate.events:,} events, about {_duration(estimate.seconds)}. Nothing was changed."
    if estimate.failed:
        text += f"\nOf the first {estimate.tried:,}, {estimate.failed:,} would be set aside or wait behind one that is."
    return text


def drop_left(subject: Subject, output: Output, name: str, *, give_up: bool = False) -> int:
    """Drop the tables that rebuilds of a projection have replaced; nothing is rebuilt.

    :param give_up: drop the tables of an unfinished rebuild instead.
    :raises CommandError: when another process rebuilds it now.
    """
    with clear_errors():
        building = _find(subject, name, threading.Event())
        dropped = building.give_up() if give_up else building.drop_old()
    for table in dropped:
        output.write(f"Dropped table {table}.")
    if not dropped:
        output.write("There is nothing to drop.")
    return 0


def _find(subject: Subject, name: str, stopping: threading.Event) -> Any:
    require_tables(subject)
    found = named(subject.consumers(), name)[0]
    if name.endswith(":reactions"):
        raise CommandError("Reactions are never called again: only the models of a projection are rebuilt.")
    return (found.application.rebuild_with or Rebuild)(found, stopping)


def _build(building: Any, stopping: threading.Event, output: Output, restart: bool) -> Rebuilt | None:
    """Build in a thread, because signals interrupt the main thread."""
    signals = Signals()
    threads = ThreadPoolExecutor(1, f"rebuild {building.live.name}")
    with shown_log(), signals.handled():
        reporter = Reporter([building.runner], output, LOG_EVERY)
        built: Future[Rebuilt | None] = threads.submit(building.run, restart=restart)
        try:
            while not built.done():
                watch(signals, stopping, reporter)
                wait([built], TICK)
        finally:
            stopping.set()
            threads.shutdown()
            reporter.finish_bar()
    return built.result()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
