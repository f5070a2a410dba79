"""Who may commit: inside a unit of work only the unit, and nobody what the database would drop or halve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy.engine import Connection

from ..exceptions import AbortedTransactionError, CommitInsideUnitError, HandlerError
from ..persistence import Dialect
from .pending import Batch, Pending, Refusal


class Scoped(Protocol):
    """The units of work of one datastore, and where they are run."""

    @property
    def scope(self) -> Callable[[], object]:
        """Returns what tells the present piece of work from others, such as an application context."""


@dataclass(eq=False)
class Run:
    """A unit of work that is being run, in this thread, greenlet or task and in what it calls.

    It goes by the host's scope and not by the session, as a function may remove the session and get another one. A
    scope within the scope, such as a nested application context, has a session and units of its own.

    :param lenient: whether others may commit and roll back in it: a task did not ask for its unit.
    """

    lenient: bool = False
    place: tuple[object, object] = (None, None)
    """The units of work to which it belongs, and the scope."""
    depth: int = 1
    """How many ``transaction()`` are open, one within the other."""
    rollback_only: str | None = None
    """Why it must not be committed."""
    is_ending: bool = False
    """Whether it is itself committing or rolling back now."""
    has_committed: bool = False
    """Whether somebody else has committed in it."""


_running: ContextVar[Run | None] = ContextVar("flask_eventsourcing.run", default=None)


def current_run(units: Scoped) -> Run | None:
    """Return the unit of work that is being run here, if it is one of these units."""
    run = _running.get()
    if run is None or run.place[0] is not units or run.place[1] is not units.scope():
        return None
    return run


def note_commit(units: Scoped) -> None:
    """Note for the unit of work that is being run here that somebody else has committed in it."""
    run = current_run(units)
    if run is not None:
        run.has_committed = True


@contextmanager
def running(run: Run, units: Scoped) -> Iterator[None]:
    """Within it, a unit of work is being run."""
    run.place = units, units.scope()
    before = _running.get()
    _running.set(run)
    try:
        yield
    finally:
        # Not by a token: the end of a generator may come in another context than its beginning.
        _running.set(before)


class CommitGate:
    """Refuses commits of one session's transaction.

    :param units: the units of work to which the session's belongs.
    :param pending: what is pending in the transaction.
    :param connection: returns its connection, if something was done on it.
    :param in_savepoint: whether the session is in a savepoint, whose end commits nothing.
    """

    def __init__(
        self,
        units: Scoped,
        dialect: Dialect,
        pending: Pending,
        connection: Callable[[], Connection | None],
        in_savepoint: Callable[[], bool],
    ) -> None:
        self._units = units
        self._dialect = dialect
        self._pending = pending
        self._connection = connection
        self._in_savepoint = in_savepoint
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

    def check(self) -> None:
        """Refuse a commit that is not for the caller, or that the database would turn into a rollback without a word.

        :raises HandlerError: when it is a handler that commits.
        :raises CommitInsideUnitError: when a unit of work is being run, and it is not the unit that commits.
        :raises AbortedTransactionError: when the transaction was aborted by an earlier error.
        """
        in_savepoint = self._in_savepoint()
        if self._held is not None and not in_savepoint:
            raise HandlerError(self._held)
        run = current_run(self._units)
        if run is not None and not run.is_ending and not in_savepoint:
            if not run.lenient:
                raise CommitInsideUnitError
            run.has_committed = True
        self._refuse_aborted()

    def _refuse_aborted(self) -> None:
        refusals = self._pending.all(Refusal)
        if refusals:
            raise AbortedTransactionError(
                f"{refusals[0].reason}, so the events that were saved cannot be committed: call db.session.rollback()."
            )
        if not self._dialect.aborts_transactions or not (self.has_failed or self._pending.all(Batch)):
            return
        connection = self._connection()
        if connection is not None and not connection.closed and self._dialect.is_aborted(connection):
            raise AbortedTransactionError(
                "The database aborted this transaction after an error, and a commit would drop everything in it: "
                "call db.session.rollback(), or put what may fail into a savepoint, db.session.begin_nested()."
            )
