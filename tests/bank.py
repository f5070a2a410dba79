"""Flask apps around the bank of ``tests.domain``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm
from werkzeug.test import TestResponse

from flask_eventsourcing import EventSourcing, InheritedDatabaseError
from tests.domain import Bank, in_thread


@dataclass
class Site:
    """A Flask app with a database, the extension and a model of its own."""

    app: Flask
    db: SQLAlchemy
    es: EventSourcing[Bank]
    Note: Any

    @property
    def bank(self) -> Bank:
        """The bank of the current app context."""
        return self.es.application

    def quiet(self) -> None:
        """Keep what the app logs out of the tests' output, with a logger that no other app has."""
        self.app.logger = logging.getLogger("tests.quiet")
        self.app.logger.disabled = True

    def answer(self, view: Callable[[], Any]) -> TestResponse:
        """Send a request that is answered by a function."""
        return self.app.test_client().post("/", environ_overrides={"tests.view": view})

    def elsewhere(self, function: Callable[[], Any]) -> None:
        """Do something in a thread, an app context and a transaction of its own, and commit it."""

        def run() -> None:
            with self.app.app_context():
                function()
                self.db.session.commit()

        in_thread(run)

    def opened(self, *deposits: int) -> UUID:
        """Open an account, with deposits, and return its id; each is committed."""
        with self.app.app_context():
            account_id = self.bank.open_account()
            self.db.session.commit()
            for amount in deposits:
                self.bank.deposit(account_id, amount)
                self.db.session.commit()
        return account_id

    def opened_or_refused(self) -> str:
        """Open an account, and return the error's text where this process may not use the database."""
        try:
            self.opened()
        except InheritedDatabaseError as error:
            return str(error)
        return "opened"

    def note(self, text: str = "note") -> None:
        """Add a row of the ORM to the current session."""
        self.db.session.add(self.Note(text=text))

    def stored(self) -> tuple[int, int]:
        """Count the events and the notes that a new transaction sees."""
        with self.app.app_context():
            events, notes = (
                self.db.session.scalar(sa.select(sa.func.count()).select_from(each))
                for each in (self.es.StoredEvent, self.Note)
            )
        return events or 0, notes or 0

    def balance(self, account_id: UUID) -> int | None:
        """Return what a new transaction sees in an account."""
        with self.app.app_context():
            return self.bank.balance(account_id)

    def close(self) -> None:
        """Close the applications and every connection."""
        self.es.close(self.app)
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()


def answer_with_view() -> Any:
    """Answer a request of ``Site.answer``."""
    return request.environ["tests.view"]()


def make_app(uri: str | None = None, **config: Any) -> Flask:
    """Make a Flask app that answers as the request says."""
    app = Flask("tests.bank")
    if uri is not None:
        app.config["SQLALCHEMY_DATABASE_URI"] = uri
    app.config.update(config)
    app.post("/")(answer_with_view)
    return app


def add_note(db: SQLAlchemy) -> Any:
    """Make a model that has nothing to do with events."""
    base: Any = db.Model
    body = {
        "__tablename__": "note",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "text": orm.mapped_column(sa.Text, unique=True, nullable=False),
    }
    return type(base)("Note", (base,), body)


def make_site(uri: str, *classes: type[Application[Any]], create: bool = True, **config: Any) -> Site:
    """Make a site with its tables; keyword arguments are configuration keys."""
    app = make_app(uri, **config)
    db = SQLAlchemy()
    note = add_note(db)
    es = EventSourcing[Bank](db=db, applications=classes or (Bank,))
    db.init_app(app)
    es.init_app(app)
    if create:
        with app.app_context():
            db.create_all()
    return Site(app, db, es, note)
