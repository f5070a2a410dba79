"""Where the tables are: bind keys, schemas, own record classes, text ids, and a database of the extension's own.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import StoredEvent, Tracking
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy_lite import SQLAlchemy as Lite
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError, EventSourcing, SnapshotMixin, StoredEventMixin, TrackingMixin
from flask_eventsourcing.persistence import SQLAlchemyTrackingRecorder
from tests.bank import Site, add_note, make_app, make_site
from tests.domain import Bank, Member, Shop
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_postgresql


def dispose(app: Flask, db: Any) -> None:
    """Close every connection."""
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


def use(es: EventSourcing[Bank, Any], db: Any) -> None:
    """Store something, roll something back, and look."""
    bank = es.application
    account_id = bank.open_account()
    bank.deposit(account_id, 5)
    db.session.commit()
    bank.deposit(account_id, 100)
    db.session.rollback()
    assert bank.balance(account_id) == 5
    assert len(db.session.scalars(sa.select(es.StoredEvent)).all()) == 2


def test_bind_key(uri: str, tmp_path: Path) -> None:
    """With a bind key the events are in that database and the models in theirs; one commit stores both."""
    other = tmp_path / "other.db"
    site = make_site(f"sqlite:///{other}", SQLALCHEMY_BINDS={"events": uri}, EVENTSOURCING_BIND_KEY="events")
    with site.app.app_context():
        assert set(site.db.metadatas["events"].tables) == {"bank_events", "bank_snapshots", "bank_tracking"}
        assert set(site.db.metadata.tables) == {"note"}
        assert set(sa.inspect(site.db.engines["events"]).get_table_names()) == set(site.db.metadatas["events"].tables)
        use(site.es, site.db)
        site.note()
        site.bank.open_account()
        site.db.session.commit()
        site.note("other")
        site.bank.open_account()
        site.db.session.rollback()
    assert site.stored() == (3, 1)
    site.close()


@pytest.mark.parametrize("mode", ["mode=memory&", ""], ids=["memory", "file"])
def test_shared_cache_is_refused(tmp_path: Path, mode: str) -> None:
    """SQLite's shared cache, in which nobody waits for others, is refused; a single connection may use it."""
    uri = f"sqlite:///file:{tmp_path}/bank.db?{mode}cache=shared&uri=true"
    with pytest.raises(ConfigurationError, match=r"cache=shared.*'sqlite://' for a database in memory"):
        make_site(uri, SQLALCHEMY_ENGINE_OPTIONS={"poolclass": sa.pool.QueuePool})
    site = make_site(uri, SQLALCHEMY_ENGINE_OPTIONS={"poolclass": sa.pool.StaticPool})
    site.opened(1)
    assert site.stored() == (2, 0)
    site.close()


@on_postgresql
def test_schema(new_site: MakeSite, uri: str) -> None:
    """On PostgreSQL the tables can be in a schema, beside those of another site in the default one."""
    plain = new_site()
    site = new_site(create=False, EVENTSOURCING_SCHEMA="Old Money")
    with site.app.app_context():
        with site.db.engine.begin() as connection:
            connection.execute(sa.schema.CreateSchema("Old Money"))
        site.db.create_all()
        assert "bank_events" in sa.inspect(site.db.engine).get_table_names(schema="Old Money")
        use(site.es, site.db)
        assert site.bank.recorder.max_notification_id() == 2
        assert len(site.bank.notification_log.select(start=1, limit=10)) == 2
    assert plain.stored() == (0, 0)


@on_postgresql
def test_schemas_do_not_wait_for_each_other(new_site: MakeSite) -> None:
    """Sites of the same name in two schemas keep their logs apart."""
    sites = []
    for name in ("one", "two"):
        site = new_site(create=False, EVENTSOURCING_SCHEMA=name)
        with site.app.app_context():
            with site.db.engine.begin() as connection:
                connection.execute(sa.schema.CreateSchema(name))
            site.db.create_all()
        sites.append(site)
    with sites[0].app.app_context():
        sites[0].bank.open_account()
        sites[1].opened()
        with sites[1].app.app_context():
            assert sites[1].bank.recorder.max_notification_id() == 1
        sites[0].db.session.commit()


def own_record_classes(db: SQLAlchemy) -> dict[str, Any]:
    """Make record classes from the mixins, the one of events with a nullable column more."""
    base: Any = db.Model

    def model(name: str, mixin: type[Any], **more: Any) -> Any:
        return type(base)(name, (mixin, base), {"__tablename__": name.lower(), **more})

    return {
        "stored_event_model": model("Entry", StoredEventMixin, tenant=orm.mapped_column(sa.Text, nullable=True)),
        "snapshot_model": model("Shot", SnapshotMixin),
        "tracking_model": model("Mark", TrackingMixin),
    }


