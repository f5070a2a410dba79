"""A user's own record classes."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError, SnapshotMixin, StoredEventMixin, TrackingMixin, UUIDType
from flask_eventsourcing.models import make_models
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
    """An index that admits duplicates is no key."""
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
