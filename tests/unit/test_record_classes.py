"""A user's own record classes."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy_utils import UUIDType as PlainUUIDType

from flask_eventsourcing import ConfigurationError, SnapshotMixin, StoredEventMixin, TrackingMixin, UUIDType
from flask_eventsourcing.models import check_models, make_models
from flask_eventsourcing.persistence.tables import POSITION_TYPE

ORIGINATOR = ("originator_id", "originator_version")
PURPOSES: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "stored_event_model": (StoredEventMixin, ("notification_id", *ORIGINATOR, "topic", "state")),
    "snapshot_model": (SnapshotMixin, (*ORIGINATOR, "topic", "state")),
    "tracking_model": (TrackingMixin, ("application_name", "notification_id")),
}


def hand_made(*columns: str, arguments: tuple[Any, ...] = (), key: tuple[str, ...] = ("id",)) -> Any:
    """Make a record class without the mixins, with these columns and this primary key."""
    types: dict[str, Any] = {"originator_id": UUIDType(), "topic": sa.Text(), "state": sa.LargeBinary()}
    body: dict[str, Any] = {"__tablename__": "mine", "__table_args__": arguments}
    for name in dict.fromkeys((*columns, *key)):
        body[name] = orm.mapped_column(types.get(name, POSITION_TYPE), primary_key=name in key)
    base = orm.declarative_base()
    return type(base)("Mine", (base,), body)


@pytest.mark.parametrize(
    ("argument", "column"),
    [(argument, column) for argument, (_, columns) in PURPOSES.items() for column in columns],
)
def test_missing_column_is_named(argument: str, column: str) -> None:
    """A record class that lacks a column is refused with the column, the class and the mixin that brings it."""
    mixin, columns = PURPOSES[argument]
    model = hand_made(*(name for name in columns if name != column))
    with pytest.raises(ConfigurationError, match=f"Mine has no column '{column}'") as raised:
        make_models(orm.declarative_base(), "Bank", **{argument: model})
    assert mixin.__name__ in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("stored_event_model", "(originator_id, originator_version)"),
        ("snapshot_model", "(originator_id, originator_version)"),
        ("tracking_model", "(application_name)"),
    ],
)
def test_missing_unique_key_is_named(argument: str, key: str) -> None:
    """A record class without the key by which conflicts are noticed is refused."""
    model = hand_made(*PURPOSES[argument][1])
    with pytest.raises(ConfigurationError) as raised:
        make_models(orm.declarative_base(), "Bank", **{argument: model})
    assert f"unique constraint on {key}" in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((sa.UniqueConstraint(*ORIGINATOR),), id="constraint"),
        pytest.param((sa.UniqueConstraint(*reversed(ORIGINATOR)),), id="other order"),
        pytest.param((sa.Index("unique_key", *ORIGINATOR, unique=True),), id="index"),
    ],
)
def test_any_kind_of_unique_key_will_do(arguments: tuple[Any, ...]) -> None:
    """A record class without the mixins is accepted if it has the columns and the key, however declared."""
    columns = PURPOSES["stored_event_model"][1]
    model = hand_made(*columns, arguments=arguments, key=("notification_id",))
    models = make_models(orm.declarative_base(), "Bank", stored_event_model=model)
    assert models.StoredEvent is model


def test_index_that_is_not_unique_will_not_do() -> None:
    """An index that admits duplicates is not a key."""
    model = hand_made(*PURPOSES["stored_event_model"][1], arguments=(sa.Index("some_index", *ORIGINATOR),))
    with pytest.raises(ConfigurationError, match="unique constraint"):
        make_models(orm.declarative_base(), "Bank", stored_event_model=model)


@pytest.mark.parametrize("argument", PURPOSES)
@pytest.mark.parametrize("model", [object, "Record", 3, StoredEventMixin])
def test_what_is_no_mapped_class_is_refused(argument: str, model: Any) -> None:
    """Something that has no table is refused with what to derive it from."""
    with pytest.raises(ConfigurationError, match="is not a mapped class with a table"):
        make_models(orm.declarative_base(), "Bank", **{argument: model})


def test_refused_record_class_leaves_no_table() -> None:
    """Nothing is added to the metadata when a record class is refused."""
    base = orm.declarative_base()
    for argument in PURPOSES:
        with pytest.raises(ConfigurationError):
            make_models(base, "Bank", **{argument: hand_made("topic")})
    assert base.metadata.tables == {}


@pytest.mark.parametrize("id_type", ["uuid", "text"])
def test_mixin_takes_a_type_of_ids(id_type: str) -> None:
    """A record class made from a mixin may have text ids, and keeps the columns and keys."""
    base: Any = orm.declarative_base()
    events = type(base)("Mine", (StoredEventMixin, base), {"__tablename__": "mine", "__originator_id_type__": id_type})
    snapshots = type(base)(
        "Shots", (SnapshotMixin, base), {"__tablename__": "shots", "__originator_id_type__": id_type}
    )
    models = make_models(base, "Bank", stored_event_model=events, snapshot_model=snapshots)
    expected = UUIDType if id_type == "uuid" else sa.String
    assert isinstance(models.tables["events"].c.originator_id.type, expected)
    assert not models.tables["events"].c.originator_id.nullable
    assert set(models.tables["snapshots"].primary_key.columns.keys()) == set(ORIGINATOR)


@pytest.mark.parametrize(
    ("argument", "column", "kind"),
    [
        ("stored_event_model", "state", sa.Text()),
        ("stored_event_model", "topic", sa.LargeBinary()),
        ("stored_event_model", "originator_version", sa.Text()),
        ("stored_event_model", "originator_id", sa.Integer()),
        ("stored_event_model", "originator_id", sa.Uuid(as_uuid=False)),
        ("snapshot_model", "state", sa.Text()),
        ("tracking_model", "notification_id", sa.Text()),
    ],
)
def test_type_that_cannot_work_is_named(argument: str, column: str, kind: Any) -> None:
    """A column of a type that cannot be read back is refused by name, before anything is stored."""
    base: Any = orm.declarative_base()
    mixin = PURPOSES[argument][0]
    model = type(base)("Mine", (mixin, base), {"__tablename__": "mine", column: orm.mapped_column(kind)})
    with pytest.raises(ConfigurationError, match=f"Column '{column}' of record class Mine is .*{mixin.__name__}"):
        make_models(orm.declarative_base(), "Bank", **{argument: model})


OWN: dict[str, tuple[Any, str]] = {
    "python default": (lambda: orm.mapped_column("more", sa.Integer, default=3), "default in Python"),
    "callable default": (lambda: orm.mapped_column("more", sa.DateTime, default=sa.func.now()), "default in Python"),
    "not null": (lambda: orm.mapped_column("more", sa.Integer, nullable=False), "NOT NULL and has no server_default"),
}


@pytest.mark.parametrize("argument", PURPOSES)
@pytest.mark.parametrize("how", OWN)
def test_own_column_that_would_not_be_filled_is_named(argument: str, how: str) -> None:
    """A further column that an insert without the ORM would leave empty is refused by name."""
    base: Any = orm.declarative_base()
    column, message = OWN[how]
    model = type(base)("Mine", (PURPOSES[argument][0], base), {"__tablename__": "mine", "more": column()})
    with pytest.raises(ConfigurationError, match=f"Column 'more' of record class Mine .*{message}"):
        make_models(orm.declarative_base(), "Bank", **{argument: model})


@pytest.mark.parametrize("how", OWN)
def test_column_that_a_base_brings_is_named(how: str) -> None:
    """What a declarative base adds to every table is refused as a column of one's own is, and nothing is made."""
    column, message = OWN[how]

    class Base(orm.DeclarativeBase):
        more = column()

    with pytest.raises(ConfigurationError, match=f"Column 'more' of record class BankStoredEvent .*{message}"):
        make_models(Base, "Bank")
    assert Base.metadata.tables == {}


