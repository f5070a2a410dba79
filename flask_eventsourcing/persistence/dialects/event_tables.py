"""Tables of events for the statements: names, values, events made from rows, and which event may follow which."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from eventsourcing import persistence
from eventsourcing.persistence import Notification, StoredEvent
from sqlalchemy.engine import Connection

from ...config import is_plain
from .event_values import Accepted, DamagedPage, UnreadableNotification, as_bytes, shown_id, unreadable_version

_new = object.__new__

POSITION = "notification_id"
EVENT_COLUMNS = ("originator_id", "originator_version", "topic", "state")
"""The columns of an event beside its position, as the library's ``StoredEvent`` names them; the first is the id."""
VERSION_KEY = EVENT_COLUMNS[:2]
VERSION = VERSION_KEY[1]
"""The columns that identify an event of an application."""
OF_AGGREGATE = ", ".join(EVENT_COLUMNS[1:])
"""The columns that differ among the events of an aggregate."""
METADATA_COLUMNS = ("event_id", "recorded_at", "metadata", "correlation_id")
"""The columns of metadata. A record class may leave out each of them."""
COLUMN_VALUES = "flask_eventsourcing.column_values"
"""The key in ``Table.info`` of the record class's function that fills further columns."""

Processor = Callable[[Any], Any]
Snapshot = Callable[[str, str | None], str]
_VALUES = attrgetter(*EVENT_COLUMNS)


class Shape(NamedTuple):
    """The columns that an append fills beside those of ``EVENT_COLUMNS``, by their quoted names."""

    each: tuple[str, ...] = ()
    """The columns with a value for each event."""
    shared: tuple[str, ...] = ()
    """The columns with one value for all events of the append."""
    kinds: tuple[str, ...] = ()
    """The types of both, as the database writes them."""
    key: str = ""
    """The key of its statements."""

    @property
    def columns(self) -> str:
        """All columns of an event that has no position."""
        return ", ".join((*EVENT_COLUMNS, *self.each, *self.shared))


PLAIN = Shape()


