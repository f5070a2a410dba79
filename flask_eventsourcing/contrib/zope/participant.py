"""The participant of the events in the transactions of a transaction manager, which commits on this host."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol

import sqlalchemy as sa
from sqlalchemy import orm
from transaction._transaction import Status
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager, NoTransaction
from zope.interface import implementer

from ...exceptions import ConfigurationError, UncommittedEventsError
from ...persistence.dialects.event_tables import ConflictError
from ...uow import LENT, Batch, UnitOfWork, close, describe, roll_back
from .registered import (
    REGISTER,
    check_registration,
    current_transaction,
    has_left,
    has_owner,
    note_owner,
    of_thread,
    registration_of,
)

if TYPE_CHECKING:

    class TransientError(Exception):
        """The ``TransientError`` of the ``transaction`` package, which has no types."""

else:
    from transaction.interfaces import TransientError

logger: logging.Logger = logging.getLogger(__name__)

NO_SAVEPOINTS = (
    "zope.sqlalchemy has no savepoints on {name}: leave transaction.savepoint() out, or use another database"
)
ELSEWHERE = (
    "The session of these events takes part in the transaction of another manager, so this one would not commit them: "
    "register the session once, and call mark_changed() of the object that zope.sqlalchemy.register() returned, not "
    "zope.sqlalchemy.mark_changed()."
)
UNBEGUN = (
    "No transaction has begun that would commit these events: save them inside transaction() of the EventSourcing "
    "object, or inside a transaction of the manager, in Pyramid with 'with request.tm:'."
)
LATE = (
    "A receiver of events_recorded or a hook of the transaction cannot save in the session that was committed, because "
    "nothing would commit it again: save in another thread or task, or in a projection."
)


class TransientConflictError(ConflictError, TransientError):
    """Another writer was first: the transaction may succeed when it is run again.

    It is a ``TransientError`` of the ``transaction`` package, so ``transaction.attempts()`` and pyramid_retry run the
    transaction again.
    """


class Managed(Protocol):
    """The methods of a host that a participant calls about transactions."""

    def unit_of(self, session: orm.Session) -> UnitOfWork:
        """The unit of work of a session."""

    def expected_manager(self) -> Any:
        """Return the manager that the session must have, or None if any manager will do."""

    def memory(self, manager: Any) -> dict[Any, Any]:
        """Return where the conflicts of a manager's transactions are kept until one is committed."""

    def committing(self, manager: Any) -> None:
        """Called before a transaction of a manager with events is committed.

        :raises: the error with which the commit is to fail.
        """

    def doomed(self) -> None:
        """Called after a unit of work that failed has doomed the transaction around it."""

    def dropped(self, batches: Sequence[Batch], session: orm.Session | None) -> None:
        """Called with events of a session that are rolled back, as its transaction was aborted without being doomed."""


@implementer(IDataManagerSavepoint)
class _Savepoint:
    """The savepoint of the events. That of zope.sqlalchemy rolls back, and the unit of work notices it."""

    def rollback(self) -> None:
        """Do nothing."""


