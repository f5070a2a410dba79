"""Inline projections: applied within ``save()``, which notes the applied positions, and events that are missing there.

A program that does not know the projection, such as an older release, appends without a note. An event above the
projection's position and in no range was not applied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ...exceptions import HandlerError
from ...metadata import RECORDED, Recorded, caused_by
from ...persistence import Description, JoinedUnit
from ...persistence.dialects import is_serialization_failure
from ...uow import UnitOfWork
from ..checkpoint import SWAPPING, CheckpointRow
from ..definitions import ModelProjection
from . import Consumer, ProjectedApplication
from .belonging import AHEAD, NOT_APPLIED, Belonging, Mismatch

T = TypeVar("T")

GAPS_AT_ONCE = 200
RANGES_AT_ONCE = 2000
IDS_AT_ONCE = 500
INLINE_ENDED = (
    "A handler of an inline projection ended the transaction: it must not call session.commit() or "
    "session.rollback(), as its models are committed with the events."
)


class InlineApplier:
    """Applies events within ``save()``, in its transaction, for the inline ones among some projections."""

    def __init__(self, application: ProjectedApplication, projection_classes: Sequence[type[ModelProjection]]) -> None:
        self.application = application
        self.projections: list[ModelProjection] = [cls() for cls in projection_classes if cls.inline and cls.handlers]

    def install(self) -> None:
        """Have the application's recorder call this after each append, if there is anything to apply."""
        if self.projections:
            self.application.datastore.after_append[self.application.name] = self

    def __call__(
        self,
        connection: Connection,
        joined: JoinedUnit | None,
        events: Sequence[StoredEvent],
        positions: Sequence[int],
        described: Description,
    ) -> None:
        """Apply the events of one append, and note their positions."""
        if joined is None:
            # Without a session to join, the recorder has a transaction of its own, and a session of ours joins it.
            self._refuse_old_snapshot(connection)
            with orm.Session(bind=connection) as session:
                session.begin()
                self._apply(session, events, partial(described.recorded, positions))
            self._note(connection, positions)
            return
        # A host has nothing but units of work for recorders to join.
        unit = cast(UnitOfWork, joined)
        # A caller that catches the error must not commit the events without their read models.
        with ExitStack() as failed:
            failed.callback(self._refuse, unit, connection)
            self._refuse_old_snapshot(connection)
            with unit.gate.hold(INLINE_ENDED):
                self._apply(unit.session, events, partial(described.recorded, positions))
            self._note(connection, positions)
            failed.pop_all()

    @staticmethod
    def _refuse(unit: UnitOfWork, connection: Connection) -> None:
        # If a flush failed, the session has closed its connection.
        unit.refuse("An inline projection failed", None if connection.closed else connection)

    def _apply(
        self, session: orm.Session, events: Sequence[StoredEvent], find: Callable[[], Sequence[Recorded]]
    ) -> None:
        recorded = cache(find)
        domain_events: list[Any] = [self.application.mapper.to_domain_event(event) for event in events]
        begun = session.get_transaction()
        for projection in self.projections:
            for number, event in enumerate(domain_events):
                handler = projection.handlers.find(type(event))
                if handler is not None:
                    session.flush()
                    self._forget_rows(session)
                    told = {RECORDED: recorded()[number]} if handler in projection.handlers.telling else {}
                    with caused_by(lambda number=number: recorded()[number]):  # type: ignore[misc]
                        handler(projection, event, session, **told)
                if session.get_transaction() is not begun:
                    raise HandlerError(INLINE_ENDED)
        session.flush()

    def _note(self, connection: Connection, positions: Sequence[int]) -> None:
        """Insert a row for each projection. If writers shared a row, they would queue for it."""
        blocks = [(positions[0], positions[-1])]
        if positions[-1] - positions[0] != len(positions) - 1:
            blocks = [(position, position) for position in positions]
        rows = [
            {"projection": projection.name, "first_position": first, "last_position": last}
            for projection in self.projections
            for first, last in blocks
        ]
        connection.execute(sa.insert(self.application.models.tables["inline_ranges"]), rows)

    def _forget_rows(self, session: orm.Session) -> None:
        """Have handlers load rows again: those in the session may be older than the aggregate's last event."""
        models = tuple(model for projection in self.projections for model in projection.models)
        if models:
            for row in list(session.identity_map.values()):
                if isinstance(row, models) and not session.is_modified(row):
                    session.expire(row)

    def _refuse_old_snapshot(self, connection: Connection) -> None:
        """Refuse a transaction whose snapshot is older than the end of a rebuild, so that it is tried again.

        It would see the new tables as they were while they were being built. A locking read sees what is committed.

        :raises ConflictError: when a rebuild has ended since the transaction began to read.
        """
        if not self.application.datastore.dialect.refuses_old_snapshot:
            return
        for projection in self.projections:
            checkpoint = self.application.checkpoint(projection.name)
            if _reached(checkpoint.read(connection)) != _reached(checkpoint.read(connection, latest=True)):
                raise self.application.datastore.dialect.conflict_error(
                    f"Projection {projection.name} was rebuilt since this transaction began: try again."
                )


