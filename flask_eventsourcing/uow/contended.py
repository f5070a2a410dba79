"""Aggregates with a recent conflict, and the queue that units join before they read them, if they can be retried.

Without the queue, a unit that lost a race reads again at once, while the next winner writes, and loses again.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from uuid import UUID

from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection

from ..persistence import Dialect
from ..persistence.dialects.event_tables import EventTable

Key = tuple[str, UUID | str]


def sort_key(key: Key) -> tuple[str, str]:
    """The order in which units of work queue for several aggregates."""
    return key[0], str(key[1])


class ContendedAggregates:
    """Remembers conflicts for a while, in this process, and as long as a unit of work is in the queue.

    :param seconds: how long after its last conflict an aggregate is queued for.
    :param most: how many aggregates are remembered.
    """

    def __init__(self, seconds: float = 1.0, most: int = 1024) -> None:
        self._seconds = seconds
        self._most = most
        self._until: OrderedDict[Key, float] = OrderedDict()
        self._queues: dict[Key, weakref.WeakSet[AggregateQueue]] = {}

    def add(self, key: Key) -> None:
        """Note a conflict."""
        self._until[key] = time.monotonic() + self._seconds
        while len(self._until) > self._most:
            try:
                self._until.popitem(last=False)
            except KeyError:  # another thread has emptied it
                break

    def joined(self, key: Key, queue: AggregateQueue) -> None:
        """Note a unit that queues, or has its turn. Until it has left, other units queue and do not overtake it."""
        if len(self._queues) >= self._most:
            for other in [each for each, queues in list(self._queues.items()) if not queues]:
                self._queues.pop(other, None)
        self._queues.setdefault(key, weakref.WeakSet()).add(queue)

    def left(self, key: Key, queue: AggregateQueue) -> None:
        """Note that the turn of a unit is over."""
        self._queues.get(key, set()).discard(queue)

    def __contains__(self, key: Key) -> bool:
        until = self._until.get(key)
        if until is not None and until < time.monotonic():
            self._until.pop(key, None)
            until = None
        return until is not None or bool(self._queues.get(key))


class AggregateQueue:
    """Queues for the aggregates of one unit of work.

    :param dialect: how the database queues.
    :param contended: the aggregates with conflicts, of all units of this process.
    """

    active = False
    """Whether the unit can be run again, so that it queues at all."""
    remembers = False
    """Whether other code may run it again, so that its conflicts are remembered."""

    def __init__(self, dialect: Dialect, contended: ContendedAggregates) -> None:
        self._dialect = dialect
        self._contended = contended
        self.conflicts: dict[Key, EventTable] = {}
        """The conflicts of the last try. A host may replace this dictionary by one that it keeps itself."""
        self._queued: set[Key] = set()
        self._considered: set[Key] = set()

    def before_read(
        self, connection: Connection, table: EventTable, originator_id: UUID | str, *, has_written: bool
    ) -> None:
        """Queue for an aggregate that is about to be read, if it had conflicts lately.

        :param has_written: whether other transactions may wait for this unit.
        """
        key = (table.name, originator_id)
        if not self.active or key in self._considered:
            return
        # Only once: with a cache, the second read is under the library's fast-forward lock, where no thread may wait.
        self._considered.add(key)
        if key not in self._queued and key in self._contended:
            # To avoid deadlocks, units wait only in one order, and not while other units may wait for what this one has
            # written.
            in_order = not has_written and all(sort_key(key) > sort_key(other) for other in self._queued)
            self._join(connection, table, originator_id, wait=in_order)

    def conflicted(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Note a conflict, so that the next try queues."""
        for event in events:
            key = (table.name, event.originator_id)
            self._contended.add(key)
            if self.active or self.remembers:
                self.conflicts[key] = table

    def forget_old(self) -> None:
        """Forget conflicts that are too old for a retry."""
        for key in [key for key in self.conflicts if key not in self._contended]:
            del self.conflicts[key]

    @property
    def has_joined(self) -> bool:
        """Whether the transaction has queued for an aggregate."""
        return bool(self._queued)

    @property
    def has_conflicts(self) -> bool:
        """Whether the last try had conflicts, so the next one has to queue."""
        return bool(self.conflicts)

    def join_conflicting(self, connection: Connection) -> None:
        """Queue for the aggregates with which the last try had a conflict."""
        conflicts = sorted(self.conflicts.items(), key=lambda item: sort_key(item[0]))
        if not self.remembers:
            self.conflicts.clear()
        for (_, originator_id), table in conflicts:
            self._join(connection, table, originator_id, wait=True)

    def _join(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        key = (table.name, originator_id)
        self._queued.add(key)
        self._contended.joined(key, self)
        self._dialect.queue_for(connection, table, originator_id, wait=wait)

    def left(self) -> None:
        """Called when a transaction or a savepoint has ended, which ends its turns."""
        for key in self._queued:
            self._contended.left(key, self)
        self._queued.clear()
        self._considered.clear()
