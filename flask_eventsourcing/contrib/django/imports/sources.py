"""The tables of other packages, as models that no app has: Django migrates them not, and checks them not."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from django.apps.registry import Apps
from django.db import connections, models

from ....exceptions import ConfigurationError
from ..record_fields import RecordBinaryField, RecordUUIDField


def _model(name: str, table: str, **fields: Any) -> Any:
    options = {"app_label": "former", "apps": Apps(), "db_table": table, "managed": False}
    return type(name, (models.Model,), {"__module__": __name__, "Meta": type("Meta", (), options), **fields})


def _versions() -> dict[str, Any]:
    # A column of ids may be text still, that an older Django has made.
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
    """Return the positions up to which followers have processed the events of others, all that they have been at."""
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
