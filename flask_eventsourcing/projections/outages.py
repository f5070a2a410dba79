"""Tells errors that pass by themselves from those of handlers."""

from __future__ import annotations

import sqlalchemy as sa
from eventsourcing import persistence

from ..exceptions import AbortedTransactionError, MissingTableError
from ..persistence.errors import is_serialization_failure
from .control import FencedError

LOCK_TIMEOUTS: frozenset[object] = frozenset({1205, "55P03"})
"""MySQL's "lock wait timeout exceeded" and PostgreSQL's "lock not available"."""
CONNECTION_LOST = "8s2b"
"""SQLAlchemy's code of "can't reconnect until invalid transaction is rolled back"."""


def is_outage(error: BaseException) -> bool:
    """Whether an error is the database's, not a handler's: it passes, and the same events are tried again."""
    if isinstance(error, FencedError | sa.exc.TimeoutError | sa.exc.DisconnectionError):
        return True
    if isinstance(error, sa.exc.PendingRollbackError):
        # Either after a lost connection, or after an error of a flush that a handler has ignored.
        return error.code == CONNECTION_LOST
    if isinstance(error, sa.exc.DBAPIError):
        return _passes(error)
    if isinstance(error, MissingTableError | AbortedTransactionError):
        return False
    # The recorders' own; a conflict of an event that a handler saves is none.
    return isinstance(error, persistence.OperationalError | persistence.InterfaceError)


def _passes(error: sa.exc.DBAPIError) -> bool:
    if error.connection_invalidated or is_serialization_failure(error.orig):
        return True
    arguments = getattr(error.orig, "args", None) or (None,)
    code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or arguments[0]
    if code in LOCK_TIMEOUTS or "database is locked" in str(error.orig):
        return True
    # Without a statement, it is the connection that could not be made.
    return error.statement is None and isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
