"""Events that a projection could not apply, set aside with those of the same aggregate that wait behind them."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from eventsourcing.persistence import Notification
from sqlalchemy.engine import Connection

from ..persistence.dialects import hide_values
from ..persistence.dialects.event_values import printable
from ..persistence.dialects.locks import utc_now

LONGEST_TEXT = 15_000
"""Characters of an error or a traceback that are kept: the shortest column of text has 65,535 bytes."""


class DeadLetter(NamedTuple):
    """One letter; without an error it waits for an earlier one of the same aggregate."""

    id: int
    projection: str
    position: int
    originator_id: str
    originator_version: int
    topic: str
    error: str | None
    traceback: str | None
    attempts: int
    failed_at: datetime | None


def describe(error: BaseException) -> str:
    """Return an error in one line that every database can store, without the values of a statement."""
    hide_values(error)
    try:
        text = str(error)
    except Exception as failure:  # noqa: BLE001
        # An error that cannot even be printed must not keep the projection from being halted.
        text = f"(its text cannot be had: {type(failure).__name__})"
    return _storable(printable(f"{type(error).__name__}: {text}".strip().replace("\n", " ")))[:LONGEST_TEXT]


def _traceback(error: BaseException) -> str:
    hide_values(error)
    # Its end is what tells most.
    return _storable("".join(traceback.format_exception(error)))[-LONGEST_TEXT:]


def _storable(text: str) -> str:
    # Not every database takes a NUL, and no driver half a surrogate pair.
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class DeadLetters:
    """The dead letters of one application's projections.

    :param table: where they are kept.
    """

    table: sa.Table

    def blocked(self, connection: Connection, projection: str) -> set[str]:
        """Return the ids of the aggregates whose later events have to wait."""
        c = self.table.c
        return set(connection.scalars(sa.select(c.originator_id).where(c.projection == projection).distinct()))

    def add(
        self,
        connection: Connection,
        projection: str,
        notification: Notification,
        error: BaseException | None = None,
        attempts: int = 0,
    ) -> None:
        """Set an event aside; without an error it waits."""
        failed: dict[str, Any] = {}
        if error is not None:
            failed = {
                "error": describe(error),
                "traceback": _traceback(error),
                "attempts": attempts,
                "failed_at": utc_now(),
            }
        values = {
            "projection": projection,
            "position": notification.id,
            "originator_id": str(notification.originator_id),
            "originator_version": notification.originator_version,
            "topic": notification.topic,
            **failed,
        }
        connection.execute(sa.insert(self.table).values(values))

    def note_failure(self, connection: Connection, letter: DeadLetter, error: BaseException) -> None:
        """Note that another try has failed too."""
        change = sa.update(self.table).where(self.table.c.id == letter.id)
        connection.execute(
            change.values(
                error=describe(error),
                traceback=_traceback(error),
                attempts=self.table.c.attempts + 1,
                failed_at=utc_now(),
            )
        )

    def select(
        self,
        connection: Connection,
        projections: Collection[str],
        *,
        ids: Collection[int] | None = None,
        originator_id: str | None = None,
        failed_only: bool = False,
    ) -> Sequence[DeadLetter]:
        """Return letters in the order of their positions."""
        c = self.table.c
        query = sa.select(*(c[name] for name in DeadLetter._fields)).where(c.projection.in_(projections))
        if ids is not None:
            query = query.where(c.id.in_(ids))
        if originator_id is not None:
            query = query.where(c.originator_id == originator_id)
        if failed_only:
            query = query.where(c.error.is_not(None))
        return [DeadLetter(*row) for row in connection.execute(query.order_by(c.projection, c.position))]

    def remove(self, connection: Connection, letter_id: int) -> None:
        """Delete a letter."""
        connection.execute(sa.delete(self.table).where(self.table.c.id == letter_id))

    def remove_all(self, connection: Connection, projection: str) -> None:
        """Delete all letters of a projection."""
        connection.execute(sa.delete(self.table).where(self.table.c.projection == projection))

    def rename(self, connection: Connection, projection: str, name: str) -> None:
        """Give the letters of one projection to another, which has none."""
        change = sa.update(self.table).where(self.table.c.projection == projection)
        connection.execute(change.values(projection=name))

    def count(self, connection: Connection, projection: str) -> tuple[int, int]:
        """Return how many events failed and how many wait behind them."""
        c = self.table.c
        query = sa.select(sa.func.count(c.error), sa.func.count()).where(c.projection == projection)
        failed, all_letters = connection.execute(query).one()
        return int(failed), int(all_letters) - int(failed)
