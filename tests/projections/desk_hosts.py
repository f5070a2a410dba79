"""The desk on each host: a Flask app, SQLAlchemy alone, and sessions of zope.sqlalchemy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
import zope.sqlalchemy
from click.testing import CliRunner, Result
from eventsourcing.application import Application
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.applications.erasure import Erasure, erase
from flask_eventsourcing.cli import group
from flask_eventsourcing.commands import Subject
from flask_eventsourcing.config import Config
from flask_eventsourcing.contrib.zope import EventSourcing as ZopeEventSourcing
from flask_eventsourcing.contrib.zope import event_models as zope_models
from flask_eventsourcing.host import PlainHost
from flask_eventsourcing.models import Models, make_projection_models
from flask_eventsourcing.models import make_models as event_models
from flask_eventsourcing.persistence import DialectOptions
from flask_eventsourcing.projections.registry import BoundProjections, PlainProjections
from flask_eventsourcing.projections.upkeep.following import Health
from tests.bank import make_app
from tests.domain import Bank
from tests.hosts.zope_site import ExplicitManager
from tests.projections.desk import Desk, make_models

R = TypeVar("R")


@dataclass(eq=False)
class FlaskDesk(Desk):
    """The bank in a Flask app."""

    program = "flask eventsourcing"
    app: Flask
    db: SQLAlchemy
    es: EventSourcing[Bank]

    @property
    def bank(self) -> Bank:
        """The bank of the current app context."""
        return self.es.application

    @property
    def projections(self) -> BoundProjections:
        """Those of the app."""
        found: BoundProjections = self.app.extensions["eventsourcing"].projections
        return found

    @property
    def session(self) -> orm.Session:
        """The session of the current app context."""
        return self.db.session()

    @property
    def sessions(self) -> Any:
        """Flask-SQLAlchemy's."""
        return self.db.session

    @property
    def models(self) -> Models:
        """Those of the extension object."""
        return next(iter(self.es.models.values()))

    def _working(self) -> AbstractContextManager[object]:
        return self.app.app_context()

    def projection(self, projection_class: Any) -> Any:
        """Register a projection."""
        return self.es.projection(projection_class)

    def create_all(self) -> None:
        """Make the tables that are missing, in each database."""
        with self.app.app_context():
            self.db.create_all()

    def health(self) -> Health:
        """Look at every projection."""
        with self.app.app_context():
            return self.es.health()

    def wait_for(self, projection: Any, recordings: Any, timeout: float = 5.0) -> None:
        """Wait until a projection has dealt with events."""
        self.es.wait_for(projection, recordings, timeout)

    def using(self, session: orm.Session) -> AbstractContextManager[orm.Session]:
        """Have another session be the current one."""
        return self.es.using(session)

    def retry(self, function: Callable[[], R], times: int = 3) -> R:
        """Run a unit of work, and again after a conflict."""
        done: R = self.es.retry_on_conflict(times=times)(function)()
        return done

    def erase(self, aggregate_id: Any, *, redact: bool = False) -> Erasure:
        """Erase an aggregate with the next commit."""
        return self.es.erase(aggregate_id, redact=redact)

    def command(self, *arguments: str, input: str | None = None) -> Result:
        """Call a command of ``flask eventsourcing``."""
        return self.app.test_cli_runner().invoke(args=["eventsourcing", *arguments], input=input)

    def close(self) -> None:
        """Close the applications and every connection."""
        self.es.close(self.app)
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()


