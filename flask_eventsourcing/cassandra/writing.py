"""Appends to the log. The order, the versions and the outcome of every save depend on this module.

One conditional insert commits a row. There are no gaps between rows: the position of the next row is that of the last
one plus its size, so writers that race insert the same key and one of them wins. A writer that loses reads on to the
end of the log, and tries again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from itertools import islice

from eventsourcing.persistence import IntegrityError, OperationalError, PersistenceError, StoredEvent

from ..exceptions import CommitOutcomeUnknownError, EventValueError
from ..failures import Kept
from .memory import NOTHING, Memory
from .queueing import Pace, Queue, Ticket
from .rows import (
    MOST_EVENTS,
    Append,
    Horizon,
    MaybeDoneError,
    NotDoneError,
    Row,
    Span,
    Store,
    Subject,
    Upstream,
)
from .walking import PAGE, Tries, Walker

logger: logging.Logger = logging.getLogger(__name__)

MOST_STREAMS = 50
"""Streams whose last versions are read with one request."""
FIRST_VERSIONS = (0, 1)
"""The versions with which a stream can begin."""
LONGEST_WAIT = 20
"""A save waits at most this many times its patience: for each step of the save before it, and for its own steps."""


class Writer:
    """Appends to the log of one application, for all threads of a process.

    :param store: what keeps the log.
    :param patience: seconds for which a save tries again while nodes do not answer, or others are first.
    :param pace: lets other processes go first.
    """

    horizon_rows = 256
    """Rows behind the horizon, after which it is moved."""
    most_rows = 2048
    """The most rows by which it is moved at once."""
    fresh_rows = 16
    """The last rows, whose writers are about to index them."""
    most_indexed = 32
    """Rows that are indexed at once for others, while a save waits."""
    pause: float = 0.25
    """Seconds without a save after which a save first checks whether the log has grown, or was emptied."""

    def __init__(self, store: Store, patience: float, pace: Pace | None = None) -> None:
        self._store = store
        self._patience = patience
        self._walker = Walker(store, patience)
        self._pace = pace or Pace(store)
        self._queue = Queue()
        self._memory: Memory | None = None
        self._met = float("-inf")
        """When this process has last seen the end of the log."""
        self._moving = threading.Lock()

    def append(self, append: Append) -> int:
        """Append to the log, and return the first position.

        :raises IntegrityError: when another writer was first, or a version would leave a gap; nothing was recorded.
        :raises CommitOutcomeUnknownError: when the database did not tell in time whether it was recorded.
        :raises OperationalError: when nothing was recorded, as nodes did not answer or others were always first.
        """
        append.spans()
        if len(append.events) > MOST_EVENTS:
            raise EventValueError(
                f"{len(append.events)} events in one save; with Cassandra {MOST_EVENTS} are the most."
            )
        ticket = Ticket(append, self._store.now() + self._patience)
        if self._queue.join(ticket, LONGEST_WAIT * self._patience):
            self._lead()
        return ticket.outcome()

    def horizon(self) -> int | None:
        """Return the horizon of the memory, or None before the first save and after one whose outcome is unknown."""
        memory = self._memory
        return None if memory is None else memory.horizon

    def offer(self, events: Sequence[StoredEvent], horizon: int | None) -> None:
        """Take the events that an application has read up to the end of a stream, so that the end is not read again.

        :param horizon: what :meth:`horizon` returned before.
        """
        memory = self._memory
        if memory is not None and horizon is not None and events:
            memory.offer(events[-1].originator_id, events[-1].originator_version, horizon)

    def is_indexed(self, row: Row) -> bool:
        """Whether a row is known to be indexed, even if its flag cannot be seen yet."""
        memory = self._memory
        known = memory is not None and memory.horizon <= row.position < memory.head
        return row.indexed or (known and memory is not None and not memory.is_unindexed(row.position))

    def was_indexed(self, row: Row) -> None:
        """Note that a reader of this process has indexed the row."""
        memory = self._memory
        if memory is not None:
            memory.indexed(row.position)

    def _load_all(self, memory: Memory, batch: Sequence[Ticket]) -> None:
        """Read the last versions of the aggregates in a batch that are not known yet, with few requests."""
        about = {key for ticket in batch for key in ticket.keys if memory.known(key) is None}
        keys = [key for key in about if not isinstance(key, Upstream)]
        left, horizon = iter(keys), memory.horizon
        # A single version is read later, when the save needs it.
        while len(keys) > 1 and (some := list(islice(left, MOST_STREAMS))):
            found = self._walker.repeat(partial(self._store.last_versions, some))
            for key in some:
                memory.offer(key, found.get(key), horizon)

    def _load(self, memory: Memory, key: Subject) -> int:
        horizon = memory.horizon
        if isinstance(key, Upstream):
            read = partial(self._store.tracked, key.name)
        else:
            read = partial(self._store.last_version, key)
        found = self._walker.repeat(read)
        memory.offer(key, found, horizon)
        return NOTHING if found is None else found

    def _lead(self) -> None:
        batch: list[Ticket] = []

        def failed(error: BaseException) -> None:
            # The memory may miss a row now.
            self._memory = None
            for ticket in batch:
                ticket.fail(error if isinstance(error, Exception) else interrupted(error))

        done = None
        try:
            # Other threads wait for the outcome, so each of them gets any error; so does this thread, by its ticket.
            with Kept(failed):
                done = self._commit(batch)
        finally:
            self._queue.hand_over()
        if done is not None:
            self._finish(*done, batch)

    def _commit(self, batch: list[Ticket]) -> tuple[Memory, Row, list[int]] | None:
        """Commit what waits as one row; return it, with the rows to be indexed before it."""
        tries: Tries | None = None
        losses = 0
        while True:
            batch += [each for each in self._queue.take(batch) if self._is_in_time(each)]
            if not batch:
                return None
            memory = self._memory = self._at_the_end()
            # A process that starts may have had much to read.
            tries = tries or Tries(self._store, self._patience)
            self._load_all(memory, batch)
            self._admit_all(memory, batch)
            if not batch:
                return None
            self._pace.before(losses)
            row = memory.row([each.append for each in batch])
            winner = self._insert(row, tries)
            if winner is None:
                before = memory.unindexed(row.keys)
                memory.meet(row)
                self._met = self._store.now()
                self._pace.won()
                return memory, row, before
            losses += 1
            self._after_loss(memory, winner)
            if tries.over:
                raise OperationalError(f"Other writers were first for {self._patience:g} s, so that nothing was saved.")
            self._pace.lost(losses)

    def _is_in_time(self, ticket: Ticket) -> bool:
        """Whether a save may still be tried. Without a limit, waiting threads would fail one after the other."""
        if self._store.now() < ticket.until:
            return True
        waited = f"A save has waited for others of this process for {self._patience:g} s, so that nothing was saved."
        ticket.fail(OperationalError(waited))
        return False

    def _insert(self, row: Row, tries: Tries) -> Row | None:
        """Insert a row, again and again while the outcome is unknown; return the one that was there before, if any."""
        while True:
            began = self._store.now()
            try:
                found = self._store.insert(row)
            except (NotDoneError, MaybeDoneError) as error:
                self._again(row, tries, error)
            else:
                self._pace.took(self._store.now() - began)
                return None if found is None or found.id == row.id else found

    def _again(self, row: Row, tries: Tries, error: Exception) -> None:
        try:
            tries.failed(error)
        except OperationalError:
            if not tries.maybe:
                raise
            raise CommitOutcomeUnknownError(
                f"Cassandra did not tell within {self._patience:g} s whether a save was recorded (at position "
                f"{row.position}, {error}). Read the aggregate again before you repeat the save."
            ) from error

    def _at_the_end(self) -> Memory:
        """Return what is known of the log; after a pause all of it, or, if the log was emptied, what it has now."""
        memory, now = self._memory, self._store.now()
        if memory is None:
            return self._begin()
        if memory.last_row is None or now - self._met < self.pause:
            return memory
        position, row_id = memory.last_row
        found = self._walker.repeat(partial(self._store.read_rows, position, 2, states=False))
        is_there = bool(found) and found[0].position == position
        last = found[0] if is_there else self._walker.repeat(partial(self._store.read_row, position))
        self._met = now
        if last is None or last.id != row_id:
            logger.warning("Row %s of a log is gone: the tables were emptied or made again", position)
            return self._begin()
        return memory if len(found) == 1 else self._follow(memory)

    def _begin(self) -> Memory:
        memory = Memory(self._walker.repeat(self._store.read_horizon))
        return self._follow(memory)

    def _after_loss(self, memory: Memory, winner: Row) -> None:
        self._check(memory, winner)
        self._memory = self._follow(memory)
        self._met = self._store.now()

    def _check(self, memory: Memory, winner: Row) -> None:
        memory.meet(winner)

    def _follow(self, memory: Memory) -> Memory:
        """Read on to the end of the log; a memory that is far behind begins again at the horizon."""
        for met, row in enumerate(self._walker.rows(memory.head), 1):
            memory.meet(row)
            if met % PAGE == 0:
                horizon = self._walker.repeat(self._store.read_horizon)
                if horizon.position > memory.head:
                    return self._follow(Memory(horizon))
        return memory

    def _admit_all(self, memory: Memory, batch: list[Ticket]) -> None:
        """Keep the saves that can be recorded at the head, after all of them were checked against the same rows."""
        head = None
        while head != memory.head:
            head = memory.head
            batch[:] = [each for each in batch if self._admit(memory, each)]

    def _admit(self, memory: Memory, ticket: Ticket) -> bool:
        reason = self._refusal(memory, ticket.append)
        if reason is not None and self._is_ahead(memory, ticket.append) and self._settle(memory):
            reason = self._refusal(memory, ticket.append)
        if reason is None:
            return True
        self._before_refusal(memory, ticket)
        ticket.fail(IntegrityError(reason))
        return False

    def _before_refusal(self, memory: Memory, ticket: Ticket) -> None:
        """Write the streams that a dead writer may not have written, so that the aggregate can be read and changed."""
        self._index(memory, memory.unindexed(ticket.keys))

    def _index(self, memory: Memory, positions: Sequence[int]) -> None:
        for position in positions:
            self._walker.index(self._walker.settled(position))
            memory.indexed(position)

    def _refusal(self, memory: Memory, append: Append) -> str | None:
        for span in append.spans():
            known = self._last(memory, span.originator_id)
            if known != span.first - 1 and not self._begins(span, known):
                return (
                    f"Version {span.first} of aggregate {span.originator_id} cannot follow version "
                    f"{'none' if known == NOTHING else known}: read it again, and repeat what was done with it."
                )
        tracking = append.tracking
        if tracking is not None:
            known = self._last(memory, Upstream(tracking.application_name))
            if tracking.notification_id <= known:
                return f"Position {tracking.notification_id} of {tracking.application_name} was processed before."
        return None

    def _is_ahead(self, memory: Memory, append: Append) -> bool:
        return any(span.first > max(self._last(memory, span.originator_id), 0) + 1 for span in append.spans())

    def _settle(self, memory: Memory) -> bool:
        """Take a row at the head that a plain read has missed, and the rows behind it. Return whether there is one."""
        found = self._walker.repeat(partial(self._store.read_row, memory.head))
        if found is None:
            return False
        memory.meet(found)
        for row in self._walker.rows(memory.head):
            memory.meet(row)
        return True

    def _last(self, memory: Memory, key: Subject) -> int:
        known = memory.known(key)
        return self._load(memory, key) if known is None else known

    def _begins(self, span: Span, known: int) -> bool:
        if known != NOTHING:
            return False
        if span.first in FIRST_VERSIONS:
            return True
        has_snapshot = partial(self._store.has_snapshot, span.originator_id, span.first - 1)
        return self._walker.repeat(has_snapshot)

    def _finish(self, memory: Memory, row: Row, before: Sequence[int], batch: Sequence[Ticket]) -> None:
        """Index a row that is committed, and tell the threads that wait for it."""
        # The waiting threads get any error. A save that returned now would leave a gap in a stream.
        with Kept(partial(unfinished, batch, row)) as kept:
            self._index(memory, before)
            self._walker.index(row)
            memory.indexed(row.position)
        if kept.error is not None:
            return
        position = row.position
        for ticket in batch:
            ticket.succeed(position)
            position += ticket.append.size
        if memory.rows >= self.horizon_rows and self._moving.acquire(blocking=False):
            try:
                self._move_horizon(memory)
            except PersistenceError:
                logger.exception("The horizon of a log was not moved; the next save tries again")
            finally:
                self._moving.release()

    def _move_horizon(self, memory: Memory) -> None:
        """Index the rows that no process has indexed, and move the horizon behind them, where new processes begin."""
        last = memory.head
        horizon = self._walker.repeat(self._store.read_horizon)
        rows = list(islice(self._walker.rows(horizon.position), self.most_rows))
        left = self.most_indexed
        for row in rows if len(rows) == self.most_rows else rows[: -self.fresh_rows]:
            is_open = not row.indexed and memory.is_unindexed(row.position)
            if row.end > last or (is_open and not left):
                break
            if is_open:
                self._walker.index(row)
                left -= 1
            horizon = Horizon(row.end, row.last_event)
        self._walker.repeat(partial(self._store.move_horizon, horizon))
        memory.forget(horizon.position)


def interrupted(error: BaseException) -> CommitOutcomeUnknownError:
    """Return the error for threads whose leader was interrupted."""
    return CommitOutcomeUnknownError(
        f"The thread that saved the events was interrupted ({type(error).__name__}): read the aggregate again before "
        "you repeat the save."
    )


def unfinished(batch: Sequence[Ticket], row: Row, error: BaseException) -> None:
    """Tell waiting threads that a row is in the log, but not yet in the streams of its aggregates."""
    for ticket in batch:
        ticket.fail(
            CommitOutcomeUnknownError(
                f"The save is in the log (row {row.position}), but could not be written to the streams of its "
                f"aggregates: {error}. Read them again before you go on."
            )
        )
