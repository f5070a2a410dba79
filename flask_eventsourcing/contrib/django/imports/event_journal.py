"""Takes over the events of djangoevents: a journal of JSON, whose events become events of your present classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db.models import Max
from django.utils import timezone
from eventsourcing.application import Application
from eventsourcing.domain import CanInitAggregate
from eventsourcing.utils import get_topic, resolve_topic

from ....exceptions import ConfigurationError
from ....metadata.values import checked
from .landing import Imported, Landing, by_position, check_tables, event_journal, refusing


@dataclass(frozen=True)
class JournalEvent:
    """An event of the journal.

    The functions that you pass to :func:`import_event_journal` get it.
    """

    position: int
    """The row's id, which becomes the position in the application's log."""
    event_id: str
    event_type: str
    event_version: int | None
    """Of its Avro schema."""
    data: Mapping[str, Any]
    """The values in ``event_data``, with ``schema_version`` if that was switched on."""
    aggregate_id: str
    aggregate_type: str
    aggregate_version: int
    """From 0 on. The event gets the next higher version here."""
    created: datetime
    """With a time zone."""
    metadata: Mapping[str, Any]
    module_name: str
    class_name: str


State = Callable[[JournalEvent], Mapping[str, Any]]
Converted = tuple[type[Any], State]
"""An event class, and a function that returns the values of its own attributes."""


def _id_of(event: JournalEvent) -> UUID:
    return UUID(event.aggregate_id)


def import_event_journal(
    application: type[Application[Any]] | str,
    mapping: Mapping[tuple[str, str], Converted | None],
    *,
    originator_id: Callable[[JournalEvent], UUID] = _id_of,
    using: str = "default",
    dry_run: bool = False,
) -> Imported:
    """Take events over from the journal of djangoevents, whose ids become their positions.

    Each event gets its date as ``timestamp`` and ``recorded_at``, its id as ``event_id``, and its metadata. It is read
    with the application and compared before anything is committed.

    :param application: the application to which the events are to belong, or its name.
    :param mapping: by the module and the class of an event in the journal, ``("todo.aggregates", "Todo.Created")``, the
        class of today and a function that returns the values of its own attributes; None for events that are left out,
        which are those of another application.
    :param originator_id: returns the id of the aggregate, by default the UUID in the journal.
    :param using: the alias of the database with ``event_journal``.
    :param dry_run: whether to roll back at the end.
    :raises ConfigurationError: when the table is not there, or the mapping lacks a class that the journal has.
    :raises ImportedEventsError: naming the position of an event that cannot be converted, or read back as it was.
    """
    check_tables(using, (event_journal(),))
    rows = event_journal().objects.using(using)
    wanted = [key for key, converted in mapping.items() if converted is not None]
    _check_mapping(rows, mapping)
    if not wanted:
        raise ConfigurationError("The mapping has no event class, so that there is nothing to take over.")
    journal = _Journal(application, mapping, originator_id)
    last: int | None = None
    for module_name, class_name in wanted:
        found = rows.filter(module_name=module_name, class_name=class_name).aggregate(last=Max("pk"))["last"]
        last = max(last or 0, found or 0)
    return journal.landing.land(lambda: journal.events(rows), last or 0, lambda _: (), dry_run=dry_run)


def _check_mapping(rows: Any, mapping: Mapping[tuple[str, str], Converted | None]) -> None:
    stored = rows.order_by("module_name", "class_name").values_list("module_name", "class_name").distinct()
    missing = [each for each in stored if each not in mapping]
    if missing:
        listed = ", ".join(map(repr, missing))
        raise ConfigurationError(
            f"The journal has events of classes that the mapping lacks: {listed}. Add them to the mapping; map a class "
            "to None to leave its events out."
        )


class _Found(NamedTuple):
    """An event of the journal, and the event that it becomes."""

    event: JournalEvent
    converted: Any
    event_id: UUID
    metadata: Mapping[str, str]


class _Journal:
    def __init__(
        self,
        application: type[Application[Any]] | str,
        mapping: Mapping[tuple[str, str], Converted | None],
        originator_id: Callable[[JournalEvent], UUID],
    ) -> None:
        name = application if isinstance(application, str) else application.name
        self.landing: Landing[_Found] = Landing(name, self._made, self._differs)
        self._mapping, self._originator_id = mapping, originator_id

    def events(self, rows: Any) -> Iterator[_Found]:
        """Return the events that are taken over."""
        for row in by_position(rows):
            wanted = self._mapping[(row.module_name, row.class_name)]
            if wanted is not None:
                yield self._found(row, *wanted)

    def _found(self, row: Any, event_class: type[Any], state: State) -> _Found:
        name = f"Event {row.pk} of the journal ({row.module_name}, {row.class_name})"
        with refusing(lambda why: f"{name} cannot be converted ({why}). Nothing was taken over."):
            event = _event_of(row)
            return _Found(
                event, self._convert(event, event_class, state), UUID(event.event_id), _texts_of(event.metadata)
            )

    def _convert(self, event: JournalEvent, event_class: type[Any], state: State) -> Any:
        values = {**state(event)}
        if issubclass(event_class, CanInitAggregate) and "originator_topic" not in values:
            values["originator_topic"] = get_topic(_aggregate_of(event_class))
        return event_class(
            originator_id=self._originator_id(event),
            originator_version=event.aggregate_version + 1,
            timestamp=event.created,
            **values,
        )

    def _made(self, found: _Found) -> Any:
        stored = self.landing.write(found.event.position, found.converted)
        values = {
            "notification_id": found.event.position,
            "originator_id": stored.originator_id,
            "originator_version": stored.originator_version,
            "topic": stored.topic,
            "state": stored.state,
            "event_id": found.event_id,
            "recorded_at": found.event.created,
            "metadata": found.metadata,
            "correlation_id": found.metadata.get("correlation_id"),
        }
        model = self.landing.records.StoredEvent
        # A record class of the user's may lack some columns of metadata.
        has = {field.name for field in model._meta.local_concrete_fields}
        return model(**{name: value for name, value in values.items() if name in has})

    def _differs(self, found: _Found, stored: Any) -> str | None:
        read = self.landing.read(stored)
        if read != found.converted:
            return (
                f"is read back as {type(read).__name__} with different values: let the function return values that the "
                "transcoder restores unchanged"
            )
        has = {field.name for field in stored._meta.local_concrete_fields}
        for name, value in {"event_id": found.event_id, "metadata": found.metadata}.items():
            if name in has and getattr(stored, name) != value:
                return f"has another {name} than in the journal"
        return None


def _aggregate_of(event_class: type[Any]) -> type[Any]:
    topic = get_topic(event_class)
    found: type[Any] = resolve_topic(topic.rpartition(".")[0])
    return found


def _event_of(row: Any) -> JournalEvent:
    created = row.create_date
    return JournalEvent(
        position=row.pk,
        event_id=row.event_id,
        event_type=row.event_type,
        event_version=row.event_version,
        data=json.loads(row.event_data),
        aggregate_id=row.aggregate_id,
        aggregate_type=row.aggregate_type,
        aggregate_version=row.aggregate_version,
        created=timezone.make_aware(created, timezone.get_default_timezone()) if created.tzinfo is None else created,
        metadata=json.loads(row.metadata) or {},
        module_name=row.module_name,
        class_name=row.class_name,
    )


def _texts_of(metadata: Mapping[str, Any]) -> Mapping[str, str]:
    """Return metadata as strings, as they are stored here; other values become JSON."""
    return checked({key: each if isinstance(each, str) else json.dumps(each) for key, each in metadata.items()})
