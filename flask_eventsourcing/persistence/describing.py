"""Makes the values that are stored beside an event's state: id, time, metadata, correlation, and the user's columns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, date, datetime
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection

from ..exceptions import EventMetadataError
from ..metadata import CORRELATION_ID, Metadata, Recorded
from ..metadata.values import ids_of, is_storable, new_block, to_json, uuids_of
from .dialects import Dialect
from .dialects.event_tables import COLUMN_VALUES, METADATA_COLUMNS, NOTHING, PLAIN, POSITION, Beside, EventTable, Shape
from .record_checks import KINDS
from .tables import MetadataType

Collect = Callable[[], Metadata]

logger: logging.Logger = logging.getLogger(__name__)

POSITIONS_AT_ONCE = 500

UNFIT = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, sa.exc.SQLAlchemyError)
"""The errors of column types for values that they do not take."""

SHARED = ("recorded_at", "metadata", "correlation_id")
"""The columns of ``METADATA_COLUMNS`` with one value for all events of a save."""

_saving: ContextVar[Sequence[Any]] = ContextVar("flask_eventsourcing.saving", default=())


@contextmanager
def saving(domain_events: Sequence[Any]) -> Iterator[None]:
    """Note in the block that an application saves these events."""
    token = _saving.set(domain_events)
    try:
        yield
    finally:
        _saving.reset(token)


class Description(NamedTuple):
    """The values beside the states of the events of one save."""

    block: str | None
    """The block of their ids, for :func:`ids_of`."""
    time: datetime | None
    metadata: Metadata
    beside: Beside

    def recorded(self, positions: Sequence[int]) -> tuple[Recorded, ...]:
        """Return what was recorded of each event."""
        count = len(positions)
        ids: Sequence[UUID | None] = [None] * count if self.block is None else uuids_of(self.block, count)
        return tuple(Recorded(*each, self.time, self.metadata) for each in zip(positions, ids, strict=True))


PLAIN_DESCRIPTION = Description(None, None, {}, NOTHING)


class Describer:
    """Describes the events of each save for one table.

    :param collect: returns the current metadata; None if no metadata are stored.
    """

    def __init__(self, dialect: Dialect, table: sa.Table, collect: Collect | None) -> None:
        self._dialect = dialect
        self._table = table
        names = [name for name in METADATA_COLUMNS if name in table.c] if collect is not None else []
        self._collect = collect if names else None
        self._shared = {SHARED.index(name): self._encoder(name) for name in names if name in SHARED}
        self._id = self._id_encoder() if "event_id" in names else None
        self._column_values: Callable[..., Mapping[str, Any]] | None = table.info.get(COLUMN_VALUES)
        self._shapes: dict[tuple[str, ...], Shape] = {}
        self._leaves_out = False

    def __call__(self, events: Sequence[StoredEvent]) -> Description:
        """Describe the events of one save.

        :raises EventMetadataError: when a provider fails, or a value cannot be stored.
        """
        if self._collect is None and self._column_values is None:
            return PLAIN_DESCRIPTION
        metadata = self._collect() if self._collect is not None else {}
        time = datetime.now(UTC) if 0 in self._shared else None
        values = (time, metadata, metadata.get(CORRELATION_ID))
        shared = tuple([encode(values[number]) for number, encode in self._shared.items()])
        block: str | None = None
        columns: list[Sequence[Any]] = []
        if self._id is not None:
            block = new_block()
            columns.append(self._id(block, len(events)))
        own: tuple[str, ...] = ()
        if self._column_values is not None:
            own, further = self._own(self._column_values, events, metadata)
            columns += further
        return Description(block, time, metadata, Beside(self._shape(own), columns, shared))

    def fitting(self, connection: Connection, table: EventTable, described: Description) -> Description:
        """Return the part for which a table, after its look, has columns."""
        is_plain = self._dialect.leaves_out_metadata(connection, table)
        return self._without_metadata(described) if is_plain else described

    def _without_metadata(self, described: Description) -> Description:
        """Return only the user's columns, for a table without columns of metadata."""
        if not self._leaves_out:
            self._leaves_out = True
            logger.warning(
                "Table %s has none of the columns %s, so events are recorded without metadata. The command 'check' "
                "says what a migration has to add; with EVENTSOURCING_METADATA = False no metadata are recorded.",
                self._table.fullname,
                ", ".join(METADATA_COLUMNS),
            )
        shape, first = described.beside.shape, 0 if self._id is None else 1
        own = shape.each[first:]
        if not own:
            return PLAIN_DESCRIPTION
        kinds = shape.kinds[first : first + len(own)]
        columns = described.beside.columns[first:]
        return Description(None, None, {}, Beside(Shape(own, (), kinds, f" {','.join(own)}"), columns, ()))

    def _shape(self, own: tuple[str, ...]) -> Shape:
        found = self._shapes.get(own)
        if found is None:
            each = ("event_id", *own) if self._id is not None else own
            names = (*each, *[SHARED[number] for number in self._shared])
            compiled = [self._table.c[name].type.compile(self._dialect.engine.dialect) for name in names]
            quoted = tuple(self._dialect.quote(self._table.c[name].name) for name in names)
            found = Shape(quoted[: len(each)], quoted[len(each) :], tuple(compiled), f" {','.join(quoted)}")
            self._shapes[own] = found if names else PLAIN
        return self._shapes[own]

    def _own(
        self, column_values: Callable[..., Any], events: Sequence[StoredEvent], metadata: Metadata
    ) -> tuple[tuple[str, ...], list[list[Any]]]:
        """Return the names of the user's columns, and the values of each."""
        # Each event gets a copy, because the class may remove values that it stores.
        found: list[Any] = [column_values(event, dict(metadata)) for event in _domain_events(events)]
        who = f"column_values() of the record class of {self._table.fullname} returns"
        for each in found:
            if not isinstance(each, Mapping):
                raise EventMetadataError(
                    f"{who} a {type(each).__name__}: return a mapping of columns' names to values."
                )
        names = tuple(dict.fromkeys(name for each in found for name in each))
        reserved = {*KINDS, *METADATA_COLUMNS, POSITION}
        for name in names:
            if not isinstance(name, str) or name not in self._table.c or name in reserved:
                raise EventMetadataError(
                    f"{who} {name!r}, which is no column of its own: give it the name of a column that the class adds "
                    "to those of the mixin."
                )
        return names, [self._encoded(name, [each.get(name) for each in found], who) for name in names]

    def _encoded(self, name: str, values: Sequence[Any], who: str) -> list[Any]:
        """Return the values of one of the user's columns as the driver takes them.

        :raises EventMetadataError: for a value that some database would refuse, or store as another one.
        """
        column_type, encode = self._table.c[name].type, self._encoder(name)
        expected = next(python for kind, python in _CLASSES if isinstance(column_type, kind))
        try:
            found = [encode(_fitting(value, expected)) for value in values]
        except UNFIT as error:
            raise EventMetadataError(
                f"{who} a value for {name!r} that a column of type {column_type!r} does not take: "
                f"{type(error).__name__}."
            ) from error
        if not all(is_storable(each) for each in found if isinstance(each, str)):
            raise EventMetadataError(f"{who} a value for {name!r} that has NUL or halves of surrogate pairs.")
        return found

    def _encoder(self, name: str) -> Callable[[Any], Any]:
        dialect = self._dialect.engine.dialect
        column_type = self._table.c[name].type.dialect_impl(dialect)
        if isinstance(column_type, MetadataType) and isinstance(column_type.load_dialect_impl(dialect), sa.JSON):
            # As text, which the statement casts to the column's type.
            return to_json
        bind: Callable[[Any], Any] = column_type.bind_processor(dialect) or _as_it_is
        if name == "recorded_at":
            if bind(_EXAMPLE) == _as_iso(_EXAMPLE):
                return _as_iso
            if not getattr(column_type, "timezone", False):
                return lambda time: bind(time.replace(tzinfo=None))
        return bind

    def _id_encoder(self) -> Callable[[str, int], list[Any]]:
        dialect = self._dialect.engine.dialect
        column_type: Any = self._table.c["event_id"].type
        bind = column_type.dialect_impl(dialect).bind_processor(dialect) or _as_it_is
        if (made := bind(_EXAMPLE_ID)) in (_EXAMPLE_ID.hex, str(_EXAMPLE_ID)):
            return partial(ids_of, dashes="-" in made)
        return lambda block, count: [bind(each) for each in uuids_of(block, count)]


