"""The unit of work on a SQLAlchemy session: the events that were recorded in it, until the transaction ends.

It follows the database's transaction, not only the session: ``listeners`` tells it of each begin, commit, rollback and
savepoint. If the unit may have missed one, it asks the database.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

from eventsourcing.persistence import StoredEvent
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ..exceptions import SpanningTransactionError
from ..persistence import Datastore, Dialect
from ..persistence.dialects.event_tables import EventTable
from .abstract import Unit
from .commit_gate import CommitGate, Commits, Run, Turns, current_run
from .contended import AggregateQueue, ContendedAggregates
from .pending import (
    AfterCommit,
    AfterRollback,
    Batch,
    Following,
    Item,
    Pending,
    call_all,
    log_lost,
    of_kind,
    state_of,
)
from .routes import FIXED, Route, same_database

INFO_KEY = "flask_eventsourcing"
"""The key in ``Session.info`` of a session's units of work."""
LENT = "flask_eventsourcing.lent"
"""The key in ``Session.info`` that marks a session which other code has made the current one, and commits."""

Announce = Callable[[Sequence[Batch]], None]


def _everywhere() -> object:
    return None


@dataclass(frozen=True, eq=False)
class Units:
    """Makes the units of work of one datastore, one for each session.

    :param datastore: the database of the events.
    :param commits: who commits.
    :param publish: called with the events of a transaction after it was committed.
    :param bind_arguments: arguments with which a session finds its connection to the events' database.
    :param fixed: functions ``get_bind`` of sessions that look at nothing but the table.
    :param scope: returns a key of the current piece of work, which has a session of its own.
    :param lost: called with events that are lost although no code asked for a rollback.
    """

    datastore: Datastore
    commits: Commits
    publish: Announce
    bind_arguments: Mapping[str, Any]
    lost: Announce = log_lost
    scope: Callable[[], object] = _everywhere
    fixed: frozenset[Callable[..., Any]] = FIXED
    contended: ContendedAggregates = field(default_factory=ContendedAggregates)

    def of(self, session: orm.Session) -> UnitOfWork:
        """Return the unit of work of a session, which is made at the first call."""
        shared: SessionUnits | None = session.info.get(INFO_KEY)
        if shared is None:
            scope = object() if LENT in session.info else self.scope()
            shared = session.info[INFO_KEY] = SessionUnits(session, scope)
        unit = shared.units.get(self)
        if unit is None:
            unit = shared.units[self] = UnitOfWork(shared, self, dict(self.bind_arguments))
        return unit

    def open(self, session: orm.Session | None) -> UnitOfWork | None:
        """Return the unit of work of a session if a recorder has joined it already."""
        shared: SessionUnits | None = None if session is None else session.info.get(INFO_KEY)
        return None if shared is None else shared.units.get(self)


class SessionUnits:
    """The units of work of one session, one for each datastore; they are committed together.

    :param session: the session, which refers to this object; the object does not refer to it.
    :param scope: the key of this session, and of a new session after it is removed.
    """

    def __init__(self, session: orm.Session, scope: object) -> None:
        self._session = weakref.ref(session)
        self.scope = scope
        self.units: dict[Units, UnitOfWork] = {}
        self.committed: orm.SessionTransaction | None = None
        """The session's transaction or savepoint that was committed and has not ended yet."""
        self.is_committing = False
        """Whether the session itself is committing."""
        self.turns: Turns = Turns()
        self.asked = False
        """Whether code has asked for the rollback that has just happened."""
        self.has_half_ended = False
        """Whether an error has rolled back the session's transaction, which stays until code ends it."""

    @property
    def session(self) -> orm.Session:
        """The session."""
        session = self._session()
        if session is None:
            raise ReferenceError("The session of this unit of work is gone: keep it until its transaction has ended.")
        return session

    @property
    def depth(self) -> int:
        """How many nested ``transaction()`` are open."""
        run = self.run()
        return 0 if run is None else run.depth

    def run(self) -> Run | None:
        """Return the running unit of work of the session."""
        return current_run(self.scope)


