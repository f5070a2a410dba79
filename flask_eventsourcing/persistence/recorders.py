"""The four recorders of the ``eventsourcing`` library, on SQLAlchemy connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    IntegrityError,
    Notification,
    ProcessRecorder,
    StoredEvent,
    Subscription,
    Tracking,
    TrackingRecorder,
)
from sqlalchemy.engine import Connection

from ..metadata import MetadataBlock, Recorded, caused_by
from ..tailing import LogSubscription, Waiter
from .datastore import Datastore, Read, Write
from .describing import PLAIN_DESCRIPTION, Describer, read_recorded
from .dialects.base import Dialect, FrozenSnapshotError
from .dialects.event_tables import Beside, EventTable
from .dialects.event_values import DamagedPage, bounded
from .dialects.looks import Use

T = TypeVar("T")
PAGE_BYTES = 4 * 2**20
"""The most bytes of the states of a page of events, unless the page is one event."""
NEVER_TOO_MANY = 4
"""How many events are read without a query for their sizes, which would delay them, if only the first may be large."""


class SQLAlchemyAggregateRecorder(AggregateRecorder):
    """Record events, or snapshots, in aggregate sequences only. Snapshots have no position in a log."""

    replaces = False
    """Whether a stored row of the same version is replaced: a snapshot has nothing that its events do not have."""

    def __init__(
        self,
        datastore: Datastore,
        events_table: sa.Table,
        application_name: str = "",
        *,
        tracking_table: sa.Table | None = None,
        snapshots_table: sa.Table | None = None,
    ) -> None:
        datastore.prepare()
        self.datastore = datastore
        self.dialect: Dialect = datastore.dialect
        self.events_table: EventTable = self.dialect.event_table(events_table, tracking_table, snapshots_table)
        self.application_name = application_name

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Insert all of the events, or none. Inside a unit of work, its commit stores them.

        :raises IntegrityError: when another writer has recorded one of these versions, unless the caller replaces them.
        """
        if stored_events:
            with self.datastore.writing() as write:
                insert = self.dialect.insert_or_replace if self.replaces else self.dialect.insert
                insert(write.connection, self._table(write.connection, "append"), stored_events)
        return None

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        """Read the events of an aggregate. It sees those that the session has saved and not committed yet."""
        if not self.events_table.can_have(originator_id):
            return []
        with self.datastore.reading() as read:
            table = self._table(read.connection)
            if read.unit is not None:
                read.unit.before_read(read.connection, table, originator_id)
            return self.dialect.select_events(
                read.connection,
                table,
                originator_id,
                gt=bounded(gt),
                lte=bounded(lte),
                desc=desc,
                limit=limit,
            )

    def _table(self, connection: Connection, use: Use = "read") -> EventTable:
        table = self.dialect.located(connection, self.events_table)
        self.dialect.look(connection, table, use)
        return table


