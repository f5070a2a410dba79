"""Binds recorders to the sessions of one Flask app, and runs units of work on them."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from flask import Flask, current_app, has_app_context
from sqlalchemy import orm

from .config import CommitMode
from .databases import Database
from .exceptions import NotInitializedError, RollbackOnlyError
from .hot import HotAggregates, sort_key
from .persistence import Datastore
from .persistence.errors import is_serialization_failure, translate, translated
from .session import INFO_KEY, Batch, UnitOfWork

R = TypeVar("R")

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 0.1


@dataclass(eq=False)
class SessionBinding:
    """The sessions of one Flask app, as the recorders of its applications join them."""

    app: Flask
    database: Database
    commit_mode: CommitMode
    bind_arguments: dict[str, Any]
    publish: Callable[[Sequence[Batch]], None]
    hot: HotAggregates = field(default_factory=HotAggregates)
    datastore: Datastore | None = None

    def scope(self) -> UnitOfWork | None:
        """Return the unit of work to join, or None outside an application context of this app."""
        if has_app_context() and current_app._get_current_object() is self.app:  # type: ignore[attr-defined]
            return self.unit(self.database.session())
        return None

    def open_unit(self) -> UnitOfWork | None:
        """Return the unit of work of the current session if recorders have joined it."""
        session = self.database.open_session()
        return None if session is None else session.info.get(INFO_KEY)

    def unit(self, session: orm.Session) -> UnitOfWork:
        """Return the unit of work of a session, which is made at the first call."""
        unit: UnitOfWork | None = session.info.get(INFO_KEY)
        if unit is None:
            if self.datastore is None:
                raise NotInitializedError
            unit = UnitOfWork(
                session, self.datastore.dialect, self.bind_arguments, self.commit_mode, self.hot, self.publish
            )
            session.info[INFO_KEY] = unit
        return unit

    @contextmanager
    def transaction(self, *, queueing: bool = False) -> Iterator[orm.Session]:
        """See ``EventSourcing.transaction``."""
        unit = self.scope()
        if unit is None:
            raise NotInitializedError(
                "A unit of work needs an application context of its app: with app.app_context(): …"
            )
        if unit.depth:
            with _joined(unit):
                yield unit.session
            return
        unit.depth, unit.rollback_only, unit.queueing = 1, False, queueing
        try:
            if queueing:
                _queue(unit)
            yield unit.session
            if unit.rollback_only:
                raise RollbackOnlyError
            self.commit(unit.session)
        except BaseException:
            # Ctrl-C and the end of a greenlet too must leave no transaction open.
            roll_back(unit.session)
            raise
        finally:
            unit.depth, unit.rollback_only, unit.queueing = 0, False, False

    def retry(self, function: Callable[[], R], times: int) -> R:
        """See ``EventSourcing.retry_on_conflict``."""
        unit = self.scope()
        # What was saved before would be rolled back with the conflict, and the next try would go on without it.
        again = unit is not None and not unit.has_changes()
        tries = 0
        while True:
            try:
                with self.transaction(queueing=True):
                    return function()
            except IntegrityError:
                # Only the outermost unit can be re-run, as it is rolled back whole.
                if not again or tries == times or (unit is not None and unit.depth):
                    raise
            tries += 1
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.002 * 2**tries)))  # noqa: S311

    def commit(self, session: orm.Session) -> None:
        """Commit a session; a serialisation failure becomes the library's ``IntegrityError``."""
        try:
            session.commit()
        except sa.exc.DBAPIError as error:
            if is_serialization_failure(error.orig):
                raise translate(error) from error
            raise


def roll_back(session: orm.Session) -> None:
    """Roll a session back; where its connection is lost, the server has done so already."""
    try:
        session.rollback()
    except sa.exc.SQLAlchemyError as error:
        logger.warning("A rollback failed, its connection is closed: %s", error)
        session.invalidate()


@contextmanager
def _joined(unit: UnitOfWork) -> Iterator[None]:
    unit.depth += 1
    try:
        yield
    except BaseException:
        # Whatever it was, the outer unit must not commit half of this one.
        unit.rollback_only = True
        raise
    finally:
        unit.depth -= 1


def _queue(unit: UnitOfWork) -> None:
    conflicts = sorted(unit.conflicts.items(), key=lambda item: sort_key(item[0]))
    unit.conflicts.clear()
    with translated:
        for (_, originator_id), table in conflicts:
            unit.queue_for(unit.connection(unit.dialect.engine), table, originator_id)
