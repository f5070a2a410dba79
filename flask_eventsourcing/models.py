"""The record classes: mixins for your own, and the making of ours on any declarative base.

The tables have the names and columns of the ``eventsourcing`` library's own PostgreSQL module, so that either can
read what the other wrote.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import mysql
from sqlalchemy_utils import UUIDType as BaseUUIDType

from .config import OriginatorIdType
from .exceptions import ConfigurationError

POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
STATE = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
# The default collations of MariaDB and MySQL take "Ada" for "ada", and some "é" for "e".
EXACT = "utf8mb4_bin"
TEXT_ID = (
    sa.String(255)
    .with_variant(sa.Text(), "postgresql")
    .with_variant(mysql.VARCHAR(255, collation=EXACT), "mysql", "mariadb")
)
TOPIC = sa.Text().with_variant(mysql.TEXT(collation=EXACT), "mysql", "mariadb")


class UUIDType(BaseUUIDType):  # type: ignore[misc]  # untyped
    """SQLAlchemy-Utils' type, native on PostgreSQL and ``CHAR(32)`` elsewhere.

    The base type's ``BINARY(16)`` is reflected by SQLite as ``NUMERIC(16)``, so that Alembic's comparison of types
    finds a change every time; ``CHAR(32)`` comes back as it went. The hexadecimal text is also what the library's
    own SQLite module stores.
    """

    cache_ok = True

    def __init__(self) -> None:
        super().__init__(binary=False)

    @property
    def python_type(self) -> type[uuid.UUID]:
        """The type of the values: ``uuid.UUID``."""
        return uuid.UUID

    def __repr__(self) -> str:
        return "UUIDType()"


# The columns are class attributes without annotations: annotated ones would have to be fields of a dataclass when the
# declarative base is a ``MappedAsDataclass``, and a mixin cannot know.
class _RecordMixin:
    """What the two kinds of event record share."""

    __originator_id_type__: ClassVar[OriginatorIdType] = "uuid"
    __originator_id_options__: ClassVar[dict[str, Any]] = {"nullable": False}

    originator_id: ClassVar[Any]
    topic = orm.mapped_column(TOPIC, nullable=True)
    state = orm.mapped_column(STATE, nullable=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if cls.__originator_id_type__ == "text" and "originator_id" not in cls.__dict__:
            cls.originator_id = orm.mapped_column(TEXT_ID, **cls.__originator_id_options__)
        super().__init_subclass__(**kwargs)


class StoredEventMixin(_RecordMixin):
    """Columns of a stored-event record class: add it to a model of yours, which may have nullable columns more.

    Set ``__originator_id_type__ = "text"`` for text ids.

    ``notification_id`` is the position in the application's log; ``originator_id`` and ``originator_version`` are
    the aggregate's; ``topic`` names the event's class and ``state`` is the serialised event.
    """

    notification_id = orm.mapped_column(POSITION, primary_key=True, autoincrement=True)
    originator_id = orm.mapped_column(UUIDType(), nullable=False)
    originator_version = orm.mapped_column(POSITION, nullable=False)

    @orm.declared_attr.directive
    def __table_args__(cls) -> Any:  # noqa: N805
        return event_table_arguments(cls.__tablename__)  # type: ignore[attr-defined]


class SnapshotMixin(_RecordMixin):
    """Columns of a snapshot record class: the aggregate's id and version, the snapshot's topic and state."""

    __originator_id_options__: ClassVar[dict[str, Any]] = {"primary_key": True}

    originator_id = orm.mapped_column(UUIDType(), primary_key=True)
    originator_version = orm.mapped_column(POSITION, primary_key=True, autoincrement=False)


class TrackingMixin:
    """Columns of a tracking record class: how far the log of each upstream application was processed."""

    application_name = orm.mapped_column(TEXT_ID, primary_key=True)
    notification_id = orm.mapped_column(POSITION, nullable=True)


def event_table_arguments(table_name: str, **options: Any) -> tuple[Any, ...]:
    """The ``__table_args__`` of a stored-event class: the key of optimistic concurrency, and the table's options."""
    key = sa.UniqueConstraint("originator_id", "originator_version", name=f"{table_name}_originator_key")
    # Without AUTOINCREMENT, SQLite gives the position of a deleted last event to the next one.
    return key, {"sqlite_autoincrement": True, **options}


