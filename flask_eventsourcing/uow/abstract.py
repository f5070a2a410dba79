"""The unit of work as applications, projections and commands use it, independent of the host's transaction."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol
from uuid import UUID

from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection

from ..persistence import Dialect
from ..persistence.datastore import JoinedUnit
from ..persistence.describing import Description
from ..persistence.dialects.event_tables import EventTable, Known
from .contended import AggregateQueue
from .pending import AfterCommit, AfterRollback, Batch, Item, Refusal


class PendingEvents(Protocol):
    """The items that were noted in a transaction that has not ended."""

    def has_events_of(self, originator_id: UUID | str) -> bool:
        """Whether there are events of an aggregate."""

    def add_beside(self, originator_id: UUID | str, item: Item) -> None:
        """Note something that is kept or dropped with the last events of an aggregate."""


class Unit(JoinedUnit, ABC):
    """The events that were recorded in one datastore in a transaction of the host's, and are not yet committed.

    Recorders join it.
    """

    queue: AggregateQueue
    _saved: weakref.WeakKeyDictionary[Any, set[Any]]

    @property
    @abstractmethod
    def dialect(self) -> Dialect:
        """How the database of the events is written and read."""

    @property
    @abstractmethod
    def pending(self) -> PendingEvents:
        """What was noted in the transaction."""

    @property
    @abstractmethod
    def batches(self) -> Sequence[Batch]:
        """The recorded events that were neither committed nor rolled back on request, by save."""

    @abstractmethod
    def connection(self) -> Connection:
        """The connection of its transaction to the database of the events."""

    @abstractmethod
    def savepoint(self) -> AbstractContextManager[Any]:
        """A savepoint in the transaction: released at the end of a ``with`` block, rolled back on an error."""

    @abstractmethod
    def look(self) -> None:
        """Find out whether the pending events are stored, if the unit may have missed the end of their transaction."""

    @abstractmethod
    def before_read(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Queue for an aggregate before it is read, if it had conflicts lately and the unit can be run again."""

    @abstractmethod
    def _note(self, item: Item, connection: Connection | None = None) -> None:
        """Note what happens at the end of the transaction: a connection's, if one is given."""

    @abstractmethod
    def _transaction(self, *, begin: bool) -> object | None:
        """Return an object that lives as long as the transaction, or None if there is no transaction."""

    def conflicted(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Note a conflict, so that the next try queues."""
        self.queue.conflicted(table, events)

    def recorded(
        self,
        connection: Connection,
        application_name: str,
        table: EventTable,
        events: Sequence[StoredEvent],
        positions: Sequence[int],
        described: Description,
    ) -> None:
        """Note events that were written and are not committed yet."""
        known = Known.of(connection).logs.get(table.name)
        place = "" if known is None else known.table
        self._note(Batch(application_name, table, events, positions, described, place), connection)

    def on_commit(self, function: Callable[[], None]) -> None:
        """Call a function after the work so far is committed; drop it if the work is rolled back."""
        self._note(AfterCommit(function))

    def on_rollback(self, function: Callable[[], None]) -> None:
        """Call a function if the work so far is rolled back, or its outcome is unknown; drop it at the commit."""
        self._note(AfterRollback(function))

    def refuse(self, reason: str, connection: Connection | None = None) -> None:
        """Refuse to commit the work so far, until it is rolled back, also with its savepoint."""
        self._note(Refusal(reason), connection)

    def note_saved(self, originator_ids: Iterable[Any]) -> None:
        """Note whose events are about to be saved."""
        transaction = self._transaction(begin=True)
        if transaction is not None:
            self._saved.setdefault(transaction, set()).update(originator_ids)

    @property
    def has_begun(self) -> bool:
        """Whether there is a transaction."""
        return self._transaction(begin=False) is not None

    def has_saved(self, originator_id: Any) -> bool:
        """Whether an aggregate was saved in the transaction, even in a savepoint that was rolled back."""
        transaction = self._transaction(begin=False)
        return transaction is not None and originator_id in self._saved.get(transaction, ())