def test_own_record_classes(uri: str) -> None:
    """A user's own record classes replace the default ones; ORM statements can use their further columns."""
    app = make_app(uri)
    db = SQLAlchemy(app)
    models = own_record_classes(db)
    es = EventSourcing(app, db=db, applications=[Bank, Shop], **models)
    assert {"entry", "shot", "mark", "shop_events", "shop_snapshots", "shop_tracking"} == set(db.metadata.tables)
    assert [es.StoredEvent, es.Snapshot, es.Tracking] == list(models.values())
    with app.app_context():
        db.create_all()
        use(es, db)
        db.session.execute(sa.update(es.StoredEvent).values(tenant="north"))
        db.session.commit()
        assert db.session.scalars(sa.select(models["stored_event_model"].tenant)).all() == ["north", "north"]
    dispose(app, db)


class Club(Application[str]):
    """An application with text ids."""

    is_snapshotting_enabled = False


class SubClub(Club):
    """Inherits the type of its ids."""


class EnvClub(Application[Any]):
    """Says in its environment that its ids are texts."""

    env = {"ORIGINATOR_ID_TYPE": "text"}  # noqa: RUF012  # as in the library's documentation


@pytest.mark.parametrize(
    ("club", "config"),
    [
        (Club, {}),
        (SubClub, {}),
        (EnvClub, {}),
        (type("AnyClub", (Application,), {}), {"EVENTSOURCING_ORIGINATOR_ID_TYPE": "text"}),
        (type("EnvConfigClub", (Application,), {}), {"EVENTSOURCING_ENV": {"ORIGINATOR_ID_TYPE": "text"}}),
    ],
)
def test_text_ids(new_site: MakeSite, club: type[Application[Any]], config: dict[str, Any]) -> None:
    """Text ids are inferred from ``Application[str]``, or configured, and work as UUIDs do."""
    site = new_site(club, **config)
    assert isinstance(site.es.StoredEvent.__table__.c.originator_id.type, sa.String)
    with site.app.app_context():
        application: Any = site.es.application
        for name in ("ada", "böb"):
            member = Member(f"member/{name}")
            member.visit()
            application.save(member)
        site.db.session.commit()
        assert cast(Member, application.repository.get("member/böb")).visits == 1
        assert [n.originator_id for n in application.notification_log.select(start=1, limit=10)] == [
            "member/ada",
            "member/ada",
            "member/böb",
            "member/böb",
        ]
        assert (
            site.db.session.scalars(sa.select(site.es.StoredEvent.originator_id).distinct()).all()
            == [
                "member/ada",
                "member/böb",
            ]
            or site.db.engine.dialect.name == "postgresql"
        )


@pytest.mark.parametrize("other", ["Ada", "adá"])
def test_text_ids_are_compared_exactly(new_site: MakeSite, other: str) -> None:
    """Ids that differ in case, or in an accent, are those of two aggregates, on every database."""
    site = new_site(Club)
    with site.app.app_context():
        club: Any = site.es.application
        for name, visits in (("ada", 1), (other, 2)):
            member = Member(f"member/{name}")
            for _ in range(visits):
                member.visit()
            club.save(member)
        site.db.session.commit()
        found = [cast(Member, club.repository.get(f"member/{name}")) for name in ("ada", other)]
        assert [(member.name, member.visits) for member in found] == [("member/ada", 1), (f"member/{other}", 2)]


def test_topics_and_names_are_compared_exactly(site: Site) -> None:
    """A topic, or the name of an upstream application, that differs in case is another one, on every database."""
    with site.app.app_context():
        bank, datastore = site.bank, site.app.extensions["eventsourcing"].datastore
        recorder: Any = bank.recorder
        account_id = uuid4()
        recorder.insert_events([StoredEvent(account_id, n, topic, b"{}") for n, topic in enumerate(["a:B", "a:b"])])
        tracking = SQLAlchemyTrackingRecorder(datastore, site.es.models[Bank].tables["tracking"])
        tracking.insert_tracking(Tracking("Shop", 5))
        tracking.insert_tracking(Tracking("shop", 3))
        site.db.session.commit()
        assert [n.topic for n in recorder.select_notifications(None, 10, topics=["a:b"])] == ["a:b"]
        assert [n.topic for n in recorder.select_notifications(None, 10, topics=["A:b"])] == []
        assert [tracking.max_tracking_id(name) for name in ("Shop", "shop", "SHOP")] == [5, 3, None]


def test_registered_db_is_used_where_none_is_given() -> None:
    """With no ``db`` the object that is registered on the app is used."""
    app = make_app("sqlite://")
    db = SQLAlchemy(app)
    es = EventSourcing(application=Bank)
    es.init_app(app)
    assert "bank_events" in db.metadata.tables
    with app.app_context():
        assert es.db is db
        db.create_all()
        use(es, db)
    dispose(app, db)


def test_db_is_made_where_there_is_none(tmp_path: Path) -> None:
    """With no ``db`` at all one is made, on a SQLite file in the instance folder."""
    app = Flask("bank", instance_path=str(tmp_path / "instance"))
    es = EventSourcing(app, application=Bank)
    assert not (tmp_path / "instance" / "eventsourcing.db").exists()
    assert app.config["SQLALCHEMY_DATABASE_URI"] == "sqlite:///eventsourcing.db"
    with app.app_context():
        assert app.extensions["sqlalchemy"] is es.db
        es.db.create_all()
        use(es, es.db)
    assert (tmp_path / "instance" / "eventsourcing.db").exists()
    dispose(app, es.db)