def _reached(row: CheckpointRow | None) -> tuple[int, int, str | None]:
    """Return what a rebuild changes in the row of an inline projection."""
    return (0, 0, None) if row is None else (row.position, row.applied, row.fingerprint)


@dataclass(frozen=True)
class Missing:
    """The events of a projection that were not applied although later ones may have been."""

    topics: dict[str, int]
    """How many of them there are, by topic."""
    first: int
    """The position of the first of them, or 0."""

    def __bool__(self) -> bool:
        return bool(self.topics)


Gap = tuple[int, int]
"""The first and the last of some positions that are in no range."""


class Ranges:
    """The ranges of positions above its checkpoint that an inline projection has applied."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.table: sa.Table = consumer.application.models.tables["inline_ranges"]
        self._own = self.table.c.projection == consumer.name

    def end(self, connection: Connection) -> int:
        """Return the last position that was applied inline, or 0."""
        last: int | None = connection.scalar(sa.select(sa.func.max(self.table.c.last_position)).where(self._own))
        return last or 0

    def gaps(self, connection: Connection, base: int, mark: int) -> list[Gap]:
        """Return the positions above *base*, up to *mark*, that are in no range."""
        c = self.table.c
        before = sa.func.max(c.last_position).over(order_by=c.first_position, rows=(None, -1)).label("before")
        own = sa.select(before, c.first_position, c.last_position).where(self._own, c.last_position > base).subquery()
        after = sa.func.coalesce(own.c.before, base)
        found = sa.select(after + 1, own.c.first_position - 1).where(own.c.first_position > after + 1)
        # In order of position. Appends in progress are beyond the mark.
        gaps = [(first, min(last, mark)) for first, last in connection.execute(found.order_by(after))]
        rest = (max(base, self.end(connection)) + 1, mark)
        return [(first, last) for first, last in (*gaps, rest) if first <= last]

    def find_missing(self, connection: Connection, base: int, mark: int) -> Missing:
        """Return the events of the projection above *base*, up to *mark*, that were not applied."""
        topics: dict[str, int] = {}
        firsts = []
        for some in _parts(self.gaps(connection, base, mark), GAPS_AT_ONCE):
            for topic, count, first in self._topics(connection, some):
                topics[topic] = topics.get(topic, 0) + count
                firsts.append(first)
        return Missing(topics, min(firsts, default=0))

    def _topics(self, connection: Connection, gaps: Sequence[Gap]) -> Iterator[tuple[str, int, int]]:
        """Return the topics of the projection's events in gaps, with their number and the first position."""
        c = self.consumer.application.recorder.events_table.table.c
        within = sa.or_(*(c.notification_id.between(first, last) for first, last in gaps))
        query = sa.select(c.topic, sa.func.count(), sa.func.min(c.notification_id)).where(within).group_by(c.topic)
        for topic, count, first in connection.execute(query).all():
            if self.consumer.handlers.concerns(topic):
                yield topic, int(count), int(first)

    def mismatch(self, missing: Missing) -> Mismatch | None:
        """Return the state of a projection that lacks events."""
        if not missing:
            return None
        name, count = self.consumer.name, sum(missing.topics.values())
        events = "1 event was" if count == 1 else f"{count} events were"
        return Mismatch(
            NOT_APPLIED,
            f"{events} not applied by the inline projection {name}, from position {missing.first} on: another program "
            "or an older release saved them, or the projection was added or made inline later. Run "
            f"{self.consumer.command('rebuild')}; or, if its tables are complete, "
            f"{self.consumer.command('projections accept')}.",
        )

    def ahead(self, last: int, end: int) -> Mismatch:
        """Return the state of a projection that has applied what is not in the log."""
        name = self.consumer.name
        return Mismatch(
            AHEAD,
            f"The inline projection {name} is ahead of its log: it has applied events up to position {last}, and the "
            f"log ends at {end}. If that was restored to an earlier point, run {self.consumer.command('rebuild')}.",
        )

    # ----------------------------------------------------------------------------------------- a change to a worker

    def beyond(self, connection: Connection, position: int, mark: int) -> int:
        """Return the last position after *position* that was applied inline, or *position*."""
        c = self.table.c
        query = sa.select(sa.func.max(c.last_position)).where(self._own, c.last_position.between(position + 1, mark))
        return connection.scalar(query) or position

    def take_over(self, connection: Connection, row: CheckpointRow, mark: int) -> Mismatch | dict[str, Any]:
        """Return the values with which a runner goes on after the inline events, or the mismatch that stops it."""
        position = self.beyond(connection, row.position, mark)
        if position == row.position:
            return {}
        mismatch = self.mismatch(self.find_missing(connection, row.position, position))
        return mismatch or {"position": position, **self.consumer.last_event(connection, position, ())}

    # ----------------------------------------------------------------------------------------------------- to merge

    def merge(self, mark: int) -> None:
        """Make one range of those that follow each other up to *mark*, and delete those below the position.

        Writers and other processes may do the same at the same time; of two processes that merge, one gives up.
        """
        start: int | None = 0
        while start is not None:
            try:
                with self.consumer.application.engine.connect() as connection:
                    start = self._merge_page(connection, start, mark)
                    connection.commit()
            except sa.exc.DBAPIError as error:
                if not is_serialization_failure(error):
                    raise
                return

    def _merge_page(self, connection: Connection, start: int, mark: int) -> int | None:
        """Merge some ranges, and return where the next page begins."""
        c = self.table.c
        row = self.consumer.checkpoint.read(connection)
        base = 0 if row is None else row.position
        columns = (c.id, c.first_position, c.last_position)
        query = sa.select(*columns).where(self._own, c.first_position >= start, c.last_position <= mark)
        page = connection.execute(query.order_by(c.first_position).limit(RANGES_AT_ONCE)).all()
        groups = list(self._groups(connection, [each for each in page if each[2] > base]))
        done = [each[0] for each in page if each[2] <= base]
        done += [each[0] for group in groups if len(group) > 1 for each in group]
        merged = [
            {"projection": self.consumer.name, "first_position": group[0][1], "last_position": group[-1][2]}
            for group in groups
            if len(group) > 1
        ]
        if not self._delete(connection, done):
            connection.rollback()
            return None
        if merged:
            connection.execute(sa.insert(self.table), merged)
        if len(page) < RANGES_AT_ONCE:
            return None
        # The next page may begin with a range that continues the last one.
        last: tuple[int, int, int] = groups[-1][0] if groups else page[-1]
        return last[1] if last[1] > start else page[-1][2] + 1

    def _groups(self, connection: Connection, ranges: Sequence[Any]) -> Iterator[list[Any]]:
        """Return ranges in groups, between which there are events of the projection."""
        gaps = [(one[2] + 1, other[1] - 1) for one, other in pairwise(ranges)]
        real = [gap for gap in gaps if gap[0] <= gap[1]]
        closed: set[Gap] = set()
        for some in _parts(real, GAPS_AT_ONCE):
            if any(self._topics(connection, some)):
                closed.update(gap for gap in some if any(self._topics(connection, [gap])))
        group: list[Any] = []
        for each in ranges:
            if group and (group[-1][2] + 1, each[1] - 1) in closed:
                yield group
                group = []
            group.append(each)
        if group:
            yield group

    def _delete(self, connection: Connection, ids: Sequence[int]) -> bool:
        """Delete rows by their ids, which keeps no writer waiting; False where another process was first."""
        deleted = 0
        for some in _parts(ids, IDS_AT_ONCE):
            deleted += connection.execute(sa.delete(self.table).where(self.table.c.id.in_(some))).rowcount
        return deleted == len(ids)