@pytest.mark.parametrize("name", ["nullable", "server default", "computed"])
def test_column_that_the_database_fills_is_accepted(name: str) -> None:
    """A further column is accepted that may be NULL, or that the database fills."""
    columns: dict[str, Any] = {
        "nullable": orm.mapped_column(sa.Integer, nullable=True),
        "server default": orm.mapped_column(sa.DateTime, server_default=sa.func.now(), nullable=False),
        "computed": orm.mapped_column(sa.Integer, sa.Computed("1 + 1")),
    }
    base: Any = orm.declarative_base()
    model = type(base)("Mine", (StoredEventMixin, base), {"__tablename__": "mine", "more": columns[name]})
    assert make_models(orm.declarative_base(), "Bank", stored_event_model=model).StoredEvent is model


@pytest.mark.parametrize("kind", [PlainUUIDType(), PlainUUIDType(binary=False), sa.Uuid(), UUIDType()])
def test_snapshots_have_the_ids_of_the_events(kind: Any) -> None:
    """An id is written and looked for in one way in both tables, whatever its type."""
    base: Any = orm.declarative_base()
    body = {"__tablename__": "mine", "originator_id": orm.mapped_column(kind, nullable=False)}
    model = type(base)("Mine", (StoredEventMixin, base), body)
    models = make_models(orm.declarative_base(), "Bank", stored_event_model=model)
    for table in (models.tables["events"], models.tables["snapshots"]):
        assert repr(table.c.originator_id.type) == repr(kind)


@pytest.mark.parametrize(("ids", "id_type"), [("text", "uuid"), ("uuid", "text")])
def test_ids_of_another_type_than_the_applications(ids: str, id_type: Any) -> None:
    """A record class whose ids are not the application's is refused with both remedies."""
    base: Any = orm.declarative_base()
    model = type(base)("Mine", (StoredEventMixin, base), {"__tablename__": "mine", "__originator_id_type__": ids})
    with pytest.raises(ConfigurationError, match=f"of Bank are {id_type}, and those of record class Mine are {ids}"):
        check_models(orm.declarative_base(), "Bank", id_type=id_type, stored_event_model=model)


def test_two_types_of_ids_are_refused() -> None:
    """Record classes of events and of snapshots have ids of one type."""
    base: Any = orm.declarative_base()
    events = type(base)("Mine", (StoredEventMixin, base), {"__tablename__": "mine"})
    shots: dict[str, Any] = {"__tablename__": "shots", "originator_id": orm.mapped_column(sa.Uuid(), primary_key=True)}
    snapshots = type(base)("Shots", (SnapshotMixin, base), shots)
    with pytest.raises(ConfigurationError, match="Mine and Shots have two types"):
        make_models(orm.declarative_base(), "Bank", stored_event_model=events, snapshot_model=snapshots)