@dataclass(eq=False)
class PlainDesk(Desk):
    """The bank on SQLAlchemy alone."""

    program = "bank events"
    host: PlainHost
    maker: orm.sessionmaker[orm.Session]
    registered: PlainProjections

    @property
    def bank(self) -> Bank:
        """The bank of the host."""
        return self.host[Bank]

    @property
    def projections(self) -> PlainProjections:
        """Those of the host."""
        return self.registered

    @property
    def session(self) -> orm.Session:
        """The session of the unit of work, or the one that was opened."""
        unit = self.host.unit()
        assert unit is not None, "there is no session here"
        return unit.session

    @property
    def sessions(self) -> Any:
        """The user's own factory."""
        return self.maker

    @property
    def models(self) -> Models:
        """Those on the user's own base."""
        return self.host.models[Bank]

    def _working(self) -> AbstractContextManager[object]:
        return self.host.session()

    def projection(self, projection_class: Any) -> Any:
        """Register a projection."""
        return self.registered.register(projection_class)

    def using(self, session: orm.Session) -> AbstractContextManager[orm.Session]:
        """Have another session be the current one."""
        return self.host.using_session(session)

    def retry(self, function: Callable[[], R], times: int = 3) -> R:
        """Run a unit of work, and again after a conflict."""
        return self.host.retry(function, times)

    def erase(self, aggregate_id: Any, *, redact: bool = False) -> Erasure:
        """Erase an aggregate with the next commit."""
        letters = self.registered.dead_letters_of(Bank.name)
        return erase(self.bank, aggregate_id, redact=redact, dead_letters=letters)

    def command(self, *arguments: str, input: str | None = None) -> Result:
        """Call a command on the host's subject."""
        subject = Subject.of_plain_host(self.registered)
        result = CliRunner().invoke(group, arguments, obj=subject, input=input)
        assert FlaskDesk.program not in result.output, result.output
        return result

    def close(self) -> None:
        """Close the application and every connection."""
        self.registered.close()
        self.host.close()
        self.host.datastore.engine.dispose()


def make_desk(uri: str, *classes: type[Application[Any]], id_type: Any = None, **config: Any) -> FlaskDesk:
    """Make a desk in a Flask app, whose tables are created with its first projection.

    Keyword arguments are configuration keys.
    """
    app = make_app(uri, **config)
    db = SQLAlchemy()
    balance, seen = make_models(db.Model, id_type)
    es = EventSourcing[Bank](db=db, applications=classes or (Bank,))
    db.init_app(app)
    es.init_app(app)
    return FlaskDesk(db.Model, balance, seen, app, db, es)


class _Parts:
    """What a desk without Flask is made of, from the configuration keys of one with Flask."""

    def __init__(self, uri: str, id_type: Any, config: dict[str, Any]) -> None:
        self.base = orm.declarative_base()
        self.engine = sa.create_engine(uri, **config.pop("SQLALCHEMY_ENGINE_OPTIONS", {}))
        self.maker = orm.sessionmaker(self.engine)
        self.settings = Config.from_mapping(config)
        self.lease = self.settings.projection_lock == "lease"
        given = {name: getattr(self.settings, name) for name in DialectOptions.settings()}
        self.options = DialectOptions(program=PlainDesk.program, **given)
        self.read_models = make_models(self.base, id_type)


def make_plain_desk(uri: str, *, id_type: Any = None, **config: Any) -> PlainDesk:
    """Make a desk without Flask; keyword arguments are the configuration keys of one with Flask."""
    made = _Parts(uri, id_type, config)
    models = event_models(made.base, "Bank", schema=made.settings.schema)
    host = PlainHost(made.maker, {Bank: models}, options=made.options, env=made.settings.env)
    own = make_projection_models(made.base, "Bank", schema=made.settings.schema)
    projections = PlainProjections(host, {Bank: own}, lease=made.lease)
    return PlainDesk(made.base, *made.read_models, host, made.maker, projections)


def make_zope_desk(uri: str, *, id_type: Any = None, **config: Any) -> PlainDesk:
    """Make a desk whose sessions a transaction manager commits; keyword arguments are those of one with Flask."""
    made = _Parts(uri, id_type, config)
    models = zope_models(made.base, "Bank", schema=made.settings.schema)
    # As Pyramid's cookiecutter has it: the sessions of workers are those of the factory, and take part in nothing.
    session = orm.sessionmaker(made.engine)
    zope.sqlalchemy.register(session, transaction_manager=ExplicitManager())
    further: dict[str, Any] = {"options": made.options, "env": made.settings.env, "lease": made.lease}
    es = ZopeEventSourcing(Bank, models=models, session=session, session_factory=made.maker, **further)
    return PlainDesk(made.base, *made.read_models, es.host, made.maker, es.projections)