def applied_inline(
    consumer: Consumer, connection: Connection, row: CheckpointRow, mark: int, end: int
) -> tuple[int, dict[str, int], Mismatch | None]:
    """Return the last position that an inline projection applied, its missing events by topic, and their state.

    :param end: the last position that is committed.
    """
    ranges = Ranges(consumer)
    last = ranges.end(connection)
    missing = ranges.find_missing(connection, row.position, mark)
    if missing:
        return missing.first - 1, missing.topics, ranges.mismatch(missing)
    if last > end:
        # Others have appended since.
        end, _ = consumer.application.log.look_for_writer(connection, mark)
    return end, {}, None if last <= end else ranges.ahead(last, end)


def find_not_applied(consumer: Consumer, connection: Connection, row: CheckpointRow, mark: int) -> Mismatch | None:
    """Return the state of a projection that lacks events before those that were applied inline."""
    if consumer.kind != "projection":
        return None
    if consumer.projection_class.inline:
        mismatch = Belonging(consumer).find_mismatch(connection, row)
        return mismatch or applied_inline(consumer, connection, row, mark, mark)[2]
    found = Ranges(consumer).take_over(connection, row, mark)
    return found if isinstance(found, Mismatch) else None


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def merge_ranges(application: ProjectedApplication, every: float = 0.0) -> None:
    """Merge what is noted of an application's inline projections, and note their tables.

    :param every: seconds within which this process does that once.
    """
    for name, projection_class in application.registered.items():
        now = time.monotonic()
        if projection_class.inline and now >= application.merged.get(name, -math.inf) + every:
            application.merged[name] = now
            consumer = Consumer(application, projection_class)
            Ranges(consumer).merge(application.high_water_mark())
            _note_tables(consumer)


def _note_tables(consumer: Consumer) -> None:
    """Note which tables there are, as a worker does for other projections, unless they do not fit."""
    checkpoint, belonging = consumer.checkpoint, Belonging(consumer)
    with consumer.application.engine.connect() as connection:
        row = checkpoint.read(connection)
        if row is not None and (row.state == SWAPPING or belonging.find_mismatch(connection, row) is not None):
            return
        noted = belonging.note_tables(connection, row or CheckpointRow.never_run(consumer.name))
    if noted in (None, None if row is None else row.tables_id):
        return
    checkpoint.ensure()
    with consumer.application.engine.begin() as connection:
        # Not if a rebuild has ended meanwhile.
        if _reached(checkpoint.lock(connection)) == _reached(row):
            checkpoint.set_values(connection, tables_id=noted)
