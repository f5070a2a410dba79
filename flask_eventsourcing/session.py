"""The unit of work on ``db.session``: what was recorded in it, and what becomes of that."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import Notification, StoredEvent
from flask import has_request_context
from sqlalchemy import orm
from sqlalchemy.engine import Connection, Engine

from .config import CommitMode
from .exceptions import AbortedTransactionError, HandlerError
from .hot import HotAggregates, Key, sort_key
from .persistence import Dialect
from .persistence.dialects.base import EventTable

INFO_KEY = "flask_eventsourcing"


@dataclass
class Batch:
    """The events of one save, and the session's transaction, or savepoint, on which they depend."""

    transaction: orm.SessionTransaction | None
    application_name: str
    events: Sequence[StoredEvent]
    positions: Sequence[int]

    @property
    def notifications(self) -> list[Notification]:
        """The events with their positions; made only when somebody asks."""
        return [
            Notification(event.originator_id, event.originator_version, event.topic, event.state, position)
            for event, position in zip(self.events, self.positions, strict=True)
        ]


@dataclass
class UnitOfWork:
    """What one session has recorded and not yet committed; recorders join the session through it.

    It is the ``SessionScope`` of ``flask_eventsourcing.persistence``.
    """

    session: orm.Session
    dialect: Dialect
    bind_arguments: dict[str, Any]
    commit_mode: CommitMode
    hot: HotAggregates
    publish: Callable[[Sequence[Batch]], None]
    batches: list[Batch] = field(default_factory=list)
    after_commit: list[tuple[orm.SessionTransaction | None, Callable[[], None]]] = field(default_factory=list)
    conflicts: dict[Key, EventTable] = field(default_factory=dict)
    queued: set[Key] = field(default_factory=set)
    considered: set[Key] = field(default_factory=set)
    depth: int = 0
    rollback_only: bool = False
    queueing: bool = False
    committed: orm.SessionTransaction | None = None
    failed_on: Connection | None = None
    refused: tuple[orm.SessionTransaction | None, str] | None = None
    held: str | None = None
    """Why nobody may commit now: handlers are at work, and their position is committed with what they write."""

    def connection(self, engine: Engine) -> Connection:
        """The session's connection to the database of the events."""
        # A copy, as the session takes "bind" out of what it is given.
        return self.session.connection(bind_arguments=dict(self.bind_arguments))

    def failed(self, connection: Connection) -> None:
        """Note a write that failed."""
        self.failed_on = connection

    def written(self) -> None:
        """After a write: in the mode ``save``, commit."""
        if self.commit_mode == "save" and not self.depth and not self.session.in_nested_transaction():
            self.session.commit()

    def reading(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Queue for an aggregate before it is read, if it had conflicts lately and the unit can be re-run."""
        key = (table.name, originator_id)
        if not self.queueing or key in self.considered:
            return
        # Once only: with a cache, the second time is under the library's fast-forward lock, where nobody may wait.
        self.considered.add(key)
        if key not in self.queued and self.hot.is_hot(key):
            # Units that wait for each other would be a deadlock: wait only in one order for all, and not while other
            # units may wait for what this one has written.
            in_order = not self.batches and all(sort_key(key) > sort_key(other) for other in self.queued)
            self.queue_for(connection, table, originator_id, wait=in_order)

    def queue_for(
        self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool = True
    ) -> None:
        """Take the turn to change an aggregate; without *wait*, only if nobody has it."""
        self.dialect.queue_for(connection, table, originator_id, wait=wait)
        self.queued.add((table.name, originator_id))

    def recorded(self, application_name: str, events: Sequence[StoredEvent], positions: Sequence[int]) -> None:
        """Note events that were written and are not committed yet."""
        self.batches.append(Batch(self.current, application_name, events, positions))

    def conflicted(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Note a conflict, so that the next try queues."""
        for event in events:
            key = (table.name, event.originator_id)
            self.hot.heat(key)
            if self.queueing:
                self.conflicts[key] = table

    def refuse_aborted(self) -> None:
        """Refuse a commit that the database would turn into a rollback without a word.

        :raises AbortedTransactionError: when the transaction was aborted by an earlier error.
        :raises HandlerError: when it is a handler that commits.
        """
        if self.held is not None and not self.session.in_nested_transaction():
            raise HandlerError(self.held)
        if self.refused is not None:
            raise AbortedTransactionError(
                f"{self.refused[1]}, so the events that were saved cannot be committed: call db.session.rollback()."
            )
        if not self.dialect.aborts_transactions or not (self.batches or self.failed_on is not None):
            return
        connection = self.connection(self.dialect.engine)
        if self.dialect.is_aborted(connection):
            raise AbortedTransactionError(
                "The database aborted this transaction after an error, and a commit would drop everything in it: "
                "call db.session.rollback(), or put what may fail into a savepoint, db.session.begin_nested()."
            )

    def refuse(self, reason: str) -> None:
        """Refuse to commit what was done so far; a rollback, also one of the savepoint it was done in, ends that."""
        # The first one stays: it belongs to the same savepoint or an outer one, and lasts longer.
        if self.refused is None:
            self.refused = self.current, reason

    @contextmanager
    def hold(self, reason: str) -> Iterator[None]:
        """Refuse commits, other than of savepoints, in a ``with`` block."""
        before, self.held = self.held, reason
        try:
            yield
        finally:
            self.held = before

    @property
    def current(self) -> orm.SessionTransaction | None:
        """The innermost savepoint of the session, or its transaction."""
        return self.session.get_nested_transaction() or self.session.get_transaction()

    def has_pending(self, originator_id: UUID | str) -> bool:
        """Whether events of this aggregate were recorded and not committed yet."""
        return any(event.originator_id == originator_id for batch in self.batches for event in batch.events)

    def has_changes(self) -> bool:
        """Whether there are events, or models that were not flushed, that a rollback would take away."""
        session = self.session
        return bool(self.batches or session.new or session.dirty or session.deleted)

    @property
    def awaits_commit(self) -> bool:
        """Whether something may have been done that a commit is still to come for."""
        if self.depth or self.session.in_nested_transaction() or self.has_changes():
            return True
        # The session does not tell whether its transaction has written. In the mode "save" a save() has committed, and
        # nobody else need do so: a transaction that is open is then taken for one that reads.
        if self.commit_mode == "save":
            return False
        return self.session.in_transaction() or (self.commit_mode == "request" and has_request_context())

    def on_commit(self, function: Callable[[], None]) -> None:
        """Call a function once what was done so far is committed; forget it if that is rolled back."""
        if not self.session.in_transaction():
            # A rollback of nothing would not be noticed, and the function be called after the next commit.
            self.session.begin()
        self.after_commit.append((self.current, function))

    def ended(self, transaction: orm.SessionTransaction) -> None:
        """A transaction or a savepoint of the session has ended."""
        committed, self.committed = self.committed is transaction, None
        if transaction.nested:
            self._end_savepoint(transaction, committed)
        elif transaction.parent is None:
            self._end_transaction(committed)

    def _end_savepoint(self, savepoint: orm.SessionTransaction, committed: bool) -> None:
        self.queued.clear()
        self.considered.clear()
        if committed:
            parent = self.current
            for batch in self.batches:
                if batch.transaction is savepoint:
                    batch.transaction = parent
            self.after_commit = [(parent if t is savepoint else t, f) for t, f in self.after_commit]
            if self.refused is not None and self.refused[0] is savepoint:
                self.refused = parent, self.refused[1]
        else:
            self.batches = [batch for batch in self.batches if batch.transaction is not savepoint]
            self.after_commit = [(t, f) for t, f in self.after_commit if t is not savepoint]
            if self.refused is not None and self.refused[0] is savepoint:
                self.refused = None

    def _end_transaction(self, committed: bool) -> None:
        batches, self.batches = self.batches, []
        functions, self.after_commit = self.after_commit, []
        self.queued.clear()
        self.considered.clear()
        self.failed_on = self.refused = None
        if committed:
            for _, function in functions:
                function()
            if batches:
                self.publish(batches)


def unit_of_work(session: orm.Session) -> UnitOfWork | None:
    """Return the unit of work of a session, if a recorder has joined it."""
    return session.info.get(INFO_KEY)


_listened: weakref.WeakSet[Any] = weakref.WeakSet()


def listen(sessions: Any) -> None:
    """Install the session events, once for a session factory.

    :param sessions: a ``sessionmaker`` or ``scoped_session``.
    """
    factory = sessions.session_factory if isinstance(sessions, orm.scoped_session) else sessions
    # Not sa.event.contains: it goes by id(), and says yes for a new factory in the place of one that is gone.
    if factory not in _listened:
        _listened.add(factory)
        sa.event.listen(sessions, "before_commit", _before_commit)
        sa.event.listen(sessions, "after_commit", _after_commit)
        sa.event.listen(sessions, "after_transaction_end", _after_transaction_end)


def _before_commit(session: orm.Session) -> None:
    unit = unit_of_work(session)
    if unit is not None:
        unit.refuse_aborted()


def _after_commit(session: orm.Session) -> None:
    unit = unit_of_work(session)
    if unit is not None:
        unit.committed = unit.current


def _after_transaction_end(session: orm.Session, transaction: orm.SessionTransaction) -> None:
    unit = unit_of_work(session)
    if unit is not None:
        unit.ended(transaction)
