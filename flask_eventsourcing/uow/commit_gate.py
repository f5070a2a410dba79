"""Refuses commits by other code inside a unit of work, and commits that the database would drop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from threading import get_ident
from typing import Protocol

from sqlalchemy import orm

from ..exceptions import (
    AbortedTransactionError,
    CommitInsideUnitError,
    HandlerError,
    NotInitializedError,
    UncommittedEventsError,
    WriteTimeoutError,
)
from ..persistence import Dialect
from .pending import Batch, Following, Pending, Refusal


class InSession(Protocol):
    """The part of a unit of work that the gate uses."""

    @property
    def session(self) -> orm.Session:
        """The session."""


class Commits(Protocol):
    """Who commits a session, and when. Each host passes one."""

    @property
    def at_save(self) -> bool:
        """Whether each ``save()`` outside of a unit of work is committed at once."""

    def begin(self, session: orm.Session) -> None:
        """Called before an outermost unit of work begins on a session."""

    def joining(self, session: orm.Session) -> None:
        """Called before a session writes, or registers something for the end of its transaction. It may refuse."""

    def commit(self, session: orm.Session) -> None:
        """Commit a session at the end of a unit of work."""

    def rollback(self, session: orm.Session) -> None:
        """Roll a session back at the end of a unit of work that failed."""

    def is_to_come(self, session: orm.Session) -> bool:
        """Whether the current work will still be committed, even if it has written nothing yet."""


@dataclass(eq=False)
class Run:
    """A running unit of work, in this thread, greenlet or task.

    It belongs to the host's scope, not to the session, as a function may remove the session and get another one. A
    nested scope, such as a nested application context or a session of the caller's own, has its own units.

    :param lenient: whether other code may commit and roll back in it: a task did not ask for its unit.
    """

    lenient: bool = False
    current: Callable[[], InSession] | None = None
    """Returns the unit of work of the session that is current in its host now."""
    scope: object = None
    """The scope of the session on which it was begun."""
    outer: Run | None = None
    """The unit of work around it, also if that is of another session."""
    depth: int = 1
    """How many ``transaction()`` are open, one within the other."""
    rollback_only: str | None = None
    """Why it must not be committed."""
    is_ending: bool = False
    """Whether it is itself committing or rolling back now."""
    has_committed: bool = False
    """Whether other code has committed in it."""


_running: ContextVar[Run | None] = ContextVar("flask_eventsourcing.run", default=None)


def current_run(scope: object) -> Run | None:
    """Return the unit of work that is being run here on the session of a scope."""
    run = _running.get()
    while run is not None and run.scope != scope:
        run = run.outer
    return run


def joined_late(session: orm.Session) -> bool:
    """Whether a session without a unit of work became the current one within a unit, and has now joined it."""
    run = _running.get()
    while run is not None:
        # Another app may be the current one.
        with suppress(NotInitializedError):
            if run.current is not None and run.current().session is session:
                return True
        run = run.outer
    return False


@contextmanager
def running(run: Run, scope: object) -> Iterator[None]:
    """Run a unit of work on the session of a scope in the block."""
    before = _running.get()
    run.scope, run.outer = scope, before
    _running.set(run)
    try:
        yield
    finally:
        # Without a token, because a generator may end in another context than it began in.
        _running.set(before)


SHARED = (
    "Another thread {does} the session of these events at this moment: give each thread a session and a transaction "
    "manager of its own."
)


class Turns:
    """Lets threads that share a session take turns. Otherwise a commit would store events that it does not know yet.

    Each thread notes what it does before it looks at the others, so that of two that begin at once, one sees the other.
    """

    def __init__(self) -> None:
        self.saving: int | None = None
        self.committing: int | None = None
        """The thread that commits."""

    def look(self) -> None:
        """Refuse to look at a session that another thread uses now.

        :raises UncommittedEventsError: while another thread saves or commits.
        """
        thread = get_ident()
        if self.saving not in (None, thread):
            raise UncommittedEventsError(SHARED.format(does="saves in"))
        if self.committing not in (None, thread):
            raise UncommittedEventsError(SHARED.format(does="commits"))

    def save(self) -> None:
        """Begin a save.

        :raises UncommittedEventsError: while another thread commits.
        """
        thread = self.saving = get_ident()
        if self.committing not in (None, thread):
            self.saving = None
            raise UncommittedEventsError(SHARED.format(does="commits"))

    def commit(self, timeout: float) -> None:
        """Begin a commit, when the save of another thread has ended.

        :param timeout: in seconds.
        :raises WriteTimeoutError: when it takes longer.
        """
        thread = self.committing = get_ident()
        if self.saving in (None, thread):
            return
        deadline = time.monotonic() + timeout
        while self.saving not in (None, thread):
            if time.monotonic() > deadline:
                self.committing = None
                raise WriteTimeoutError(SHARED.format(does="saves in"))
            time.sleep(0.001)


class CommitGate:
    """Refuses commits of one session's transaction.

    :param run: returns the unit of work that is being run on the session.
    :param pending: the pending items of the transaction.
    :param following: has its connection, if something was done on it.
    """

    def __init__(
        self,
        run: Callable[[], Run | None],
        dialect: Dialect,
        pending: Pending,
        following: Following,
    ) -> None:
        self._run = run
        self._dialect = dialect
        self._pending = pending
        self._following = following
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

    def check(self, *, in_savepoint: bool = False) -> None:
        """Refuse a commit by the wrong code, or one that the database would turn into a rollback without an error.

        :param in_savepoint: whether it is the end of a savepoint, which commits nothing.
        :raises HandlerError: when a handler commits.
        :raises CommitInsideUnitError: when a unit of work is running, and other code commits.
        :raises AbortedTransactionError: when the transaction was aborted by an earlier error.
        """
        if self._held is not None and not in_savepoint:
            raise HandlerError(self._held)
        run = self._run()
        if run is not None and not run.is_ending and not in_savepoint:
            if not run.lenient:
                raise CommitInsideUnitError
            run.has_committed = True
        self._refuse_aborted()

    def _refuse_aborted(self) -> None:
        refusals = self._pending.all(Refusal)
        if refusals:
            raise AbortedTransactionError(
                f"{refusals[0].reason}, so the events that were saved cannot be committed: call {self._rollback}."
            )
        if not self._dialect.aborts_transactions or not (self.has_failed or self._pending.has(Batch)):
            return
        connection = self._following.connection()
        if connection is not None and not connection.closed and self._dialect.is_aborted(connection):
            raise AbortedTransactionError(
                "The database aborted this transaction after an error, and a commit would drop everything in it: "
                f"call {self._rollback}, or put what may fail into a savepoint."
            )

    @property
    def _rollback(self) -> str:
        """The call that rolls back the host's session, as messages name it."""
        return self._dialect.options.ends[1]
