"""Runs one consumer in one thread: waits for its turn, catches up, follows the log, survives the database's outages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from eventsourcing.persistence import Notification

from ..exceptions import ProjectionHaltedError
from ..persistence.dialects.waiting import Waiter
from .applying import Applier, EventError
from .consumers import Consumer
from .control import HALTED, SWAPPING, ControlRow, FencedError
from .dead_letters import describe
from .handover import settle
from .heartbeat import Heartbeat
from .locks import RunnerLock
from .outages import is_outage

logger = logging.getLogger(__name__)

STANDBY_PAUSE = 0.5
"""Seconds between the tries of a runner that stands by to take over."""
SHORTEST_WAIT = 0.005
GROWTH = 1.5
SLICE = 0.2
"""Seconds after which a wait looks whether it was told to stop."""
FIRST_BATCH = 16
BATCH_TIME, SQLITE_BATCH_TIME = 0.5, 0.1
"""Seconds that a batch takes at most, roughly: a longer one keeps SIGTERM waiting, and on SQLite every other writer."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between tries to apply an event, and to reach a database that cannot be reached."""
SKIP_PAUSE = 0.05
"""Seconds for which news without an event for this consumer are gathered before its position moves past them."""

RunnerState = Literal["starting", "standing by", "catching up", "up to date", "unreachable", "halted", "stopped"]