class SQLAlchemyApplicationRecorder(SQLAlchemyAggregateRecorder, ApplicationRecorder):
    """Records events in aggregate sequences and in the application's log.

    An event is refused if it would leave a gap in its aggregate's sequence, which could not be read then. Its
    predecessor must be an event, or a snapshot in *snapshots_table*.
    """

    _looks_at = 2000
    """From how many events on a page is measured. Threads may share the value."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Append all of the events to the log, or none. Return their positions, which follow one another.

        :raises IntegrityError: when another writer has recorded one of these versions.
        """
        return self._append(stored_events) if stored_events else []

    @cached_property
    def _describe(self) -> Describer:
        return Describer(self.dialect, self.events_table.table, self.datastore.metadata)

    def _append(self, events: Sequence[StoredEvent], tracking: Tracking | None = None) -> list[int]:
        # Before a connection is taken: providers may read.
        described = self._describe(events) if events else PLAIN_DESCRIPTION
        alone = tracking is None and self.application_name not in self.datastore.after_append
        with self.datastore.writing(in_autocommit=alone) as write:
            try:
                with self.dialect.translated:
                    write.check_thread(self.events_table, events)
                    if write.unit is not None:
                        self.dialect.check_transaction(write.connection)
                    is_described = described is not PLAIN_DESCRIPTION
                    use: Use = "describe" if is_described else "append"
                    table = self._table(write.connection, use) if events else self.events_table
                    if is_described:
                        described = self._describe.fitting(write.connection, table, described)
                    positions = self._write(write, table, events, tracking, described.beside)
            except IntegrityError as error:
                if self.dialect.is_conflict(error):
                    write.conflicted(self.dialect.located(write.connection, self.events_table), events)
                raise
            if events:
                write.recorded(self.application_name, self.events_table, events, positions, described)
        return positions

    def _write(
        self, write: Write, table: EventTable, events: Sequence[StoredEvent], tracking: Tracking | None, beside: Beside
    ) -> list[int]:
        return self.dialect.append(write.connection, table, events, beside)

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        """Read the log by position. No event can appear later at or before the last position that is returned.

        The events before a row that cannot be read are returned.

        :raises UnreadableEventError: when the first row cannot be read.
        """
        return self.read_log(start, limit, stop, topics, inclusive_of_start=inclusive_of_start, join=True)

    def read_log(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
        join: bool = False,
        damaged: bool = False,
    ) -> Sequence[Notification]:
        """Like :meth:`select_notifications`, but on a connection of its own unless *join* is set. It sees new commits.

        :param damaged: whether rows that cannot be read are returned too, each as an ``UnreadableNotification``.
        """

        def read_page(read: Read) -> Sequence[Notification]:
            return self.dialect.select_notifications(
                read.connection,
                self._table(read.connection),
                bounded(start),
                limit,
                bounded(stop),
                topics,
                inclusive_of_start=inclusive_of_start,
                joined=read.unit is not None,
            )

        page = self._read(read_page, join=join)
        return page.before_damage() if isinstance(page, DamagedPage) and not damaged else page

    def read_committed(self, after: int, limit: int) -> Sequence[Notification]:
        """Read what is committed after a position, damaged rows too. Events may appear between these later.

        If several are large, only the first of them is read, as if the others did not exist yet.
        """
        with self.datastore.reading(join=False) as read:
            table, largest = self._table(read.connection), PAGE_BYTES // NEVER_TOO_MANY
            return self.dialect.select_committed(read.connection, table, after, limit, largest)

    def fitting(self, after: int, limit: int, stop: int | None = None, topics: Sequence[str] = ()) -> int:
        """Return how many of the next events to read at once: up to *limit*, unless their states are too large.

        After large events it looks at few events at a time, as a database may have to read a state to know its size.

        :param after: the position after which they begin; *stop* is the last one, if there is one.
        :raises PersistenceError: when the database cannot be asked.
        """
        if limit <= 1:
            return limit
        limit = min(limit, self._looks_at)
        c = self.events_table.table.c
        sizes = sa.select(c.notification_id, sa.func.length(c.state).label("size")).where(c.notification_id > after)
        if stop is not None:
            sizes = sizes.where(c.notification_id <= stop)
        if topics:
            sizes = sizes.where(c.topic.in_(topics))
        page = sizes.order_by(c.notification_id).limit(limit).subquery()

        def count(read: Read) -> int:
            total = read.connection.scalar(sa.select(sa.func.sum(page.c.size))) or 0
            if total <= PAGE_BYTES:
                self._looks_at = max(self._looks_at, 4 * limit)
                return limit
            in_order = sa.select(page.c.size).order_by(page.c.notification_id)
            each: Sequence[int | None] = read.connection.scalars(in_order).all()
            fitting = max(1, sum(together <= PAGE_BYTES for together in accumulate(size or 0 for size in each)))
            self._looks_at = 2 * fitting
            return fitting

        try:
            return self._read(count, join=False)
        except sa.exc.SQLAlchemyError as error:
            raise self.dialect.translate(error) from error

    def find_recorded(self, positions: Sequence[int], connection: Connection | None = None) -> dict[int, Recorded]:
        """Return the metadata, time and id of events, by position. Most readers do not need this query.

        :param connection: the connection to read with, by default the session's or a new one.
        :raises UnsafeTableError: when the table lacks one of the columns.
        """
        if connection is None:
            with self.datastore.reading() as read:
                return self.find_recorded(positions, read.connection)
        return read_recorded(self.dialect, connection, self._table(connection), positions)

    def cause(self, position: int, is_over: Callable[[], bool] = bool) -> MetadataBlock:
        """Return a context in which saved events have an event of this log as their cause. Use it in a runner."""
        return caused_by(lambda: self.find_recorded([position]).get(position), is_over)

    def max_notification_id(self) -> int | None:
        """Return the position of the last event, or None for an empty log. Earlier ones may be uncommitted yet."""
        return self._last_position(join=True)

    def high_water_mark(self) -> int:
        """Return the position up to which no more events can appear, or 0. A reader that stops there misses none."""
        return self._last_position(join=False) or 0

    def _last_position(self, *, join: bool) -> int | None:
        return self._read(
            lambda read: self.dialect.last_position(
                read.connection, self._table(read.connection), joined=read.unit is not None
            ),
            join=join,
        )

    def _read(self, work: Callable[[Read], T], *, join: bool) -> T:
        try:
            with self.datastore.reading(join=join) as read:
                return work(read)
        except FrozenSnapshotError:
            with self.datastore.reading(join=False) as read:
                return work(read)

    def subscribe(self, gt: int | None = None, topics: Sequence[str] = ()) -> Subscription[ApplicationRecorder]:
        """Iterate over the log from a position on, waiting for new events at its end. It starts no thread."""
        return LogSubscription(recorder=self, gt=gt, topics=topics)

    def waiter(self) -> Waiter:
        """Return a waiter for news of this log. It has a connection of its own if the database notifies."""
        return self.dialect.waiter(self.events_table)

    def shared_waiter(self) -> Waiter:
        """Return a waiter for one of many in this process. They share a connection."""
        return self.dialect.shared_waiter(self.events_table)


