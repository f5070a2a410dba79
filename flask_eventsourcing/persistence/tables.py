"""The tables of an application: mixins for your own record classes, and functions that make the default ones.

The tables have the names and columns that the ``eventsourcing`` library's own modules give them, so that either can
read what the other wrote; ``docs/models.md`` says what the further columns are for.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime  # noqa: F401  # named in a type comment
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.engine import Dialect as SQLAlchemyDialect

from .._patches import forget_class
from ..config import OriginatorIdType, is_plain
from ..exceptions import ConfigurationError
from ..metadata.values import to_json
from .dialects import column_type, keep_transactions, table_options
from .dialects.base import new_identity
from .dialects.event_tables import COLUMN_VALUES, EVENT_COLUMNS, POSITION, VERSION_KEY
from .record_checks import check_columns, check_ids, check_types, is_filled

if TYPE_CHECKING:
    # For type checkers, because SQLAlchemy-Utils has no types.
    BaseUUIDType: TypeAlias = sa.types.TypeDecorator[uuid.UUID]
else:
    from sqlalchemy_utils import UUIDType as BaseUUIDType

POSITION_TYPE = column_type("position", sa.BigInteger())
STATE = column_type("state", sa.LargeBinary())
TEXT_ID = column_type("text id", sa.String(255))
TOPIC = column_type("topic", sa.Text())
TIME = column_type("time", sa.DateTime())
MOMENT = column_type("time", sa.DateTime(timezone=True))
CORRELATION = column_type("correlation", sa.String(128))
Implementation: TypeAlias = sa.types.TypeEngine[Any] | type[sa.types.TypeEngine[Any]]


class UUIDType(BaseUUIDType):
    """SQLAlchemy-Utils' type, native where the database has one and ``CHAR(32)`` elsewhere.

    The base type's ``BINARY(16)`` can be reflected as ``NUMERIC(16)``, so Alembic's comparison of types finds a change
    every time; ``CHAR(32)`` is reflected as it is. The library itself also stores the hexadecimal text.
    """

    cache_ok: bool | None = True

    def __init__(self) -> None:
        super().__init__(binary=False)

    @property
    def python_type(self) -> type[uuid.UUID]:
        """The type of the values: ``uuid.UUID``."""
        return uuid.UUID

    def bind_processor(self, dialect: SQLAlchemyDialect) -> Callable[[Any], Any]:
        """Return the function that makes a driver's value: text, which every driver takes."""
        text = str if self._is_native(dialect) else _hexadecimal

        def bind(value: Any) -> str | None:
            return text(value if isinstance(value, uuid.UUID) else uuid.UUID(value)) if value is not None else None

        return bind

    def result_processor(self, dialect: SQLAlchemyDialect, coltype: object) -> Callable[[Any], Any]:
        """Return the function that makes a ``UUID`` of a driver's value, which some drivers have made already."""
        return _as_uuid

    def _is_native(self, dialect: SQLAlchemyDialect) -> bool:
        return isinstance(self.load_dialect_impl(dialect), sa.Uuid)

    def __repr__(self) -> str:
        return "UUIDType()"


def _hexadecimal(value: uuid.UUID) -> str:
    return value.hex


_new, _set_int = object.__new__, vars(uuid.UUID)["int"].__set__
_set_is_safe, _UNKNOWN = vars(uuid.UUID)["is_safe"].__set__, uuid.SafeUUID.unknown


def _as_uuid(value: Any) -> uuid.UUID | None:
    if type(value) is str and len(value) == 32 and value.isalnum():
        # In the spelling of the column. The constructor of UUID takes five times as long, as it knows other spellings.
        made = _new(uuid.UUID)
        _set_int(made, int(value, 16))
        _set_is_safe(made, _UNKNOWN)
        return made
    return value if value is None or isinstance(value, uuid.UUID) else uuid.UUID(value)


