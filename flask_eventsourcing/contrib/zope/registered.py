"""Finds out how a session was registered with zope.sqlalchemy, and in which manager's transactions it takes part."""

from __future__ import annotations

import weakref
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine.default import DefaultDialect
from transaction import ThreadTransactionManager
from zope.sqlalchemy import ZopeTransactionEvents, datamanager
from zope.sqlalchemy.datamanager import STATUS_READONLY

from ...exceptions import ConfigurationError

IMPLICIT = "flask_eventsourcing.implicit"
"""The key in ``Session.info`` of the manager's transaction, if the session began it because no other code had."""
REGISTERED = "flask_eventsourcing.registered"
"""The key in ``Session.info`` of the listeners of zope.sqlalchemy."""
REGISTER = "call zope.sqlalchemy.register(session, transaction_manager=…) with the session or its factory"


def registration_of(session: orm.Session) -> ZopeTransactionEvents | None:
    """Return the listeners with which a session was registered, or None."""
    found: ZopeTransactionEvents | None = session.info.get(REGISTERED)
    if found is None:
        listeners: Any = session.dispatch
        owners = (getattr(function, "__self__", None) for function in listeners.after_begin)
        found = next((each for each in owners if isinstance(each, ZopeTransactionEvents)), None)
        if found is not None:
            session.info[REGISTERED] = found
    return found


def check_registration(session: orm.Session, registered: ZopeTransactionEvents, expected: Any) -> None:
    """Check that the events that are saved in a session are stored when its transaction is committed.

    :param expected: the manager that will commit, or None if any manager will do.
    :raises ConfigurationError: otherwise, with the remedy.
    """
    if expected is not None and of_thread(registered.transaction_manager) is not of_thread(expected):
        raise ConfigurationError(
            "This session was registered with a transaction manager that does not commit the request: call "
            "zope.sqlalchemy.register(session, transaction_manager=request.tm)."
        )
    if registered.keep_session:
        raise ConfigurationError(
            "This session was registered with keep_session=True, with which an abort rolls nothing back, and the next "
            "transaction would commit the events: leave keep_session out."
        )
    if registered.initial_state == STATUS_READONLY:
        raise ConfigurationError(
            "This session was registered as read only, so that events which are saved in it would never be committed: "
            "register it without initial_state."
        )
    if session.twophase and not has_two_phases(session.get_bind().dialect):
        raise ConfigurationError(
            f"This session has twophase=True, and {session.get_bind().dialect.name} commits in one phase only: "
            "leave twophase out."
        )


def has_two_phases(dialect: sa.Dialect) -> bool:
    """Whether SQLAlchemy can commit in two phases on a database."""
    return getattr(type(dialect), "do_prepare_twophase", None) is not DefaultDialect.do_prepare_twophase


def of_thread(manager: Any) -> Any:
    """Return the transaction manager of this thread."""
    return manager.manager if isinstance(manager, ThreadTransactionManager) else manager


class _Probe:
    """A synchronizer that is told the current transaction."""

    transaction: Any = None

    def newTransaction(self, transaction: Any) -> None:  # noqa: N802
        """Note the transaction; the manager also calls this on registration within one."""
        self.transaction = transaction


def current_transaction(manager: Any) -> Any:
    """Return a manager's current transaction, or None. Unlike its ``get()``, this begins none."""
    probe = _Probe()
    manager.registerSynch(probe)
    manager.unregisterSynch(probe)
    return probe.transaction


def has_left(session: orm.Session) -> bool:
    """Whether zope.sqlalchemy has ended the part of a session that had joined; no public name shows it."""
    return session not in datamanager._SESSION_STATE


def watch(factory: orm.sessionmaker[Any] | orm.scoped_session[Any]) -> None:
    """Note for each session, before it joins a transaction, whether the transaction has already begun."""
    for name in ("after_begin", "after_attach"):
        sa.event.listen(factory, name, note_owner, insert=True)
    # At a statement of the ORM, a session joins the transaction before it begins its own.
    sa.event.listen(factory, "do_orm_execute", lambda state: note_owner(state.session), insert=True)


def note_owner(session: orm.Session, *_: object) -> None:
    """Begin the manager's transaction for a session unless there is one, and note that it was begun here."""
    registered = registration_of(session)
    if registered is None:
        return
    manager = registered.transaction_manager
    if not manager.explicit and current_transaction(manager) is None:
        session.info[IMPLICIT] = weakref.ref(manager.get())


def has_owner(session: orm.Session, manager: Any) -> bool:
    """Whether other code has begun the manager's transaction and will end it."""
    current, own = current_transaction(manager), session.info.get(IMPLICIT)
    return current is not None and (own is None or own() is not current)
