"""What is stored beside an event's state: id, time, metadata, correlation, and columns of a user's record class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection

from ..exceptions import EventMetadataError
from ..metadata import CORRELATION_ID, Metadata, Recorded, new_ids
from ..metadata.values import to_json
from .dialects import Dialect
from .dialects.event_tables import COLUMN_VALUES, METADATA_COLUMNS, NOTHING, PLAIN, POSITION, Beside, EventTable, Shape
from .record_checks import KINDS
from .tables import MetadataType

Collect = Callable[[], Metadata]

logger: logging.Logger = logging.getLogger(__name__)

POSITIONS_AT_ONCE = 500

_saving: ContextVar[Sequence[Any]] = ContextVar("flask_eventsourcing.saving", default=())


@contextmanager
def saving(domain_events: Sequence[Any]) -> Iterator[None]:
    """Within it, these are the events that an application saves."""
    token = _saving.set(domain_events)
    try:
        yield
    finally:
        _saving.reset(token)


class Description(NamedTuple):
    """What is stored beside the events of one save."""

    ids: Sequence[int]
    time: datetime | None
    metadata: Metadata
    beside: Beside

    def recorded(self, positions: Sequence[int]) -> tuple[Recorded, ...]:
        """Return it for each event."""
        ids: list[UUID | None] = [UUID(int=each) for each in self.ids]
        ids = ids or [None] * len(positions)
        return tuple(Recorded(*each, self.time, self.metadata) for each in zip(positions, ids, strict=True))


PLAIN_DESCRIPTION = Description((), None, {}, NOTHING)


class Describer:
    """Describes the events of each save for one table.

    :param collect: returns the metadata in force, or None where no metadata is stored.
    """

    def __init__(self, dialect: Dialect, table: sa.Table, collect: Collect | None) -> None:
        self._dialect = dialect
        self._table = table
        names = [name for name in METADATA_COLUMNS if name in table.c] if collect is not None else []
        self._collect = collect if names else None
        self._shared = {name: self._encoder(name) for name in names if name != "event_id"}
        self._id = self._id_encoder() if "event_id" in names else None
        self._column_values: Callable[..., Mapping[str, Any]] | None = table.info.get(COLUMN_VALUES)
        self._shapes: dict[tuple[str, ...], Shape] = {}
        self._leaves_out = False

    def __call__(self, events: Sequence[StoredEvent]) -> Description:
        """Describe the events of one save.

        :raises EventMetadataError: when a provider fails, or there is something that cannot be stored.
        """
        if self._collect is None and self._column_values is None:
            return PLAIN_DESCRIPTION
        metadata = self._collect() if self._collect is not None else {}
        time = datetime.now(UTC) if "recorded_at" in self._shared else None
        values = {"recorded_at": time, "metadata": metadata, "correlation_id": metadata.get(CORRELATION_ID)}
        shared = tuple([encode(values[name]) for name, encode in self._shared.items()])
        ids = range(0)
        rows: list[tuple[Any, ...]]
        if self._id is not None:
            ids = new_ids(len(events))
            rows = list(zip(self._id(ids)))
        else:
            rows = [()] * len(events)
        own: tuple[str, ...] = ()
        if self._column_values is not None:
            own, further = self._own(self._column_values, events, metadata)
            rows = [(*row, *more) for row, more in zip(rows, further, strict=True)]
        return Description(ids, time, metadata, Beside(self._shape(own), rows, shared))

    def fitting(self, connection: Connection, table: EventTable, described: Description) -> Description:
        """Return what a table that was looked at has columns for."""
        is_plain = self._dialect.leaves_out_metadata(connection, table)
        return self._without_metadata(described) if is_plain else described

    def _without_metadata(self, described: Description) -> Description:
        """Return the user's columns alone, for a table that has none of those for metadata."""
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
        rows = [row[first:] for row in described.beside.rows]
        return Description((), None, {}, Beside(Shape(own, (), kinds, f" {','.join(own)}"), rows, ()))

    def _shape(self, own: tuple[str, ...]) -> Shape:
        found = self._shapes.get(own)
        if found is None:
            each = ("event_id", *own) if self._id is not None else own
            names = (*each, *self._shared)
            compiled = [self._table.c[name].type.compile(self._dialect.engine.dialect) for name in names]
            quoted = tuple(self._dialect.quote(self._table.c[name].name) for name in names)
            found = Shape(quoted[: len(each)], quoted[len(each) :], tuple(compiled), f" {','.join(quoted)}")
            self._shapes[own] = found if names else PLAIN
        return self._shapes[own]

    def _own(
        self, column_values: Callable[..., Mapping[str, Any]], events: Sequence[StoredEvent], metadata: Metadata
    ) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        """Return the user's columns, and their values for each event."""
        found = [column_values(event, metadata) for event in _domain_events(events)]
        names = tuple(dict.fromkeys(name for each in found for name in each))
        for name in names:
            if name not in self._table.c or name in KINDS or name in METADATA_COLUMNS or name == POSITION:
                raise EventMetadataError(
                    f"column_values() of the record class of {self._table.fullname} returns {name!r}, which is no "
                    "column of its own: give it the name of a column that the class adds to those of the mixin."
                )
        encoders = [self._encoder(name) for name in names]
        return names, [
            tuple(encode(each.get(name)) for name, encode in zip(names, encoders, strict=True)) for each in found
        ]

    def _encoder(self, name: str) -> Callable[[Any], Any]:
        dialect = self._dialect.engine.dialect
        column_type = self._table.c[name].type.dialect_impl(dialect)
        if isinstance(column_type, MetadataType) and isinstance(column_type.load_dialect_impl(dialect), sa.JSON):
            # As text, which the statement gives the column's type.
            return to_json
        bind: Callable[[Any], Any] = column_type.bind_processor(dialect) or _as_it_is
        if name == "recorded_at":
            if bind(_EXAMPLE) == _as_iso(_EXAMPLE):
                return _as_iso
            if not getattr(column_type, "timezone", False):
                return lambda time: bind(time.replace(tzinfo=None))
        return bind

    def _id_encoder(self) -> Callable[[range], list[Any]]:
        dialect = self._dialect.engine.dialect
        column_type: Any = self._table.c["event_id"].type
        bind = column_type.dialect_impl(dialect).bind_processor(dialect) or _as_it_is
        if (made := bind(_EXAMPLE_ID)) in (_EXAMPLE_ID.hex, str(_EXAMPLE_ID)):
            return partial(_as_texts, "-" in made)
        return lambda ids: [bind(UUID(int=each)) for each in ids]


