"""Erases what is stored of an aggregate, and keeps the log readable.

The last event of an erased aggregate is a *tombstone*, appended to the log like any event. Projections and
fast-forwarded caches see it, objects that were read before have a conflict with its version, and the id cannot be used
again. The events before it are deleted or redacted: a redacted event keeps position and version, and has no content.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, NoReturn, cast
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import AggregateNotFoundError, Application
from eventsourcing.persistence import Mapper
from sqlalchemy.engine import Connection

from ..exceptions import AggregateErasedError, ConfigurationError, NotInitializedError, UncommittedEventsError
from ..persistence import SQLAlchemyApplicationRecorder
from ..persistence.dialects import Dialect
from ..persistence.dialects.event_tables import EVENT_COLUMNS, LATEST_FIRST_VERSION, POSITION
from ..uow import Unit
from .stale import evict, unit_of

KEPT = {POSITION, *EVENT_COLUMNS, "event_id", "recorded_at"}
"""The columns that a redacted event keeps, its topic and state as those of :class:`EventRedacted`."""


@dataclass(frozen=True)
class EventRedacted:
    """A redacted event: it has the position and version of the original event, and no content.

    It is in the log instead of an event of an aggregate that was erased with ``redact=True``. Handlers need not know
    it.
    """

    TOPIC: ClassVar[str] = "flask_eventsourcing:EventRedacted"

    # A UUID if the application's ids are UUIDs: with this annotation the library leaves an id as it is.
    originator_id: str
    originator_version: int

    def mutate(self, aggregate: Any) -> NoReturn:
        """Refuse to be part of an aggregate.

        :raises AggregateErasedError: always.
        """
        raise erased(self.originator_id)


@dataclass(frozen=True)
class AggregateErased:
    """The last event of an erased aggregate, appended to the log by the erasure.

    Handlers of projections delete their rows of ``originator_id``. ``erased_at`` is a string in the format of ISO 8601,
    and ``timestamp`` the same as a ``datetime``.
    """

    TOPIC: ClassVar[str] = "flask_eventsourcing:AggregateErased"

    originator_id: str
    originator_version: int
    erased_at: str

    @property
    def timestamp(self) -> datetime:
        """When it was erased, as a ``datetime``. Projections ask events for their time by this name."""
        return datetime.fromisoformat(self.erased_at)

    def mutate(self, aggregate: Any) -> NoReturn:
        """Refuse to be part of an aggregate.

        :raises AggregateErasedError: always.
        """
        raise erased(self.originator_id)


def erased(aggregate_id: object) -> AggregateErasedError:
    """Return the error that refuses to read an aggregate."""
    return AggregateErasedError(f"Aggregate {aggregate_id} was erased: its id is not used again.")


def refusing_erased(projector: Any, aggregate: Any, domain_events: Any) -> Any:
    """Call a projector function that need not know the events of an erased aggregate.

    :raises AggregateErasedError: when there is one.
    """

    def checked() -> Any:
        for event in domain_events:
            if isinstance(event, AggregateErased | EventRedacted):
                raise erased(event.originator_id)
            yield event

    return projector(aggregate, checked())


@dataclass(frozen=True)
class Erasure:
    """The numbers of events, snapshots and dead letters that were erased, or would be.

    Show them to the person who asked for the erasure. They have no personal data.

    :param position: the position of the new tombstone, or None.
    """

    events: int
    snapshots: int
    dead_letters: int = 0
    position: int | None = None


def recorder_of(application: Application[Any]) -> SQLAlchemyApplicationRecorder:
    """Return the recorder of an application.

    :raises ConfigurationError: when it is not one of this package.
    """
    if not isinstance(application.recorder, SQLAlchemyApplicationRecorder):
        raise ConfigurationError(f"The events of {application.name} are not in a database of SQLAlchemy.")
    return application.recorder


class Stored:
    """The stored rows of one aggregate, as the transaction of a connection sees them.

    :raises IdentifierTypeError: for an id of another type than the application's.
    """

    def __init__(self, application: Application[Any], connection: Connection, aggregate_id: UUID | str) -> None:
        recorder = recorder_of(application)
        self.dialect: Dialect = recorder.dialect
        self.connection = connection
        table = self.dialect.located(connection, recorder.events_table)
        self.id: object = table.accepted.id(aggregate_id)
        self.events: sa.Table = table.table
        self.snapshots: sa.Table | None = None
        if table.snapshots is not None and self.dialect.has_snapshots(connection, table):
            self.snapshots = self.dialect.tables[table.snapshots]

    def last(self) -> tuple[int, str | None] | None:
        """Return the version and the topic of its last event, or the version of its last snapshot, or None."""
        for table in (self.events, self.snapshots):
            if table is not None:
                version = table.c.originator_version
                last = self._of(sa.select(version, table.c.topic), table).order_by(version.desc()).limit(1)
                for row in self._run(last).mappings():
                    return int(row[version]), row[table.c.topic] if table is self.events else None
        return None

    def count_events(self, *, redact: bool) -> int:
        """Count the events that would be redacted, or deleted."""
        empty = [AggregateErased.TOPIC, *([EventRedacted.TOPIC] if redact else [])]
        # An event that another program has erased may have no topic.
        return self._count(self.events, sa.func.coalesce(self.events.c.topic, "").not_in(empty))

    def count_snapshots(self) -> int:
        """Count the snapshots."""
        return 0 if self.snapshots is None else self._count(self.snapshots, sa.true())

    def _count(self, table: sa.Table, condition: Any) -> int:
        return int(self._run(self._of(sa.select(sa.func.count()), table).where(condition)).scalar_one())

    def delete_events(self, before: int) -> int:
        """Delete the events before a version, and return how many there were."""
        statement = self._of(sa.delete(self.events), self.events)
        return self._run(statement.where(self.events.c.originator_version < before)).rowcount

    def redact_events(self, before: int, topic: str, state: bytes) -> int:
        """Give the events before a version another topic and state, unless they have it, and return how many."""
        found = self.dialect.found_table(self.connection, self.events)
        names = {} if found is None else found.columns
        # A table may lack some of the package's nullable columns.
        emptied = {c: sa.null() for c in self.events.c if c.nullable and c.computed is None and c.name in names}
        values = {column: null for column, null in emptied.items() if column.name not in KEPT}
        statement = sa.update(self.events).values({**values, self.events.c.topic: topic, self.events.c.state: state})
        is_other = sa.func.coalesce(self.events.c.topic, "") != topic
        version = self.events.c.originator_version
        return self._run(self._of(statement, self.events).where(version < before, is_other)).rowcount

    def delete_snapshots(self, *, unless_needed: bool = False) -> int:
        """Delete the snapshots, and return how many there were.

        :param unless_needed: keep them if the aggregate cannot be read from its events alone.
        """
        if self.snapshots is None:
            return 0
        statement = self._of(sa.delete(self.snapshots), self.snapshots)
        if unless_needed:
            first = self._of(sa.select(sa.literal(1)), self.events)
            statement = statement.where(first.where(self.events.c.originator_version <= LATEST_FIRST_VERSION).exists())
        return self._run(statement).rowcount

    def count_dead_letters(self, letters: sa.Table | None) -> int:
        """Count the dead letters."""
        if letters is None or self.dialect.found_table(self.connection, letters) is None:
            return 0
        found = sa.select(sa.func.count()).where(letters.c.originator_id == str(self.id))
        return int(self._run(found).scalar_one())

    def delete_dead_letters(self, letters: sa.Table | None) -> int:
        """Delete the dead letters, and return how many there were.

        Those that wait behind them are deleted too, as they would wait for ever.
        """
        if letters is None or self.dialect.found_table(self.connection, letters) is None:
            return 0
        return self._run(sa.delete(letters).where(letters.c.originator_id == str(self.id))).rowcount

    def _of(self, statement: Any, table: sa.Table) -> Any:
        return statement.where(table.c.originator_id == self.id)

    def _run(self, statement: Any) -> sa.CursorResult[Any]:
        try:
            return cast("sa.CursorResult[Any]", self.connection.execute(statement))
        except sa.exc.DBAPIError as error:
            raise self.dialect.own_error(self.connection, error.orig, "") from error.orig


def count(
    application: Application[Any],
    aggregate_id: UUID | str,
    *,
    redact: bool = False,
    dead_letters: sa.Table | None = None,
) -> Erasure:
    """Return what :func:`erase` would erase of an aggregate.

    :raises AggregateNotFoundError: when nothing is stored of it.
    :raises IdentifierTypeError: for an id of another type than the application's.
    """
    recorder = recorder_of(application)
    with recorder.datastore.reading() as read:
        recorder.dialect.look(read.connection, recorder.dialect.located(read.connection, recorder.events_table), "read")
        stored = Stored(application, read.connection, aggregate_id)
        if stored.last() is None:
            raise not_found(application, aggregate_id)
        events, snapshots = stored.count_events(redact=redact), stored.count_snapshots()
        return Erasure(events, snapshots, stored.count_dead_letters(dead_letters))


def not_found(application: Application[Any], aggregate_id: object) -> AggregateNotFoundError:
    """Return the error for an aggregate without stored events and snapshots."""
    return AggregateNotFoundError(
        f"{application.name} has no aggregate {aggregate_id}: there is neither an event nor a snapshot of it."
    )


def erase(
    application: Application[Any],
    aggregate_id: UUID | str,
    *,
    redact: bool = False,
    dead_letters: sa.Table | None = None,
) -> Erasure:
    """Erase an aggregate in the current unit of work: its events, snapshots and dead letters.

    Nothing is deleted before the commit. A second call deletes what is left of the aggregate, and adds no second
    tombstone.

    :param redact: keep the events' positions and versions, as :class:`EventRedacted`, rather than delete their rows.
    :param dead_letters: the table of the dead letters of the application's projections, if it has any.
    :raises AggregateNotFoundError: when nothing is stored of it.
    :raises IdentifierTypeError: for an id of another type than the application's.
    :raises IntegrityError: when another writer has saved an event of it meanwhile.
    :raises UncommittedEventsError: when the unit of work has events of it that are not committed.
    :raises NotInitializedError: where there is no unit of work.
    :raises ConfigurationError: when the application's events are not in a database of SQLAlchemy.
    """
    recorder = recorder_of(application)
    unit = _unit(application, recorder, aggregate_id)
    with recorder.datastore.writing() as write, unit.savepoint():
        table = recorder.dialect.located(write.connection, recorder.events_table)
        recorder.dialect.look(write.connection, table, "append")
        stored = Stored(application, write.connection, aggregate_id)
        last = stored.last()
        if last is None:
            raise not_found(application, aggregate_id)
        version, position = last[0], None
        if last[1] != AggregateErased.TOPIC:
            # First, because it raises the conflict if there is one.
            version += 1
            position = _append_tombstone(application, aggregate_id, version)
        events = _redact(application, stored, version) if redact else stored.delete_events(version)
        unit.on_commit(partial(evict, application.repository.cache, aggregate_id))
        return Erasure(events, stored.delete_snapshots(), stored.delete_dead_letters(dead_letters), position)


def _unit(application: Application[Any], recorder: SQLAlchemyApplicationRecorder, aggregate_id: Any) -> Unit:
    unit = unit_of(recorder)
    if unit is None:
        raise NotInitializedError(
            "An aggregate is erased within a unit of work: 'with app.app_context():', or 'with host.transaction():'."
        )
    unit.look()
    if unit.pending.has_events_of(aggregate_id):
        raise UncommittedEventsError(
            f"There are events of {application.name} {aggregate_id} that are not committed: commit before you erase "
            "it, or roll back."
        )
    return unit


def _append_tombstone(application: Application[Any], aggregate_id: Any, version: int) -> int:
    tombstone = AggregateErased(aggregate_id, version, datetime.now(UTC).isoformat())
    (recording,) = application.save(tombstone)
    return int(recording.notification.id)


def _redact(application: Application[Any], stored: Stored, before: int) -> int:
    # Without the mapper's own method, which may know only the application's own classes.
    redacted = Mapper.to_stored_event(application.mapper, EventRedacted(cast(str, stored.id), before))
    return stored.redact_events(before, redacted.topic, redacted.state)
