"""Checks record classes of the user's, and makes their equivalents for SQLAlchemy, which makes the statements."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from django.core.exceptions import ValidationError
from django.db import connections, models
from sqlalchemy.ext.compiler import compiles

from ...exceptions import ConfigurationError
from ...models import SnapshotMixin, StoredEventMixin, TrackingMixin
from ...persistence.dialects.event_tables import METADATA_COLUMNS
from .record_fields import RecordTextField, RecordUUIDField

MIXINS: Mapping[str, type[Any]] = {
    "AbstractSnapshot": SnapshotMixin,
    "AbstractStoredEvent": StoredEventMixin,
    "AbstractTracking": TrackingMixin,
}
QUOTED = re.compile(r"([\"`])(.+)\1|([^\"`]+([\"`])\.\4[^\"`]+)")
"""A name that Django does not quote, or that is complete only with the quotes that Django adds."""
TEXT_ID = "text id"
"""The kind of a field with the ids of aggregates that are texts."""


class OwnType(sa.types.UserDefinedType[Any]):
    """The SQLAlchemy type of a field of the user's: Django knows the column's type and prepares the values.

    :param field: the field.
    """

    cache_ok: bool | None = True

    def __init__(self, field: Any) -> None:
        self.field = field

    def bind_processor(self, dialect: Any) -> Any:
        """Return the function that makes a driver's value."""
        connection = connections[dialect.alias]

        def prepare(value: Any) -> Any:
            try:
                return self.field.get_db_prep_save(value, connection)
            except ValidationError as error:
                raise ValueError(f"The field {self.field.name} does not take it.") from error

        return prepare


@compiles(OwnType)
def _compiled(kind: OwnType, compiler: Any, **_: Any) -> str:
    found: str = kind.field.db_type(connections[compiler.dialect.alias])
    return found


def check_record_class(model: Any, base: type[models.Model], unique: Collection[str]) -> None:
    """Check that a record class of the user's stores events that can be read, and that it finds conflicts.

    :param base: the abstract class of ``models``.
    :param unique: the fields whose values must be unique together.
    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    options: Any = getattr(model, "_meta", None)
    if not (isinstance(model, type) and issubclass(model, base)) or options.abstract or options.proxy:
        raise ConfigurationError(f"{model!r} is no record class with a table: derive it from {base.__name__}.")
    if options.parents:
        raise ConfigurationError(
            f"Record class {model.__name__} has columns in the table of {next(iter(options.parents)).__name__}: derive "
            "it from abstract models only."
        )
    for theirs in base._meta.local_concrete_fields:
        _check_brought(model, theirs)
    keys = [{each.name for each in options.pk_fields}, *map(set, options.unique_together)]
    keys += [set(each.fields) for each in options.total_unique_constraints]
    if set(unique) not in keys:
        raise ConfigurationError(
            f"Record class {model.__name__} has no unique key of {', '.join(sorted(unique))}, without which a conflict "
            f"would not be noticed: write class Meta({base.__name__}.Meta), or name them in a UniqueConstraint."
        )
    for field in _further(model, base):
        _check_further(model, field)


def _check_brought(model: Any, theirs: Any) -> None:
    """Check a field of the abstract class, which the user's class may have removed or replaced."""
    own = next((each for each in model._meta.local_concrete_fields if each.name == theirs.name), None)
    if own is None and theirs.name in METADATA_COLUMNS:
        return
    kinds = [getattr(theirs, "kind", None)]
    classes: tuple[type[Any], ...] = (type(theirs),)
    if theirs.name == "originator_id":
        kinds, classes = ["uuid", TEXT_ID], (RecordUUIDField, RecordTextField)
    is_same = isinstance(own, classes) and getattr(own, "kind", None) in kinds and own.column == theirs.column
    if not is_same:
        raise ConfigurationError(
            f"Field {theirs.name!r} of record class {model.__name__} differs from that of the abstract class: do not "
            "define it in your class."
        )


def _further(model: Any, base: type[models.Model]) -> list[Any]:
    """Return the fields of a record class that the abstract class does not have."""
    brought = {each.name for each in base._meta.local_concrete_fields}
    return [each for each in model._meta.local_concrete_fields if each.name not in brought]


def _check_further(model: Any, field: Any) -> None:
    what = f"Field {field.name!r} of record class {model.__name__}"
    if field.has_default() or getattr(field, "auto_now", False) or getattr(field, "auto_now_add", False):
        raise ConfigurationError(
            f"{what} has a default in Python, which would not be used, as events are inserted without the ORM: give it "
            "a db_default, or return its value from column_values()."
        )
    if not (field.null or _is_given(field) or _fills(model)):
        raise ConfigurationError(
            f"{what} is NOT NULL and has no db_default, and events are inserted without it: set null=True, give it a "
            "db_default, or return its value from column_values()."
        )


def _is_given(field: Any) -> bool:
    return bool(field.generated or field.has_db_default())


def _fills(model: Any) -> bool:
    found = getattr(model, "column_values", None)
    return found is not None and found.__func__ is not vars(_base_of(model))["column_values"].__func__


def _base_of(model: Any) -> Any:
    return next(each for each in model.__mro__ if each.__name__ in MIXINS)


def has_text_ids(model: Any) -> bool:
    """Whether the ids of a record class are texts."""
    kind: str = model._meta.get_field("originator_id").kind
    return kind == TEXT_ID


def place_of(db_table: str) -> tuple[str | None, str]:
    """Return the schema and the name of a table, of which ``db_table`` may have both: ``'"schema"."table"'``."""
    found = QUOTED.fullmatch(db_table)
    if found is None:
        return None, db_table
    schema, _, name = (found[2] or found[3]).replace("`", '"').rpartition('"."')
    return schema or None, name


def mirrored(base: Any, model: Any) -> Any:
    """Return the SQLAlchemy class for a record class of the user's.

    :param base: a declarative base.
    """
    abstract = _base_of(model)
    options: Any = model._meta
    schema, name = place_of(options.db_table)
    body: dict[str, Any] = {"__tablename__": name, "__module__": model.__module__}
    if schema is not None:
        body["metadata"] = sa.MetaData(schema=schema)
    if "originator_id" in {each.name for each in options.local_concrete_fields} and has_text_ids(model):
        body["__originator_id_type__"] = "text"
    there = {each.column for each in options.local_concrete_fields}
    body |= {_attribute(name): None for name in METADATA_COLUMNS if name not in there}
    if _fills(model):
        body["column_values"] = model.column_values
    for field in _further(model, abstract):
        given = sa.FetchedValue() if _is_given(field) else None
        # Any name will do for the attribute: a declarative class reserves some names.
        body[f"own_{field.attname}"] = sa.Column(
            field.column, OwnType(field), nullable=field.null, server_default=given
        )
    return type(base)(model.__name__, (MIXINS[abstract.__name__], base), body)


def _attribute(column: str) -> str:
    return "event_metadata" if column == "metadata" else column