def _as_it_is(value: Any) -> Any:
    return value


_EXAMPLE = datetime(2026, 1, 2, 3, 4, 5, 6)
_EXAMPLE_ID = UUID(int=7 << 76)
_ISO = "%04d-%02d-%02d %02d:%02d:%02d.%06d"
_DIGITS = tuple([f"{number:03x}" for number in range(16**3)])


def _as_texts(dashes: bool, ids: range) -> list[str]:
    """Return ids as text, with dashes or without. They begin with one whose last three digits are zeros."""
    found: list[str] = []
    for block in range(ids[0], ids[-1] + 1, len(_DIGITS)):
        start = hex(block >> 12)[2:].zfill(29)
        if dashes:
            start = f"{start[:8]}-{start[8:12]}-{start[12:16]}-{start[16:20]}-{start[20:]}"
        found += [start + each for each in _DIGITS[: ids[-1] + 1 - block]]
    return found


def _as_iso(time: datetime) -> str:
    """Return a time as SQLAlchemy writes it into a column of text, in a third of the time."""
    parts = (time.year, time.month, time.day, time.hour, time.minute, time.second, time.microsecond)
    return _ISO % parts


def _domain_events(events: Sequence[StoredEvent]) -> Sequence[Any]:
    """Return the domain events of stored ones, where an application is saving them."""
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
    """Return what was recorded of events beside their state, by position.

    :raises UnsafeTableError: when the table lacks some of the columns.
    """
    dialect.look(connection, table, "describe")
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
            aware = time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time
            found[position] = Recorded(position, event_id, aware, known)
    return found