class MetadataType(sa.types.TypeDecorator[dict[str, str]]):
    """A mapping of strings to strings: JSON if the database has a type that is fast to search, else bytes, as
    version 10 of the library stores it."""

    impl: Implementation = sa.LargeBinary
    cache_ok: bool | None = True

    def load_dialect_impl(self, dialect: SQLAlchemyDialect) -> sa.types.TypeEngine[Any]:
        """Return the type of the column."""
        return column_type("metadata", sa.LargeBinary()).dialect_impl(dialect)

    def bind_processor(self, dialect: SQLAlchemyDialect) -> Callable[[Any], Any] | None:
        """Return the function that makes a driver's value: what the database's JSON takes, or bytes."""
        implementation: Any = self.load_dialect_impl(dialect)
        if isinstance(implementation, sa.JSON):
            found: Callable[[Any], Any] | None = implementation.bind_processor(dialect)  # type: ignore[no-untyped-call]
            return found
        return lambda value: None if value is None else to_json(value).encode()

    def process_result_value(self, value: Any, dialect: SQLAlchemyDialect) -> dict[str, str] | None:
        """Return the mapping."""
        if value is not None and not isinstance(value, dict):
            value = json.loads(value if isinstance(value, str) else bytes(value))
        return cast("dict[str, str] | None", value)

    def column_expression(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any] | None:
        """Return what is selected: JSON as text, which no driver decodes by an engine's ``json_deserializer``."""
        is_json = isinstance(self.impl_instance, sa.JSON)
        return sa.type_coerce(sa.cast(column, sa.Text()), self) if is_json else column

    def __repr__(self) -> str:
        return "MetadataType()"


class OnTable:
    """The attributes that a record class gets from its declarative base, for type checkers."""

    if TYPE_CHECKING:
        __table__: ClassVar[sa.FromClause]
        metadata: ClassVar[sa.MetaData]

        def __init__(self, **columns: Any) -> None: ...


def table_of(model: type[OnTable]) -> sa.Table:
    """Return the table of a record class."""
    table = model.__table__
    if not isinstance(table, sa.Table):
        raise ConfigurationError(f"{model.__qualname__} is mapped to {table!r}, which is not a table: map it to one.")
    return table


# The columns have their types in comments: annotated class attributes would have to be fields of a dataclass when the
# declarative base is a ``MappedAsDataclass``, and a mixin cannot know.
class _RecordMixin(OnTable):
    """The columns that both kinds of event records share."""

    __originator_id_type__: ClassVar[OriginatorIdType] = "uuid"
    __originator_id_options__: ClassVar[dict[str, Any]] = {"nullable": False}

    if TYPE_CHECKING:
        originator_id: orm.Mapped[uuid.UUID | str]
    topic = orm.mapped_column(TOPIC, nullable=True)  # type: orm.Mapped[str]
    state = orm.mapped_column(STATE, nullable=True)  # type: orm.Mapped[bytes]
    event_id = orm.mapped_column(UUIDType(), nullable=True)  # type: orm.Mapped[uuid.UUID | str | None]
    # A declarative class keeps the name for its own ``MetaData``.
    event_metadata = orm.mapped_column("metadata", MetadataType(), nullable=True)  # type: orm.Mapped[dict[str, str] | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if cls.__originator_id_type__ == "text" and "originator_id" not in cls.__dict__:
            cls.originator_id = orm.mapped_column(TEXT_ID, **cls.__originator_id_options__)
        super().__init_subclass__(**kwargs)