@implementer(ISavepointDataManager)
class Participant:
    """Takes part in a transaction for the events of one session. zope.sqlalchemy commits them.

    :param unit: the session's unit of work.
    :param manager: the transaction manager.
    :param transaction: its transaction.
    :param host: its methods are called about the end of the transaction.
    """

    def __init__(self, unit: UnitOfWork, manager: Any, transaction: Any, host: Managed) -> None:
        self.transaction_manager = manager
        self.transaction: Any = weakref.ref(transaction)
        self._unit = unit
        self._session = weakref.ref(unit.session)
        self._host = host
        self._at_stake: list[Batch] | None = []
        """The events that a commit is about to store, or None when the database has stored them."""
        self._stage: Literal["open", "aborting", "over"] = "open"
        self.is_following: bool = False
        """Whether it listens to the database's own commit, which the status of the transaction does not show."""

    @property
    def is_over(self) -> bool:
        """Whether its part was aborted. A rollback to an older savepoint does that too, and the transaction goes on."""
        return self._stage == "over"

    def follow(self) -> None:
        """Listen to the database's own commit from now on."""
        if not self.is_following:
            self.is_following = True
            self._unit.on_commit(self._stored)

    def _stored(self) -> None:
        self._at_stake = None

    def asked(self) -> None:
        """Note that a caller asked for the rollback in progress."""
        self._unit.shared.asked = True

    def aborting(self) -> None:
        """Before an abort, roll the session back."""
        if not self.is_over:
            self._stage = "aborting"
        self.roll_back()

    def aborted(self) -> None:
        """After an abort, log the events that its hooks have saved: the transaction rolls them back, like rows."""
        if self._stage == "open":
            self._stage = "over"
            self._log_late()

    def _log_late(self) -> None:
        batches = self._unit.batches
        if batches:
            logger.error(
                "%s saved by a hook or synchronizer of a transaction that was aborted, and rolled back with it: save "
                "in a transaction of its own.",
                describe(batches),
            )

    def roll_back(self) -> None:
        """Roll the session back on request: zope.sqlalchemy only closes it."""
        session = self._session()
        if session is None or not session.in_transaction():
            return
        transaction = self.transaction()
        if transaction is not None and not transaction.isDoomed() and self._unit.pending.has(Batch):
            self._at_stake = []
            self._host.dropped(self._unit.pending.all(Batch), session)
        roll_back(session)

    def abort(self, transaction: Any) -> None:
        """Note that the transaction was aborted, or that its commit failed."""
        if self._stage == "aborting" or (self._stage == "open" and _is_aborting(transaction)):
            # Synchronizers were called meanwhile, or one of them made the session join.
            self._log_late()
        self._stage = "over"
        self.roll_back()

    def tpc_begin(self, transaction: Any) -> None:
        """Check the transaction before its commit.

        :raises CommitInsideUnitError: when a unit of work is being run, and it is not the unit that commits.
        :raises UncommittedEventsError: when the session has joined the transaction of another manager.
        :raises TransientConflictError: when the host is going to run it again after a conflict.
        """
        self._host.committing(self.transaction_manager)
        self._unit.gate.check()
        if self._unit.pending.has(Batch) and not self._has_session(transaction):
            raise UncommittedEventsError(ELSEWHERE)
        # If the commit fails, zope.sqlalchemy closes the session, and the caller gets an error.
        if self._unit.pending:
            self.asked()
            self._at_stake = self._unit.pending.all(Batch)

    def _has_session(self, transaction: Any) -> bool:
        """Whether the session takes part in a transaction; no public name shows it."""
        session = self._session()
        return any(getattr(each, "session", None) is session for each in transaction._resources)

    def refuse_late(self) -> None:
        """Refuse saves of receivers that are called during the commit: no commit would follow.

        :raises UncommittedEventsError: saying what to do instead.
        """
        transaction = self.transaction()
        if self._at_stake is None and transaction is not None and transaction.status == Status.COMMITTING:
            raise UncommittedEventsError(LATE)

    def commit(self, transaction: Any) -> None:
        """Do nothing: zope.sqlalchemy commits."""

    def tpc_vote(self, transaction: Any) -> None:
        """Agree."""

    def tpc_finish(self, transaction: Any) -> None:
        """Note that all participants have agreed."""
        self._host.memory(self.transaction_manager).clear()

    def tpc_abort(self, transaction: Any) -> None:
        """Note that the transaction failed. In one phase, the events may have been committed before that."""
        if self._at_stake is None:
            logger.error(
                "The transaction failed after the database had committed its events: %s failed. The events are stored, "
                "and events_recorded was sent.",
                _failed_participant(self),
            )
        elif self._at_stake:
            # The database has rolled them back at its commit, before the manager asked a participant to abort.
            self._host.dropped(self._at_stake, self._session())

    def sortKey(self) -> str:  # noqa: N802
        """Sort before the database."""
        return "flask_eventsourcing"

    @property
    def savepoint(self) -> Callable[[], _Savepoint]:
        """Return an object that rolls back to this moment.

        :raises AttributeError: where zope.sqlalchemy has no savepoints; the transaction package expects this error.
        """
        name = self._unit.units.datastore.engine.dialect.name
        if name in _no_savepoint_support():
            raise AttributeError(NO_SAVEPOINTS.format(name=name))
        return _Savepoint

    def should_retry(self, error: BaseException) -> bool:
        """Whether the transaction may be tried again after an error."""
        return self._unit.dialect.is_conflict(error)

    def __repr__(self) -> str:
        name = self._unit.units.datastore.engine.dialect.name
        note = f": {NO_SAVEPOINTS.format(name=name)}" if name in _no_savepoint_support() else ""
        return f"<the events of a session{note}>"


def _no_savepoint_support() -> set[str]:
    from zope.sqlalchemy import datamanager

    found: set[str] = datamanager.NO_SAVEPOINT_SUPPORT
    return found


def _is_aborting(transaction: Any) -> bool:
    """Whether its owner aborts all of it, and does not go back to a savepoint. No public name shows it."""
    return transaction.status in (Status.ACTIVE, Status.DOOMED) and not transaction._savepoint2index


