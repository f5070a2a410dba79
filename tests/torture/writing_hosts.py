"""The hosts on which writers save while readers follow the log: Flask, zope.sqlalchemy and Django."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast
from uuid import UUID, uuid4

import sqlalchemy as sa
import zope.sqlalchemy
from django.db import Error as DjangoError
from django.db import connections, transaction
from eventsourcing.application import Application
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm
from transaction import ThreadTransactionManager

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.contrib.django import get_application
from flask_eventsourcing.contrib.django.records import records_of
from flask_eventsourcing.contrib.zope import EventSourcing as ZopeEventSourcing
from flask_eventsourcing.contrib.zope import event_models
from flask_eventsourcing.persistence import SQLAlchemyApplicationRecorder
from tests.django_host import project
from tests.django_host.datastores import Opened


class Bank(Application[UUID]):
    """The application whose log is written and read."""


class WritingHost(ABC):
    """A host on a database, in which writers save."""

    engine: sa.Engine
    recorder: SQLAlchemyApplicationRecorder
    events: sa.Table

    @abstractmethod
    def working(self) -> AbstractContextManager[object]:
        """What is around a unit of a writer."""

    @abstractmethod
    def commit(self) -> None:
        """Commit it."""

    @abstractmethod
    def rollback(self) -> None:
        """Roll it back."""

    @abstractmethod
    def close(self) -> None:
        """Close everything."""


class FlaskHost(WritingHost):
    """A Flask app."""

    def __init__(self, url: str, engine_options: dict[str, Any]) -> None:
        self.app = Flask("torture")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options
        self.db = SQLAlchemy(self.app)
        self.es = EventSourcing(self.app, db=self.db, application=Bank)
        with self.app.app_context():
            self.db.create_all()
            self.recorder = cast(SQLAlchemyApplicationRecorder, self.es.application.recorder)
            self.engine = self.db.engine
            self.events = next(iter(self.es.models.values())).tables["events"]

    def working(self) -> AbstractContextManager[object]:
        """An application context."""
        return self.app.app_context()

    def commit(self) -> None:
        """Commit the session."""
        self.db.session.commit()

    def rollback(self) -> None:
        """Roll the session back."""
        self.db.session.rollback()

    def close(self) -> None:
        """Close everything."""
        self.es.close(self.app)
        self.engine.dispose()


class ZopeHost(WritingHost):
    """Sessions whose transactions a manager commits."""

    def __init__(self, url: str, engine_options: dict[str, Any]) -> None:
        base = orm.declarative_base()
        self.engine = sa.create_engine(url, **engine_options)
        models = event_models(base, "Bank")
        base.metadata.create_all(self.engine)
        self.session = orm.scoped_session(orm.sessionmaker(self.engine))
        self.manager = ThreadTransactionManager()
        zope.sqlalchemy.register(self.session, transaction_manager=self.manager)
        self.es = ZopeEventSourcing(Bank, models=models, session=self.session)
        self.recorder = cast(SQLAlchemyApplicationRecorder, self.es.application.recorder)
        self.events = models.tables["events"]

    def working(self) -> AbstractContextManager[object]:
        """A transaction that somebody else commits."""
        self.manager.begin()
        return nullcontext()

    def commit(self) -> None:
        """Commit the transaction."""
        self.manager.commit()

    def rollback(self) -> None:
        """Abort the transaction."""
        self.manager.abort()

    def close(self) -> None:
        """Close everything."""
        self.es.close()
        self.engine.dispose()


class DjangoHost(WritingHost):
    """A Django project, in which each thread has a connection."""

    def __init__(self, url: str, engine_options: dict[str, Any]) -> None:
        self.stack = ExitStack()
        self.alias = f"torture{uuid4().hex}"
        self.stack.enter_context(project.database(self.alias, url))
        self.stack.callback(Opened(self.alias).close)
        self.stack.enter_context(project.applications(Bank=self.alias))
        self.engine = sa.create_engine(url, **engine_options)
        self.stack.callback(self.engine.dispose)
        self.recorder = cast(SQLAlchemyApplicationRecorder, get_application("Bank").recorder)
        self.events = records_of("Bank").mirror.tables["events"]
        self.thread = threading.local()

    @contextmanager
    def working(self) -> Iterator[None]:
        """A block, which is rolled back unless it was committed."""
        try:
            self._begin()
        except DjangoError:
            # A request would close the connection that was lost, and the next one make another.
            connections[self.alias].close()
            self._begin()
        try:
            yield
        finally:
            self.rollback()

    def _begin(self) -> None:
        block: Any = transaction.atomic(using=self.alias)
        block.__enter__()
        self.thread.block = block

    def commit(self) -> None:
        """Leave the block."""
        self._leave(None, None, None)

    def rollback(self) -> None:
        """Leave the block with an error, if it is not left yet."""
        if self.thread.block is not None:
            self._leave(KeyError, KeyError(), None)

    def _leave(self, *error: Any) -> None:
        block, self.thread.block = self.thread.block, None
        block.__exit__(*error)

    def close(self) -> None:
        """Close everything."""
        self.stack.close()


HOSTS: dict[str, Callable[[str, dict[str, Any]], WritingHost]] = {
    "flask": FlaskHost,
    "zope": ZopeHost,
    "django": DjangoHost,
}
