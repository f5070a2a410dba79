"""The turn of a process to run a consumer: it runs, stands by, or is kept from running."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from eventsourcing.persistence import Notification
from sqlalchemy.engine import Connection

from ...persistence.dialects import MAY_PASS, is_outage
from ...persistence.dialects.locks import RunnerLock
from ..applying.pages import LogPages
from ..checkpoint import LEASE, CheckpointRow, FencedError
from ..consumers import Consumer
from ..consumers.belonging import OLD_CODE, Belonging, Mismatch
from ..consumers.inline import Ranges, merge_ranges

logger: logging.Logger = logging.getLogger(__name__)

MERGE_EVERY = 20.0
"""Seconds after which an idle worker merges the ranges of inline projections again."""
LOOK_EVERY = 5.0
"""Seconds after which an idle runner checks its log and its tables again."""
FILLED = (
    "%s begins at the start of the log, and its table %s has rows: if its checkpoint was lost, events are applied to "
    "these a second time, and you need to run %s"
)

_alone = threading.RLock()
"""Held while an event is tried that may end the process, so that no other event is blamed for the end."""


class ProcessEndedError(Exception):
    """A process has ended while it applied an event.

    :param again: the command after which it is tried again.
    """

    def __init__(self, again: str) -> None:
        super().__init__(
            "the process ended while it applied the event, by a signal, a lack of memory, or os._exit(); the same code "
            f"tries it again only after {again}"
        )


class Suspects:
    """Events of which one may have ended a process. Each is noted and tried alone, so that the next process knows it.

    A process that a signal, a lack of memory, or ``os._exit()`` has ended does not give its claim back.

    That a supervisor restarts the process is no decision of an operator to try the event again.

    :param token: of the claim that this process is to give back, if it has one.
    :param left: how many events the process before may have been applying, or 0 if it has given its claim back.
    """

    def __init__(self, consumer: Consumer, token: str | None = None, left: int = 0) -> None:
        self.consumer: Consumer = consumer
        self.token: str | None = token
        self.left: int = left

    def tries(self, claimed: CheckpointRow, notification: Notification) -> int:
        """Return how often other processes have tried an event before they ended."""
        is_noted = self.left and claimed.failed_position == notification.id
        return claimed.claim or 0 if is_noted else 0

    def halted(self, error: BaseException) -> None:
        """Leave the claim of the process that has ended in the row, if the consumer has halted because of it."""
        if isinstance(error, ProcessEndedError):
            self.token = None

    @contextmanager
    def trying(self, claimed: CheckpointRow, notification: Notification, attempt: int) -> Iterator[None]:
        """Note a try, if the event may end the process, and try the event in the block.

        :raises FencedError: when the claim was lost.
        """
        if not self.left:
            yield
            return
        with _alone:
            self.consumer.checkpoint.note_try(claimed, notification.id, attempt)
            yield
        self.left -= 1


class LeaseWatch:
    """Notices that a lease is not renewed, by the clock of this process: the other's clock may be wrong."""

    def __init__(self) -> None:
        self._seen: tuple[str | None, datetime | None] = (None, None)
        self._since = time.monotonic()

    def abandoned(self, row: CheckpointRow | None) -> CheckpointRow | None:
        """Return the row if its lease has not changed for as long as a lease lasts."""
        seen = (None, None) if row is None else (row.token, row.leased_until)
        if seen != self._seen or seen[0] is None:
            self._seen, self._since = seen, time.monotonic()
            return None
        return row if time.monotonic() - self._since > LEASE else None


