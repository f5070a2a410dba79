"""Checks a user's own record class: events that are stored with it must be readable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy_utils import UUIDType as BaseUUIDType

from ..config import OriginatorIdType
from ..exceptions import ConfigurationError
from .dialects.event_tables import METADATA_COLUMNS, POSITION

KINDS: Mapping[str, tuple[tuple[type[Any], ...], str]] = {
    POSITION: ((sa.Integer,), "an integer"),
    "originator_version": ((sa.Integer,), "an integer"),
    "topic": ((sa.String,), "text"),
    "state": ((sa.LargeBinary, sa.BINARY, sa.VARBINARY), "bytes (LargeBinary)"),
    "originator_id": ((sa.String, sa.Uuid, BaseUUIDType), "a UUID (UUIDType) or text"),
    "application_name": ((sa.String,), "text"),
}
"""The types of the columns that statements name, with words for them."""
METADATA_KINDS: Mapping[str, tuple[tuple[type[Any], ...], str]] = {
    "event_id": ((sa.Uuid, BaseUUIDType), "a UUID (UUIDType)"),
    "recorded_at": ((sa.DateTime,), "a time (DateTime)"),
    "metadata": ((sa.JSON, sa.types.TypeDecorator), "a mapping (MetadataType)"),
    "correlation_id": ((sa.String,), "text"),
}
"""The same for the columns that a record class may leave out."""


def check_columns(model: Any, mixin: type[Any], expected: Sequence[str], unique: Iterable[str]) -> None:
    """Check that a record class has the columns that it needs, and that its key columns are unique together.

    :raises ConfigurationError: naming what is missing and the mixin that brings it.
    """
    table = getattr(model, "__table__", None)
    if not isinstance(table, sa.Table):
        raise ConfigurationError(
            f"{model!r} is not a mapped class with a table: derive it from {mixin.__name__} and your db.Model."
        )
    missing = [name for name in expected if name not in table.columns]
    if missing:
        raise ConfigurationError(
            f"Record class {model.__name__} has no column {', '.join(repr(name) for name in missing)}: "
            f"derive it from flask_eventsourcing.{mixin.__name__}, or add what is missing."
        )
    wanted = set(unique)
    keys = [{column.name for column in table.primary_key.columns}]
    keys += [{c.name for c in item.columns} for item in table.constraints if isinstance(item, sa.UniqueConstraint)]
    keys += [{c.name for c in index.columns} for index in table.indexes if index.unique]
    if wanted not in keys:
        raise ConfigurationError(
            f"Record class {model.__name__} needs a primary key or unique constraint on "
            f"({', '.join(sorted(wanted))}): without it a conflict would not be noticed."
        )
    check_types(model, mixin, table, expected)


def check_types(model: Any, mixin: type[Any], table: sa.Table, expected: Iterable[str]) -> None:
    """Check the types of the columns that statements name, and that rows can be inserted without the others.

    :raises ConfigurationError: naming the column and the remedy.
    """
    for name in expected:
        classes, kind = KINDS[name]
        found = table.columns[name].type
        if not isinstance(found, classes) or (isinstance(found, sa.Uuid) and not found.as_uuid):
            raise ConfigurationError(
                f"Column {name!r} of record class {model.__name__} is {found!r}, and has to be {kind}: derive the "
                f"class from flask_eventsourcing.{mixin.__name__}, which brings it."
            )
    _check_metadata(model, mixin, table)
    # The class itself fills its columns.
    fills = is_filled(model)
    for column in table.columns:
        if column.name in KINDS or column.server_default is not None or column is table.autoincrement_column:
            continue
        what = f"Column {column.name!r} of record class {model.__name__}"
        if column.default is not None:
            raise ConfigurationError(
                f"{what} has a default in Python, which would not be used, as events are inserted without the ORM: "
                "give it a server_default, or leave the default out."
            )
        if not column.nullable and not fills:
            raise ConfigurationError(
                f"{what} is NOT NULL and has no server_default, and events are inserted without it: make it nullable, "
                "or give it a server_default."
            )


def _check_metadata(model: Any, mixin: type[Any], table: sa.Table) -> None:
    for name in (each for each in METADATA_COLUMNS if each in table.columns):
        classes, kind = METADATA_KINDS[name]
        if not isinstance(table.columns[name].type, classes):
            raise ConfigurationError(
                f"Column {name!r} of record class {model.__name__} is {table.columns[name].type!r}, and has to be "
                f"{kind}: derive the class from flask_eventsourcing.{mixin.__name__}, which brings it, or give your "
                "column another name."
            )


def is_filled(model: Any) -> bool:
    """Whether a record class of events fills columns of its own, with a ``column_values()`` of the user's."""
    found = getattr(model, "column_values", None)
    return found is not None and found.__module__ != f"{__package__}.tables"


def check_ids(models: Iterable[Any], application_name: str, id_type: OriginatorIdType | None) -> None:
    """Check that record classes have ids of one type, the application's.

    :raises ConfigurationError: when the types differ.
    """
    found = {model: model.__table__.columns["originator_id"].type for model in models}
    for model, kind in found.items():
        has: OriginatorIdType = "text" if isinstance(kind, sa.String) else "uuid"
        if id_type is not None and has != id_type:
            remedy = (
                "derive the application from Application[str], or set EVENTSOURCING_ORIGINATOR_ID_TYPE to 'text'"
                if has == "text"
                else 'set __originator_id_type__ = "text" in the class'
            )
            raise ConfigurationError(
                f"The ids of {application_name} are {id_type}, and those of record class {model.__name__} are {has}: "
                f"{remedy}."
            )
    if len({(type(kind), repr(kind)) for kind in found.values()}) > 1:
        names = " and ".join(model.__name__ for model in found)
        raise ConfigurationError(f"The columns originator_id of {names} have two types: give them one.")
