"""One bank in three sites on one database: a Flask app, a Pyramid application, and the Django site beside this.

``python -m tests.torture.two_sites PORT`` serves Pyramid's; ``python -m tests.torture.two_sites worker KIND`` runs the
projection in one of them, ``flask``, ``pyramid`` or ``django``, until it is told to end. The database is that of
``DATABASE_URL``.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import zope.sqlalchemy
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from pyramid.config import Configurator
from sqlalchemy import orm

from flask_eventsourcing.contrib.pyramid import EventSourcing as PyramidEventSourcing
from flask_eventsourcing.contrib.pyramid import event_models
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.workers import Worker


class Account(Aggregate):
    """An account that may be overdrawn."""

    def __init__(self) -> None:
        self.balance = 0

    @event("Moved")
    def move(self, amount: int) -> None:
        """Add an amount."""
        self.balance += amount


class Ledger(Application[UUID]):
    """The application of all sites."""

    def open(self) -> UUID:
        """Open an account."""
        account = Account()
        self.save(account)
        return account.id

    def transfer(self, sender_id: UUID, recipient_id: UUID, amount: int) -> None:
        """Move an amount between two accounts, which are read in one order by everybody."""
        accounts: dict[UUID, Account] = {each: self.repository.get(each) for each in sorted({sender_id, recipient_id})}
        accounts[sender_id].move(-amount)
        accounts[recipient_id].move(amount)
        self.save(*accounts.values())


Moved: Any = Account.Moved  # type: ignore[attr-defined]


def models_on(base: Any) -> tuple[Any, Any]:
    """Make the read models: totals, and a line for each event, which no key keeps from being there twice."""
    total = {
        "__tablename__": "total",
        "account_id": orm.mapped_column(sa.Uuid(), primary_key=True),
        "amount": orm.mapped_column(sa.BigInteger, nullable=False),
    }
    line = {
        "__tablename__": "line",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "account_id": orm.mapped_column(sa.String(36), nullable=False),
        "version": orm.mapped_column(sa.Integer, nullable=False),
    }
    return type(base)("Total", (base,), total), type(base)("Line", (base,), line)


def projection_on(total: Any, line: Any) -> type[ModelProjection]:
    """Make the projection, which all sites run under one name."""

    class Totals(ModelProjection):
        models = (total, line)

        @on(Moved)
        def moved(self, event: Any, session: orm.Session) -> None:
            row = session.get(total, event.originator_id)
            if row is None:
                row = total(account_id=event.originator_id, amount=0)
                session.add(row)
            row.amount += event.amount
            session.add(line(account_id=str(event.originator_id), version=event.originator_version))

    return Totals


def numbers_of(text: str) -> tuple[UUID, UUID, int]:
    """Return sender, recipient and amount."""
    sender, recipient, amount = text.split("_")
    return UUID(sender), UUID(recipient), int(amount)


def make_flask_app() -> Any:
    """Make the Flask app."""
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    from flask_eventsourcing import EventSourcing

    app = Flask("two_sites")
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db = SQLAlchemy()
    es = EventSourcing[Ledger](db=db, application=Ledger)
    es.projection(projection_on(*models_on(db.Model)))
    db.init_app(app)
    es.init_app(app)

    @app.get("/")
    def ready() -> dict[str, Any]:
        return {}

    @app.post("/transfer/<numbers>")
    @es.retry_on_conflict(times=50)
    def transfer(numbers: str) -> dict[str, Any]:
        es.application.transfer(*numbers_of(numbers))
        return {}

    return app


def make_pyramid_app() -> Any:
    """Make the Pyramid application."""
    base = orm.declarative_base()
    models = event_models(base, "Ledger")
    settings = {
        "tm.manager_hook": "pyramid_tm.explicit_manager",
        "tm.commit_veto": "pyramid_tm.default_commit_veto",
        "retry.attempts": "50",
    }
    factory = orm.sessionmaker(sa.create_engine(os.environ["DATABASE_URL"], pool_size=10))

    def dbsession(request: Any) -> orm.Session:
        session = factory()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    def transfer(request: Any) -> dict[str, Any]:
        request.eventsourcing[Ledger].transfer(*numbers_of(request.matchdict["numbers"]))
        return {}

    with Configurator(settings=settings) as config:
        config.include("pyramid_tm")
        config.include("pyramid_retry")
        config.registry["dbsession_factory"] = factory
        config.add_request_method(dbsession, reify=True)
        config.include("flask_eventsourcing.contrib.pyramid")
        config.add_eventsourcing(Ledger, models=models)
        config.add_projection(projection_on(*models_on(base)))
        config.add_route("ready", "/")
        config.add_view(lambda _: {}, route_name="ready", renderer="json")
        config.add_route("transfer", "/transfer/{numbers}")
        config.add_view(transfer, route_name="transfer", renderer="json")
    config.registry["base"] = base
    return config.make_wsgi_app()


def run_worker(kind: str) -> None:
    """Run the projection in one of the sites until the process is told to end."""
    projections: Any
    if kind == "flask":
        projections = make_flask_app().extensions["eventsourcing"].projections
    elif kind == "django":
        import django

        django.setup()
        from flask_eventsourcing.contrib.django.projecting import projections as django_projections

        projections = django_projections().bound["default"]
    else:
        found: PyramidEventSourcing = make_pyramid_app().registry["flask_eventsourcing"]
        projections = found.projections
    worker = Worker(projections.runnable())
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.exit(1 if worker.run() else 0)


def main() -> None:
    """Serve, or run the projection."""
    if sys.argv[1] == "worker":
        run_worker(sys.argv[2])
        return
    from waitress import serve

    serve(make_pyramid_app(), listen=f"127.0.0.1:{sys.argv[1]}", threads=8)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from tests.torture.two_sites import main as run

    run()
