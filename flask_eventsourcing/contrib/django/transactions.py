"""The unit of work on a connection of Django's: it ends with the transaction that ``atomic()`` has begun."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from uuid import UUID

from django.db import connections, transaction
from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection

from ...failures import OnError
from ...persistence import Datastore, Description, Dialect
from ...persistence.dialects.event_tables import EventTable
from ...uow import AfterCommit, Batch, Unit
from ...uow.contended import AggregateQueue, ContendedAggregates
from ...uow.pending import Item, call_all
from .lending import Borrowed
from .lent_connections import driver_errors
from .marks import Announce, Losses, Marked


def nothing() -> None:
    """Called after a commit, where it matters that something is."""


class Gate:
    """Keeps others from committing, which is Django's own affair."""

    def hold(self, reason: str) -> AbstractContextManager[object]:
        """Return a block within which nobody commits."""
        return nullcontext()


class Transaction:
    """Stands for a transaction of Django's."""


class DjangoUnit(Unit):
    """What was recorded on one connection of Django's and is not committed.

    :param borrowed: the connection, as SQLAlchemy has it.
    :param marked: what was noted on it.
    :param contended: the aggregates with conflicts, of all units of this process.
    """

    def __init__(
        self, borrowed: Borrowed, datastore: Datastore, marked: Marked, contended: ContendedAggregates
    ) -> None:
        self._borrowed = borrowed
        self._datastore = datastore
        self._marked = marked
        self.queue = AggregateQueue(datastore.dialect, contended)
        self._saved = weakref.WeakKeyDictionary()
        self._blocks: list[Any] = []
        """The blocks of the writes that are in progress."""
        self._hooks: tuple[int, int] | None = None
        """The identity of Django's list of functions, as to hold the list would keep what is dropped; and how often
        something has ended, as another list may have the same."""
        self._current: Transaction | None = None

    @property
    def wrapper(self) -> Any:
        """The connection, ``django.db.connections[alias]``."""
        return self._borrowed.wrapper

    @property
    def gate(self) -> Gate:
        """Who may commit: Django lets nobody do it inside a block."""
        return Gate()

    @property
    def losses(self) -> Losses:
        """What was lost."""
        return self._marked.losses

    @property
    def dialect(self) -> Dialect:
        """How the database of the events is written and read."""
        return self._datastore.dialect

    @property
    def pending(self) -> Marked:
        """What was noted in the transaction."""
        self.look()
        return self._marked

    @property
    def batches(self) -> list[Batch]:
        """The events that were recorded and neither committed nor rolled back, by save."""
        return self.pending.all(Batch)

    @property
    def awaits_commit(self) -> bool:
        """Whether what is done now is committed later."""
        return self.in_transaction

    @property
    def in_transaction(self) -> bool:
        """Whether what is done now waits for a commit."""
        wrapper = self.wrapper
        return bool(wrapper.in_atomic_block or not (wrapper.connection is None or wrapper.autocommit))

    # ------------------------------------------------------------------------------------------ its transaction

    def connection(self) -> Connection:
        """SQLAlchemy's connection on the one that Django has now."""
        connection = self._borrowed.connection()
        if self._transaction(begin=True) is not None and not connection.in_transaction():
            # What is known of a transaction hangs on SQLAlchemy's, which the first statement would begin too late.
            connection.begin()
        return connection

    def savepoint(self) -> AbstractContextManager[Any]:
        """A savepoint of Django's."""
        made: AbstractContextManager[Any] = transaction.atomic(using=self.wrapper.alias)
        return made

    def _transaction(self, *, begin: bool) -> Transaction | None:
        if not self.in_transaction:
            self._end()
            return None
        if self._hooks != (id(self.wrapper.run_on_commit), self._marked.ends):
            # Another list: after the end of a transaction, and after the rollback of a savepoint. Where something is
            # left of what was noted before, it was a savepoint. Taken for a new one, the same would do no harm.
            self.look()
            if not self._marked:
                self._end()
            self._hooks = id(self.wrapper.run_on_commit), self._marked.ends
        if self._current is None:
            self._current = Transaction()
        return self._current

    def _end(self) -> None:
        self._hooks = self._current = None
        self.queue.left()
        self._borrowed.end()

    # ----------------------------------------------------------------------------------- what recorders tell

    def before_write(self) -> Connection:
        """Open a block as ``Model.save()`` does: what fails in it marks the one around it for a rollback."""
        self.look()
        block: Any = transaction.atomic(using=self.wrapper.alias, savepoint=False)
        with driver_errors():
            block.__enter__()
        self._blocks.append(block)
        with OnError(self._leave):
            return self.connection()

    def _leave(self, error: BaseException | None) -> None:
        block = self._blocks.pop()
        with driver_errors():
            block.__exit__(None if error is None else type(error), error, None)

    def written(self) -> None:
        """Close the block of the write, which commits where nobody has begun a transaction."""
        self._leave(None)

    def failed(self, connection: Connection) -> None:
        """Close the block of a write that failed."""
        self._hooks = None
        if self._blocks:
            self._leave(RuntimeError("A write of events failed."))

    def before_read(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Queue for an aggregate before it is read, if it had conflicts lately and the unit can be run again."""
        if self.queue.active:
            self.queue.before_read(connection, table, originator_id, has_written=self.pending.has(Batch))

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
        self._note(Batch(application_name, table, events, positions, described))

    def pending_events(self) -> list[tuple[Connection, EventTable, Sequence[StoredEvent]]]:
        """Return the events whose transaction has not ended, with its connection and their table."""
        batches = self.batches
        connection = self._borrowed.known
        return [] if connection is None else [(connection, each.table, each.events) for each in batches]

    # -------------------------------------------------------------------------------- what becomes of it

    def refuse(self, reason: str, connection: Connection | None = None) -> None:
        """Have Django roll back what was done so far."""
        if self.wrapper.in_atomic_block:
            self.wrapper.set_rollback(True)

    def _note(self, item: Item, connection: Connection | None = None) -> None:
        if self.in_transaction:
            self._marked.add(self.wrapper, item)
        elif isinstance(item, AfterCommit):
            # There is nothing to wait for, and nothing to roll back.
            call_all([item])

    def look(self) -> None:
        """Find out what Django has dropped, and what was committed of which it has told nobody yet."""
        if self._marked:
            if self._is_committed():
                for noted in list(self._marked.noted):
                    self._marked.committed(noted)
            self._marked.look(self.wrapper)

    def _is_committed(self) -> bool:
        """Whether somebody has committed who has autocommit switched off, of which Django tells nobody at once."""
        wrapper = self.wrapper
        if wrapper.in_atomic_block or wrapper.autocommit or wrapper.connection is None or not wrapper.run_on_commit:
            return False
        is_open = getattr(wrapper.connection, "in_transaction", None)
        if isinstance(is_open, bool):
            return not is_open
        return self._borrowed.known is not None and self.dialect.is_over(self._borrowed.known)


class DjangoUnits:
    """The units of work of one database, one for each connection that Django has to it.

    :param publish: called with the events of a transaction after it was committed.
    :param lost: called with events that are gone although nobody asked for a rollback.
    """

    def __init__(self, alias: str, datastore: Datastore, publish: Announce, lost: Announce) -> None:
        self._alias = alias
        self._make = partial(_make, datastore, publish, lost, ContendedAggregates())
        self._units: weakref.WeakKeyDictionary[Any, DjangoUnit] = weakref.WeakKeyDictionary()

    def current(self) -> DjangoUnit:
        """Return the unit of the connection of this thread, or task."""
        wrapper = connections[self._alias]
        return self._units.get(wrapper) or self._units.setdefault(wrapper, self._make(wrapper))


def _make(
    datastore: Datastore, publish: Announce, lost: Announce, contended: ContendedAggregates, wrapper: Any
) -> DjangoUnit:
    marked = Marked(publish, Losses(wrapper, lost))
    return DjangoUnit(Borrowed(datastore.engine, wrapper), datastore, marked, contended)
