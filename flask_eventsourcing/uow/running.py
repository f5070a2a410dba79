"""Runs units of work: commits or rolls back at the end, joins outer ones, and retries after a conflict."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from sqlalchemy import orm

from ..exceptions import ConfigurationError, RollbackOnlyError
from .commit_gate import Run, running
from .unit import INFO_KEY, SessionUnits, UnitOfWork

R = TypeVar("R")

logger: logging.Logger = logging.getLogger(__name__)

LONGEST_PAUSE = 0.1
"""The most seconds before a unit is run again."""

UNREAD = "Not tried again, as the body of the request was read, and is too large to be kept."


def always() -> bool:
    """Return True: another try is possible."""
    return True


class UnitRunner:
    """Runs units of work on the session that is current at that time.

    :param current: returns the unit of work of the current session.
    """

    def __init__(self, current: Callable[[], UnitOfWork]) -> None:
        self._current = current

    @contextmanager
    def transaction(self, *, queueing: bool = False, run: Run | None = None) -> Iterator[orm.Session]:
        """See ``EventSourcing.transaction``.

        :param queueing: whether the unit can be run again; then it queues for contended aggregates.
        :param run: the run of the unit, if the caller needs to know more of it.
        """
        unit = self._current()
        # Kept, because the user's code may remove it.
        session = unit.session
        outer = unit.shared.run()
        if outer is not None:
            with _joined(outer):
                yield session
            return
        run = run or Run()
        run.current = self._current
        with running(run, unit.shared.scope):
            unit.queue.active = queueing
            try:
                # Ctrl-C, and the end of a greenlet, must leave no transaction open either.
                with ExitStack() as failed:
                    failed.callback(self._roll_back, run, unit, session)
                    self._begin(unit, session)
                    yield session
                    # Other code may have rolled the driver's connection back since the last save.
                    self._current().look()
                    if run.rollback_only is not None:
                        raise RollbackOnlyError(run.rollback_only or None)
                    run.is_ending = True
                    commit(self._current())
                    failed.pop_all()
            finally:
                unit.queue.active = False

    def _begin(self, unit: UnitOfWork, session: orm.Session) -> None:
        unit.units.commits.begin(session)
        # A session with autobegin=False does not begin by itself.
        if not (session.autobegin or session.in_transaction()):
            session.begin()
        if session.in_transaction():
            with unit.dialect.translated:
                unit.begun(unit.connection())
        if unit.queue.has_conflicts:
            with unit.dialect.translated:
                unit.queue.join_conflicting(unit.connection())

    def _roll_back(self, run: Run, unit: UnitOfWork, session: orm.Session) -> None:
        run.is_ending = True
        unit.units.commits.rollback(session)
        current = self._current()
        if current is not unit:
            # Other code has removed the session, and got another one.
            current.units.commits.rollback(current.session)

    def retry(
        self, function: Callable[[], R], times: int, *, lenient: bool = False, rewind: Callable[[], bool] = always
    ) -> R:
        """See ``EventSourcing.retry_on_conflict``.

        :param rewind: called before another try; returns whether there can be one.
        :param lenient: whether other code may commit in it, as in a task, which did not ask for a unit of work.
        """
        unit = self._current()
        # Earlier saves would be rolled back with the conflict, and the next try would go on without them.
        again = not unit.has_changes() and unit.shared.run() is None
        for tries in range(times + 1):
            run = Run(lenient=lenient)
            try:
                with self.transaction(queueing=True, run=run):
                    return function()
            except (IntegrityError, sa.exc.DBAPIError) as error:
                conflict = as_conflict(unit, error)
                if conflict is None:
                    raise
                if (reason := _reason(again=again, run=run, tries=tries, times=times, rewind=rewind)) is not None:
                    conflict.add_note(reason)
                    raise conflict from conflict.__cause__
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.004 * 2**tries)))  # noqa: S311
        raise IntegrityError


def _reason(*, again: bool, run: Run, tries: int, times: int, rewind: Callable[[], bool]) -> str | None:
    """Return why there is no other try, or None if there is one."""
    if not again:
        return "Not tried again, as the session had changes, or was in a unit of work, before this one began."
    if run.has_committed:
        return "Not tried again, as something was committed within the unit of work."
    return why_not_again(tries, times, rewind)


def why_not_again(tries: int, times: int, rewind: Callable[[], bool]) -> str | None:
    """Return why there is no other try after a number of failed tries, or None if there is one.

    :param rewind: called before another try; returns whether there can be one.
    """
    if tries == times:
        return f"Tried {tries + 1} times."
    return None if rewind() else UNREAD


def as_conflict(unit: UnitOfWork, error: Exception) -> IntegrityError | None:
    """Return the library's error for a conflict, after which the unit may be run again, or None."""
    if isinstance(error, sa.exc.DBAPIError):
        if not unit.dialect.is_serialization_failure(error.orig):
            return None
        translated = unit.dialect.translate(error)
        translated.__cause__ = error
        return translated if isinstance(translated, IntegrityError) else None
    return error if isinstance(error, IntegrityError) and unit.dialect.is_conflict(error) else None


