"""Dead letters: events that a projection could not apply, and later events of their aggregates, which wait."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from eventsourcing.persistence import Notification
from sqlalchemy.engine import Connection, Engine

from ..persistence.dialects import hide_values
from ..persistence.dialects.event_values import printable
from ..persistence.dialects.locks import utc_now

T = TypeVar("T")

LONGEST_TEXT = 15_000
"""Characters of an error or a traceback that are kept: the shortest column of text has 65,535 bytes."""
PAGE = 200
"""Letters that are read at once: each may have two such texts."""


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
    changed_by: str | None = None
    """The operator who skipped the event, if one did."""
    reason: str | None = None


class Aggregate(NamedTuple):
    """An aggregate with letters, and the positions of its first and last one."""

    originator_id: str
    first: int
    last: int


def describe(error: BaseException) -> str:
    """Return an error in one line that every database can store, without the values of a statement."""
    hide_values(error)
    # TracebackException has a text even where str() of the error fails, so that the projection halts in any case.
    text = str(traceback.TracebackException(type(error), error, None, limit=0, lookup_lines=False))
    return _storable(printable(f"{type(error).__name__}: {text}".strip().replace("\n", " ")))[:LONGEST_TEXT]


def event_name(notification: Notification) -> str:
    """Return how messages name an event."""
    event_class = notification.topic.partition(":")[2] or notification.topic or "of no topic"
    return printable(
        f"event {notification.id} ({event_class} {notification.originator_id} "
        f"version {notification.originator_version})"
    )


def _traceback(error: BaseException) -> str:
    hide_values(error)
    # The end tells most.
    return _storable("".join(traceback.format_exception(error)))[-LONGEST_TEXT:]


def note_of(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return an operator's note in one line that every database can store."""
    return _storable(printable(" ".join(text.split())))[:longest]


