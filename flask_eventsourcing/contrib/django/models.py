"""Record classes as ordinary models of your app: ``BankRecords = event_models(__name__, "Bank")``.

Nothing here depends on settings, so that ``makemigrations`` finds the same in every project.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from django.db import models

from ...config import OriginatorIdType, is_plain
from ...exceptions import ConfigurationError
from ...persistence.dialects.event_tables import VERSION_KEY
from ...persistence.tables import TableNames
from .own_records import TEXT_ID, check_record_class, has_text_ids
from .record_fields import (
    RecordBinaryField,
    RecordMetadataField,
    RecordTextField,
    RecordTimeField,
    RecordUUIDField,
)
from .records import Records, add_records

__all__ = [
    "AbstractSnapshot",
    "AbstractStoredEvent",
    "AbstractTracking",
    "RecordTextField",
    "event_models",
    "projection_models",
]


VIEWED = ("view",)
"""The permissions of models that only the package writes."""


class AbstractStoredEvent(models.Model):
    """Columns of a stored event.

    ``notification_id`` is the position in the application's log; ``originator_id`` and ``originator_version`` are the
    aggregate's; ``topic`` names the event's class and ``state`` is the serialised event.

    Derive a record class of your own from it, with ``class Meta(AbstractStoredEvent.Meta)``, and give it to
    :func:`event_models`. Further fields must be nullable, have a ``db_default``, or get their values from
    :meth:`column_values`. For ids that are texts, write ``originator_id = RecordTextField(kind="text id")``.
    """

    notification_id = models.BigAutoField(primary_key=True)
    originator_id = RecordUUIDField()
    originator_version = models.BigIntegerField()
    topic = RecordTextField(kind="topic", null=True)
    state = RecordBinaryField(null=True)
    event_id = RecordUUIDField(null=True)
    metadata = RecordMetadataField(null=True)
    recorded_at = RecordTimeField(kind="moment", null=True)
    correlation_id = RecordTextField(kind="correlation", null=True)

    class Meta:
        abstract = True
        default_permissions = VIEWED
        constraints = (
            models.UniqueConstraint(fields=list(VERSION_KEY), name="%(app_label)s_%(class)s_originator_key"),
        )

    @classmethod
    def column_values(cls, event: Any, metadata: Mapping[str, str]) -> Mapping[str, Any]:
        """Return the values of your own fields by the columns' names; a column without a value is NULL.

        It is called for each event that is saved. Override it in your class.

        :param event: the domain event if an application saves it, else the library's ``StoredEvent``.
        :param metadata: the metadata that are stored with it.
        """
        return {}

    def __str__(self) -> str:
        return f"{self.originator_id} version {self.originator_version}: {self.topic}"


class AbstractSnapshot(models.Model):
    """Columns of a snapshot: the aggregate's id and version, the snapshot's topic and state.

    Derive a record class of your own from it for more fields, and pass it as ``snapshot_model``.
    """

    pk = models.CompositePrimaryKey(*VERSION_KEY)
    originator_id = RecordUUIDField()
    originator_version = models.BigIntegerField()
    topic = RecordTextField(kind="topic", null=True)
    state = RecordBinaryField(null=True)
    event_id = RecordUUIDField(null=True)
    metadata = RecordMetadataField(null=True)

    class Meta:
        abstract = True
        default_permissions = VIEWED

    def __str__(self) -> str:
        return f"{self.originator_id} version {self.originator_version}: {self.topic}"


class AbstractTracking(models.Model):
    """Columns of the positions up to which the logs of upstream applications were processed.

    Derive a record class of your own from it for more fields, and pass it as ``tracking_model``.
    """

    application_name = RecordTextField(kind="text id", primary_key=True)
    notification_id = models.BigIntegerField(null=True)

    class Meta:
        abstract = True
        default_permissions = VIEWED

    def __str__(self) -> str:
        return f"{self.application_name}: {self.notification_id}"


class AbstractProjection(models.Model):
    """Columns of the checkpoint of a projection, one row for each.

    The commands change these rows; a query of yours may read them, for example for a page of your operators.
    """

    name = RecordTextField(kind="text id", primary_key=True)
    position = models.BigIntegerField(default=0)
    applied = models.BigIntegerField(default=0)
    state = models.CharField(max_length=20, default="active")
    runner = models.CharField(max_length=255, null=True)
    token = models.CharField(max_length=32, null=True)
    claim = models.BigIntegerField(null=True)
    running_since = RecordTimeField(null=True)
    leased_until = RecordTimeField(null=True)
    error = RecordTextField(null=True)
    failed_position = models.BigIntegerField(null=True)
    fingerprint = models.CharField(max_length=64, null=True)
    earlier_fingerprints = RecordTextField(null=True)
    log_id = models.BigIntegerField(null=True)
    last_originator_id = RecordTextField(kind="text id", null=True)
    last_originator_version = models.BigIntegerField(null=True)
    last_event_id = RecordTextField(null=True)
    tables_id = RecordTextField(null=True)
    topics = RecordTextField(null=True)
    topics_position = models.BigIntegerField(null=True)
    changed_by = models.CharField(max_length=255, null=True)
    reason = RecordTextField(null=True)

    class Meta:
        abstract = True
        default_permissions = VIEWED

    def __str__(self) -> str:
        return f"{self.name}: {self.state} at {self.position}"


class AbstractDeadLetter(models.Model):
    """Columns of the dead letters: events that a projection could not apply, and later ones of the same aggregate.

    The admin site and the command ``dead-letters`` apply them again or discard them.
    """

    id = models.BigAutoField(primary_key=True)
    projection = RecordTextField(kind="text id")
    position = models.BigIntegerField()
    originator_id = RecordTextField(kind="text id")
    originator_version = models.BigIntegerField()
    topic = RecordTextField()
    error = RecordTextField(null=True)
    traceback = RecordTextField(null=True)
    attempts = models.IntegerField(default=0)
    failed_at = RecordTimeField(null=True)
    changed_by = models.CharField(max_length=255, null=True)
    reason = RecordTextField(null=True)

    class Meta:
        abstract = True
        default_permissions = (*VIEWED, "retry", "discard")

    def __str__(self) -> str:
        return f"{self.projection} at {self.position}"


class AbstractInlineRange(models.Model):
    """Columns of the positions that inline projections have applied. Only other hosts of the database have such."""

    id = models.BigAutoField(primary_key=True)
    projection = RecordTextField(kind="text id")
    first_position = models.BigIntegerField()
    last_position = models.BigIntegerField()

    class Meta:
        abstract = True
        default_permissions = VIEWED

    def __str__(self) -> str:
        return f"{self.projection}: {self.first_position} to {self.last_position}"


def event_models(
    module: str,
    name: str,
    *,
    originator_id_type: OriginatorIdType = "uuid",
    stored_event_model: type[AbstractStoredEvent] | None = None,
    snapshot_model: type[AbstractSnapshot] | None = None,
    tracking_model: type[AbstractTracking] | None = None,
) -> Records:
    """Declare the events, snapshots, positions, checkpoints and dead letters of an application as models of your app.

    The tables are named as on every other host, ``bank_events`` and so on. As they are models of your app, its
    migrations make and change them::

        BankRecords = event_models(__name__, "Bank")

    :param module: ``__name__`` of your app's module with the models.
    :param name: the application's, ``Bank.name``.
    :param originator_id_type: whether the ids of aggregates are UUIDs (``"uuid"``) or texts (``"text"``).
    :param stored_event_model: a record class of your own, derived from :class:`AbstractStoredEvent`; so are
        *snapshot_model* and *tracking_model* from theirs. It is used instead of a class that is made here.
    :raises ConfigurationError: when the name cannot be used, another module has declared the same, or a record class of
        yours would lose events.
    """
    _check_name("event_models", name)
    given = {
        "stored_event_model": (stored_event_model, AbstractStoredEvent, VERSION_KEY),
        "snapshot_model": (snapshot_model, AbstractSnapshot, VERSION_KEY),
        "tracking_model": (tracking_model, AbstractTracking, ("application_name",)),
    }
    own: dict[str, Any] = {}
    for key, (model, base, unique) in given.items():
        if model is not None:
            check_record_class(model, base, unique)
            own[key] = model
    text_ids = _has_text_ids(name, originator_id_type, [own[key] for key in own if key != "tracking_model"])
    made = {**_event_records(module, name, own, text_ids=text_ids), **_projection_records(module, name)}
    return add_records(name, module, made, own, text_ids=text_ids)


def projection_models(module: str, name: str) -> Records:
    """Declare the checkpoints and dead letters of the projections of an application whose events are in Cassandra.

    Their tables are in the database of the projections' models: ``bank_projections`` and so on.

    :param module: ``__name__`` of your app's module with the models.
    :param name: the application's, ``Bank.name``.
    :raises ConfigurationError: when the name cannot be used, or another module has declared the same.
    """
    _check_name("projection_models", name)
    none = dict.fromkeys(("StoredEvent", "Snapshot", "Tracking"))
    return add_records(name, module, {**none, **_projection_records(module, name)}, {}, text_ids=False, events=False)


def _check_name(function: str, name: str) -> None:
    if not name or not name.isidentifier() or not is_plain(name):
        raise ConfigurationError(f"{function}(__name__, …) takes the name of an application class; found {name!r}.")


def _has_text_ids(name: str, id_type: OriginatorIdType, own: Sequence[Any]) -> bool:
    """Whether the ids are texts, as record classes of the user's say where there are some.

    :raises ConfigurationError: when two of them have different ids.
    """
    found = {has_text_ids(each) for each in own} or {id_type == "text"}
    if len(found) > 1:
        raise ConfigurationError(f"The record classes of {name} have two types of originator_id: give them one.")
    return found.pop()


def _event_records(module: str, name: str, own: Mapping[str, Any], *, text_ids: bool) -> Mapping[str, Any]:
    names = TableNames.of(name)
    key = models.UniqueConstraint(fields=list(VERSION_KEY), name=f"{names.events}_originator_key")

    def ids() -> dict[str, Any]:
        return {"originator_id": RecordTextField(kind=TEXT_ID)} if text_ids else {}

    return {
        "StoredEvent": own.get("stored_event_model")
        or _model(module, name, AbstractStoredEvent, names.events, "event", ids(), key),
        "Snapshot": own.get("snapshot_model")
        or _model(module, name, AbstractSnapshot, names.snapshots, "snapshot", ids()),
        "Tracking": own.get("tracking_model") or _model(module, name, AbstractTracking, names.tracking, "tracking", {}),
    }


def _projection_records(module: str, name: str) -> Mapping[str, Any]:
    prefix = name.lower()
    letters = f"{prefix}_dead_letters"
    key = models.UniqueConstraint(fields=["projection", "position"], name=f"{letters}_position_key")
    return {
        "Projection": _model(module, name, AbstractProjection, f"{prefix}_projections", "projection", {}),
        "DeadLetter": _model(module, name, AbstractDeadLetter, letters, "dead letter", {}, key),
        "InlineRange": _model(module, name, AbstractInlineRange, f"{prefix}_inline_ranges", "inline range", {}),
    }


def _model(
    module: str,
    name: str,
    base: type[models.Model],
    table: str,
    title: str,
    fields: Mapping[str, Any],
    *constraints: Any,
) -> Any:
    body = {
        "db_table": table,
        "constraints": list(constraints),
        "verbose_name": f"{title} of {name}",
        "verbose_name_plural": f"{title}s of {name}",
    }
    own = {"__module__": module, "__qualname__": f"{name}{base.__name__.removeprefix('Abstract')}"}
    made = type(own["__qualname__"], (base,), {**own, **fields, "Meta": type("Meta", (_meta_of(base),), body)})
    # In the module that its name says, where pickled query sets and Django's shell look for it.
    vars(sys.modules[module]).setdefault(made.__name__, made)
    return made


def _meta_of(base: Any) -> type:
    # Django keeps the abstract class there.
    found: type = base.Meta
    return found