def _as_it_is(value: Any) -> Any:
    return value


# A driver, or a database, may convert a value of another class.
_CLASSES: Sequence[tuple[type[Any], type[Any]]] = (
    (sa.Enum, object),
    (sa.String, str),
    (sa.Integer, int),
    (sa.Date, date),
    (sa.DateTime, date),
    (object, object),
)


def _fitting(value: Any, expected: type[Any]) -> Any:
    """Return the value if it is of the class; the characters of a subclass of ``str``.

    :raises TypeError: for a value of another class.
    """
    # Without isinstance(), which a proxy can deceive.
    if value is not None and not issubclass(type(value), expected):
        raise TypeError(f"Expected a value of {expected}.")
    return str.__str__(value) if issubclass(type(value), str) and expected is str else value


_EXAMPLE = datetime(2026, 1, 2, 3, 4, 5, 6)
_EXAMPLE_ID = UUID(int=7 << 76)
_TWO = tuple([f"{number:02d}" for number in range(100)])
_THREE = tuple([f"{number:03d}" for number in range(1000)])


def _as_iso(time: datetime) -> str:
    """Return a time as SQLAlchemy writes it into a column of text, in a third of the time."""
    day = f"{time.year:04d}-{_TWO[time.month]}-{_TWO[time.day]}"
    thousands, rest = divmod(time.microsecond, 1000)
    return f"{day} {_TWO[time.hour]}:{_TWO[time.minute]}:{_TWO[time.second]}.{_THREE[thousands]}{_THREE[rest]}"


