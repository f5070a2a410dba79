"""Fields of record classes. Their columns are the same as on every other host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from functools import cache
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from django.core.exceptions import ValidationError
from django.db import models

from ...persistence.dialects import DIALECTS
from ...persistence.tables import CORRELATION, MOMENT, STATE, TEXT_ID, TIME, TOPIC, MetadataType, UUIDType

TYPES: Mapping[str, sa.types.TypeEngine[Any]] = {
    "correlation": CORRELATION,
    "metadata": MetadataType(),
    "moment": MOMENT,
    "state": STATE,
    "text": sa.Text(),
    "text id": TEXT_ID,
    "time": TIME,
    "topic": TOPIC,
    "uuid": UUIDType(),
}
"""The types of columns by their kind."""


@cache
def _dialect(vendor: str, driver: str, is_second: bool) -> Any:
    # The values of another driver of the database may differ.
    name = f"{vendor}.{driver}" if driver in DIALECTS[vendor].drivers else vendor
    return sa.dialects.registry.load(name)(**({"is_mariadb": True} if is_second else {}))


def dialect_of(connection: Any) -> Any:
    """Return SQLAlchemy's dialect of the database of a connection, or None for one that is not supported."""
    # Django has one vendor for two databases, whose collations differ. The server tells which one it is.
    is_second = getattr(connection, "mysql_is_mariadb", False)
    if connection.vendor not in DIALECTS:
        return None
    return _dialect(connection.vendor, connection.Database.__name__.lower(), is_second)


def zone_of(connection: Any) -> tzinfo:
    """Return the time zone of values that the driver returns without one, though the database stores one.

    Without ``USE_TZ``, Django lets the driver remove the zone, which is that of the connection.
    """
    return ZoneInfo(connection.timezone_name) if connection.features.supports_timezones else UTC


class _RecordField(models.Field):
    """A field with the type of a kind of column.

    :param kind: one of :data:`TYPES`.
    """

    kind = ""

    def __init__(self, *args: Any, kind: str = "", **options: Any) -> None:
        self.given_kind = kind
        self.kind = kind or self.kind
        super().__init__(*args, **options)

    def db_type(self, connection: Any) -> str | None:
        """Return the type of the column. On a database that is not supported, it is Django's type of the field."""
        dialect = dialect_of(connection)
        found: str | None = super().db_type(connection) if dialect is None else self._type.compile(dialect)
        return found

    @property
    def _type(self) -> Any:
        return TYPES[self.kind]

    def _bound(self, value: Any, connection: Any) -> Any:
        """Return the value for the driver, in the form that SQLAlchemy gives it."""
        dialect = dialect_of(connection)
        bind = None if dialect is None else self._type.dialect_impl(dialect).bind_processor(dialect)
        return value if bind is None or value is None else bind(value)

    def rel_db_type(self, connection: Any) -> str | None:
        """Return the type of a column that refers to it."""
        return self.db_type(connection)

    def deconstruct(self) -> Any:
        """Return what a migration needs to make the field again."""
        name, path, args, options = super().deconstruct()
        if self.given_kind:
            options["kind"] = self.given_kind
        return name, path, args, options


class RecordUUIDField(_RecordField, models.UUIDField):
    """A UUID: native where every driver takes it so, and its 32 hexadecimal digits elsewhere."""

    kind = "uuid"

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        """Return what the driver gets."""
        return self._bound(self.to_python(value), connection)

    def get_internal_type(self) -> str:
        """Return another name than that of Django's field, which is native in more databases."""
        return "RecordUUIDField"

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> UUID | None:
        """Return the UUID."""
        return value if value is None or isinstance(value, UUID) else UUID(value)


class RecordBinaryField(_RecordField, models.BinaryField):
    """Bytes."""

    kind = "state"

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> bytes | None:
        """Return bytes, where some drivers return a view of them."""
        return None if value is None else bytes(value)


class RecordTextField(_RecordField, models.TextField):
    """Text, which is compared byte by byte where it is a key.

    Use ``RecordTextField(kind="text id")`` for ``originator_id`` in a record class of your own whose ids are texts.
    """

    kind = "text"


class RecordTimeField(_RecordField, models.DateTimeField):
    """A time in UTC, whatever ``USE_TZ`` and ``TIME_ZONE`` say."""

    kind = "time"

    def get_internal_type(self) -> str:
        """Return another name than that of Django's field, which depends on settings."""
        return "RecordTimeField"

    def get_prep_value(self, value: Any) -> Any:
        """Return a time in UTC. A naive time is taken as UTC."""
        found = models.Field.get_prep_value(self, value)
        if isinstance(found, str):
            found = datetime.fromisoformat(found)
        return found if not isinstance(found, datetime) or found.tzinfo is None else found.astimezone(UTC)

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        """Return what the driver gets."""
        found = self.get_prep_value(value)
        if not isinstance(found, datetime):
            return found
        has_zone = str(self.db_type(connection)).endswith(" WITH TIME ZONE")
        return self._bound(found.replace(tzinfo=UTC if has_zone else None), connection)

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> datetime | None:
        """Return the time with its zone. Drivers return text, or times with or without a zone."""
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if value is None:
            return None
        if value.tzinfo is None:
            value = value.replace(tzinfo=zone_of(connection) if self._type.timezone else UTC)
        found: datetime = value.astimezone(UTC)
        return found

    def value_from_object(self, obj: Any) -> Any:
        """Return text for dumps and forms, because Django's JSON keeps only the milliseconds of a time."""
        value = super().value_from_object(obj)
        return value.isoformat() if isinstance(value, datetime) else value

    def value_to_string(self, obj: Any) -> str:
        """Return the same for dumps in formats that have only text."""
        return self.value_from_object(obj) or ""

    def to_python(self, value: Any) -> Any:
        """Return the time."""
        if value is None or isinstance(value, datetime):
            return value
        try:
            return datetime.fromisoformat(value)
        except (TypeError, ValueError) as error:
            raise ValidationError(self.error_messages["invalid"], code="invalid", params={"value": value}) from error


class RecordMetadataField(_RecordField):
    """A mapping of strings to strings: JSON where the database has a type for it, and its bytes elsewhere."""

    kind = "metadata"
    description = "A mapping of strings to strings"

    def get_internal_type(self) -> str:
        """Return another name than that of Django's JSONField, whose columns differ."""
        return "RecordMetadataField"

    def to_python(self, value: Any) -> Any:
        """Return the mapping; dumps have it as JSON."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValidationError(f"{value!r} is not JSON.", code="invalid") from error

    def value_to_string(self, obj: Any) -> str:
        """Return JSON, for dumps."""
        return json.dumps(self.value_from_object(obj))

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        """Return what the driver gets."""
        return value if isinstance(value, str | bytes) else self._bound(value, connection)

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> dict[str, str] | None:
        """Return the mapping."""
        if value is None or isinstance(value, dict):
            return value
        found: dict[str, str] = json.loads(value if isinstance(value, str) else bytes(value))
        return found