class Runner:
    """Runs a consumer until it is told to stop.

    :param stop: ends the run after the batch in progress.
    :param lock: a lock that the caller holds, and gives back.
    :param session: a context within which ``db.session`` is the one to write with.
    """

    def __init__(
        self,
        consumer: Consumer,
        stop: threading.Event,
        *,
        lock: RunnerLock | None = None,
        session: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.consumer = consumer
        self.host = consumer.host
        self.control = consumer.control
        self.stop = stop
        self.state: RunnerState = "starting"
        self.position = 0
        self.head = 0
        self.goal: int | None = None
        self.halted: ProjectionHaltedError | None = None
        self.events = 0
        """How many events this runner has dealt with."""
        self.lock = lock or consumer.lock()
        self._owns_lock = lock is None
        self._session = session
        self._batch_time = SQLITE_BATCH_TIME if self.host.engine.dialect.name == "sqlite" else BATCH_TIME
        self._limit = 1

    def run(self, *, once: bool = False) -> None:
        """Run the consumer; blocks until *stop* is set or, with *once*, until it has reached the head.

        While another process runs it, this one stands by.

        :raises ProjectionHaltedError: when an event cannot be applied and the consumer is to halt: at once with *once*,
            and otherwise at the end, unless somebody has resumed it.
        """
        pause = FIRST_PAUSE
        with self.host.app.app_context(), self._session():
            try:
                while not self.stop.is_set():
                    try:
                        self.control.ensure(self.consumer.start())
                        if self._take_turn(once):
                            return
                        pause = FIRST_PAUSE
                    except ProjectionHaltedError as error:
                        if once:
                            raise
                        # Others may go on in the meantime; it waits until somebody resumes it.
                        self.halted = error
                        logger.error("%s", error, exc_info=error.__cause__)
                    except FencedError:
                        logger.info("%s: another process moved its position; it goes on from there", self.name)
                    except Exception as error:
                        # An outage ends; anything else is raised.
                        if not is_outage(error):
                            raise
                        self.state = "unreachable"
                        logger.warning("%s: next try in %.3g s, as the database failed: %s", self.name, pause, error)
                        self.stop.wait(pause)
                        pause = min(pause * 2, LONGEST_PAUSE)
                if self.halted is not None:
                    raise self.halted
                self.state = "stopped"
            finally:
                if self._owns_lock:
                    self.lock.release()

    @property
    def name(self) -> str:
        """The consumer's name."""
        return self.consumer.name

    def _take_turn(self, once: bool) -> bool:
        row = self.control.read()
        if row is not None and row.state == HALTED:
            self._halted(row, once)
            return False
        if row is not None and row.state == SWAPPING and self.consumer.kind == "projection":
            self._settle_swap()
            return False
        claimed = self.control.claim(lease=self.lock.leased) if self.lock.acquire() else None
        if claimed is None:
            return self._stand_by(row, once)
        self.halted = None
        try:
            with Heartbeat(self.control, claimed, self.lock) as heartbeat:
                return self._follow(claimed, once, heartbeat)
        finally:
            self._give_up(claimed)

    def _settle_swap(self) -> None:
        """A rebuild is about to end; if its process has died, end it in its place."""
        self.state = "standing by"
        lock = self.consumer.of_kind("rebuild").lock()
        try:
            if lock.acquire():
                settle(self.consumer)
        finally:
            lock.release()
        self.stop.wait(SLICE)

    def _halted(self, row: ControlRow, once: bool) -> None:
        self.state = "halted"
        self.lock.release()
        if once:
            raise ProjectionHaltedError(halted_message(self.name, row.failed_position, row.error))
        self.stop.wait(STANDBY_PAUSE)

    def _stand_by(self, row: ControlRow | None, once: bool) -> bool:
        self.state = "standing by"
        if row is not None:
            self.position = row.position
        if once and self.position >= self._find_goal():
            return True
        self.stop.wait(STANDBY_PAUSE)
        return False

    def _give_up(self, claimed: ControlRow) -> None:
        try:
            self.control.give_up(claimed)
        except Exception as error:
            # What ended the run is more important, and who takes over does not need this.
            if not is_outage(error):
                raise
            logger.debug("%s: its claim could not be given up: %s", self.name, error)

    def _follow(self, claimed: ControlRow, once: bool, heartbeat: Heartbeat) -> bool:
        """Apply events until told to stop; returns True when *once* and all are applied."""
        applier = Applier(self.consumer)
        waiter = self.host.recorder.waiter()
        try:
            while not self.stop.is_set():
                heartbeat.check()
                self.position = claimed.position
                if once and claimed.position >= self._find_goal():
                    self.state = "up to date"
                    return True
                if claimed.position >= self.head:
                    self.head = self.consumer.end()
                if claimed.position >= self.head:
                    self.state = "up to date"
                    self._wait(waiter, claimed, heartbeat)
                    continue
                # Each time anew: subclasses may have been imported in the meantime.
                topics = self.consumer.handlers.topics
                page = self.host.read_log(claimed.position, self._limit, self.head, topics)
                full = len(page) == self._limit
                self.state = "catching up" if full else "up to date"
                if not page:
                    self.stop.wait(0 if once else SKIP_PAUSE)
                claimed = self._apply(applier, claimed, page, page[-1].id if full else self.head)
            return False
        finally:
            waiter.close()

    def _find_goal(self) -> int:
        """Where a run that is to happen once ends: what is saved in the meantime is left to the next one."""
        if self.goal is None:
            self.goal = self.head = self.consumer.end()
        return self.goal

    def _wait(self, waiter: Waiter, claimed: ControlRow, heartbeat: Heartbeat) -> None:
        """Wait until there is something to do."""
        wait = SHORTEST_WAIT
        look = time.monotonic()
        while not self.stop.is_set():
            heartbeat.check()
            news = waiter.wait(max(0.0, min(SLICE, look + wait - time.monotonic())))
            now = time.monotonic()
            if news or now >= look + wait:
                self.head = self.consumer.end()
                if self.head > claimed.position:
                    return
                # After news that is not to be seen yet, because of a writer in progress, look again soon.
                wait = SHORTEST_WAIT if news else min(wait * GROWTH, waiter.longest)
                look = now

    def _apply(self, applier: Applier, claimed: ControlRow, page: Sequence[Notification], position: int) -> ControlRow:
        started = time.monotonic()
        if len(page) == 1:
            # Not as a batch, so that a reaction is called no more often than it says.
            applied = self._apply_one(applier, claimed, page[0], position)
        else:
            try:
                applied = applier.apply(claimed, page, position)
            except EventError:
                logger.info("%s: a batch of %d events failed, they are applied one by one", self.name, len(page))
                return self._one_by_one(applier, claimed, page)
            self.events += len(page)
        self._adapt(time.monotonic() - started, len(page))
        return applied

    def _adapt(self, seconds: float, size: int) -> None:
        # Grows while it catches up; at the head a page has what there is, often a single event.
        if seconds > self._batch_time:
            self._limit = max(1, self._limit // 2)
        elif size == self._limit and seconds < self._batch_time / 2:
            self._limit = min(self.consumer.batch_size, max(FIRST_BATCH, self._limit * 2))

    def _one_by_one(self, applier: Applier, claimed: ControlRow, page: Sequence[Notification]) -> ControlRow:
        for notification in page:
            if self.stop.is_set():
                break
            claimed = self._apply_one(applier, claimed, notification, notification.id)
            self.position = claimed.position
        return claimed

    def _apply_one(
        self, applier: Applier, claimed: ControlRow, notification: Notification, position: int
    ) -> ControlRow:
        retries = self.consumer.projection_class.retries
        error: BaseException | None = None
        for attempt in range(retries + 1):
            try:
                applied = applier.apply(claimed, [notification], position)
            except EventError as failure:
                error = failure.__cause__ or failure
                self._note(claimed, notification, error)
                if attempt < retries and self.stop.wait(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)):
                    return claimed
            else:
                self.events += 1
                return applied
        return self._fail(applier, claimed, notification, error, retries + 1)

    def _note(self, claimed: ControlRow, notification: Notification, error: BaseException) -> None:
        text = f"{event_name(notification)}: {describe(error)}"
        self.control.note_error(claimed, notification.id, text)
        logger.warning("%s: its handler failed: %s", self.name, text, exc_info=error)

    def _fail(
        self,
        applier: Applier,
        claimed: ControlRow,
        notification: Notification,
        error: BaseException | None,
        attempts: int,
    ) -> ControlRow:
        error = error or EventError(None)
        if self.consumer.projection_class.on_failure == "dead-letter":
            logger.error("%s: %s is set aside as a dead letter", self.name, event_name(notification))
            return applier.apply(claimed, [notification], notification.id, dead=(error, attempts))
        text = f"{event_name(notification)}: {describe(error)}"
        self.control.halt(claimed, notification.id, text)
        self.state = "halted"
        raise ProjectionHaltedError(halted_message(self.name, notification.id, text)) from error


def event_name(notification: Notification) -> str:
    """Return how messages name an event."""
    event_class = notification.topic.partition(":")[2] or notification.topic
    return (
        f"event {notification.id} ({event_class} {notification.originator_id} "
        f"version {notification.originator_version})"
    )


def halted_message(name: str, position: int | None, error: str | None) -> str:
    """Return what is said of a halted projection."""
    return (
        f"{name} is halted before position {position}: {error}. Mend its handler and run it again, "
        "or let it set such events aside with on_failure = 'dead-letter'."
    )