def _storable(text: str) -> str:
    # Not every database takes a NUL, and no driver half a surrogate pair.
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class DeadLetters:
    """The dead letters of one application's projections.

    :param table: where they are kept.
    """

    table: sa.Table

    def blocked(self, connection: Connection, projection: str, originator_ids: Collection[str]) -> set[str]:
        """Return those of some aggregates whose later events have to wait."""
        c = self.table.c
        found: set[str] = set()
        for some in _chunks(sorted(originator_ids)):
            of_projection = (c.projection == projection, c.originator_id.in_(some))
            found.update(connection.scalars(sa.select(c.originator_id).where(*of_projection).distinct()))
        return found

    def any(self, connection: Connection, projection: str) -> bool:
        """Whether a projection has letters."""
        c = self.table.c
        return connection.scalar(sa.select(c.id).where(c.projection == projection).limit(1)) is not None

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
        self._insert(connection, projection, notification, failed)

    def add_skipped(
        self, connection: Connection, projection: str, notification: Notification, error: str, by: str, reason: str
    ) -> None:
        """Set an event aside that an operator has skipped."""
        noted = {"error": error, "failed_at": utc_now(), "changed_by": by, "reason": reason}
        self._insert(connection, projection, notification, noted)

    def _insert(
        self, connection: Connection, projection: str, notification: Notification, noted: dict[str, Any]
    ) -> None:
        values = {
            "projection": projection,
            "position": notification.id,
            "originator_id": str(notification.originator_id),
            "originator_version": notification.originator_version,
            "topic": notification.topic,
            **noted,
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
        after: int | None = None,
        limit: int | None = None,
    ) -> Sequence[DeadLetter]:
        """Return letters in the order of their positions.

        :param ids: at most as many as a statement may have parameters; see :meth:`find`.
        :param after: only those behind a position.
        :param limit: the most that are read, all of them without it; see :meth:`pages`.
        """
        c = self.table.c
        query = sa.select(*(c[name] for name in DeadLetter._fields)).where(c.projection.in_(projections))
        if ids is not None:
            query = query.where(c.id.in_(ids))
        if originator_id is not None:
            query = query.where(c.originator_id == originator_id)
        if after is not None:
            query = query.where(c.position > after)
        query = query.order_by(c.projection, c.position).limit(limit)
        return [DeadLetter(*row) for row in connection.execute(query)]

    def pages(
        self, engine: Engine, projection: str, *, originator_id: str | None = None, limit: int | None = None
    ) -> Iterator[Sequence[DeadLetter]]:
        """Read the letters of a projection in the order of their positions, some at once, between transactions.

        :param originator_id: only those of an aggregate.
        :param limit: the most that are read, all of them without it.
        """
        after, left = 0, limit
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            with engine.connect() as connection:
                page = self.select(connection, [projection], originator_id=originator_id, after=after, limit=size)
            if page:
                yield page
            if len(page) < size:
                return
            after = page[-1].position
            left = None if left is None else left - len(page)

    def find(self, connection: Connection, projections: Collection[str], ids: Iterable[int]) -> dict[int, list[str]]:
        """Return which of some projections have letters with these ids, however many ids there are."""
        c = self.table.c
        found: dict[int, list[str]] = {}
        for some in _chunks(sorted(set(ids))):
            query = sa.select(c.id, c.projection).where(c.projection.in_(projections), c.id.in_(some))
            for letter_id, projection in connection.execute(query):
                found.setdefault(letter_id, []).append(projection)
        return found

    def aggregates(
        self, connection: Connection, projection: str, *, after: int = 0, upto: int | None = None
    ) -> Sequence[Aggregate]:
        """Return a page of the aggregates whose first letter is behind a position, in the order of these."""
        query = self._by_aggregate(projection)
        first = sa.func.min(self.table.c.position)
        query = query.having(first > after) if upto is None else query.having(first > after, first <= upto)
        return [Aggregate._make(row) for row in connection.execute(query.order_by(first).limit(PAGE))]

    def aggregates_of(
        self, connection: Connection, projection: str, originator_ids: Sequence[str]
    ) -> Sequence[Aggregate]:
        """Return those of some aggregates that have letters, in the order of the first of these."""
        c = self.table.c
        found: list[Aggregate] = []
        for some in _chunks(originator_ids):
            query = self._by_aggregate(projection).where(c.originator_id.in_(some))
            found += [Aggregate._make(row) for row in connection.execute(query)]
        return sorted(found, key=lambda each: each.first)

    def originators(self, connection: Connection, projection: str, ids: Iterable[int]) -> Sequence[str]:
        """Return the aggregates of letters with these ids."""
        c = self.table.c
        found: dict[str, None] = {}
        for some in _chunks(sorted(set(ids))):
            query = sa.select(c.originator_id).where(c.projection == projection, c.id.in_(some)).distinct()
            found |= dict.fromkeys(connection.scalars(query))
        return list(found)

    def last(self, connection: Connection, projection: str) -> int:
        """Return the position of the last letter, 0 if there is none."""
        c = self.table.c
        return connection.scalar(sa.select(sa.func.max(c.position)).where(c.projection == projection)) or 0

    def _by_aggregate(self, projection: str) -> sa.Select[tuple[str, int, int]]:
        c = self.table.c
        columns = (c.originator_id, sa.func.min(c.position), sa.func.max(c.position))
        return sa.select(*columns).where(c.projection == projection).group_by(c.originator_id)

    def remove(self, connection: Connection, letter_id: int) -> None:
        """Delete a letter."""
        connection.execute(sa.delete(self.table).where(self.table.c.id == letter_id))

    def remove_all(self, connection: Connection, projection: str, after: int = 0) -> None:
        """Delete all letters of a projection, or those behind a position."""
        c = self.table.c
        connection.execute(sa.delete(self.table).where(c.projection == projection, c.position > after))

    def rename(self, connection: Connection, projection: str, name: str) -> None:
        """Give the letters of one projection to another, which has none."""
        change = sa.update(self.table).where(self.table.c.projection == projection)
        connection.execute(change.values(projection=name))

    def count(self, connection: Connection, projection: str, originator_id: str | None = None) -> tuple[int, int]:
        """Return how many events failed and how many wait behind them, of an aggregate or of all."""
        c = self.table.c
        query = sa.select(sa.func.count(c.error), sa.func.count()).where(c.projection == projection)
        if originator_id is not None:
            query = query.where(c.originator_id == originator_id)
        failed, all_letters = connection.execute(query).one()
        return int(failed), int(all_letters) - int(failed)


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the values in parts that are few enough for the parameters of one statement."""
    return (values[start : start + PAGE] for start in range(0, len(values), PAGE))
