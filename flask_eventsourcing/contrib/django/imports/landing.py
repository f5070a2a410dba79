"""The tables from which an import takes events, and those into which it puts them.

The tables of other packages are models that no app has, so that Django neither migrates nor checks them. Each event
that was put into the tables of an application is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import islice, zip_longest
from typing import Any, Generic, TypeVar, cast

from django.apps.registry import Apps
from django.db import connections, models, transaction
from django.db.models import Count, F, Max
from eventsourcing.persistence import StoredEvent

from ....exceptions import ConfigurationError, ImportedEventsError
from ....failures import raised_as
from ..hosting import Database, get_application, site
from ..record_fields import RecordBinaryField, RecordUUIDField

R = TypeVar("R")

PAGE = 1000
"""The most rows that are held in memory at a time."""
UNREADABLE = (
    "cannot be read ({}): set in ENV the cipher, compressor and transcoder that wrote it, and call register_topic() "
    "for each class that has moved"
)


@dataclass(frozen=True)
class Imported:
    """The result of an import into the tables of one application.

    An import returns one for each application. It was committed, unless the import was a dry run.
    """

    application: str
    events: int
    """How many were compared."""
    position: int
    """The position of the last event. The next event of the application gets a higher one."""
    was_there: bool
    """Whether an earlier run had taken them over, so that this run only compared them."""
    snapshots: int = 0
    tracking: int = 0
    """How many applications it follows."""


class Landing(Generic[R]):
    """The tables of an application.

    :param name: the application's.
    :param make: makes a record, which is not saved, of what was found elsewhere.
    :param differs: tells how a stored event differs from what was found, or returns None.
    :raises ConfigurationError: when the setting has no such application.
    """

    def __init__(self, name: str, make: Callable[[R], Any], differs: Callable[[R, Any], str | None]) -> None:
        found = site()
        self.name = found.name_of(name)
        self._database: Database = found.database(self.name)
        self.alias = self._database.alias
        self.records = self._database.records[self.name]
        self.application: Any = get_application(self.name)
        self._make, self._differs = make, differs

    def land(
        self, rows: Callable[[], Iterator[R]], last: int, beside: Callable[[bool], Sequence[int]], *, dry_run: bool
    ) -> Imported:
        """Take events over, or compare those that were taken over before.

        :param rows: returns what was found elsewhere, by position; called twice.
        :param last: the last position of them.
        :param beside: called in the same transaction with whether the events were there; returns further counts.
        :param dry_run: whether to roll back at the end.
        :raises ImportedEventsError: naming the position of an event that differs, or cannot be read.
        :raises RuntimeError: inside another ``atomic()``.
        """
        with transaction.atomic(using=self.alias, durable=True):
            self._lock()
            was_there = self._events.exists()
            if not was_there:
                self._copy(rows())
            count = self._compare(rows(), last)
            self._check_versions(last)
            counts = beside(was_there)
            if dry_run:
                transaction.set_rollback(True, using=self.alias)
        if not dry_run:
            # At the end, because every session sees a sequence at once: readers would pass the events before the
            # commit.
            with transaction.atomic(using=self.alias, durable=True):
                self._lock()
                self._count_from(last)
        return Imported(self.name, count, last, was_there, *counts)

    @property
    def _events(self) -> Any:
        return self.records.StoredEvent.objects.using(self.alias)

    @property
    def _connection(self) -> Any:
        return self._database.units.current().connection()

    def _lock(self) -> None:
        recorder = self.application.recorder
        with recorder.dialect.translated:
            recorder.dialect.lock_log(self._connection, recorder.events_table)

    def _count_from(self, last: int) -> None:
        dialect, tables = self._database.datastore.dialect, self.records.mirror.tables
        with dialect.translated:
            dialect.go_on_behind(self._connection, tables["events"], tables["tracking"], last)

    def _copy(self, rows: Iterator[R]) -> None:
        while page := [self._make(row) for row in islice(rows, PAGE)]:
            self._events.bulk_create(page)

    def _compare(self, rows: Iterator[R], last: int) -> int:
        count = 0
        for row, event in zip_longest(rows, by_position(self._events.filter(pk__lte=last))):
            expected = None if row is None else self._make(row)
            if expected is None or (event is not None and event.notification_id < expected.notification_id):
                raise ImportedEventsError(self._text(event, "is not among those that were to be taken over"))
            if event is None or event.notification_id > expected.notification_id:
                raise ImportedEventsError(self._text(expected, "is missing"))
            problem = self._differs(cast(R, row), event)
            if problem is not None:
                raise ImportedEventsError(self._text(event, problem))
            count += 1
        return count

    def write(self, position: int, event: Any) -> StoredEvent:
        """Return what the application stores of a domain event.

        :raises ImportedEventsError: when the transcoder has no way for it.
        """
        with refusing(lambda why: f"Event {position} of {self.name} cannot be stored ({why}). Nothing was taken over."):
            stored: StoredEvent = self.application.mapper.to_stored_event(event)
        return stored

    def read(self, event: Any) -> Any:
        """Read an event as the application does.

        :raises ImportedEventsError: when it cannot be read.
        """
        stored = StoredEvent(event.originator_id, event.originator_version, event.topic, event.state)
        with refusing(lambda why: self._text(event, UNREADABLE.format(why))):
            return self.application.mapper.to_domain_event(stored)

    def _check_versions(self, last: int) -> None:
        found = self._events.filter(notification_id__lte=last).values("originator_id")
        gaps = found.annotate(n=Count("originator_version"), to=Max("originator_version")).exclude(n=F("to"))
        for each in gaps[:1]:
            raise ImportedEventsError(
                f"Aggregate {each['originator_id']} of {self.name} has {each['n']} events up to version {each['to']}: "
                "one of them is missing, so that it could not be read. Nothing was taken over."
            )

    def _text(self, event: Any, problem: str) -> str:
        return (
            f"Event {event.notification_id} of {self.name} ({event.originator_id} version {event.originator_version}) "
            f"{problem}. Nothing was taken over. Before the import, empty the tables, or leave exactly these events in "
            "them, and stop every other process that writes events."
        )


def refusing(text: Callable[[str], str]) -> AbstractContextManager[None]:
    """Around calls of the user's functions and classes: an error names the event at which the import ends.

    :param text: returns the message for an error's type and text.
    :return: a context manager that raises an ``ImportedEventsError`` for any error.
    """
    return raised_as(lambda error: ImportedEventsError(text(f"{type(error).__name__}: {error}")))


def by_position(query: Any) -> Iterator[Any]:
    """Yield the rows of a query in the order of their ids, without holding all of them in memory."""
    last = 0
    while page := list(query.filter(pk__gt=last).order_by("pk")[:PAGE]):
        yield from page
        last = page[-1].pk


def _model(name: str, table: str, **fields: Any) -> Any:
    options = {"app_label": "former", "apps": Apps(), "db_table": table, "managed": False}
    return type(name, (models.Model,), {"__module__": __name__, "Meta": type("Meta", (), options), **fields})


def _versions() -> dict[str, Any]:
    # A column of ids that an older Django has made may still be text.
    return {
        "application_name": models.CharField(max_length=32),
        "originator_id": RecordUUIDField(),
        "originator_version": models.BigIntegerField(),
        "topic": models.TextField(),
        "state": RecordBinaryField(),
    }


@cache
def stored_events() -> Any:
    """Return the events of all applications with eventsourcing-django."""
    return _model("FormerEvent", "stored_events", id=models.BigAutoField(primary_key=True), **_versions())


@cache
def snapshots() -> Any:
    """Return their snapshots."""
    return _model("FormerSnapshot", "snapshots", uid=models.BigAutoField(primary_key=True), **_versions())


@cache
def notification_tracking() -> Any:
    """Return all positions at which followers have been in the logs of other applications."""
    return _model(
        "FormerTracking",
        "notification_tracking",
        uid=models.BigAutoField(primary_key=True),
        application_name=models.CharField(max_length=32),
        upstream_application_name=models.CharField(max_length=32),
        notification_id=models.BigIntegerField(),
    )


@cache
def event_journal() -> Any:
    """Return the events that djangoevents has stored."""
    texts = ("event_type", "aggregate_id", "aggregate_type")
    hidden = ("module_name", "class_name", "stored_entity_id")
    return _model(
        "FormerJournal",
        "event_journal",
        id=models.AutoField(primary_key=True),
        event_id=models.CharField(max_length=255),
        event_version=models.IntegerField(null=True),
        event_data=models.TextField(),
        aggregate_version=models.IntegerField(),
        create_date=models.DateTimeField(),
        metadata=models.TextField(),
        **{each: models.CharField(max_length=255) for each in texts},
        **{each: models.CharField(max_length=255, db_column=f"_{each}") for each in hidden},
    )


def check_tables(using: str, tables: Iterable[Any]) -> None:
    """Check that tables are there.

    :param using: the alias of the database.
    :raises ConfigurationError: naming the first one that is not.
    """
    if using not in connections:
        raise ConfigurationError(f"DATABASES has no {using!r}: it has {', '.join(map(repr, connections))}.")
    connection: Any = connections[using]
    with connection.cursor() as cursor:
        found = set(connection.introspection.table_names(cursor))
    for each in tables:
        if each._meta.db_table not in found:
            raise ConfigurationError(f"Database {using!r} has no table {each._meta.db_table!r}: say which one has it.")
