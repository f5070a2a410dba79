"""The record classes, on every declarative base."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError, EventSourcing, UUIDType
from flask_eventsourcing.models import Models, TableNames, make_models
from tests.bank import add_note
from tests.domain import Bank

METADATA = ["correlation_id", "event_id", "metadata", "recorded_at"]
COLUMNS = {
    "bank_events": sorted([*METADATA, "notification_id", "originator_id", "originator_version", "state", "topic"]),
    "bank_snapshots": ["event_id", "metadata", "originator_id", "originator_version", "state", "topic"],
    "bank_tracking": ["application_name", "notification_id"],
}


class OwnModel(Model):
    """A base of Flask-SQLAlchemy's own kind."""


def bare(*bases: type[Any]) -> Callable[[], Any]:
    """Return what makes a declarative base, as a user's module would."""
    return lambda: types.new_class("Base", bases, {}, lambda body: body.update(__module__=__name__))


CANDIDATES: dict[str, Callable[[], Any]] = {
    "Model": lambda: Model,
    "subclass of Model": lambda: OwnModel,
    "DeclarativeBase": bare(orm.DeclarativeBase),
    "DeclarativeBaseNoMeta": bare(orm.DeclarativeBaseNoMeta),
    "DeclarativeBase, MappedAsDataclass": bare(orm.DeclarativeBase, orm.MappedAsDataclass),
    "MappedAsDataclass, DeclarativeBase": bare(orm.MappedAsDataclass, orm.DeclarativeBase),
    "DeclarativeBaseNoMeta, MappedAsDataclass": bare(orm.DeclarativeBaseNoMeta, orm.MappedAsDataclass),
    "MappedAsDataclass, DeclarativeBaseNoMeta": bare(orm.MappedAsDataclass, orm.DeclarativeBaseNoMeta),
    "declarative_base()": orm.declarative_base,
}


def is_accepted(make: Callable[[], Any]) -> bool:
    """Whether Flask-SQLAlchemy itself takes a base; 3.1.1 takes no dataclasses with SQLAlchemy 2.1."""
    try:
        SQLAlchemy(model_class=make())
    except sa.exc.InvalidRequestError:
        return False
    return True


BASES = {name: make for name, make in CANDIDATES.items() if is_accepted(make)}


def test_enough_bases_are_accepted() -> None:
    """The bases without dataclasses are accepted by every Flask-SQLAlchemy, so that the tests below mean something."""
    assert {name for name in CANDIDATES if "Dataclass" not in name} <= set(BASES)


@pytest.fixture(params=BASES)
def model_class(request: pytest.FixtureRequest) -> Any:
    """Each declarative base that Flask-SQLAlchemy accepts."""
    return BASES[request.param]()


@pytest.mark.parametrize("disable_autonaming", [False, True])
def test_every_declarative_base_works(model_class: Any, disable_autonaming: bool) -> None:
    """On every base that Flask-SQLAlchemy accepts the tables are made, and events are written and read."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db = SQLAlchemy(model_class=model_class, disable_autonaming=disable_autonaming)
    es = EventSourcing(db=db, application=Bank)
    db.init_app(app)
    es.init_app(app)
    assert {name: sorted(table.columns.keys()) for name, table in db.metadata.tables.items()} == COLUMNS
    with app.app_context():
        db.create_all()
        account_id = es.application.open_account("Ada")
        es.application.deposit(account_id, 7)
        db.session.commit()
        assert es.application.balance(account_id) == 7
        rows = db.session.scalars(sa.select(es.StoredEvent).order_by(es.StoredEvent.notification_id)).all()
        assert [(row.originator_id, row.originator_version) for row in rows] == [(account_id, 1), (account_id, 2)]
    with app.app_context():
        db.engine.dispose()


def test_users_models_stand_beside_ours(model_class: Any) -> None:
    """A model of the user's own shares metadata with ours, so that both are created and migrated together."""
    db = SQLAlchemy(model_class=model_class)
    note = add_note(db)
    models = make_models(db.Model, "Bank")
    assert note.metadata is models.StoredEvent.metadata is db.metadata
    assert set(db.metadata.tables) == {"note", *COLUMNS}


@pytest.mark.parametrize("base", [orm.declarative_base, bare(orm.DeclarativeBase), bare(orm.DeclarativeBaseNoMeta)])
def test_plain_sqlalchemy_bases_work(base: Callable[[], Any]) -> None:
    """The record classes can be made on a base of SQLAlchemy without Flask-SQLAlchemy."""
    made = base()
    models = make_models(made, "Bank")
    assert set(made.metadata.tables) == set(COLUMNS)
    assert isinstance(models, Models)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("Bank", ("bank_events", "bank_snapshots", "bank_tracking")),
        ("TrainingSchool", ("trainingschool_events", "trainingschool_snapshots", "trainingschool_tracking")),
        ("", ("stored_events", "stored_snapshots", "notification_tracking")),
    ],
)
def test_tables_are_named_as_the_library_names_them(name: str, tables: tuple[str, ...]) -> None:
    """The tables have the names that the library's own modules give them."""
    names = TableNames.of(name)
    assert (names.events, names.snapshots, names.tracking) == tables


def test_keys_and_nullability() -> None:
    """Position and version are unique, ids are required, and topic and state may be empty, as the library has it."""
    models = make_models(orm.declarative_base(), "Bank")
    events, snapshots, tracking = (models.tables[name] for name in ("events", "snapshots", "tracking"))
    assert events.primary_key.columns.keys() == ["notification_id"]
    unique = [set(c.columns.keys()) for c in events.constraints if isinstance(c, sa.UniqueConstraint)]
    assert unique == [{"originator_id", "originator_version"}]
    assert set(snapshots.primary_key.columns.keys()) == {"originator_id", "originator_version"}
    assert tracking.primary_key.columns.keys() == ["application_name"]
    assert {column.name for column in events.columns if column.nullable} == {"topic", "state", *METADATA}


@pytest.mark.parametrize("id_type", ["uuid", "text"])
def test_type_of_ids(id_type: Any) -> None:
    """Originator ids are UUIDs or texts, in events and in snapshots."""
    models = make_models(orm.declarative_base(), "Bank", originator_id_type=id_type)
    expected = UUIDType if id_type == "uuid" else sa.String
    for name in ("events", "snapshots"):
        assert isinstance(models.tables[name].c.originator_id.type, expected)


def test_schema_is_that_of_every_table() -> None:
    """With a schema, all three tables and their keys are in it."""
    models = make_models(orm.declarative_base(), "Bank", schema="money")
    assert [table.fullname for table in models.tables.values()] == [f"money.{name}" for name in COLUMNS]


def test_taken_table_name_is_refused() -> None:
    """Where a model of the user's has the table's name already, the message says which and what to do."""
    base = orm.declarative_base()
    sa.Table("bank_events", base.metadata, sa.Column("id", sa.Integer))
    with pytest.raises(ConfigurationError, match="Table 'bank_events' is taken"):
        make_models(base, "Bank")


def test_uuid_type_is_the_same_when_reflected() -> None:
    """The type of ids comes back from SQLite as it went, so that migrations find nothing to change."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    table = make_models(orm.declarative_base(), "Bank").tables["events"]
    table.create(engine)
    column = next(c for c in sa.inspect(engine).get_columns(table.name) if c["name"] == "originator_id")
    assert str(column["type"]) == "CHAR(32)"
    assert repr(table.c.originator_id.type) == "UUIDType()"
    assert table.c.originator_id.type.python_type.__name__ == "UUID"
    engine.dispose()
