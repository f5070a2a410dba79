"""The log that projections follow: in a table of their own database, or in a store apart from it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import Notification
from sqlalchemy.engine import Connection

from ...applications.apart import EventStore
from ...exceptions import CheckpointError
from ...metadata import Recorded
from ...persistence import Datastore, SQLAlchemyApplicationRecorder
from ...persistence.dialects.base import IDENTITY, new_identity
from ...persistence.dialects.locks import OpenWriter
from ...tailing import Waiter
from ..checkpoint import NOTED

AT_ONCE = 500
"""Events of a store that are read at once to count them."""
COUNTED = 10_000
"""Positions of a store that are read for a count that need not be exact."""
REMEMBERED = 64
REST = ""
"""The topic that stands for positions that were counted without being read."""


TEXT = sa.Text()


class Found(NamedTuple):
    """Which event is at a position; not each has an id of its own."""

    originator_id: Any
    originator_version: int
    event_id: str | None


class EventLog(Protocol):
    """What a projection asks of a log. A connection is one to the projection's own database."""

    can_filter: bool
    """Whether it is quicker to read events of some topics only."""
    can_count: bool
    """Whether all events can be counted without reading them."""

    def high_water_mark(self) -> int:
        """Return the position up to which no event can appear any more, on a connection of its own; 0 for none."""

    def last_position(self, connection: Connection) -> int:
        """Return the same. A log in this database is read on *connection*, because a pool may have no second one."""

    def look_for_writer(self, connection: Connection, mark: int) -> tuple[int, OpenWriter | None]:
        """Return the last position that is committed, and the oldest writer in progress if it is above the mark."""

    def read(self, after: int, limit: int, stop: int | None, topics: Sequence[str]) -> Sequence[Notification]:
        """Read events on a connection of its own, with placeholders for those that cannot be read."""

    def page(self, after: int, limit: int, stop: int, topics: Sequence[str]) -> tuple[Sequence[Notification], int]:
        """Return as many events as fit into memory at once, and the position up to which they are complete."""

    def topics(self, after: int, to: int) -> set[str]:
        """Return the topics between two positions."""

    def count_topics(self, connection: Connection, after: int, to: int, *, exact: bool) -> Mapping[str, int]:
        """Count the events between two positions by their topics.

        :param exact: whether to read all that it takes; positions that are not read count as events of ``REST``.
        """

    def at(self, position: int, text: Any) -> tuple[Any, Any]:
        """Return id and version of the event at a position, None where there is none, as values of a statement.

        What is not known yet is a subquery whose parameter :data:`~.checkpoint.NOTED` is the position.

        :param text: the type of the column that has the id as a text.
        """

    def event_id(self, connection: Connection, position: int) -> Any:
        """Return the id of the event at a position as a text, or None, as a value of a statement like :meth:`at`."""

    def identity(self, connection: Connection | None = None) -> int | None:
        """Return the identity of the log, which no other log has, or None where it has none."""

    def look(self, connection: Connection, position: int) -> tuple[int | None, Found | None]:
        """Return the identity of the log, and which event is at a position."""

    def give_identity(self, connection: Connection) -> tuple[int | None, int]:
        """Give the log another identity; returns the old one and the new one.

        :raises CheckpointError: where it cannot have one.
        """

    def find_recorded(self, positions: Sequence[int], connection: Connection) -> dict[int, Recorded]:
        """Return what was recorded of events beside their states, by position."""

    def waiter(self) -> Waiter:
        """Return what waits for news of the log."""

    def id_type(self) -> type[Any] | None:
        """Return the type of the ids of aggregates."""

    def table_names(self) -> set[str]:
        """Return the names of its tables in the projection's database that are known so far."""


