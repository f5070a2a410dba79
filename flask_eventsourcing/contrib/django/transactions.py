"""The unit of work on a connection of Django's: it ends with the transaction that ``atomic()`` has begun."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from django.db import Error, transaction
from django.db.transaction import TransactionManagementError
from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection

from ...persistence import Datastore, Dialect
from ...persistence.dialects.event_tables import EventTable
from ...uow import AfterCommit, Batch, Unit
from ...uow.contended import AggregateQueue, ContendedAggregates
from ...uow.pending import Item, call_all, is_there
from .ends import Ends
from .lending import Borrowed, own_connection, refresh
from .lent_connections import driver_errors
from .marks import Announce, Losses, Marked

logger: logging.Logger = logging.getLogger(__name__)

GONE = (
    "{} events were saved and cannot be committed, because the database has rolled this transaction back: let an error "
    "leave its atomic() block, or put code that may fail into an atomic() block of its own."
)


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
        borrowed.ends = Ends(borrowed.wrapper, self, marked)

    @property
    def wrapper(self) -> Any:
        """The connection, ``django.db.connections[alias]``."""
        return self._borrowed.wrapper

    @property
    def gate(self) -> Gate:
        """The rule for commits: inside a block, Django lets no code commit."""
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
        if self.wrapper.autocommit:
            # With autocommit off, what is not committed would be lost with it.
            refresh(self.wrapper)
        block: Any = transaction.atomic(using=self.wrapper.alias, savepoint=False)
        with driver_errors():
            block.__enter__()
        self._blocks.append(block)
        with ExitStack() as failed:
            failed.callback(self._leave, failed=True)
            connection = self.connection()
            failed.pop_all()
        return connection

    def _leave(self, *, failed: bool = False) -> None:
        block = self._blocks.pop()
        error = RuntimeError("A write of events failed.") if failed else None
        with driver_errors():
            block.__exit__(None if error is None else type(error), error, None)

    def written(self) -> None:
        """Close the block of the write, which commits where nobody has begun a transaction."""
        self._leave()

    def failed(self, connection: Connection) -> None:
        """Close the block of a write that failed."""
        self._hooks = None
        if self._blocks:
            self._leave(failed=True)

    def before_read(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Queue for an aggregate before it is read, if it had conflicts lately and the unit can be run again."""
        if self.queue.active:
            self.queue.before_read(connection, table, originator_id, has_written=self.pending.has(Batch))

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
            if self._has_ended():
                self._marked.decide(self._there(self._marked.all(Batch)))
            self._marked.look(self.wrapper)

    def _has_ended(self) -> bool:
        """Whether somebody has ended the transaction of whose end Django knows nothing, or only a part.

        It was done by switching autocommit on, with the driver, or with the text of a statement.

        What waits for the rest of Django's own commit is not looked for.
        """
        wrapper, is_suspicious = self.wrapper, self._marked.is_suspicious
        if wrapper.in_atomic_block or not (wrapper.run_on_commit or is_suspicious):
            return False
        if wrapper.connection is None:
            return is_suspicious
        if self._marked.losses.leaving is not None and not wrapper.autocommit:
            # Django is about to end it.
            return False
        # Before something was written, there may be no transaction yet.
        return bool(wrapper.autocommit) or (self._marked.has(Batch) and self._is_over())

    def _is_over(self) -> bool:
        """Whether the driver, or the server, says that there is no transaction any more, nor an aborted one."""
        is_open, known = getattr(self.wrapper.connection, "in_transaction", None), self._borrowed.known
        if isinstance(is_open, bool):
            return not is_open
        return known is not None and self.dialect.is_over(known) and not self.dialect.is_aborted(known)

    def _may_be_over(self) -> bool:
        """Whether the transaction may have been ended past Django, so that the events have to be looked for."""
        if self._marked.is_suspicious or self.wrapper.errors_occurred:
            return True
        return self._is_over() if self.dialect.driver_knows_end else self.losses.leaving is None

    def check_commit(self) -> None:
        """Refuse a commit that would not store the events, after an error that was swallowed.

        A driver or server that is in doubt tells it without a round trip; after an error of it the events are looked
        for, and where code commits without a block and the driver does not know about rollbacks.

        :raises TransactionManagementError: when they are not there.
        """
        wrapper, connection = self.wrapper, self._borrowed.known
        self._marked.look(wrapper)
        if not self._marked or connection is None or wrapper.connection is None:
            return
        is_refused = self.dialect.is_aborted(connection)
        if is_refused or self._may_be_over():
            batches = self._marked.all(Batch)
            if batches and (is_refused or not all(is_there(self.dialect, connection, each) for each in batches)):
                raise TransactionManagementError(GONE.format(sum(len(each.events) for each in batches)))

    def _there(self, batches: Sequence[Batch]) -> set[int] | None:
        """Return which events are in the database, or None where that cannot be asked."""
        try:
            with driver_errors():
                connection = self._borrowed.connection()
                return {id(each) for each in batches if is_there(self.dialect, connection, each)}
        except (sa.exc.SQLAlchemyError, Error, self.dialect.driver_error) as error:
            logger.warning("It is unknown whether events that were saved are stored: %s", type(error).__name__)
            return None


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
        wrapper = own_connection(self._alias)
        return self._units.get(wrapper) or self._units.setdefault(wrapper, self._make(wrapper))


def _make(
    datastore: Datastore, publish: Announce, lost: Announce, contended: ContendedAggregates, wrapper: Any
) -> DjangoUnit:
    marked = Marked(publish, Losses(wrapper, lost))
    return DjangoUnit(Borrowed(datastore.engine, wrapper), datastore, marked, contended)
