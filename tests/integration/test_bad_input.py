"""Bad input: one clear error each, and the app as it was before."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm

from flask_eventsourcing import (
    ConfigurationError,
    EventSourcing,
    NotInitializedError,
    StoredEventMixin,
    current_application,
)
from tests.bank import make_app
from tests.domain import Bank, Shop


def looks(app: Flask) -> dict[str, Any]:
    """Describe everything about an app that the extension may touch."""
    hooks = (
        "before_request_funcs",
        "after_request_funcs",
        "teardown_request_funcs",
        "error_handler_spec",
        "template_context_processors",
        "url_build_error_handlers",
        "teardown_appcontext_funcs",
        "shell_context_processors",
        "view_functions",
        "blueprints",
    )
    found = {name: repr(getattr(app, name)) for name in hooks}
    return found | {
        "config": dict(app.config),
        "extensions": dict(app.extensions),
        "commands": dict(app.cli.commands),
        "jinja": dict(app.jinja_env.globals),
        "rules": len(list(app.url_map.iter_rules())),
    }


def make(uri: str | None = "sqlite://", **config: Any) -> tuple[Flask, SQLAlchemy]:
    """Make an app with Flask-SQLAlchemy registered on it, and a hook of each kind that the extension adds."""
    app = make_app(uri, **config)
    db = SQLAlchemy()
    db.init_app(app)
    app.after_request(lambda response: response)
    app.teardown_appcontext(lambda error: None)
    app.shell_context_processor(dict)
    return app, db


def bad_model(db: SQLAlchemy) -> Any:
    """Make a record class that lacks the column ``state``."""
    base: Any = db.Model
    key = {"notification_id": StoredEventMixin.notification_id, "__tablename__": "mine"}
    return type(base)("Mine", (base,), {**key, "topic": copy(StoredEventMixin.topic)})


CASES: dict[str, tuple[Callable[[SQLAlchemy], EventSourcing[Bank]], dict[str, Any], str]] = {
    "unknown key": (
        lambda db: EventSourcing(db=db, application=Bank),
        {"EVENTSOURCING_COMIT": "save"},
        "EVENTSOURCING_COMIT: did you mean EVENTSOURCING_COMMIT",
    ),
    "wrong type": (
        lambda db: EventSourcing(db=db, application=Bank),
        {"EVENTSOURCING_LOCK_TIMEOUT": "30"},
        "EVENTSOURCING_LOCK_TIMEOUT must be a number",
    ),
    "unknown bind key": (
        lambda db: EventSourcing(db=db, application=Bank),
        {"EVENTSOURCING_BIND_KEY": "events"},
        "no engine for the bind key 'events'",
    ),
    "schema on SQLite": (
        lambda db: EventSourcing(db=db, application=Bank),
        {"EVENTSOURCING_SCHEMA": "bank"},
        "EVENTSOURCING_SCHEMA is set, but SQLite has no schemas",
    ),
    "record class with a column missing": (
        lambda db: EventSourcing(db=db, application=Bank, stored_event_model=bad_model(db)),
        {},
        "Mine has no column 'originator_id', 'originator_version', 'state'",
    ),
    "db of another app": (
        lambda db: EventSourcing(db=SQLAlchemy(), application=Bank),
        {},
        r"call db\.init_app\(app\) before es\.init_app\(app\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_app_is_as_it_was_before(case: str) -> None:
    """Bad input is one clear error, and the app's extensions, configuration and hooks are as they were before."""
    make_extension, config, message = CASES[case]
    app, db = make(**config)
    es = make_extension(db)
    before = looks(app)
    with pytest.raises(ConfigurationError, match=message):
        es.init_app(app)
    assert looks(app) == before
    assert "eventsourcing" not in app.extensions


@pytest.mark.parametrize("case", ["unknown key", "wrong type", "unknown bind key", "schema on SQLite"])
def test_corrected_app_can_be_registered(case: str) -> None:
    """After the mistake is corrected the same objects can be registered, and work."""
    make_extension, config, _ = CASES[case]
    app, db = make(**config)
    es = make_extension(db)
    with pytest.raises(ConfigurationError):
        es.init_app(app)
    for key in config:
        del app.config[key]
    es.init_app(app)
    with app.app_context():
        db.create_all()
        es.application.open_account("Ada")
        db.session.commit()
    with app.app_context():
        db.engine.dispose()


