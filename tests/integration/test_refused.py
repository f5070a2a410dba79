"""A refused ``init_app`` leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy_lite import SQLAlchemy as Lite
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError, EventSourcing
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.web.state import states
from tests.bank import make_app
from tests.domain import Account, Bank, Shop


def everything(app: Flask, db: Any) -> dict[str, Any]:
    """Describe what the extension may touch of an app, its engines, sessions and models."""
    with app.app_context():
        engines = dict(db.engines)
        scope = getattr(getattr(db.session, "registry", None), "scopefunc", None)
    classes = getattr(getattr(db, "Model", None), "registry", orm.registry())._class_registry
    hooks = [app.after_request_funcs, app.teardown_appcontext_funcs, app.shell_context_processors]
    found: dict[str, Any] = {
        "hooks": repr(hooks),
        "extensions": dict(app.extensions),
        "commands": dict(app.cli.commands),
        "patched": sorted(
            name for name in ("finalize_request", "handle_user_exception", "wsgi_app") if name in vars(app)
        ),
        "tables": {key: sorted(each.tables) for key, each in getattr(db, "metadatas", {}).items()},
        "classes": sorted(name for name in classes if not name.startswith("_sa_")),
        "scope": scope,
        "get_session": vars(db).get("get_session"),
        "states": [state for state in states() if state.app is app],
    }
    for key, engine in engines.items():
        found |= {f"{key} {name}": value for name, value in of_engine(engine).items()}
    return found


def of_engine(engine: sa.Engine) -> dict[str, Any]:
    """Describe an engine."""
    places: dict[str, Any] = {"engine": engine, "pool": engine.pool, "dialect": engine.dialect}
    listeners = {
        f"{place} {name}": len(list(getattr(target.dispatch, name)))
        for place, target in places.items()
        for name in target.dispatch._event_names
    }
    patched = [name for name in ("connect", "dispose", "recreate") if name in vars(engine.pool)]
    return listeners | {"patched": patched, "do_rollback": vars(engine.dialect).get("do_rollback")}


def make(**config: Any) -> tuple[Flask, SQLAlchemy]:
    """Make an app with two databases."""
    app = make_app("sqlite://", SQLALCHEMY_BINDS={"other": "sqlite://"}, **config)
    return app, SQLAlchemy(app)


def model(db: SQLAlchemy, name: str, bind_key: str | None = None) -> Any:
    """Make a model with a table of that name."""
    base: Any = db.Model
    body: dict[str, Any] = {"__tablename__": name, "id": orm.mapped_column(sa.Integer, primary_key=True)}
    return type(base)(name.title(), (base,), body | ({"__bind_key__": bind_key} if bind_key else {}))


def projected(es: EventSourcing, *models: Any) -> None:
    """Register a projection with these models."""
    body = {"models": models, "note": on(Account.Event)(lambda self, event, session: None)}
    es.projection(of=Bank)(type("Balances", (ModelProjection,), body))


def on_another_bind(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """A projection has its table in another database."""
    projected(es, model(db, "balance", "other"))


def checkpoints_taken(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """Somebody has a table of the name of the checkpoints'."""
    app.config["KEPT"] = model(db, "bank_projections")
    projected(es, model(db, "balance"))


def second_taken(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """The second application's table is taken."""
    app.config["KEPT"] = model(db, "shop_events")


def request_handled(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """The app has handled a request, so that Flask admits no hooks any more."""
    app.test_client().get("/")


def foreign_setting(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """There is a setting of eventsourcing-sqlalchemy."""
    app.config["EVENTSOURCING_ENV"] = {"SQLALCHEMY_SCOPED_SESSION_TOPIC": "models:session"}


def unknown_bind(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """A bind key is given for an application that there is not."""
    app.config["EVENTSOURCING_BINDS"] = {"Bnak": "other"}


def missing_bind(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """One of two applications has a bind key that there is not."""
    app.config["EVENTSOURCING_BINDS"] = {"Shop": "missing"}


def schema_on_second(es: EventSourcing, app: Flask, db: SQLAlchemy) -> None:
    """There is a schema where there are none."""
    app.config["EVENTSOURCING_SCHEMA"] = "bank"


REASONS: list[Callable[[EventSourcing, Flask, SQLAlchemy], None]] = [
    on_another_bind,
    checkpoints_taken,
    second_taken,
    request_handled,
    foreign_setting,
    unknown_bind,
    missing_bind,
    schema_on_second,
]


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("construct", ["first-use", "init"])
def test_everything_is_as_before(reason: Callable[..., None], construct: str) -> None:
    """A refused ``init_app`` leaves no table, listener, hook, patched pool or replaced scope, for every reason."""
    app, db = make(EVENTSOURCING_CONSTRUCT=construct)
    es = EventSourcing(db=db, applications=[Bank, Shop])
    reason(es, app, db)
    before = everything(app, db)
    with pytest.raises((ConfigurationError, AssertionError, sa.exc.InvalidRequestError)):
        es.init_app(app)
    assert everything(app, db) == before
    if reason is not request_handled:
        other, db = make()
        EventSourcing(db=db, applications=[Bank, Shop]).init_app(other)
        assert everything(other, db) != before


@pytest.mark.parametrize("where", ["env", "env of one", "environment", "class"])
def test_setting_of_eventsourcing_sqlalchemy_is_refused_by_name(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``SQLALCHEMY_SCOPED_SESSION_TOPIC`` is refused wherever it stands, with the remedy."""
    name = ("BANK_" if where == "env of one" else "") + "SQLALCHEMY_SCOPED_SESSION_TOPIC"
    app, db = make()
    bank: Any = Bank
    if where == "environment":
        monkeypatch.setenv(name, "models:session")
    elif where == "class":
        bank = type("Bank", (Bank,), {"env": {name: "models:session"}})
    else:
        app.config["EVENTSOURCING_ENV"] = {name: "models:session"}
    es = EventSourcing(db=db, application=bank)
    with pytest.raises(ConfigurationError, match=f"^{name} is a setting of eventsourcing-sqlalchemy.*es.using"):
        es.init_app(app)


@pytest.mark.parametrize("kind", ["models", "lite"])
def test_one_extension_for_two_db_objects(kind: str) -> None:
    """One ``EventSourcing`` serves two apps with a ``db`` object each; they share neither tables nor events."""
    es = EventSourcing(application=Bank)
    apps: list[Flask] = []
    metadatas = []
    for _ in range(2):
        app = make_app("sqlite://" if kind == "models" else None)
        if kind == "lite":
            app.config["SQLALCHEMY_ENGINES"] = {"default": "sqlite://"}
        db: Any = SQLAlchemy(app) if kind == "models" else Lite(app)
        es.init_app(app)
        with app.app_context():
            metadatas.append(es.metadata)
            es.metadata.create_all(db.engine)
            es.application.open_account()
            db.session.commit()
        apps.append(app)
    assert metadatas[0] is not metadatas[1]
    for app in apps:
        with app.app_context():
            assert es.application.recorder.max_notification_id() == 1
            engine = app.extensions["sqlalchemy"].engine
        es.close(app)
        engine.dispose()


def test_one_base_for_two_db_objects() -> None:
    """With a base of the user's, the record classes are made once, for every ``db`` object."""
    base: Any = orm.declarative_base()
    es = EventSourcing(application=Bank, model_class=base)
    for _ in range(2):
        app = make_app(SQLALCHEMY_ENGINES={"default": "sqlite://"})
        Lite(app)
        es.init_app(app)
    assert len(base.metadata.tables) == 3