class Turn:
    """Takes and releases the claim of one runner.

    :param lock: a lock that the caller holds, and gives back.
    """

    def __init__(self, consumer: Consumer, lock: RunnerLock | None = None) -> None:
        self.consumer = consumer
        self.lock: RunnerLock = lock or consumer.lock()
        self._owns_lock = lock is None
        self._watch = LeaseWatch()
        self._told: str | None = None
        self._looked = time.monotonic()
        self.suspects: Suspects = Suspects(consumer)
        self.topics: dict[str, Any] = {}
        """What the runner has found out about topics; the end of the claim writes it."""

    def take(self, row: CheckpointRow | None) -> CheckpointRow | Mismatch | None:
        """Return the row if the turn is taken, a mismatch, or None while another process has the turn."""
        belonging = Belonging(self.consumer)
        if row is None:
            return self._begin(belonging)
        # Before the lock, which another process with other code may hold for long.
        mismatch = belonging.find_old_code(row)
        if mismatch is not None:
            return self._refuse(mismatch)
        abandoned = self._watch.abandoned(row)
        if not self.lock.acquire():
            return None
        mark = self.consumer.application.high_water_mark()
        with self.consumer.application.engine.begin() as connection:
            # Read again, now that the lock is held.
            row = self.consumer.checkpoint.read(connection) or row
            notes = self._notes(belonging, connection, row, mark)
            if isinstance(notes, Mismatch):
                return self._refuse(notes)
        code = "" if self.consumer.kind == "rebuild" else self.consumer.fingerprint
        at = row.position if "position" in notes else None
        claimed = self.consumer.checkpoint.claim(
            lease=self.lock.leased, fingerprint=code, notes=notes, abandoned=abandoned, at=at
        )
        if claimed is not None:
            self._told, self._looked = None, time.monotonic()
            # This process may have left a claim itself, in an outage in which it could not give it back.
            is_left = row.token not in (None, self.suspects.token)
            self.suspects = Suspects(self.consumer, claimed.token, self.consumer.batch_size if is_left else 0)
            if claimed.position == 0 < mark:
                self._warn_of_rows(belonging)
        return claimed

    def _warn_of_rows(self, belonging: Belonging) -> None:
        with self.consumer.application.engine.connect() as connection:
            filled = belonging.find_filled(connection)
        if filled is not None:
            logger.warning(FILLED, self.consumer.name, filled, self.consumer.command("rebuild"))

    def _notes(
        self, belonging: Belonging, connection: Connection, row: CheckpointRow, mark: int
    ) -> Mismatch | dict[str, Any]:
        """Return what the row is to have with the claim, or what does not fit."""
        mismatch = belonging.find_mismatch(connection, row)
        if mismatch is not None:
            return mismatch
        notes = belonging.notes(connection, row)
        if self.consumer.kind != "projection":
            return notes
        # The projection may have been inline before.
        behind = Ranges(self.consumer).take_over(connection, row, mark)
        return behind if isinstance(behind, Mismatch) else notes | behind

    def _begin(self, belonging: Belonging) -> CheckpointRow | Mismatch | None:
        checkpoint = self.consumer.checkpoint
        with self.consumer.application.engine.connect() as connection:
            mismatch = belonging.find_orphan(connection)
        if mismatch is not None:
            return self._refuse(mismatch)
        checkpoint.ensure(self.consumer.start())
        made = checkpoint.read()
        return None if made is None else self.take(made)

    def find_end(self, row: CheckpointRow, pages: LogPages, limit: int) -> int:
        """Return how far the consumer may go now.

        :param pages: looks for up to *limit* events, and keeps them.
        :raises FencedError: when an older release, or a newer one, applies events inline; the next turn says what then.
        """
        end = pages.look_ahead(row.position, limit)
        if end is None:
            end = self.consumer.end()
        if end <= row.position:
            # Every event that may have ended a process is applied.
            self.suspects.left = 0
        elif self.consumer.kind == "projection" and self.consumer.applied_inline is None:
            # Read after the end, so that the ranges of all events before the end are there.
            with self.consumer.application.datastore.reading(join=False) as read:
                if Ranges(self.consumer).beyond(read.connection, row.position, end) != row.position:
                    raise FencedError
        return end

    def look(self, row: CheckpointRow) -> None:
        """Check every few seconds, while the runner is idle, whether everything still fits, and note the tables.

        :raises FencedError: when it does not; the next turn says what.
        """
        if time.monotonic() < self._looked + LOOK_EVERY:
            return
        self._looked = time.monotonic()
        belonging = Belonging(self.consumer)
        with self.consumer.application.engine.connect() as connection:
            if belonging.find_mismatch(connection, row) is not None:
                raise FencedError
            tables = belonging.note_tables(connection, row)
        if tables not in (None, row.tables_id):
            self.consumer.checkpoint.note(row, tables_id=tables)
        merge_ranges(self.consumer.application, MERGE_EVERY)

    def _refuse(self, mismatch: Mismatch) -> Mismatch:
        self.give_up()
        if mismatch.text != self._told:
            self._told = mismatch.text
            logger.log(logging.WARNING if mismatch.state == OLD_CODE else logging.ERROR, "%s", mismatch.text)
        return mismatch

    def release(self, claimed: CheckpointRow) -> None:
        """End the claim, and note the tables as they are left."""
        try:
            self._note(claimed)
            if self.suspects.token is not None:
                self.consumer.checkpoint.release(claimed)
        except FencedError:
            logger.debug("%s: its claim was lost before it was released", self.consumer.name)
        except MAY_PASS as error:
            # The error that ended the run is more important, and a process that takes over does not need the release.
            if not is_outage(error):
                raise
            logger.debug("%s: its claim could not be released: %s", self.consumer.name, error)

    def _note(self, claimed: CheckpointRow) -> None:
        with self.consumer.application.engine.connect() as connection:
            row = self.consumer.checkpoint.read(connection)
            # Only over its own notes, and only if everything fits.
            if row is None or row.token != claimed.token:
                return
            belonging = Belonging(self.consumer)
            if belonging.find_mismatch(connection, row) is not None:
                return
            tables = belonging.note_tables(connection, row)
        notes = dict(self.topics)
        if tables not in (None, row.tables_id):
            notes["tables_id"] = tables
        if notes:
            self.consumer.checkpoint.note(claimed, **notes)

    def give_up(self) -> None:
        """Give the lock back."""
        self.lock.release()

    def leave(self) -> None:
        """Leave a server that is no longer the primary: the next connections may lead to another one."""
        self.lock.leave()

    def end(self) -> None:
        """Give the lock back, unless it is the caller's."""
        if self._owns_lock:
            self.lock.release()


def refuse_missing(consumer: Consumer) -> None:
    """Refuse to go on if a table of the projection is missing: then the event that failed is not at fault.

    :raises FencedError: when one is; the next turn says which.
    """
    with consumer.application.engine.connect() as connection:
        if Belonging(consumer).find_missing(connection) is not None:
            raise FencedError