def test_configured_uri_is_kept_where_a_db_is_made(tmp_path: Path) -> None:
    """With no ``db``, the database that is configured is used."""
    app = make_app(f"sqlite:///{tmp_path / 'mine.db'}")
    es = EventSourcing(app, application=Bank)
    with app.app_context():
        es.db.create_all()
    assert (tmp_path / "mine.db").exists()
    dispose(app, es.db)


def make_lite(uri: str, es: EventSourcing[Bank, Lite], db: Lite, **config: Any) -> Flask:
    """Make an app with Flask-SQLAlchemy-Lite."""
    app = make_app(SQLALCHEMY_ENGINES={"default": uri}, **config)
    db.init_app(app)
    es.init_app(app)
    return app


@pytest.mark.parametrize("given", [True, False])
def test_flask_sqlalchemy_lite(uri: str, given: bool) -> None:
    """With Flask-SQLAlchemy-Lite everything works the same; ``es.metadata.create_all()`` makes the tables."""
    db = Lite()
    es = EventSourcing(db=db if given else None, application=Bank)
    app = make_lite(uri, es, db)
    with app.app_context():
        assert set(es.metadata.tables) == {"bank_events", "bank_snapshots", "bank_tracking"}
        es.metadata.create_all(db.engine)
        use(es, db)
        with es.transaction() as session:
            assert session is db.session
            es.application.open_account()
        db.session.rollback()
        assert len(db.session.scalars(sa.select(es.StoredEvent)).all()) == 3
        es.application.open_account()
    with app.app_context():
        assert len(db.session.scalars(sa.select(es.StoredEvent)).all()) == 3
    dispose(app, db)


def test_lite_with_a_base_of_the_users(uri: str) -> None:
    """With Flask-SQLAlchemy-Lite the models can be made on the user's own base, beside the user's models."""

    class Base(orm.DeclarativeBase):
        pass

    db = Lite()
    es = EventSourcing(db=db, application=Bank, model_class=Base)
    app = make_lite(uri, es, db)
    assert es.metadata is Base.metadata
    with app.app_context():
        Base.metadata.create_all(db.engine)
        use(es, db)
    dispose(app, db)


def test_lite_guard(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    """With Flask-SQLAlchemy-Lite a view that forgets to commit answers 500 and stores nothing, too."""
    db = Lite()
    es = EventSourcing(db=db, application=Bank)
    app = make_lite(uri, es, db)
    with app.app_context():
        es.metadata.create_all(db.engine)
    answer = app.test_client().post("/", environ_overrides={"tests.view": lambda: str(es.application.open_account())})
    assert answer.status_code == 500
    assert "Account.Created" in caplog.text
    with app.app_context():
        assert db.session.scalars(sa.select(es.StoredEvent)).all() == []
    dispose(app, db)


def test_lite_bind_key(uri: str, tmp_path: Path) -> None:
    """With Flask-SQLAlchemy-Lite a bind key chooses one of its engines."""
    db = Lite()
    es = EventSourcing(db=db, application=Bank)
    app = make_app(
        SQLALCHEMY_ENGINES={"default": f"sqlite:///{tmp_path / 'other.db'}", "events": uri},
        EVENTSOURCING_BIND_KEY="events",
    )
    db.init_app(app)
    es.init_app(app)
    with app.app_context():
        es.metadata.create_all(db.engines["events"])
        account_id = es.application.open_account()
        db.session.commit()
        assert es.application.balance(account_id) == 0
        with db.engines["events"].connect() as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(es.StoredEvent)).scalar_one() == 1
        assert sa.inspect(db.engine).get_table_names() == []
    dispose(app, db)


def test_models_of_two_apps_with_other_settings_are_refused() -> None:
    """Two apps that share ``db`` cannot have different tables for one application, and the error says so."""
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bank)
    first = make_app("sqlite://")
    db.init_app(first)
    es.init_app(first)
    second = make_app("sqlite://", EVENTSOURCING_ORIGINATOR_ID_TYPE="text")
    db.init_app(second)
    with pytest.raises(ConfigurationError, match="EVENTSOURCING_ORIGINATOR_ID_TYPE"):
        es.init_app(second)
    assert "eventsourcing" not in second.extensions


def test_no_ddl_on_construction(uri: str) -> None:
    """Neither ``init_app`` nor the application's construction creates a table."""
    app = make_app(uri)
    db = SQLAlchemy()
    add_note(db)
    es = EventSourcing(db=db, application=Bank)
    db.init_app(app)
    es.init_app(app)
    with app.app_context():
        _ = es.application
        assert sa.inspect(db.engine).get_table_names() == []
    Site(app, db, es, None).close()