class SQLAlchemyTrackingRecorder(TrackingRecorder):
    """Records how far the logs of upstream applications have been processed.

    Derive your own views from it. Write a view and its position on the connection of :meth:`transaction`.
    """

    def __init__(self, datastore: Datastore, tracking_table: sa.Table, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        datastore.prepare()
        self.datastore = datastore
        self.dialect: Dialect = datastore.dialect
        self.tracking_table = tracking_table
        name = self.dialect.engine.dialect.identifier_preparer.format_table(tracking_table)
        self.dialect.tables[name] = tracking_table

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A context with the session's connection, or one that is committed at the end. Write your view on it."""
        with self.datastore.writing() as write:
            yield write.connection

    def insert_tracking(self, tracking: Tracking) -> None:
        """Record a position. With a view of your own, call :meth:`write_tracking` in its transaction instead.

        :raises IntegrityError: when it is not above the recorded one.
        """
        with self.transaction() as connection:
            self.write_tracking(connection, tracking)

    def write_tracking(self, connection: Connection, tracking: Tracking) -> None:
        """Record a position on a connection of :meth:`transaction`. It is stored with what was written there."""
        self.dialect.insert_tracking(connection, self.tracking_table, tracking)

    def max_tracking_id(self, application_name: str) -> int | None:
        """Return the recorded position of an upstream application, or None. A runner goes on after it."""
        return self._max_tracking_id(application_name, join=True)

    def has_tracking_id(self, application_name: str, notification_id: int | None) -> bool:
        """Whether a position was reached, even after the session's transaction took its snapshot.

        The library's ``wait()`` polls this.
        """
        if super().has_tracking_id(application_name, notification_id):
            return True
        found = self._max_tracking_id(application_name, join=False)
        return found is not None and notification_id is not None and found >= notification_id

    def _max_tracking_id(self, application_name: str, *, join: bool) -> int | None:
        with self.datastore.reading(join=join) as read:
            return self.dialect.max_tracking_id(read.connection, self.tracking_table, application_name)


class SQLAlchemyProcessRecorder(SQLAlchemyTrackingRecorder, SQLAlchemyApplicationRecorder, ProcessRecorder):
    """Record events together with the position of the event that caused them.

    If the process ends before the commit, neither is stored, and the event is processed again.
    """

    def __init__(
        self,
        datastore: Datastore,
        tracking_table: sa.Table,
        events_table: sa.Table,
        application_name: str = "",
        *,
        snapshots_table: sa.Table | None = None,
    ) -> None:
        SQLAlchemyApplicationRecorder.__init__(
            self,
            datastore,
            events_table,
            application_name,
            tracking_table=tracking_table,
            snapshots_table=snapshots_table,
        )
        self.tracking_table = tracking_table
        self.upstream: dict[str, SQLAlchemyApplicationRecorder] = {}
        """The recorders of the applications whose events are processed, by their names."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Append events and record the position in ``tracking``: both or neither. So no event is processed twice.

        :raises IntegrityError: when another writer has recorded one of them first.
        """
        tracking: Tracking | None = kwargs.get("tracking")
        upstream = None if tracking is None else self.upstream.get(tracking.application_name)
        if upstream is None or tracking is None:
            return self._append(stored_events, tracking) if stored_events or tracking is not None else []
        with upstream.cause(tracking.notification_id):
            return self._append(stored_events, tracking)

    def _write(
        self, write: Write, table: EventTable, events: Sequence[StoredEvent], tracking: Tracking | None, beside: Beside
    ) -> list[int]:
        if tracking is None:
            return super()._write(write, table, events, None, beside)
        with nullcontext() if write.unit is None else write.connection.begin_nested():
            self.write_tracking(write.connection, tracking)
            return super()._write(write, table, events, None, beside) if events else []
