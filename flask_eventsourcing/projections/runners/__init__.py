"""Runs one consumer in one thread: waits for its turn, catches up, follows the log, and survives outages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from eventsourcing.persistence import Notification

from ...exceptions import HandlerError, ProjectionHaltedError
from ...persistence.dialects import MAY_PASS, hide_values, is_canceled, is_outage, is_read_only
from ...persistence.dialects.locks import RunnerLock
from ...tailing import Waiter
from ..applying import Applier, EventError, SuspectError
from ..applying.pages import LogPages, Page
from ..checkpoint import HALTED, PAUSED, SWAPPING, CheckpointRow, FencedError, Heartbeat
from ..consumers import Consumer
from ..consumers.belonging import OLD_CODE, Mismatch
from ..dead_letters import describe, event_name
from ..swap import is_rebuilding, settle
from .claims import ProcessEndedError, Suspects, Turn, refuse_missing
from .pace import Backoff, Pace

logger: logging.Logger = logging.getLogger(__name__)

STANDBY_PAUSE = 0.5
"""Seconds between the tries of a runner that stands by to take over."""
SHORTEST_WAIT, GROWTH = 0.002, 1.5
SLICE = 0.2
"""Seconds after which a wait checks whether the runner is to stop."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between tries to apply an event, and to reach a database that cannot be reached."""
SUSPECT_PAUSE = 1.0
"""The same at first, after a connection was lost."""
SKIP_PAUSE = 0.05
"""Seconds for which news without an event for this consumer are gathered before its position moves past them."""

RunnerState = Literal[
    "starting", "standing by", "catching up", "up to date", "unreachable", "halted", "paused", "stopped"
]


@dataclass(eq=False)
class Progress:
    """What a runner does and how far it is, for reports from another thread."""

    state: RunnerState = "starting"
    position: int = 0
    high_water_mark: int = 0
    events: int = 0
    """How many events the runner has dealt with."""
    has_saved: bool = False
    """Whether a reaction has saved events since the run began."""
    halted: ProjectionHaltedError | None = None

    @property
    def end(self) -> int:
        """How far the runner has to go, as far as it has looked."""
        return max(self.high_water_mark, self.position)

    @property
    def lag(self) -> int:
        """How many positions the runner is behind."""
        return self.end - self.position


class Delivery:
    """Gives the events of a log to an applier in batches; if one fails, one by one and with retries.

    :param stop: ends it after the event in progress.
    :param suspects: the events that are not applied as a batch.
    """

    def __init__(
        self, consumer: Consumer, stop: threading.Event, progress: Progress, pace: Pace, suspects: Suspects
    ) -> None:
        self.applier: Applier = Applier(consumer, ends=self._is_over)
        self.suspects: Suspects = suspects
        self.consumer = consumer
        self.stop = stop
        self.progress = progress
        self.pace = pace

    def deliver(self, claimed: CheckpointRow, page: Page) -> CheckpointRow:
        """Apply events and move the position; returns the row as it is then.

        :raises ProjectionHaltedError: when one keeps failing and the consumer is to halt.
        """
        self.pace.begin()
        events, size = page.events, page.size
        if events and (self.suspects.left or (len(events) > 1 and self.applier.commits_each)):
            return self._one_by_one(claimed, events)
        if len(events) == 1:
            # Not as a batch, so that a reaction is called no more often than it says.
            applied = self._deliver_one(claimed, events[0], page.position)
        else:
            try:
                applied = self.applier.apply(claimed, events, page.position)
            except EventError:
                logger.info("%s: a batch of %d events failed, they are applied one by one", claimed.name, len(events))
                return self._one_by_one(claimed, events)
            self.progress.events += applied.applied - claimed.applied
            if applied.position < page.position:
                size = applied.applied - claimed.applied
        self.pace.adapt(self.pace.spent, size)
        return applied

    def _is_over(self) -> bool:
        """Whether a batch is to end before its next event, because its transaction keeps other writers waiting."""
        return self.stop.is_set() or time.monotonic() > self.pace.until

    def _one_by_one(self, claimed: CheckpointRow, page: Sequence[Notification]) -> CheckpointRow:
        for notification in page:
            if self.stop.is_set():
                break
            self.pace.begin()
            claimed = self._deliver_one(claimed, notification, notification.id)
            self.progress.position = claimed.position
        return claimed

    def _deliver_one(self, claimed: CheckpointRow, notification: Notification, position: int) -> CheckpointRow:
        pause = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        attempts = self.suspects.tries(claimed, notification)
        if attempts:
            error: BaseException = ProcessEndedError(self.consumer.command("projections resume"))
            self._note(claimed, notification, error, attempts)
            if attempts > self.consumer.projection_class.retries:
                return self._fail(claimed, notification, error, attempts)
        while True:
            try:
                with self.suspects.trying(claimed, notification, attempts + 1):
                    applied = self.applier.apply(claimed, [notification], position)
            except EventError as failure:
                attempts += 1
                error = failure.__cause__ or failure
                if isinstance(failure, SuspectError):
                    # A short outage may end several connections.
                    pause.seconds = max(pause.seconds, SUSPECT_PAUSE)
            else:
                self.progress.events += 1
                self.progress.has_saved = self.applier.has_saved
                return applied
            self._note(claimed, notification, error, attempts)
            if attempts > self.consumer.projection_class.retries:
                refuse_missing(self.consumer)
                return self._fail(claimed, notification, error, attempts)
            if self.stop.wait(pause.seconds):
                return claimed
            pause.grow()

    def _note(self, claimed: CheckpointRow, notification: Notification, error: BaseException, attempts: int) -> None:
        text = f"{event_name(notification)}: {describe(error)}"
        try:
            self.consumer.checkpoint.note_try(claimed, notification.id, attempts, error=text)
        except sa.exc.DBAPIError as lost:
            # The pool still had a connection from before the outage. After this error it makes new ones.
            if not lost.connection_invalidated:
                raise
            self.consumer.checkpoint.note_try(claimed, notification.id, attempts, error=text)
        # The traceback is logged once: the next tries are likely to fail in the same way.
        shown = error if attempts == 1 and error.__traceback__ else None
        logger.warning("%s: its handler failed, try %d: %s", claimed.name, attempts, text, exc_info=shown)

    def _fail(
        self, claimed: CheckpointRow, notification: Notification, error: BaseException, attempts: int
    ) -> CheckpointRow:
        # What a rebuild refuses is not the fault of one event, and it would set aside all of them.
        is_refused = self.consumer.kind == "rebuild" and isinstance(error, HandlerError)
        if self.consumer.projection_class.on_failure == "dead-letter" and not is_refused:
            logger.error("%s: %s is set aside as a dead letter", claimed.name, event_name(notification))
            return self.applier.apply(claimed, [notification], notification.id, dead=(error, attempts))
        text = f"{event_name(notification)}: {describe(error)}"
        self.consumer.checkpoint.halt(claimed, notification.id, text)
        self.suspects.halted(error)
        self.progress.state = "halted"
        raise ProjectionHaltedError(halted_message(self.consumer, notification.id, text)) from error