class Beside(NamedTuple):
    """The values beside the events of an append, in the driver's form."""

    shape: Shape = PLAIN
    columns: Sequence[Sequence[Any]] = ()
    """The values of each event, column by column."""
    shared: tuple[Any, ...] = ()

    def first(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the row of the first event with all that is beside it."""
        return (*row, *[column[0] for column in self.columns], *self.shared) if self.columns else row + self.shared

    def part(self, start: int, count: int) -> Beside:
        """Return what is beside some of the events."""
        return self._replace(columns=[column[start : start + count] for column in self.columns])

    def joined(self, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the values of events with those of each beside them, one after another."""
        if not self.columns:
            return list(chain.from_iterable(rows))
        values: list[Any] = [None] * ((width := len(rows[0]) + len(self.columns)) * len(rows))
        # Column by column, so that no row is copied.
        for number, column in enumerate(chain(zip(*rows, strict=True), self.columns)):
            values[number::width] = column
        return values

    def completed(self, rows: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """Return the rows of the events with all that is beside them."""
        beside = zip(*self.columns, strict=True) if self.columns else repeat(())
        return [(*row, *own, *self.shared) for row, own in zip(rows, beside, strict=False)]


NOTHING = Beside()


@dataclass(frozen=True)
class EventTable:
    """A table of events or snapshots as the statements need it."""

    table: sa.Table
    name: str
    """Quoted, and qualified by the schema if there is one."""
    accepted: Accepted
    binds: tuple[tuple[int, Processor], ...]
    """Functions that convert the value of a column for the driver, by the column's number."""
    decode_id: Processor
    counter: str | None = None
    """The quoted name of the tracking table, if the database counts positions in it."""
    snapshots: str | None = None
    """The quoted name of the table of snapshots, after whose versions an event may follow too."""
    statements: dict[str, str] = field(default_factory=dict, compare=False)
    """Statements by their use, filled by the dialect as they are needed."""

    def row(self, event: StoredEvent) -> tuple[Any, ...]:
        """Return an event's values, in the order of ``EVENT_COLUMNS``, as the driver takes them.

        :raises IdentifierTypeError: for an id of another type than those of the table.
        :raises EventValueError: for any other value that cannot be stored and read back.
        """
        values = self.accepted.values(_VALUES(event))
        for number, bind in self.binds:
            values = (*values[:number], bind(values[number]), *values[number + 1 :])
        return values

    def encode_id(self, originator_id: UUID | str) -> Any:
        """Return an aggregate's id as the driver takes it.

        :raises IdentifierTypeError: for a text where ids are UUIDs, and the reverse.
        """
        found = self.accepted.id(originator_id)
        for number, bind in self.binds:
            if number == 0:
                return bind(found)
        return found

    def read_id(self, value: Any) -> UUID | str:
        """Return an aggregate's id from the driver's value, or a text that shows a value that cannot be read."""
        if type(value) is self.accepted.id_class:
            return value
        try:
            found: UUID | str = self.decode_id(value)
        except UNREADABLE:
            return shown_id(value)
        return found

    def can_have(self, originator_id: object) -> bool:
        """Whether an aggregate can have this id. :meth:`encode_id` refuses an id of the wrong type."""
        return not isinstance(originator_id, str) or self.accepted.id_class is UUID or is_plain(originator_id)

    def follows(
        self, originator_id: str, version: str, lock: str = "", *, begins: bool, snapshot: Snapshot | None
    ) -> str:
        """Return the condition under which an event leaves no gap in its stream, with the marks of its id and version.

        If the event itself exists already, its key decides.

        :param lock: what makes the reads locking ones.
        :param begins: whether its version is one that a stream can begin with.
        :param snapshot: returns the condition for a snapshot of an id, and of a version if one is given; None where
            there are no snapshots.
        """
        exists = f"EXISTS (SELECT 1 FROM {self.name} AS p WHERE p.originator_id = {originator_id}"
        found = f"{exists} AND p.originator_version BETWEEN {version} - 1 AND {version}{lock})"
        none = f"NOT {exists}{lock})"
        if snapshot is not None:
            found += f" OR {snapshot(originator_id, f'{version} - 1')}"
            none += f" AND NOT {snapshot(originator_id, None)}"
        return f"{found} OR {none}" if begins else found

    def look_for_gap(
        self, events: Sequence[StoredEvent], mark: str, lock: str, *, snapshots: bool
    ) -> tuple[str, list[Any]]:
        """Return the statement that finds the number of an event that would leave a gap, and its parameters.

        :param mark: the driver's placeholder.
        :param snapshots: whether the table of snapshots is there.
        """
        snapshot = snapshot_in(self.snapshots, lock) if snapshots else None
        statements: list[str] = []
        parameters: list[Any] = []
        for number, event in enumerate(events):
            first, version = begins(event), event.originator_version
            follows = self.follows(mark, mark, lock, begins=first, snapshot=snapshot)
            statements.append(f"SELECT {number} FROM (SELECT 1 AS one) AS d WHERE NOT ({follows})")
            originator_id = self.encode_id(event.originator_id)
            # In the order of the marks in the condition.
            parameters += (originator_id, version, version)
            parameters += (originator_id, version) if snapshots else ()
            parameters += [originator_id] * (1 + snapshots) if first else ()
        return " UNION ALL ".join(statements), parameters

    def between(self, first: int, last: int, place: str = "") -> str:
        """Return the statement that reads what :meth:`page` takes, without parameters, of the table at a place."""
        columns = ", ".join((POSITION, *EVENT_COLUMNS))
        return f"SELECT {columns} FROM {place or self.name} WHERE {POSITION} BETWEEN {first} AND {last}"

    def page(self, rows: Sequence[Sequence[Any]]) -> list[Notification]:
        """Return the notifications of rows of the log, with the position before the columns of ``EVENT_COLUMNS``.

        It is a :class:`DamagedPage` if some of them cannot be read.
        """
        try:
            return self._readable(rows)
        except UNREADABLE:
            return DamagedPage(map(self._notification, rows))

    def _readable(self, rows: Sequence[Sequence[Any]]) -> list[Notification]:
        """Return the notifications, made as by :func:`notification`: a call for each takes a fifth of the time."""
        ids, decode, id_class = dict[Any, Any](), self.decode_id, self.accepted.id_class
        found = []
        for position, value, version, topic, state in rows:
            # The driver may have made the id already; SQLite gives each row its own type. The events of an aggregate
            # stand near each other, and share its id: each is one more object that the garbage collector walks over.
            originator_id = value if type(value) is id_class else ids.get(value)
            if originator_id is None:
                originator_id = ids[value] = decode(value)
            event = _new(Notification)
            attributes = event.__dict__
            attributes["originator_id"] = originator_id
            attributes["originator_version"] = version
            attributes["topic"] = topic
            attributes["state"] = state if type(state) is bytes else as_bytes(state)
            attributes["id"] = position
            found.append(event)
        return found

    def _notification(self, row: Sequence[Any]) -> Notification:
        position, originator_id, version, topic, state = row
        try:
            found = originator_id if type(originator_id) is self.accepted.id_class else self.decode_id(originator_id)
            return notification(position, found, version, topic, state)
        except UNREADABLE as error:
            return UnreadableNotification.of(self.name, tuple(row), error)

    def stream(self, originator_id: UUID | str, rows: Sequence[Sequence[Any]]) -> list[StoredEvent]:
        """Return the events of an aggregate.

        :raises UnreadableEventError: for a row that cannot be read.
        """
        found = []
        for version, topic, state in rows:
            try:
                found.append(stored_event(originator_id, version, topic, state))
            except TypeError as error:
                raise unreadable_version(self.name, originator_id, version, error) from error
        return found


UNREADABLE = (TypeError, ValueError, AttributeError)
"""The errors of a value of another type than the column's, which another program has written."""


class ConflictError(persistence.IntegrityError):
    """Another writer was first: the whole unit may succeed when it is run again."""


LATEST_FIRST_VERSION = 1
"""A stream begins with this version or the one before it: the library begins with 1, its contract tests with both."""


def begins(event: StoredEvent) -> bool:
    """Whether an event's version is one that a stream can begin with."""
    return event.originator_version <= LATEST_FIRST_VERSION


def heads(events: Sequence[StoredEvent]) -> Sequence[StoredEvent]:
    """Return those events of an append whose predecessor is not earlier in it.

    :raises IntegrityError: for an event that would begin a stream behind another one.
    """
    start = events[0]
    for number, event in enumerate(events, start.originator_version):
        if event.originator_version != number or event.originator_id is not start.originator_id:
            break
    else:
        return events[:1]
    found: list[StoredEvent] = []
    spans: dict[UUID | str, tuple[int, int]] = {}
    for event in events:
        version = event.originator_version
        span = spans.get(event.originator_id)
        if span is not None and span[0] <= version <= span[1] + 1:
            spans[event.originator_id] = (span[0], max(version, span[1]))
            continue
        if span is not None and begins(event):
            raise gap(event)
        found.append(event)
        spans[event.originator_id] = (version, version)
    return found


def gap(event: StoredEvent) -> persistence.IntegrityError:
    """Return the error that refuses an event which cannot follow what is stored."""
    version = event.originator_version
    return persistence.IntegrityError(
        f"Version {version} of aggregate {event.originator_id} would leave a gap: version {version - 1} is neither "
        "among its events nor that of a snapshot. Read the aggregate again, and repeat what was done with it."
    )


def is_key(table: sa.Table, columns: Collection[str]) -> bool:
    """Whether columns are a key by which the library tells events, snapshots or positions from each other."""
    keys: list[Collection[str]] = [(POSITION,), VERSION_KEY, table.primary_key.columns.keys()]
    return any(set(columns) == set(key) for key in keys)


def columns_of(table: sa.Table, name: str) -> Collection[str] | None:
    """Return the columns of a unique constraint or index of that name, or None if the table's class has none."""
    uniques = [each for each in table.constraints if isinstance(each, sa.PrimaryKeyConstraint | sa.UniqueConstraint)]
    for unique in [*uniques, *(index for index in table.indexes if index.unique)]:
        if str(unique.name) == name:
            return unique.columns.keys()
    return None


def stored_event(originator_id: UUID | str, version: int, topic: str, state: Any) -> StoredEvent:
    """Make a ``StoredEvent``; the constructor of a frozen dataclass takes more than twice as long."""
    event = _new(StoredEvent)
    attributes = event.__dict__
    attributes["originator_id"] = originator_id
    attributes["originator_version"] = version
    attributes["topic"] = topic
    attributes["state"] = state if type(state) is bytes else as_bytes(state)
    return event


def notification(position: int, originator_id: UUID | str, version: int, topic: str, state: Any) -> Notification:
    """Make a ``Notification`` in the same way."""
    event = _new(Notification)
    attributes = event.__dict__
    attributes["originator_id"] = originator_id
    attributes["originator_version"] = version
    attributes["topic"] = topic
    attributes["state"] = state if type(state) is bytes else as_bytes(state)
    attributes["id"] = position
    return event


def snapshot_in(table: str | None, lock: str = "") -> Snapshot:
    """Return a function that makes the condition for a snapshot in a table that exists."""

    def condition(originator_id: str, version: str | None) -> str:
        of_version = "" if version is None else f" AND p.originator_version = {version}"
        return f"EXISTS (SELECT 1 FROM {table} AS p WHERE p.originator_id = {originator_id}{of_version}{lock})"

    return condition


def transposed(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Return the columns of rows."""
    return [list(column) for column in zip(*rows, strict=True)]


class KnownLog(NamedTuple):
    """A table of events with its identity in the database, because other tables may have the same name."""

    identity: int
    sequence: str
    snapshots: str | None
    """The name of the table of snapshots, whatever names mean later; None where it is looked for each time."""
    statements: dict[str, str]
    table: str = ""
    """The name of the table itself, whatever names mean later."""


class Known:
    """What is known on a driver's connection: which tables the names meant last, and the floors of its transaction.

    Later appends keep the floor that a transaction published first. A lock taken within a savepoint goes when
    that is rolled back. Taking the same lock again is always safe, as a lower floor only makes readers more careful,
    and costs no new entry in the server's lock table.
    """

    KEY = "flask_eventsourcing.logs"

    def __init__(self) -> None:
        self.logs: dict[str, KnownLog] = {}
        self._transaction: weakref.ref[Any] | None = None
        self._floors: dict[int, int] = {}

    @classmethod
    def of(cls, connection: Connection) -> Known:
        """Return it, made at the first call."""
        info = connection.info
        found: Known | None = info.get(cls.KEY)
        if found is None:
            found = info[cls.KEY] = cls()
        return found

    def floors_of(self, connection: Connection) -> dict[int, int]:
        """Return the floors of the connection's transaction by the identity of the table."""
        transaction = connection.get_transaction() or connection
        if self._transaction is None or self._transaction() is not transaction:
            self._transaction, self._floors = weakref.ref(transaction), {}
        return self._floors

    def ended(self) -> None:
        """Called at the end of a transaction that SQLAlchemy does not know."""
        self._transaction = None
