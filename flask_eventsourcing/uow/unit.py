"""The unit of work on a SQLAlchemy session: what was recorded in it, and what becomes of that."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ..exceptions import AbortedTransactionError, HandlerError, SpanningTransactionError
from ..persistence import Datastore, Dialect
from ..persistence.dialects.driver import EventTable
from .contended import AggregateQueue, ContendedAggregates
from .pending import AfterCommit, Batch, Pending, Refusal

INFO_KEY = "flask_eventsourcing"
"""Where a session has its units of work, in ``Session.info``."""


class Commits(Protocol):
    """Who commits a session, and when; the host hands it in."""

    @property
    def at_save(self) -> bool:
        """Whether each ``save()`` outside of a unit of work is committed at once."""

    def commit(self, session: orm.Session) -> None:
        """Commit a session at the end of a unit of work."""

    def rollback(self, session: orm.Session) -> None:
        """Roll a session back at the end of a unit of work that failed."""

    def is_to_come(self, session: orm.Session) -> bool:
        """Whether somebody is still going to commit what is done now, although it may have written nothing yet."""


@dataclass(frozen=True, eq=False)
class Units:
    """Makes the units of work of one datastore, one for each session.

    :param datastore: where the events are.
    :param commits: who commits.
    :param publish: called with the events of a transaction after it was committed.
    :param bind_arguments: with which a session finds its connection to the events' database.
    """

    datastore: Datastore
    commits: Commits
    publish: Callable[[Sequence[Batch]], None]
    bind_arguments: Mapping[str, Any]
    contended: ContendedAggregates = field(default_factory=ContendedAggregates)

    def of(self, session: orm.Session) -> UnitOfWork:
        """Return the unit of work of a session, which is made at the first call."""
        shared: SessionUnits | None = session.info.get(INFO_KEY)
        if shared is None:
            shared = session.info[INFO_KEY] = SessionUnits(session)
        unit = shared.units.get(self)
        if unit is None:
            unit = shared.units[self] = UnitOfWork(shared, self, dict(self.bind_arguments))
        return unit

    def open(self, session: orm.Session | None) -> UnitOfWork | None:
        """Return the unit of work of a session if a recorder has joined it already."""
        shared: SessionUnits | None = None if session is None else session.info.get(INFO_KEY)
        return None if shared is None else shared.units.get(self)


class SessionUnits:
    """The units of work of one session, one for each datastore, and what they share: they are committed together."""

    def __init__(self, session: orm.Session) -> None:
        self._session = weakref.ref(session)
        self.units: dict[Units, UnitOfWork] = {}
        self.depth = 0
        """How many ``transaction()`` are open, one within the other."""
        self.rollback_only = False
        self.committed: orm.SessionTransaction | None = None

    @property
    def session(self) -> orm.Session:
        """The session, which has this object and not the other way round."""
        session = self._session()
        if session is None:
            raise ReferenceError("The session of this unit of work is gone.")
        return session

    @property
    def current(self) -> orm.SessionTransaction | None:
        """The innermost savepoint of the session, or its transaction."""
        session = self.session
        return session.get_nested_transaction() or session.get_transaction()

    def before_commit(self) -> None:
        """Refuse a commit that one of the units cannot allow."""
        for unit in self.units.values():
            unit.gate.check()

    def ended(self, transaction: orm.SessionTransaction) -> None:
        """A transaction or a savepoint of the session has ended."""
        committed, self.committed = self.committed is transaction, None
        if transaction.nested:
            parent = self.current
            for unit in self.units.values():
                unit.savepoint_ended(transaction, parent if committed else None, committed)
        elif transaction.parent is None:
            for unit in list(self.units.values()):
                unit.transaction_ended(committed)


class CommitGate:
    """Refuses commits that would drop or halve what was recorded."""

    def __init__(
        self, shared: SessionUnits, dialect: Dialect, pending: Pending, connect: Callable[[], Connection]
    ) -> None:
        self._shared = shared
        self._dialect = dialect
        self._pending = pending
        self._connect = connect
        self.has_failed = False
        """Whether a write failed in this transaction."""
        self._held: str | None = None

    @contextmanager
    def hold(self, reason: str) -> Iterator[None]:
        """Refuse commits, other than of savepoints, in a ``with`` block."""
        before, self._held = self._held, reason
        try:
            yield
        finally:
            self._held = before

    def refuse(self, reason: str) -> None:
        """Refuse to commit what was done so far; a rollback, also one of the savepoint it was done in, ends that."""
        self._pending.add(self._shared.current, Refusal(reason))

    def check(self) -> None:
        """Refuse a commit that the database would turn into a rollback without a word.

        :raises AbortedTransactionError: when the transaction was aborted by an earlier error.
        :raises HandlerError: when it is a handler that commits.
        """
        if self._held is not None and not self._shared.session.in_nested_transaction():
            raise HandlerError(self._held)
        refusals = self._pending.all(Refusal)
        if refusals:
            raise AbortedTransactionError(
                f"{refusals[0].reason}, so the events that were saved cannot be committed: call db.session.rollback()."
            )
        if not self._dialect.aborts_transactions or not (self.has_failed or self._pending.all(Batch)):
            return
        if self._dialect.is_aborted(self._connect()):
            raise AbortedTransactionError(
                "The database aborted this transaction after an error, and a commit would drop everything in it: "
                "call db.session.rollback(), or put what may fail into a savepoint, db.session.begin_nested()."
            )


class UnitOfWork:
    """What one session has recorded in one datastore and not yet committed; recorders join the session through it.

    It is the ``JoinedUnit`` of ``flask_eventsourcing.persistence``.

    :param shared: what it has in common with the session's other units.
    :param units: what made it.
    :param bind_arguments: with which the session finds its connection to the events' database.
    """

    def __init__(self, shared: SessionUnits, units: Units, bind_arguments: dict[str, Any]) -> None:
        self.shared = shared
        self.units = units
        self.bind_arguments = bind_arguments
        self.pending = Pending()
        self.queue = AggregateQueue(units.datastore.dialect, units.contended)
        self.gate = CommitGate(shared, units.datastore.dialect, self.pending, self.connection)

    @property
    def session(self) -> orm.Session:
        """The session."""
        return self.shared.session

    @property
    def dialect(self) -> Dialect:
        """How the database of the events is written and read."""
        return self.units.datastore.dialect

    @property
    def batches(self) -> list[Batch]:
        """The events that were recorded and not committed yet, by save."""
        return self.pending.all(Batch)

    def connection(self) -> Connection:
        """The session's connection to the database of the events."""
        # A copy, as the session takes "bind" out of what it is given.
        return self.session.connection(bind_arguments=dict(self.bind_arguments))

    # -------------------------------------------------------------------------------- what recorders tell

    def before_write(self) -> None:
        """Refuse a write if the session has events in another database, as the two commits could not be one.

        :raises SpanningTransactionError: unless the session commits in two phases.
        """
        if len(self.shared.units) == 1 or self.session.twophase:
            return
        for other in self.shared.units.values():
            engine = other.units.datastore.engine
            if (
                engine is not self.units.datastore.engine
                and other.batches
                and self.connection() is not other.connection()
            ):
                raise SpanningTransactionError(
                    f"This transaction has events of {other.batches[0].application_name} in another database, which "
                    "cannot be committed together with these: commit before, or use a session with twophase=True."
                )

    def before_read(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Queue for an aggregate before it is read, if it had conflicts lately and the unit can be run again."""
        if self.queue.active:
            self.queue.before_read(connection, table, originator_id, has_written=bool(self.batches))

    def failed(self, connection: Connection) -> None:
        """Note a write that failed."""
        self.gate.has_failed = True

    def conflicted(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Note a conflict, so that the next try queues."""
        self.queue.conflicted(table, events)

    def recorded(self, application_name: str, events: Sequence[StoredEvent], positions: Sequence[int]) -> None:
        """Note events that were written and are not committed yet."""
        self.pending.add(self.shared.current, Batch(application_name, events, positions))

    def written(self) -> None:
        """After a write: commit, where each save is committed by itself."""
        if self.units.commits.at_save and not self.shared.depth and not self.session.in_nested_transaction():
            self.session.commit()

    # -------------------------------------------------------------------------------- what others ask

    def has_changes(self) -> bool:
        """Whether there are events, or models that were not flushed, that a rollback would take away."""
        session = self.session
        # Those of the session's other units go the same way.
        recorded = any(unit.batches for unit in self.shared.units.values())
        return bool(recorded or session.new or session.dirty or session.deleted)

    @property
    def awaits_commit(self) -> bool:
        """Whether something may have been done that a commit is still to come for."""
        if self.shared.depth or self.session.in_nested_transaction() or self.has_changes():
            return True
        # The session does not tell whether its transaction has written. Where save() commits, it has done so, and
        # nobody else need: a transaction that is open is then taken for one that reads.
        if self.units.commits.at_save:
            return False
        return self.session.in_transaction() or self.units.commits.is_to_come(self.session)

    def on_commit(self, function: Callable[[], None]) -> None:
        """Call a function once what was done so far is committed; forget it if that is rolled back."""
        if not self.session.in_transaction():
            # A rollback of nothing would not be noticed, and the function be called after the next commit.
            self.session.begin()
        self.pending.add(self.shared.current, AfterCommit(function))

    # -------------------------------------------------------------------------------- what becomes of it

    def savepoint_ended(
        self, savepoint: orm.SessionTransaction, parent: orm.SessionTransaction | None, committed: bool
    ) -> None:
        """A savepoint was released, or rolled back."""
        self.queue.left()
        if committed:
            self.pending.released(savepoint, parent)
        else:
            self.pending.rolled_back(savepoint)

    def transaction_ended(self, committed: bool) -> None:
        """The transaction was committed, or rolled back."""
        ended = self.pending.take()
        self.queue.left()
        self.gate.has_failed = False
        if committed:
            for item in ended.all(AfterCommit):
                item.function()
            batches = ended.all(Batch)
            if batches:
                self.units.publish(batches)


@sa.event.listens_for(orm.Session, "before_commit")
def _before_commit(session: orm.Session) -> None:
    shared: SessionUnits | None = session.info.get(INFO_KEY)
    if shared is not None:
        shared.before_commit()


@sa.event.listens_for(orm.Session, "after_commit")
def _after_commit(session: orm.Session) -> None:
    shared: SessionUnits | None = session.info.get(INFO_KEY)
    if shared is not None:
        shared.committed = shared.current


@sa.event.listens_for(orm.Session, "after_transaction_end")
def _after_transaction_end(session: orm.Session, transaction: orm.SessionTransaction) -> None:
    shared: SessionUnits | None = session.info.get(INFO_KEY)
    if shared is not None:
        shared.ended(transaction)