class Runner:
    """Runs a consumer until it is stopped.

    :param stop: ends the run after the batch in progress.
    :param lock: a lock that the caller holds, and gives back.
    :param session: a context within which the host's current session is the one to write with.
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
        self.stop = stop
        self.progress: Progress = Progress()
        self.pace: Pace = Pace(consumer.batch_size, consumer.application.datastore.dialect.batch_seconds)
        self.goal: int | None = None
        self.turn: Turn = Turn(consumer, lock)
        self._session = session

    @property
    def name(self) -> str:
        """The consumer's name."""
        return self.consumer.name

    def run(self, *, once: bool = False) -> None:
        """Run the consumer; blocks until *stop* is set or, with *once*, until it has reached the end of the log.

        While another process runs it, this one stands by.

        :raises ProjectionHaltedError: when an event cannot be applied and the consumer is to halt: at once with *once*,
            and otherwise at the end, unless it was resumed.
        """
        with self.consumer.application.host.context(), self._session():
            try:
                self._run(once)
            finally:
                self.turn.end()

    def _run(self, once: bool) -> None:
        pause = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self.goal, self.progress.has_saved = None, False
        while not self.stop.is_set():
            try:
                if self._take_turn(once):
                    return
                pause.reset()
            except ProjectionHaltedError as error:
                if once:
                    raise
                # Other projections may go on in the meantime. This one waits until an operator resumes it.
                self.progress.halted = error
                logger.error("%s", error)
            except FencedError:
                logger.info("%s: another process moved its position; it goes on from there", self.name)
            except MAY_PASS as error:
                # An outage ends, and so may a lock that a statement waited for. Any other error is raised.
                if not (is_outage(error) or (is_canceled(error) and not once)):
                    raise
                self.progress.state = "unreachable"
                hide_values(error)
                if is_read_only(error):
                    # The server is not the primary any more, and the next connection may lead to another one.
                    self.turn.leave()
                logger.warning("%s: next try in %.3g s, as the database failed: %s", self.name, pause.seconds, error)
                self.stop.wait(pause.seconds)
                pause.grow()
        if self.progress.halted is not None:
            raise self.progress.halted
        self.progress.state = "stopped"

    def _take_turn(self, once: bool) -> bool:
        row = self.consumer.checkpoint.read()
        if row is not None and row.state in (HALTED, PAUSED):
            self._stand_still(row, once)
            return False
        if row is not None and row.state == SWAPPING and self.consumer.kind == "projection":
            self._settle_swap()
            return False
        claimed = self.turn.take(row)
        if isinstance(claimed, Mismatch):
            self._refuse(claimed, once)
            return False
        if claimed is None:
            return self._stand_by(row, once)
        self.progress.halted = None
        try:
            with Heartbeat(self.consumer.checkpoint, claimed, self.turn.lock, self.turn.look) as heartbeat:
                return self._follow(claimed, once, heartbeat)
        finally:
            self.turn.release(claimed)

    def _refuse(self, mismatch: Mismatch, once: bool) -> None:
        """Wait until an operator has corrected the mismatch; with old code, wait for ever."""
        if once:
            raise mismatch.error
        if mismatch.state == OLD_CODE:
            self.progress.state = "standing by"
        else:
            self.progress.state, self.progress.halted = "halted", mismatch.error
        self.stop.wait(STANDBY_PAUSE)

    def _settle_swap(self) -> None:
        """Wait for the end of a rebuild, or end it here if its process has died."""
        self.progress.state = "standing by"
        lock = self.consumer.of_kind("rebuild").lock()
        try:
            if lock.acquire() and not (lock.leased and is_rebuilding(self.consumer)):
                settle(self.consumer)
        finally:
            lock.release()
        self.stop.wait(SLICE)

    def _stand_still(self, row: CheckpointRow, once: bool) -> None:
        """Wait until an operator resumes it."""
        self.turn.give_up()
        if once:
            raise ProjectionHaltedError(stopped_message(self.consumer, row))
        if row.state == PAUSED and self.progress.state != "paused":
            logger.info("%s", stopped_message(self.consumer, row))
        if row.state == PAUSED:
            self.progress.state, self.progress.halted, self.progress.position = "paused", None, row.position
        else:
            self.progress.state = "halted"
        self.stop.wait(STANDBY_PAUSE)

    def _stand_by(self, row: CheckpointRow | None, once: bool) -> bool:
        self.progress.state, self.progress.halted = "standing by", None
        if row is not None:
            self.progress.position = row.position
        if once and self.progress.position >= self._find_goal():
            return True
        self.stop.wait(STANDBY_PAUSE)
        return False

    def _follow(self, claimed: CheckpointRow, once: bool, heartbeat: Heartbeat) -> bool:
        """Apply events until told to stop; returns True when *once* and all are applied."""
        progress, application = self.progress, self.consumer.application
        delivery = Delivery(self.consumer, self.stop, progress, self.pace, self.turn.suspects)
        pages = LogPages(self.consumer, claimed)
        waiter = application.log.waiter()
        try:
            while not self.stop.is_set():
                heartbeat.check()
                progress.position = claimed.position
                if once and claimed.position >= self._find_goal():
                    progress.state = "up to date"
                    return True
                if claimed.position >= progress.high_water_mark:
                    self._wait(waiter, claimed, heartbeat, pages)
                    continue
                claimed = self._move(claimed, once, pages, delivery)
            return False
        finally:
            waiter.close()
            self.turn.topics = pages.notes()

    def _move(self, claimed: CheckpointRow, once: bool, pages: LogPages, delivery: Delivery) -> CheckpointRow:
        """Apply one page, and keep no reference to it, as the next wait may be long."""
        mark = self.progress.high_water_mark
        page = pages.read(claimed.position, self.pace.limit, mark)
        self.progress.state = "catching up" if page.full else "up to date"
        # A node of a cluster may not have an event yet that another node has.
        seen = page.position > claimed.position
        if not page.events and (page.position == mark or not seen):
            self.stop.wait(0 if once and seen else SKIP_PAUSE)
        return delivery.deliver(claimed, page) if seen else claimed

    def _find_goal(self) -> int:
        """Return the position at which a run with *once* ends; the next run handles later events."""
        if self.goal is None:
            self.goal = self.progress.high_water_mark = self.consumer.end()
        return self.goal

    def _wait(self, waiter: Waiter, claimed: CheckpointRow, heartbeat: Heartbeat, pages: LogPages) -> None:
        """Wait until there is something to do."""
        pause = Backoff(SHORTEST_WAIT, waiter.longest, GROWTH)
        due = time.monotonic() + waiter.first
        heartbeat.resting = claimed
        try:
            while not self.stop.is_set():
                heartbeat.check()
                news = waiter.wait(max(0.0, min(SLICE, due - time.monotonic())))
                if news or time.monotonic() >= due:
                    self.progress.high_water_mark = self.turn.find_end(claimed, pages, self.pace.limit)
                    if self.progress.high_water_mark > claimed.position:
                        return
                    self.progress.state = "up to date"
                    # After news that cannot be read yet, because a writer is in progress, look again soon.
                    if news:
                        pause.reset()
                    due = time.monotonic() + pause.take()
        finally:
            heartbeat.resting = None


def halted_message(consumer: Consumer, position: int | None, error: str | None) -> str:
    """Return what is said of a halted projection."""
    return (
        f"{consumer.name} is halted before position {position}: {(error or '').rstrip('.')}. Correct its handler and "
        "run it again, or let it set such events aside with on_failure = 'dead-letter', or this one with "
        f"{consumer.command('projections skip', position)}."
    )


def stopped_message(consumer: Consumer, row: CheckpointRow) -> str:
    """Return what is said of a consumer that is halted or paused."""
    if row.state != PAUSED:
        return halted_message(consumer, row.failed_position, row.error)
    by = f" by {row.changed_by}" if row.changed_by else ""
    reason = f": {row.reason}" if row.reason else ""
    return f"{row.name} is paused{by}{reason}. Let it go on with {consumer.command('projections resume')}."