def test_init_app_twice_is_refused() -> None:
    """A second ``init_app`` for the same app is refused, by the same object or another, and changes nothing."""
    app, db = make()
    es = EventSourcing(app, db=db, application=Bank)
    before = looks(app)
    for other in (es, EventSourcing(db=db, application=Shop)):
        with pytest.raises(ConfigurationError, match=r"registered on the app 'tests\.bank' already"):
            other.init_app(app)
    assert looks(app) == before


def test_bad_uri_leaves_no_database_behind() -> None:
    """If the extension fails to make the database itself, nothing of it stays."""
    app = make_app("nonsense://", EVENTSOURCING_COMMIT="save")
    before = looks(app)
    with pytest.raises(ConfigurationError, match="SQLALCHEMY_DATABASE_URI cannot be used"):
        EventSourcing(application=Bank).init_app(app)
    assert looks(app) == before


@pytest.mark.parametrize("commit", ["never", None])
def test_bad_key_with_a_database_of_its_own(commit: Any) -> None:
    """A bad key is found before a database is made, so that even the default address is not set."""
    app = make_app(EVENTSOURCING_COMMIT=commit)
    before = looks(app)
    with pytest.raises(ConfigurationError, match="EVENTSOURCING_COMMIT"):
        EventSourcing(application=Bank).init_app(app)
    assert looks(app) == before


@pytest.mark.parametrize("wrong", [object, "Bank", Bank.__name__, Flask, 3])
def test_application_that_is_none_is_refused(wrong: Any) -> None:
    """A class that is not a subclass of ``Application`` is refused at once, in every argument."""
    for register in (
        lambda: EventSourcing(application=wrong),
        lambda: EventSourcing(applications=[Bank, wrong]),
        lambda: EventSourcing().register(wrong),
    ):
        with pytest.raises(ConfigurationError, match="is not an application class"):
            register()


def test_instance_of_an_application_is_refused() -> None:
    """An application object instead of its class is refused with what to pass."""
    with pytest.raises(ConfigurationError, match="not an instance of one"):
        EventSourcing(application=Bank())  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [object(), "sqlite://", 3, SQLAlchemy, orm.sessionmaker()])
def test_db_that_is_none_is_refused(wrong: Any) -> None:
    """A ``db`` that is not an extension object is refused at once."""
    with pytest.raises(ConfigurationError, match=r"db must be a SQLAlchemy\(\) object"):
        EventSourcing(db=wrong, application=Bank)


@pytest.mark.parametrize("wrong", [None, "app", Flask, object()])
def test_app_that_is_none_is_refused(wrong: Any) -> None:
    """``init_app`` takes a Flask app."""
    with pytest.raises(ConfigurationError, match="init_app takes a Flask app"):
        EventSourcing(application=Bank).init_app(wrong)


def test_unsupported_database_is_refused() -> None:
    """A database on which the order of events is not known to be safe is refused, and the app left untouched."""
    app, db = make("sqlite://")
    with app.app_context():
        db.engine.dialect.name = "oracle"
    before = looks(app)
    with pytest.raises(ConfigurationError, match="Database 'oracle' is not supported"):
        EventSourcing(db=db, application=Bank).init_app(app)
    assert looks(app) == before


def test_use_without_init_app() -> None:
    """Without ``init_app``, and outside an application context, the message says what is missing."""
    app, db = make()
    es = EventSourcing(db=db, application=Bank)
    with pytest.raises(NotInitializedError, match="application context"):
        _ = es.application
    with pytest.raises(NotInitializedError, match="application context"):
        _ = current_application.repository
    with app.app_context():
        with pytest.raises(NotInitializedError, match=r"did you call es\.init_app\(app\)"):
            _ = es.application
        with pytest.raises(NotInitializedError, match=r"did you call es\.init_app\(app\)"):
            es.transaction()
    with pytest.raises(ConfigurationError, match=r"es\.init_app\(app\)"):
        _ = es.StoredEvent