def check_times(times: Any) -> None:
    """Check the number of retries.

    :raises ConfigurationError: when it is not a whole number from 0 up.
    """
    if not isinstance(times, int) or isinstance(times, bool) or times < 0:
        raise ConfigurationError(f"retry_on_conflict(times=…) takes a whole number from 0 up; found {times!r}.")


def commit(unit: UnitOfWork) -> None:
    """Commit a unit's session; a serialisation failure becomes the library's ``IntegrityError``."""
    try:
        unit.units.commits.commit(unit.session)
    except sa.exc.DBAPIError as error:
        if unit.dialect.is_serialization_failure(error.orig):
            raise unit.dialect.translate(error) from error
        raise


def roll_back(session: orm.Session) -> None:
    """Roll a session back; if its connection is lost, the server has already done so."""
    try:
        session.rollback()
    except sa.exc.InvalidRequestError:
        # A listener of after_commit failed: the transaction is committed, and only has to be closed.
        session.close()
    except sa.exc.SQLAlchemyError as error:
        logger.warning("A rollback failed, so its session is closed: %s", error)
        close(session)


def may_lose(session: orm.Session) -> bool:
    """Whether a session may have events that are neither committed nor rolled back on request."""
    shared: SessionUnits | None = session.info.get(INFO_KEY)
    return shared is not None and any(unit.pending or unit.following.rolled_back for unit in shared.units.values())


def close(session: orm.Session) -> None:
    """Close a session whose rollback has failed; only if that fails too, its connection is given up.

    A database in memory is gone with its connection, and what fails is mostly a savepoint that has ended before.
    """
    transactions = [session.get_nested_transaction() or session.get_transaction()]
    while transactions[-1] is not None:
        transactions.append(transactions[-1].parent)
    for _ in transactions:
        # Each failure is about one more savepoint.
        with suppress(sa.exc.SQLAlchemyError):
            session.close()
            return
    session.invalidate()


class SessionCommits:
    """The ``Commits`` of a host that commits the session itself.

    :param at_save: whether each ``save()`` outside of a unit of work is committed at once.
    :param is_to_come: whether the host will commit at the end of the current work.
    """

    def __init__(self, *, at_save: bool = False, is_to_come: Callable[[], bool] = bool) -> None:
        self.at_save = at_save
        self._is_to_come = is_to_come

    def begin(self, session: orm.Session) -> None:
        """Do nothing: a session begins by itself."""

    def joining(self, session: orm.Session) -> None:
        """Do nothing: a session commits all its work."""

    def commit(self, session: orm.Session) -> None:
        """Commit the session."""
        session.commit()

    def rollback(self, session: orm.Session) -> None:
        """Roll the session back."""
        roll_back(session)

    def is_to_come(self, session: orm.Session) -> bool:
        """Whether the host will commit."""
        return self._is_to_come()


@contextmanager
def _joined(run: Run) -> Iterator[None]:
    run.depth += 1
    is_whole = False
    try:
        yield
        is_whole = True
    finally:
        run.depth -= 1
        if not is_whole:
            # After any error, the outer unit must not commit half of this one. The default message says so.
            run.rollback_only = run.rollback_only or ""