class TableLog:
    """A log in a table of the database in which its projections have their models.

    :param name: of the application.
    :param find: returns the application of this process.
    """

    can_filter = True
    can_count = True

    def __init__(self, datastore: Datastore, name: str, find: Callable[[], Application[Any]]) -> None:
        self.datastore = datastore
        self.name = name
        self._find = find
        self._noted: dict[tuple[sa.Table, str, Any], sa.ScalarSelect[Any]] = {}

    @property
    def recorder(self) -> SQLAlchemyApplicationRecorder:
        """The recorder of the application."""
        return cast(SQLAlchemyApplicationRecorder, self._find().recorder)

    @property
    def _columns(self) -> Any:
        return self.recorder.events_table.table.c

    @property
    def _tracking(self) -> sa.Table | None:
        """The table that has the identity of the log, unless the host has none."""
        tables = self.datastore.tables(self.name)
        return None if tables is None else tables["tracking"]

    def high_water_mark(self) -> int:
        """See ``EventLog``."""
        return self.recorder.high_water_mark()

    def last_position(self, connection: Connection) -> int:
        """See ``EventLog``."""
        dialect = self.recorder.dialect
        return dialect.last_position(connection, dialect.located(connection, self.recorder.events_table)) or 0

    def look_for_writer(self, connection: Connection, mark: int) -> tuple[int, OpenWriter | None]:
        """See ``EventLog``."""
        table, dialect = self.recorder.events_table, self.recorder.dialect
        end = max(mark, connection.scalar(sa.select(sa.func.max(self._columns.notification_id))) or 0)
        return end, dialect.oldest_writer(connection, dialect.located(connection, table)) if end > mark else None

    def read(self, after: int, limit: int, stop: int | None, topics: Sequence[str]) -> Sequence[Notification]:
        """See ``EventLog``."""
        return self.recorder.read_log(after, limit, stop, topics, inclusive_of_start=False, damaged=True)

    def page(self, after: int, limit: int, stop: int, topics: Sequence[str]) -> tuple[Sequence[Notification], int]:
        """See ``EventLog``."""
        if (most := min(limit, stop - after)) > 1:
            limit = self.recorder.fitting(after, most, stop, topics)
        found = self.read(after, limit, stop, topics)
        return found, found[-1].id if len(found) == limit else stop

    def topics(self, after: int, to: int) -> set[str]:
        """See ``EventLog``."""
        c = self._columns
        query = sa.select(c.topic).where(c.notification_id > after, c.notification_id <= to).distinct()
        with self.datastore.engine.connect() as connection:
            return set(connection.scalars(query))

    def count_topics(self, connection: Connection, after: int, to: int, *, exact: bool) -> Mapping[str, int]:
        """See ``EventLog``."""
        c = self._columns
        between = (c.notification_id > after, c.notification_id <= to)
        found = connection.execute(sa.select(c.topic, sa.func.count()).where(*between).group_by(c.topic))
        return {topic: int(count) for topic, count in found}

    def at(self, position: int, text: Any) -> tuple[Any, Any]:
        """See ``EventLog``; it is read by the statement that notes it."""
        return self._once("originator_id", text), self._once("originator_version")

    def event_id(self, connection: Connection, position: int) -> Any:
        """See ``EventLog``; it is read by the statement that notes it."""
        return self._once("event_id", TEXT) if self._has_ids(connection) else None

    def _once(self, name: str, text: Any = None) -> Any:
        """Return a column of the event at a position, the same object each time, so that statements are built once."""
        table = self.recorder.events_table.table
        found = self._noted.get((table, name, text))
        if found is None:
            c = table.c
            value = c[name] if text is None else sa.cast(c[name], text)
            there = c.notification_id == sa.bindparam(NOTED, type_=c.notification_id.type)
            found = self._noted[table, name, text] = sa.select(value).where(there).scalar_subquery()
        return found

    def _has_ids(self, connection: Connection) -> bool:
        """Whether events have ids as texts, which bytes may not be."""
        events, dialect = self.recorder.events_table, self.recorder.dialect
        column = events.table.c.get("event_id")
        located = dialect.located(connection, events)
        dialect.look(connection, located, "read")
        if column is None or getattr(column.type, "binary", False):
            return False
        return not dialect.leaves_out_metadata(connection, located)

    def identity(self, connection: Connection | None = None) -> int | None:
        """See ``EventLog``."""
        table = self._tracking
        if table is None:
            return None
        if connection is not None:
            return self.datastore.dialect.log_identity(connection, table)
        with self.datastore.engine.begin() as own:
            return self.datastore.dialect.log_identity(own, table)

    def look(self, connection: Connection, position: int) -> tuple[int | None, Found | None]:
        """See ``EventLog``."""
        events = self.recorder.events_table
        c, read_id, tracking = events.table.c, events.read_id, self._tracking
        # As the driver returns it: another program may have written an id that is not a UUID.
        event_id = sa.cast(c.event_id, TEXT) if self._has_ids(connection) else sa.null()
        of_event = (sa.type_coerce(c.originator_id, sa.String()), c.originator_version, event_id)
        at = c.notification_id == position
        if tracking is not None:
            query = sa.select(tracking.c.notification_id, *of_event).where(tracking.c.application_name == IDENTITY)
            found = connection.execute(query.select_from(tracking.outerjoin(events.table, at))).first()
            if found is not None:
                return int(found[0]), None if found[2] is None else Found(read_id(found[1]), int(found[2]), found[3])
        alone = connection.execute(sa.select(*of_event).where(at)).first()
        return None, None if alone is None else Found(read_id(alone[0]), int(alone[1]), alone[2])

    def give_identity(self, connection: Connection) -> tuple[int | None, int]:
        """See ``EventLog``."""
        tracking = self._tracking
        if tracking is None:
            raise CheckpointError(f"{self.name} has no tracking table, where the identity is kept.")
        made = int(new_identity()["notification_id"])
        old = self.datastore.dialect.log_identity(connection, tracking)
        change = sa.update(tracking).where(tracking.c.application_name == IDENTITY)
        connection.execute(change.values(notification_id=made))
        return old, made

    def find_recorded(self, positions: Sequence[int], connection: Connection) -> dict[int, Recorded]:
        """See ``EventLog``."""
        return self.recorder.find_recorded(positions, connection)

    def waiter(self) -> Waiter:
        """See ``EventLog``."""
        return self.recorder.shared_waiter()

    def id_type(self) -> type[Any] | None:
        """See ``EventLog``."""
        return python_type(self._columns.originator_id)

    def table_names(self) -> set[str]:
        """See ``EventLog``."""
        return {table.name for table in self.recorder.dialect.tables.values()}