class StoredEventMixin(_RecordMixin):
    """Columns of a record class of events: add it to a model of yours, which may have more columns.

    Set ``__originator_id_type__ = "text"`` for text ids.

    ``notification_id`` is the position in the application's log; ``originator_id`` and ``originator_version`` are
    the aggregate's; ``topic`` names the event's class and ``state`` is the serialised event. ``event_id``,
    ``recorded_at`` (in UTC), ``event_metadata`` (the column ``metadata``) and ``correlation_id`` are nullable.
    """

    notification_id = orm.mapped_column(POSITION_TYPE, primary_key=True, autoincrement=True)  # type: orm.Mapped[int]
    originator_id = orm.mapped_column(UUIDType(), nullable=False)  # type: orm.Mapped[uuid.UUID | str]
    originator_version = orm.mapped_column(POSITION_TYPE, nullable=False)  # type: orm.Mapped[int]
    recorded_at = orm.mapped_column(MOMENT, nullable=True)  # type: orm.Mapped[datetime | None]
    correlation_id = orm.mapped_column(CORRELATION, nullable=True)  # type: orm.Mapped[str | None]

    @classmethod
    def column_values(cls, event: Any, metadata: Mapping[str, str]) -> Mapping[str, Any]:
        """Return the values of your own columns by the columns' names; columns without a value are NULL.

        It is called for each event, on every database, inside a session and outside. Override it in your class.

        :param event: the domain event if an application saves it, else the library's ``StoredEvent``.
        :param metadata: the metadata that are stored with it.
        """
        return {}

    if TYPE_CHECKING:
        # A class of the user's may have a tuple or a mapping instead.
        __table_args__: Any
    else:

        @orm.declared_attr.directive
        def __table_args__(cls) -> Any:  # noqa: N805
            return event_table_arguments(cls.__tablename__)


class SnapshotMixin(_RecordMixin):
    """Columns of a record class of snapshots: the aggregate's id and version, the snapshot's topic and state.

    Add it to a model of yours for more columns, and pass that as ``snapshot_model``.
    """

    __originator_id_options__: ClassVar[dict[str, Any]] = {"primary_key": True}

    originator_id = orm.mapped_column(UUIDType(), primary_key=True)  # type: orm.Mapped[uuid.UUID | str]
    originator_version = orm.mapped_column(POSITION_TYPE, primary_key=True, autoincrement=False)  # type: orm.Mapped[int]


class TrackingMixin(OnTable):
    """Columns of how far the log of each upstream application is processed. Pass your own as ``tracking_model``."""

    application_name = orm.mapped_column(TEXT_ID, primary_key=True)  # type: orm.Mapped[str]
    notification_id = orm.mapped_column(POSITION_TYPE, nullable=True)  # type: orm.Mapped[int | None]


def event_table_arguments(table_name: str, **options: Any) -> tuple[Any, ...]:
    """Return the ``__table_args__`` of a class of events: call it if yours has more. It has the key of conflicts."""
    key = sa.UniqueConstraint(*VERSION_KEY, name=f"{table_name}_originator_key")
    return key, {**table_options(), **options}