def _domain_events(events: Sequence[StoredEvent]) -> Sequence[Any]:
    """Return the domain events of stored ones, if an application is saving them."""
    found = _saving.get()
    if len(found) == len(events) and all(map(_is_same, found, events)):
        return found
    return events


def _is_same(domain_event: Any, stored: StoredEvent) -> bool:
    return (domain_event.originator_id, domain_event.originator_version) == (
        stored.originator_id,
        stored.originator_version,
    )


def read_recorded(
    dialect: Dialect, connection: Connection, table: EventTable, positions: Sequence[int]
) -> dict[int, Recorded]:
    """Return the metadata, time and id of events, by position.

    :raises UnsafeTableError: when the table lacks some of the columns.
    """
    dialect.look(connection, table, "recall")
    if dialect.leaves_out_metadata(connection, table):
        return {}
    c = table.table.c
    columns = [c[name] if name in c else sa.null().label(name) for name in METADATA_COLUMNS]
    found: dict[int, Recorded] = {}
    for start in range(0, len(positions), POSITIONS_AT_ONCE):
        some = positions[start : start + POSITIONS_AT_ONCE]
        query = sa.select(c[POSITION], *columns).where(c[POSITION].in_(some))
        for position, event_id, time, metadata, correlation in connection.execute(query):
            known = dict(metadata or {})
            if correlation is not None:
                known[CORRELATION_ID] = correlation
            # Version 10 of the library stores a nil UUID for an event without an id, and many events would share it.
            own_id = event_id if event_id is not None and event_id.int else None
            aware = time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time
            found[position] = Recorded(position, own_id, aware, known)
    return found
