"""The packages that are measured, each as its documentation says it is used."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import ApplicationRecorder, StoredEvent
from eventsourcing.utils import get_topic
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing

from .domain import Account, Bench


class Worker(Protocol):
    """What one thread does with a contender; a unit of work ends with ``commit`` or ``rollback``."""

    def insert(self, events: Sequence[StoredEvent]) -> None:
        """Append events."""

    def commit(self) -> None:
        """End a unit that wrote."""

    def rollback(self) -> None:
        """End a unit that only read, or that failed."""

    def read(self, originator_id: UUID) -> int:
        """Read the events of an aggregate, and return how many there are."""

    def rebuild(self, originator_id: UUID) -> int:
        """Rebuild an aggregate from its events, and return its version."""

    def page(self, start: int, limit: int) -> tuple[int, int]:
        """Read a page of the log, and return how many events it has and the position of the last."""


class RecorderWorker:
    """Works with the recorder of an application, and with a session where there is one."""

    def __init__(self, application: Application[UUID], session: Any = None) -> None:
        self._application = application
        self._recorder: ApplicationRecorder = application.recorder
        self._session = session

    def insert(self, events: Sequence[StoredEvent]) -> None:
        """Append events; without a session they are committed."""
        self._recorder.insert_events(events)

    def commit(self) -> None:
        """Commit the session."""
        if self._session is not None:
            self._session.commit()

    def rollback(self) -> None:
        """Roll the session back."""
        if self._session is not None:
            self._session.rollback()

    def read(self, originator_id: UUID) -> int:
        """Read the events of an aggregate."""
        return len(self._recorder.select_events(originator_id))

    def rebuild(self, originator_id: UUID) -> int:
        """Rebuild an aggregate from its events."""
        account: Account = self._application.repository.get(originator_id)
        return account.version

    def page(self, start: int, limit: int) -> tuple[int, int]:
        """Read a page of the log."""
        page = self._recorder.select_notifications(start, limit)
        return len(page), page[-1].id if page else start


class Contender(ABC):
    """A package, opened on one database.

    :param url: the database.
    :param connections: how many connections there may be at a time.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """Modules that must be installed."""
    databases: ClassVar[tuple[str, ...]]
    commits_itself: ClassVar[bool] = False
    """Whether the events are committed when they are inserted, so that nothing can come between."""
    rebuilds: ClassVar[bool] = True
    table: ClassVar[str] = "bench_events"

    @abstractmethod
    def __init__(self, url: sa.URL, connections: int) -> None: ...

    @staticmethod
    def encode_id(originator_id: Any) -> Any:
        """Return an id as the package stores it on databases that have no type for it."""
        return originator_id.hex

    def create_tables(self) -> None:
        """Create the tables, where opening does not."""
        return

    @abstractmethod
    def worker(self) -> Any:
        """A context manager with the :class:`Worker` of one thread."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections."""

    @classmethod
    def missing(cls) -> list[str]:
        """The modules that are required and not installed."""
        return [name for name in cls.requires if importlib.util.find_spec(name) is None]


def flask_app(url: sa.URL, connections: int) -> Flask:
    """Make an app as for this package so for the peer."""
    app = Flask("benchmarks")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": connections, "max_overflow": 0}
    return app


class This(Contender):
    """This package under Flask: the recorder joins ``db.session``."""

    name = "this"
    title = "this, in a session"
    databases = ("sqlite", "postgresql", "mariadb")
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bench)

    def __init__(self, url: sa.URL, connections: int) -> None:
        self.app = flask_app(url, connections)
        self.db.init_app(self.app)
        self.es.init_app(self.app)

    def create_tables(self) -> None:
        """Create the tables."""
        with self.app.app_context():
            self.db.create_all()

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Work in an application context of this thread."""
        with self.app.app_context():
            yield RecorderWorker(self.es.application, self.db.session)

    def close(self) -> None:
        """Close the application and its connections."""
        self.es.close(self.app)


class ThisAlone(This):
    """This package outside a session: the recorder commits on its own, as in the threads of a runner."""

    name = "this-alone"
    title = "this, on its own"
    commits_itself = True

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Work without an application context."""
        with self.app.app_context():
            application = self.es.application
        yield RecorderWorker(application)


class Own(Contender):
    """A recorder of the library itself."""

    name = "own"
    commits_itself = True

    def __init__(self, url: sa.URL, connections: int) -> None:
        self.application = Bench(env=self.env(url, connections))

    @abstractmethod
    def env(self, url: sa.URL, connections: int) -> Mapping[str, str]:
        """The environment of the application."""

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Work with the library's own connections."""
        yield RecorderWorker(self.application)

    def close(self) -> None:
        """Close the application."""
        self.application.close()


class OwnSQLite(Own):
    """The library's ``eventsourcing.sqlite``."""

    title = "eventsourcing.sqlite"
    databases = ("sqlite",)
    table = "stored_events"

    def env(self, url: sa.URL, connections: int) -> Mapping[str, str]:
        """The environment of the application."""
        return {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(url.database)}


class OwnPostgreSQL(Own):
    """The library's ``eventsourcing.postgres``."""

    title = "eventsourcing.postgres"
    databases = ("postgresql",)
    requires = ("psycopg", "psycopg_pool")

    def env(self, url: sa.URL, connections: int) -> Mapping[str, str]:
        """The environment of the application."""
        return {
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": str(url.database),
            "POSTGRES_HOST": str(url.query.get("host", url.host)),
            "POSTGRES_PORT": str(url.port or 5432),
            "POSTGRES_USER": str(url.username),
            "POSTGRES_PASSWORD": str(url.password or "-"),
            "POSTGRES_POOL_SIZE": str(connections),
        }


class FlaskScopedSession:
    """The adapter that the peer's README has for Flask-SQLAlchemy."""

    def __getattribute__(self, item: str) -> Any:
        return getattr(Peer.db.session, item)


class Peer(Contender):
    """``eventsourcing-sqlalchemy`` under Flask with Flask-SQLAlchemy, as its README has it."""

    name = "peer"
    title = "eventsourcing-sqlalchemy"
    databases = ("sqlite", "postgresql", "mariadb")
    requires = ("eventsourcing_sqlalchemy",)
    db = SQLAlchemy()

    def __init__(self, url: sa.URL, connections: int) -> None:
        self.app = flask_app(url, connections)
        self.db.init_app(self.app)
        with self.app.app_context():
            self.application = Bench(
                env={
                    "PERSISTENCE_MODULE": "eventsourcing_sqlalchemy",
                    "SQLALCHEMY_SCOPED_SESSION_TOPIC": get_topic(FlaskScopedSession),
                }
            )

    @staticmethod
    def encode_id(originator_id: Any) -> Any:
        """The peer stores ids as 16 bytes."""
        return originator_id.bytes

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Work in an application context of this thread."""
        with self.app.app_context():
            yield RecorderWorker(self.application, self.db.session)

    def close(self) -> None:
        """Close the application and its connections."""
        self.application.close()
        with self.app.app_context():
            self.db.engine.dispose()