@dataclass(frozen=True)
class Models:
    """The three record classes of one application. ``EventSourcing`` makes them, or takes yours."""

    StoredEvent: type[StoredEventMixin]
    Snapshot: type[SnapshotMixin]
    Tracking: type[TrackingMixin]

    @property
    def tables(self) -> Mapping[str, sa.Table]:
        """The tables by their use: ``events``, ``snapshots``, ``tracking``. Migrations need them."""
        return {
            "events": table_of(self.StoredEvent),
            "snapshots": table_of(self.Snapshot),
            "tracking": table_of(self.Tracking),
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
    """Make an application's three record classes on a declarative base, or take yours. ``PlainHost`` needs them.

    :raises ConfigurationError: when a given record class lacks something, or a table name is taken; nothing was made
        then.
    """
    names = TableNames.of(application_name)
    own = {"stored_event_model": stored_event_model, "snapshot_model": snapshot_model, "tracking_model": tracking_model}
    check_models(base, application_name, schema=schema, bind_key=bind_key, **own)
    # Both tables are searched for an id in the same way.
    own_ids = [each.__table__.c.originator_id.type for each in (stored_event_model, snapshot_model) if each]
    extra: dict[str, Any] = {"__originator_id_type__": originator_id_type}
    if bind_key is not None:
        extra["__bind_key__"] = bind_key

    def model(suffix: str, mixin: type[Any], table_name: str) -> Any:
        body = {"__tablename__": table_name, "__module__": __name__, **extra}
        if mixin is not TrackingMixin and own_ids:
            body["originator_id"] = orm.mapped_column(own_ids[0], **mixin.__originator_id_options__)
        if schema is not None:
            body["__table_args__"] = _with_schema(mixin, table_name, schema)
        return type(base)(f"{application_name}{suffix}", (mixin, base), body)

    models = Models(
        stored_event_model or model("StoredEvent", StoredEventMixin, names.events),
        snapshot_model or model("Snapshot", SnapshotMixin, names.snapshots),
        tracking_model or model("Tracking", TrackingMixin, names.tracking),
    )
    _finish(models, [each for each in own.values() if each is not None])
    return models


def index_correlation(models: Models) -> None:
    """Give the column ``correlation_id`` of the events an index, to find the events of a request."""
    table = models.tables["events"]
    name = f"{table.name}_correlation_idx"
    if "correlation_id" in table.c and name not in {index.name for index in table.indexes}:
        sa.Index(name, table.c.correlation_id)


def _finish(models: Models, own: Iterable[Any]) -> None:
    """Check the columns that a user's base has added to the record classes, and set how the tables are created.

    :raises ConfigurationError: after the classes that were made are removed again.
    """
    made = [model for model in (models.StoredEvent, models.Snapshot, models.Tracking) if model not in own]
    try:
        for model in made:
            mixin = next(each for each in (StoredEventMixin, SnapshotMixin, TrackingMixin) if issubclass(model, each))
            check_types(model, mixin, table_of(model), ())
    except ConfigurationError:
        for model in made:
            forget_class(model)
        raise
    keep_transactions(models.tables.values())
    if is_filled(models.StoredEvent):
        models.tables["events"].info[COLUMN_VALUES] = models.StoredEvent.column_values
    if models.Tracking in made:
        # A record class of the user's may need further values. Its log gets an identity when it is first asked for.
        sa.event.listen(models.tables["tracking"], "after_create", _identify)


def _identify(tracking_table: sa.Table, connection: Any, **_: Any) -> None:
    # Not if the statements are only printed.
    if isinstance(connection, Connection):
        connection.execute(sa.insert(tracking_table).values(new_identity()))


def check_models(
    base: Any,
    application_name: str,
    *,
    schema: str | None = None,
    bind_key: str | None = None,
    id_type: OriginatorIdType | None = None,
    stored_event_model: Any = None,
    snapshot_model: Any = None,
    tracking_model: Any = None,
) -> None:
    """Check what :func:`make_models` is going to make.

    :param id_type: the type of the application's ids, if it is known.
    :raises ConfigurationError: when a given record class lacks something, or a table name is taken.
    """
    if not is_plain(application_name) or application_name != application_name.strip():
        raise ConfigurationError(
            f"An application is called {application_name!r}: a name has no control characters, no unpaired "
            "surrogates, and no spaces at its ends. Set another class attribute 'name'."
        )
    names = TableNames.of(application_name)
    if stored_event_model is not None:
        check_columns(stored_event_model, StoredEventMixin, (POSITION, *EVENT_COLUMNS), VERSION_KEY)
    if snapshot_model is not None:
        check_columns(snapshot_model, SnapshotMixin, EVENT_COLUMNS, VERSION_KEY)
    if tracking_model is not None:
        check_columns(tracking_model, TrackingMixin, ("application_name", POSITION), {"application_name"})
    check_ids([each for each in (stored_event_model, snapshot_model) if each is not None], application_name, id_type)
    for model, name in (
        (stored_event_model, names.events),
        (snapshot_model, names.snapshots),
        (tracking_model, names.tracking),
    ):
        if model is None:
            _refuse_taken(base, name, schema, bind_key)


def _with_schema(mixin: type[Any], table_name: str, schema: str) -> Any:
    return event_table_arguments(table_name, schema=schema) if mixin is StoredEventMixin else {"schema": schema}


def _refuse_taken(base: Any, table_name: str, schema: str | None, bind_key: str | None) -> None:
    extension = getattr(base, "__fsa__", None)
    metadata = extension.metadatas.get(bind_key) if extension is not None else base.metadata
    key = f"{schema}.{table_name}" if schema else table_name
    if metadata is not None and key in metadata.tables:
        raise ConfigurationError(
            f"Table {key!r} is taken by another model on the same metadata: rename that model's table, or give the "
            "application another name; if db.reflect() has put it there, call es.init_app(app) before that."
        )