class UnitOfWork(Unit):
    """The uncommitted events of one session in one datastore. Recorders join the session through it.

    :param shared: what the session's units share.
    :param units: the object that made it.
    :param bind_arguments: arguments with which the session finds its connection to the events' database.
    """

    def __init__(self, shared: SessionUnits, units: Units, bind_arguments: dict[str, Any]) -> None:
        self.shared = shared
        self.units = units
        self.route: Route = Route(units.datastore.engine, bind_arguments, units.fixed)
        self._pending = Pending()
        self._saved = weakref.WeakKeyDictionary()
        self.queue: AggregateQueue = AggregateQueue(units.datastore.dialect, units.contended)
        self.following: Following = Following()
        self.gate: CommitGate = CommitGate(shared.run, units.datastore.dialect, self._pending, self.following)

    @property
    def session(self) -> orm.Session:
        """The session."""
        return self.shared.session

    @property
    def dialect(self) -> Dialect:
        """How the database of the events is written and read."""
        return self.units.datastore.dialect

    @property
    def pending(self) -> Pending:
        """What was noted in the transaction."""
        return self._pending

    @property
    def batches(self) -> list[Batch]:
        """The recorded events that were neither committed nor rolled back on request, by save."""
        if not (self.pending or self.following.rolled_back):
            return []
        self.look()
        if not self.shared.has_half_ended:
            # Other code has rolled the connection back without the session.
            self.resolve(asked=True)
        return [*self.following.rolled_back, *self.pending.all(Batch)]

    def connection(self) -> Connection:
        """The session's connection to the database of the events."""
        return self.route.connection(self.session)

    def savepoint(self) -> orm.SessionTransaction:
        """A savepoint of the session."""
        return self.session.begin_nested()

    def _transaction(self, *, begin: bool) -> object | None:
        session = self.session
        return session.get_transaction() or (session.begin() if begin else None)

    # -------------------------------------------------------------------------------- what recorders tell

    def before_write(self) -> Connection:
        """Return the connection to write with; refuse a write if the session has events in another database.

        :raises SpanningTransactionError: unless the session commits in two phases.
        :raises UncommittedEventsError: while another thread saves in the session, or commits it.
        :raises ConfigurationError: when the session writes models in another transaction.
        """
        self.shared.turns.look()
        self.look()
        session = self.session
        self.units.commits.joining(session)
        connection = self.route.connection(session)
        if not self.pending.has(Batch):
            self.route.check(session, connection)
        if len(self.shared.units) > 1 and not session.twophase:
            self._refuse_spanning(connection)
        self.shared.turns.save()
        return connection

    def _refuse_spanning(self, connection: Connection) -> None:
        for other in self.shared.units.values():
            same = other.units.datastore.engine is self.units.datastore.engine
            if not same and other.pending.has(Batch) and other.connection() is not connection:
                raise SpanningTransactionError(
                    f"This transaction has events of {other.batches[0].application_name} in another database, which "
                    "cannot be committed together with these: commit first, or use a session with twophase=True."
                )

    def before_read(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Queue for an aggregate before it is read, if it had conflicts lately and the unit can be run again."""
        self.look()
        if self.queue.active:
            self.queue.before_read(connection, table, originator_id, has_written=self.pending.has(Batch))

    def failed(self, connection: Connection) -> None:
        """Note a write that failed."""
        self.shared.turns.saving = None
        self._follow(connection)
        self.gate.has_failed = True

    def written(self) -> None:
        """After a write: commit, if each save is committed at once and no unit or savepoint is around it."""
        self.shared.turns.saving = None
        session = self.session
        if self.units.commits.at_save and not self.shared.depth and not session.in_nested_transaction():
            transaction = session.get_transaction()
            if transaction is not None and transaction.origin is orm.SessionTransactionOrigin.AUTOBEGIN:
                session.commit()

    def pending_events(self) -> list[tuple[Connection, EventTable, Sequence[StoredEvent]]]:
        """Return the events whose transaction has not ended, with its connection and their table."""
        self.look()
        connection = self.following.open_connection()
        return [] if connection is None else [(connection, each.table, each.events) for each in self.pending.all(Batch)]

    # -------------------------------------------------------------------------------- what others ask

    def has_changes(self) -> bool:
        """Whether there are events, or models that were not flushed, that a rollback would take away."""
        session = self.session
        # A rollback also removes the events of the session's other units.
        recorded = any(unit.batches for unit in self.shared.units.values())
        return bool(recorded or session.new or session.dirty or session.deleted)

    @property
    def awaits_commit(self) -> bool:
        """Whether there may be work that is not committed yet."""
        if self.shared.depth or self.session.in_nested_transaction() or self.has_changes():
            return True
        # The session does not tell whether its transaction has written. If save() commits, nothing of ours is left, so
        # an open transaction is taken for one that only reads.
        if self.units.commits.at_save:
            return False
        return self.session.in_transaction() or self.units.commits.is_to_come(self.session)

    def _note(self, item: Item, connection: Connection | None = None) -> None:
        self.resolve(asked=True)
        if connection is None:
            # A rollback without a transaction would not be noticed, so one begins here.
            self.shared.turns.look()
            self.units.commits.joining(self.session)
            connection = self.connection()
        self._follow(connection)
        state = state_of(connection)
        if not self.pending:
            self.following.begin(self.dialect.calls(connection), state.statements)
        self.pending.add(len(state.savepoints), item)

    def begun(self, connection: Connection) -> None:
        """Inside a unit of work, follow a transaction from its beginning, even if no events were saved in it."""
        is_free = not self.pending and self.following.connection() is not connection
        if is_free and same_database(connection.engine, self.units.datastore.engine) and self.shared.run() is not None:
            self._follow(connection)

    def _follow(self, connection: Connection) -> None:
        if self.following.connection() is not connection:
            self.following.connection = weakref.ref(connection)
            state_of(connection).add(self)

    # -------------------------------------------------------------------------------- what becomes of it

    def look(self, *, is_over: bool = False) -> None:
        """Find out whether the pending events are stored, if the unit may have missed the end of their transaction."""
        if not (self.pending or self.following.is_committing):
            return
        connection = self.following.open_connection()
        if connection is None or self.following.is_prepared:
            return
        if self.following.is_committing and not connection.in_transaction():
            self.committed()
        if self.pending.has(Batch):
            is_over = self._is_over(connection) or is_over
            if (self.following.is_suspicious or is_over) and not self.dialect.is_aborted(connection):
                self._ask(connection, is_over)

    def _is_over(self, connection: Connection) -> bool:
        was_ended = self.following.compare(self.dialect.calls(connection), state_of(connection).statements)
        return was_ended or self.dialect.is_over(connection)

    def _ask(self, connection: Connection, is_over: bool) -> None:
        self.following.asked(self.dialect.calls(connection))
        if self.dialect.is_over(connection):
            self.dialect.ended_past(connection)
        if self._find_gone(connection, is_over=is_over):
            self.note_rollback_in_run()
        if is_over and self.pending.has(Batch):
            self._committed_past()

    def look_for_commit(self, connection: Connection) -> None:
        """Before a rollback, find out whether there was a commit without SQLAlchemy."""
        if connection.invalidated or self.following.is_prepared or not self.pending.has(Batch):
            return
        is_over = self._is_over(connection)
        if not (is_over or self.following.was_suspicious) or self.dialect.is_aborted(connection):
            return
        # The events of this transaction would look like those that an earlier one has committed.
        if not is_over and not self.dialect.roll_back(connection):
            return
        gone = self._find_gone(connection, is_over=True)
        if self.pending.has(Batch):
            self._committed_past()
        self.following.rolled_back += of_kind(gone, Batch)

    def _committed_past(self) -> None:
        run = self.shared.run()
        if run is not None:
            run.has_committed = True
        self.committed()

    def _find_gone(self, connection: Connection, *, is_over: bool) -> list[Item]:
        """Forget the events that the transaction does not see, and return what was forgotten.

        :param is_over: whether it has ended. Then events that cannot be looked for are forgotten, and not guessed.
        """
        there = self.following.ask(self.dialect, connection, self.pending.all(Batch))
        if there is None:
            if not is_over:
                # It stays pending, and is asked again.
                self.following.suspect()
                return []
            there = set()
        gone = self.pending.keep(lambda batch: id(batch) in there)
        call_all(of_kind(gone, AfterRollback))
        return gone

    def rolled_back(self, level: int) -> None:
        """Called when a savepoint, or with level 0 the transaction, was rolled back in the database."""
        self.queue.left()
        self.following.is_committing = self.following.is_prepared = False
        gone = self.pending.rolled_back(level)
        # At once: an object must not be saved again before it is known whether code asked for the rollback.
        call_all(of_kind(gone, AfterRollback))
        self.following.rolled_back += of_kind(gone, Batch)
        if level == 0:
            self.gate.has_failed = False
            self.following.ended()
            self.note_rollback_in_run()

    def note_rollback_in_run(self) -> None:
        """Note that a unit of work that runs here can no longer be committed."""
        run = self.shared.run()
        if run is not None and not (run.lenient or run.is_ending) and run.rollback_only is None:
            run.rollback_only = "A part of this unit of work was rolled back, so all of it was rolled back"

    def released(self, level: int) -> None:
        """Called when a savepoint was released in the database."""
        self.queue.left()
        self.pending.released(level)

    def resolve(self, *, asked: bool) -> None:
        """Forget or report the events of a rollback, now that it is known whether code asked for it."""
        batches, self.following.rolled_back = self.following.rolled_back, []
        if batches and not asked:
            self.units.lost(batches)

    def committed(self) -> None:
        """Called when the transaction was committed."""
        items = self.pending.rolled_back(0)
        self.queue.left()
        self.gate.has_failed = False
        self.following.ended()
        self.resolve(asked=True)
        call_all(of_kind(items, AfterCommit))
        batches = of_kind(items, Batch)
        if batches:
            call_all([AfterCommit(partial(self.units.publish, batches))])

    def unknown(self) -> None:
        """Called when the connection was lost during the commit: no signal is sent, and aggregate objects are stale."""
        self.queue.left()
        self.following.is_committing = self.following.is_prepared = False
        call_all(of_kind(self.pending.rolled_back(0), AfterRollback))
