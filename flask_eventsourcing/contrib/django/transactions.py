"""The unit of work on a connection of Django's: it ends with the transaction that ``atomic()`` has begun."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
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
    """Do nothing: a function for ``on_commit``, to see whether it is still in the list."""


class Gate:
    """Does nothing, because Django itself keeps code from committing in a block."""

    def hold(self, reason: str) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
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
        """The ``atomic()`` blocks of writes in progress."""
        self._hooks: tuple[int, int] | None = None
        """The identity of Django's list of functions, as to hold the list would keep what is dropped; and how often
        something has ended, as another list may have the same."""
        self._current: Transaction | None = None
        borrowed.ends = Ends(borrowed.find(), self, marked)

    @property
    def wrapper(self) -> Any:
        """The connection, ``django.db.connections[alias]``."""
        return self._borrowed.find()

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
            # The caller may compare transactions. Without this, the first statement would begin SQLAlchemy's, too late.
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
            if not self._marked.noted:
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
        """Let an error mark the block for a rollback, as ``Model.save()`` does; open a block if there is none."""
        self.look()
        wrapper = self.wrapper
        block = None
        if not wrapper.in_atomic_block:
            if wrapper.autocommit:
                # With autocommit off, uncommitted rows would be lost with it.
                refresh(wrapper)
            block = transaction.atomic(using=wrapper.alias, savepoint=False)
            with driver_errors():
                block.__enter__()
        self._blocks.append(block)
        is_ready = False
        try:
            # Without SQLAlchemy's transaction, which no statement needs.
            connection = self._borrowed.connection()
            self._transaction(begin=True)
            is_ready = True
        finally:
            if not is_ready:
                self._leave(failed=True)
        return connection

    def _leave(self, *, failed: bool = False) -> None:
        block = self._blocks.pop()
        error = RuntimeError("A write of events failed.") if failed else None
        if block is not None:
            with driver_errors():
                block.__exit__(None if error is None else type(error), error, None)
        elif error is not None:
            # Any error, also Ctrl-C. Django names it as the cause when it refuses the next statement.
            with suppress(RuntimeError), transaction.mark_for_rollback_on_error(using=self.wrapper.alias):
                raise error from sys.exception()

    def written(self) -> None:
        """Close the block of the write. It commits if no code has begun a transaction."""
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
        """Let Django roll back what was done so far."""
        if self.wrapper.in_atomic_block:
            self.wrapper.set_rollback(True)

    def _note(self, item: Item, connection: Connection | None = None) -> None:
        if self.in_transaction:
            self._marked.add(self.wrapper, item)
        elif isinstance(item, AfterCommit):
            # No commit is to come, and nothing is left to roll back.
            call_all([item])

    def look(self) -> None:
        """Find out what Django has dropped, and what was committed without a call of the functions yet."""
        if self._marked.noted:
            if self._has_ended():
                self._marked.decide(self._there(self._marked.all(Batch)))
            self._marked.look(self.wrapper)

    def _has_ended(self) -> bool:
        """Whether code has ended the transaction, or a part of it, without Django's knowledge.

        It may have switched autocommit on, called the driver, or run a statement such as ``COMMIT``.

        Django's own commit in progress does not count.
        """
        wrapper, is_suspicious = self.wrapper, self._marked.is_suspicious
        if wrapper.in_atomic_block or not (wrapper.run_on_commit or is_suspicious):
            return False
        if wrapper.connection is None:
            return is_suspicious
        if self._marked.losses.leaving is not None and not wrapper.autocommit:
            # Django itself is about to end it.
            return False
        # Before the first write there may be no transaction yet.
        return bool(wrapper.autocommit) or (self._marked.has(Batch) and self._is_over())

    def _is_over(self) -> bool:
        """Whether the driver, or the server, says that there is no transaction any more, not even an aborted one."""
        known = self._borrowed.known
        return self._cannot_commit() and (known is None or not self.dialect.is_aborted(known))

    def _cannot_commit(self) -> bool:
        """Whether the driver, or the server, says that there is no transaction any more, or that it is aborted."""
        is_open, known = getattr(self.wrapper.connection, "in_transaction", None), self._borrowed.known
        if isinstance(is_open, bool):
            return not is_open
        return known is not None and self.dialect.is_over(known)

    def check_commit(self) -> None:
        """Refuse a commit that would not store the events, after an error that was swallowed.

        The driver or the server tells the state of the transaction, without a round trip. The events are looked for in
        the database after an error of that question, and if code commits without a block and the driver does not know
        about rollbacks.

        :raises TransactionManagementError: when they are not there.
        """
        wrapper, known, marked = self.wrapper, self._borrowed.known, self._marked
        if marked.noted:
            marked.look(wrapper)
        if not marked.noted or known is None or wrapper.connection is None:
            return
        is_doubtful = marked.is_suspicious or wrapper.errors_occurred
        if is_doubtful or not self.dialect.driver_knows_end or self._cannot_commit():
            # Without a block of Django's, other code may have ended the transaction, and the driver may not tell.
            knows = self.losses.leaving is not None and not self.dialect.driver_knows_end
            self._check_stored(known, is_doubtful=is_doubtful or not knows)

    def _check_stored(self, connection: Connection, *, is_doubtful: bool) -> None:
        is_refused = self.dialect.is_aborted(connection)
        batches = self._marked.all(Batch) if is_refused or is_doubtful else []
        # With Django's errors, after which Django gives up a lost connection.
        with self.wrapper.wrap_database_errors:
            is_gone = is_refused or not all(is_there(self.dialect, connection, each) for each in batches)
        if batches and is_gone:
            raise TransactionManagementError(GONE.format(sum(len(each.events) for each in batches)))

    def _there(self, batches: Sequence[Batch]) -> set[int] | None:
        """Return which events are in the database, or None if the database cannot be asked."""
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
    :param lost: called with events that were rolled back although no code asked for it.
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