class StoreLog:
    """A log in a store apart from the database of the projections: no transaction holds both.

    :param name: of the application.
    :param find: returns the application of this process.
    """

    can_filter = False
    can_count = False

    def __init__(self, store: EventStore, name: str, find: Callable[[], Application[Any]]) -> None:
        self.store = store
        self.name = name
        self._find = find
        self._ends: OrderedDict[int, tuple[str, int]] = OrderedDict()
        """The last events of pages that were read lately, by their positions."""

    @property
    def _recorder(self) -> Any:
        return self._find().recorder

    def high_water_mark(self) -> int:
        """See ``EventLog``."""
        mark: int = self._recorder.high_water_mark()
        return mark

    def last_position(self, connection: Connection) -> int:
        """See ``EventLog``."""
        return self.high_water_mark()

    def look_for_writer(self, connection: Connection, mark: int) -> tuple[int, OpenWriter | None]:
        """See ``EventLog``; no writer keeps readers from the end."""
        return mark, None

    def read(self, after: int, limit: int, stop: int | None, topics: Sequence[str]) -> Sequence[Notification]:
        """See ``EventLog``."""
        found: Sequence[Notification]
        known = [topic for topic in topics if topic != REST]
        found = self._recorder.read_log(after, limit, stop, known, inclusive_of_start=False)
        return found

    def page(self, after: int, limit: int, stop: int, topics: Sequence[str]) -> tuple[Sequence[Notification], int]:
        """See ``EventLog``."""
        found: Sequence[Notification]
        found, upto = self._recorder.read_page(after, limit, stop)
        if found and found[-1].id == upto:
            self._ends[upto] = str(found[-1].originator_id), found[-1].originator_version
            while len(self._ends) > REMEMBERED:
                self._ends.popitem(last=False)
        return found, upto

    def _pages(self, after: int, to: int) -> Iterator[Sequence[Notification]]:
        before = -1
        while before < after < to:
            before = after
            found, after = self.page(after, AT_ONCE, to, ())
            yield found

    def topics(self, after: int, to: int) -> set[str]:
        """See ``EventLog``."""
        return {each.topic for page in self._pages(after, to) for each in page}

    def count_topics(self, connection: Connection, after: int, to: int, *, exact: bool) -> Mapping[str, int]:
        """See ``EventLog``."""
        near = to if exact else min(to, after + COUNTED)
        counted = Counter(each.topic for page in self._pages(after, near) for each in page)
        return {**counted, REST: to - near} if to > near else counted

    def at(self, position: int, text: Any) -> tuple[Any, Any]:
        """See ``EventLog``."""
        known = self._ends.get(position)
        if known is not None:
            # The event as it was read: the log may have changed since, and a transaction is open.
            return known
        found = self.read(position - 1, 1, position, ()) if position > 0 else ()
        return (str(found[0].originator_id), found[0].originator_version) if found else (None, None)

    def event_id(self, connection: Connection, position: int) -> Any:
        """See ``EventLog``: of an event that was read lately, as it was then."""
        recorded = self.find_recorded([position], connection).get(position) if position > 0 else None
        return None if recorded is None or recorded.event_id is None else str(recorded.event_id)

    def identity(self, connection: Connection | None = None) -> int | None:
        """See ``EventLog``."""
        return self.store.log_identity(self.name)

    def look(self, connection: Connection, position: int) -> tuple[int | None, Found | None]:
        """See ``EventLog``."""
        found = self.read(position - 1, 1, position, ()) if position > 0 else ()
        if not found:
            return self.identity(), None
        last = found[0]
        return self.identity(), Found(last.originator_id, last.originator_version, self.event_id(connection, position))

    def give_identity(self, connection: Connection) -> tuple[int | None, int]:
        """See ``EventLog``."""
        raise CheckpointError(
            f"The log of {self.name} is known by its table in {self.store.title}, where every table that is made has "
            "an identity of its own."
        )

    def find_recorded(self, positions: Sequence[int], connection: Connection) -> dict[int, Recorded]:
        """See ``EventLog``."""
        found: dict[int, Recorded] = self._recorder.find_recorded(positions)
        return found

    def waiter(self) -> Waiter:
        """See ``EventLog``."""
        waiter: Waiter = self._recorder.shared_waiter()
        return waiter

    def id_type(self) -> type[Any] | None:
        """See ``EventLog``."""
        return UUID if self.store.id_types[self.name] == "uuid" else str

    def table_names(self) -> set[str]:
        """See ``EventLog``: none of them is there."""
        return set()


def python_type(column: Any) -> type[Any] | None:
    """Return the type of a column's values, if it has one."""
    try:
        found: type[Any] = column.type.python_type
    except NotImplementedError:
        return None
    return found
