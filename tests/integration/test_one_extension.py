"""``EventSourcing(app)`` alone, what takes its plain application's place, and when applications are constructed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import ConfigurationError, EventSourcing, NotInitializedError
from flask_eventsourcing.projections import ModelProjection, on
from tests.bank import make_app
from tests.domain import Account, Bank, Shop
from tests.integration.test_refused import everything
from tests.unit.test_lifecycle_fork import in_child

PROGRAM = """
from eventsourcing.domain import Aggregate
from flask import Flask
from flask_eventsourcing import EventSourcing

class Account(Aggregate):
    def __init__(self, owner):
        self.owner = owner

app = Flask(__name__)
es = EventSourcing(app)

@app.post("/accounts/<owner>")
@es.transactional
def open_account(owner):
    account = Account(owner)
    es.application.save(account)
    return {"id": str(account.id)}, 201
"""


def make(uri: str = "sqlite://", **config: Any) -> tuple[Flask, EventSourcing[Bank]]:
    """Make an app with the extension alone."""
    app = make_app(uri, **config)
    return app, EventSourcing[Bank](app)


def dispose(*apps: Flask) -> None:
    """Close what apps have open."""
    for app in apps:
        state = app.extensions["eventsourcing"]
        state.close()
        with app.app_context():
            for engine in state.db.engines.values():
                engine.dispose()


def test_fifteen_lines_are_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``EventSourcing(app)`` alone, aggregates are saved in the library's plain application."""
    assert len([line for line in PROGRAM.splitlines() if line]) <= 15
    (tmp_path / "fifteen_lines.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    program = importlib.import_module("fifteen_lines")
    app, es = program.app, program.es
    created = app.test_cli_runner().invoke(args=["eventsourcing", "init-db"])
    assert "Created table application_events." in created.output
    answer = app.test_client().post("/accounts/ada")
    assert answer.status_code == 201
    with app.app_context():
        assert type(es.application) is Application
        assert es.application.repository.get(UUID(answer.json["id"])).owner == "ada"
    dispose(app)


class TestRegisteringLater:
    """The first class that is registered replaces the plain application, if that was not used yet."""

    @pytest.mark.parametrize("number", [1, 2])
    def test_its_place_is_taken_with_its_tables(self, number: int) -> None:
        """Every app has the registered class, its commands and tables, and nothing of the plain one."""
        db = SQLAlchemy()
        es = EventSourcing[Bank](db=db)
        apps = [make_app("sqlite://") for _ in range(number)]
        for app in apps:
            db.init_app(app)
            es.init_app(app)
        assert "application_events" in db.metadata.tables
        assert es.register(Bank) is Bank
        assert set(db.metadata.tables) == {"bank_events", "bank_snapshots", "bank_tracking"}
        for app in apps:
            with app.app_context():
                db.create_all()
                account_id = es.application.open_account()
                db.session.commit()
                assert es[Bank].balance(account_id) == 0
                with pytest.raises(ConfigurationError, match="not registered"):
                    _ = es[Application]
        with pytest.raises(ConfigurationError, match=r"after es\.init_app"):
            es.register(Shop)
        dispose(*apps)

    def test_guard_goes_over_to_it(self) -> None:
        """The class that replaces the plain application has the guard, too."""
        app, es = make()
        es.register(Bank)
        with app.app_context():
            es.db.create_all()

        @app.post("/forget")
        def forget() -> str:
            es.application.open_account()
            return "done"

        assert app.test_client().post("/forget").status_code == 500
        dispose(app)

    @pytest.mark.parametrize("use", ["construct", "create", "init-db"])
    def test_a_plain_one_that_was_used_stays(self, use: str) -> None:
        """Once the plain application was constructed, or its tables created, another one is refused."""
        app, es = make()
        with app.app_context():
            if use == "construct":
                _ = es.application
            elif use == "create":
                es.db.create_all()
        if use == "init-db":
            app.test_cli_runner().invoke(args=["eventsourcing", "init-db"])
        with pytest.raises(ConfigurationError, match="registered too late"):
            es.register(Bank)
        with app.app_context():
            assert type(es.application) is Application
        assert "bank_events" not in es._made_db.metadata.tables
        dispose(app)

    def test_a_projection_of_it_is_a_use(self) -> None:
        """A projection that follows the plain application keeps it."""
        app, es = make()

        @es.projection
        class Accounts(ModelProjection):
            @on(Account.Event)
            def note(self, event: Any, session: Any) -> None:
                """Do nothing."""

        with pytest.raises(ConfigurationError, match="registered too late"):
            es.register(Bank)
        dispose(app)

    def test_one_that_cannot_be_used_changes_nothing(self) -> None:
        """If the class is refused, the plain application stays what it was, and another one may follow."""
        app, es = make()
        with app.app_context():
            metadata = es.db.metadata
        taken = sa.Table("bank_events", metadata)
        before = set(metadata.tables)
        with pytest.raises(ConfigurationError, match="taken by another model"):
            es.register(Bank)
        assert set(metadata.tables) == before
        metadata.remove(taken)
        es.register(Bank)
        dispose(app)

    def test_an_application_that_was_given_is_not_replaced(self) -> None:
        """Registering a class after ``init_app`` is refused if a class was already given."""
        app = make_app("sqlite://")
        es = EventSourcing(app, application=Bank)
        with pytest.raises(ConfigurationError, match=r"after es\.init_app"):
            es.register(Shop)
        dispose(app)


class Noted(Bank):
    """Notes when it is constructed, and may fail."""

    name = "Bank"
    constructed: list[int]
    fails = False

    def __init__(self, env: Any = None) -> None:
        self.constructed.append(os.getpid())
        if self.fails:
            raise ValueError("this setting is wrong")
        super().__init__(env)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> type[Noted]:
    """The class with an empty note."""
    monkeypatch.setattr(Noted, "constructed", [], raising=False)
    return Noted


class TestConstruct:
    """``EVENTSOURCING_CONSTRUCT``."""

    @pytest.mark.parametrize("when", ["first-use", "init"])
    def test_when_it_is_constructed(self, when: str, noted: type[Noted], tmp_path: Path) -> None:
        """It is constructed at the first use, or in ``init_app``: once either way, and again in a forked process."""
        app = make_app(f"sqlite:///{tmp_path / 'bank.db'}", EVENTSOURCING_CONSTRUCT=when)
        es = EventSourcing(app, application=noted)
        assert len(noted.constructed) == (1 if when == "init" else 0)
        with app.app_context():
            es.db.create_all()
            first = es.application
            first.open_account()
            es.db.session.commit()
            assert es.application is first
        assert len(noted.constructed) == 1

        def child() -> list[object]:
            with app.app_context():
                events = es.application.recorder.max_notification_id()
            return [events, len(noted.constructed), noted.constructed[-1] == os.getpid()]

        assert in_child(child) == [1, 2, True]
        dispose(app)

    def test_wrong_setting_fails_in_init_app(self) -> None:
        """What the library refuses fails in ``init_app``, nothing is left behind, and the corrected app works."""
        app = make_app("sqlite://", EVENTSOURCING_CONSTRUCT="init")
        db = SQLAlchemy(app)
        es = EventSourcing(db=db, application=Bank)
        app.config["EVENTSOURCING_ENV"] = {"COMPRESSOR_TOPIC": "no.such:Compressor"}
        before = everything(app, db)
        with pytest.raises(Exception, match=r"no\.such"):
            es.init_app(app)
        assert everything(app, db) == before
        app.config["EVENTSOURCING_ENV"] = {}
        es.init_app(app)
        with app.app_context():
            db.create_all()
            es.application.open_account()
            db.session.commit()
        dispose(app)

    def test_the_second_of_two_fails(self, noted: type[Noted], monkeypatch: pytest.MonkeyPatch) -> None:
        """If one of several applications fails, those before it are closed, and nothing is left behind."""
        monkeypatch.setattr(noted, "fails", True)
        closed: list[str] = []

        def close(self: Shop) -> None:
            closed.append(self.name)

        monkeypatch.setattr(Shop, "close", close)
        app = make_app("sqlite://", EVENTSOURCING_CONSTRUCT="init")
        db = SQLAlchemy(app)
        es = EventSourcing(db=db, applications=[Shop, noted])
        before = everything(app, db)
        with pytest.raises(ValueError, match="this setting is wrong"):
            es.init_app(app)
        assert "Shop" in closed
        assert everything(app, db) == before
        dispose_of(app, db)


def dispose_of(app: Flask, db: SQLAlchemy) -> None:
    """Close the engines of an app without the extension."""
    with app.app_context():
        db.engine.dispose()


class Mailing(Bank):
    """A bank that needs a service."""

    name = "Bank"

    def __init__(self, mailer: str, env: Any = None) -> None:
        super().__init__(env)
        self.mailer = mailer


def make_bank(env: Any) -> Mailing:
    """Make it with its service."""
    return Mailing("mailer", env)


def make_another(env: Any) -> Mailing:
    """Make something else than it says."""
    return Bank(env)  # type: ignore[return-value]


def make_untold(env):  # type: ignore[no-untyped-def]
    """Make it, and do not say what."""
    return Mailing("mailer", env)


class TestFactories:
    """An application whose constructor takes services is given by a factory."""

    @pytest.mark.parametrize("factory", [make_bank, partial(Mailing, "mailer"), partial(Mailing, mailer="mailer")])
    @pytest.mark.parametrize("how", ["argument", "register"])
    def test_it_makes_the_application(self, factory: Callable[..., Mailing], how: str) -> None:
        """The class of an application is known from a function's return annotation, or from a ``partial``."""
        app = make_app("sqlite://")
        if how == "argument":
            es = EventSourcing(app, application=factory)
        else:
            es = EventSourcing()
            es.register(factory)
            es.init_app(app)
        with app.app_context():
            es.db.create_all()
            assert es[Mailing].mailer == "mailer"
            account_id = es[Mailing].open_account()
            es.db.session.commit()
            assert es.application.balance(account_id) == 0
        dispose(app)

    def test_argument_is_named_at_the_start(self) -> None:
        """Without a factory the constructor's argument is named, when the class is given."""
        with pytest.raises(ConfigurationError, match="Mailing takes the argument 'mailer' beside env"):
            EventSourcing(application=Mailing)
        es = EventSourcing()
        with pytest.raises(ConfigurationError, match="def make_bank"):
            es.register(Mailing)

    def test_a_factory_has_to_say_what_it_makes(self) -> None:
        """A function without the annotation is refused, one with more arguments, and one that makes something else."""
        with pytest.raises(ConfigurationError, match="return annotation"):
            EventSourcing(application=make_untold)

        def make_with_more(env: Any, mailer: str) -> Mailing:
            return Mailing(mailer, env)

        with pytest.raises(ConfigurationError, match="takes the argument 'mailer'"):
            EventSourcing(application=make_with_more)
        app = make_app("sqlite://")
        es = EventSourcing(app, application=make_another)
        with app.app_context(), pytest.raises(ConfigurationError, match="was to return a Mailing"):
            _ = es.application
        dispose(app)


def test_nothing_is_there_before_init_app() -> None:
    """An extension object without an app says so."""
    es = EventSourcing()
    with make_app("sqlite://").app_context(), pytest.raises(NotInitializedError):
        es.application.save(Account(str(uuid4())))