@dataclass(frozen=True)
class Models:
    """The three record classes of one application."""

    StoredEvent: Any
    Snapshot: Any
    Tracking: Any

    @property
    def tables(self) -> Mapping[str, sa.Table]:
        """The tables by their use: ``events``, ``snapshots``, ``tracking``."""
        return {
            "events": self.StoredEvent.__table__,
            "snapshots": self.Snapshot.__table__,
            "tracking": self.Tracking.__table__,
        }


@dataclass(frozen=True)
class TableNames:
    """The names that the library gives to the tables of an application."""

    events: str
    snapshots: str
    tracking: str

    @classmethod
    def of(cls, application_name: str) -> TableNames:
        """The names for an application; without a name they are the library's names for that case."""
        prefix = application_name.lower()
        return cls(
            f"{prefix or 'stored'}_events", f"{prefix or 'stored'}_snapshots", f"{prefix or 'notification'}_tracking"
        )


def make_models(
    base: Any,
    application_name: str,
    *,
    originator_id_type: OriginatorIdType = "uuid",
    schema: str | None = None,
    bind_key: str | None = None,
    stored_event_model: Any = None,
    snapshot_model: Any = None,
    tracking_model: Any = None,
) -> Models:
    """Make, or take from the arguments, the three record classes of an application on a declarative base.

    :raises ConfigurationError: when a given record class lacks something, or a table name is taken.
    """
    names = TableNames.of(application_name)
    if stored_event_model is not None:
        check_columns(stored_event_model, StoredEventMixin, {"originator_id", "originator_version"})
    if snapshot_model is not None:
        check_columns(snapshot_model, SnapshotMixin, {"originator_id", "originator_version"})
    if tracking_model is not None:
        check_columns(tracking_model, TrackingMixin, {"application_name"})
    extra: dict[str, Any] = {"__originator_id_type__": originator_id_type}
    if bind_key is not None:
        extra["__bind_key__"] = bind_key

    def model(suffix: str, mixin: type[Any], table_name: str) -> Any:
        _refuse_taken(base, table_name, schema, bind_key)
        body = {"__tablename__": table_name, "__module__": __name__, **extra}
        if schema is not None:
            body["__table_args__"] = _with_schema(mixin, table_name, schema)
        return type(base)(f"{application_name}{suffix}", (mixin, base), body)

    return Models(
        stored_event_model or model("StoredEvent", StoredEventMixin, names.events),
        snapshot_model or model("Snapshot", SnapshotMixin, names.snapshots),
        tracking_model or model("Tracking", TrackingMixin, names.tracking),
    )


def _with_schema(mixin: type[Any], table_name: str, schema: str) -> Any:
    return event_table_arguments(table_name, schema=schema) if mixin is StoredEventMixin else {"schema": schema}


def _refuse_taken(base: Any, table_name: str, schema: str | None, bind_key: str | None) -> None:
    extension = getattr(base, "__fsa__", None)
    metadata = extension.metadatas.get(bind_key) if extension is not None else base.metadata
    key = f"{schema}.{table_name}" if schema else table_name
    if metadata is not None and key in metadata.tables:
        raise ConfigurationError(
            f"Table {key!r} is taken by another model on the same metadata: rename that model's table, "
            "or give the application another name."
        )


def check_columns(model: Any, mixin: type[Any], unique: Iterable[str]) -> None:
    """Check that a record class has a mixin's columns, and that its key columns are unique together.

    :raises ConfigurationError: naming what is missing and the mixin that brings it.
    """
    table = getattr(model, "__table__", None)
    if not isinstance(table, sa.Table):
        raise ConfigurationError(
            f"{model!r} is not a mapped class with a table: derive it from {mixin.__name__} and your db.Model."
        )
    expected = [name for name, value in _declared(mixin) if isinstance(value, orm.MappedColumn)]
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


def _declared(mixin: type[Any]) -> list[tuple[str, Any]]:
    return [(n, v) for cls in mixin.__mro__ for n, v in vars(cls).items() if not n.startswith("__")]