def _failed_participant(own: Participant) -> str:
    """Return the name of the data manager that raised the current error."""
    traceback = sys.exc_info()[2]
    while traceback is not None:
        found = traceback.tb_frame.f_locals.get("self")
        if found is not own and hasattr(found, "tpc_finish"):
            return repr(found)
        traceback = traceback.tb_next
    return "another participant"


class ManagerCommits:
    """The ``Commits`` of a host whose sessions are committed by a transaction manager.

    A session that is not registered with zope.sqlalchemy, such as a worker's, commits by itself.

    :param host: whose sessions they are.
    """

    at_save = False

    def __init__(self, host: Managed) -> None:
        self._host = host
        self._participants: weakref.WeakKeyDictionary[orm.Session, Participant] = weakref.WeakKeyDictionary()
        self._own: weakref.WeakSet[Any] = weakref.WeakSet()
        """The managers, as their threads have them, whose transaction was begun here for a unit of work."""

    def begin(self, session: orm.Session) -> None:
        """Begin a transaction for a unit of work, unless other code has begun one; that code then ends it."""
        registered = registration_of(session)
        if registered is None:
            return
        manager = registered.transaction_manager
        if not has_owner(session, manager):
            self._own.add(of_thread(manager))
            if current_transaction(manager) is None:
                manager.begin()
        self._participant(session, manager)

    def joining(self, session: orm.Session) -> None:
        """Make a session take part in the manager's transaction before it is used.

        :raises ConfigurationError: when the manager would not commit the session.
        """
        registered = registration_of(session)
        if registered is None:
            if LENT in session.info:
                return
            raise ConfigurationError(
                f"This session takes part in no transaction, so its events would not be committed: {REGISTER}."
            )
        note_owner(session)
        participant = self._participant(session, registered.transaction_manager)
        participant.refuse_late()
        if not participant.is_following:
            check_registration(session, registered, None if LENT in session.info else self._host.expected_manager())
        # With the settings of the registration. It also makes the session join, if nothing has done so yet.
        registered.mark_changed(session)
        participant.follow()

    def _participant(self, session: orm.Session, manager: Any) -> Participant:
        """Return the participant of a session; the first call makes it join the manager's transaction."""
        try:
            transaction = manager.get()
        except NoTransaction:
            raise NoTransaction(UNBEGUN) from None
        if transaction.status == Status.COMMITTED:
            raise UncommittedEventsError(LATE)
        known = self._participants.get(session)
        if known is None or known.is_over or known.transaction() is not transaction:
            known = Participant(self._host.unit_of(session), manager, transaction, self._host)
            self._participants[session] = known
            if transaction.status == Status.COMMITTING:
                # A listener of the session's flush saves here. The database commits its events together with the flush.
                known.asked()
                return known
            transaction.join(known)
            transaction.addBeforeAbortHook(known.aborting)
            if any(transaction.getAfterAbortHooks()):
                # One of these hooks may be what saves here, after the abort.
                transaction.addAfterAbortHook(known.aborted)
        return known

    def commit(self, session: orm.Session) -> None:
        """Commit the transaction if it was begun here; otherwise leave it to its owner."""
        registered = registration_of(session)
        if registered is None:
            session.commit()
            return
        if session.in_transaction():
            registered.mark_changed(session)
        manager = registered.transaction_manager
        if of_thread(manager) in self._own:
            manager.commit()
            self._own.discard(of_thread(manager))

    def rollback(self, session: orm.Session) -> None:
        """Abort the transaction if it was begun here; otherwise doom it, so it cannot be committed."""
        registered = registration_of(session)
        if registered is None:
            roll_back(session)
            return
        manager = registered.transaction_manager
        if current_transaction(manager) is None:
            self._own.discard(of_thread(manager))
        elif of_thread(manager) in self._own or not has_owner(session, manager):
            self._own.discard(of_thread(manager))
            roll_back(session)
            try:
                manager.abort()
            except sa.exc.SQLAlchemyError as error:
                logger.warning("An abort failed, its session is closed: %s", error)
                close(session)
        else:
            # A transaction whose commit has failed, or that was committed, cannot be doomed.
            with suppress(ValueError):
                manager.doom()
                self._host.doomed()
            roll_back(session)

    def ended(self, session: orm.Session, transaction: orm.SessionTransaction) -> None:
        """Note the end of a session's transaction; where zope.sqlalchemy ended it, a caller has asked for that."""
        known = self._participants.get(session)
        if transaction.parent is None and known is not None and has_left(session):
            known.asked()

    def is_to_come(self, session: orm.Session) -> bool:
        """Whether the current transaction will be committed by its owner."""
        registered = registration_of(session)
        return registered is not None and current_transaction(registered.transaction_manager) is not None
