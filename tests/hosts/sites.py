"""The bank on each host: what the tests that hold for every host need of it, and no Flask where there is none."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.pool import StaticPool

from flask_eventsourcing.host import Host, PlainHost
from flask_eventsourcing.models import make_models
from flask_eventsourcing.persistence.dialects import is_in_memory
from tests.domain import Bank, in_thread


def can_import(name: str) -> bool:
    """Whether a module can be imported in this process."""
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


ZOPE = ("zope scoped_session", "zope sessionmaker")
HOSTS = (
    "plain scoped_session",
    "plain sessionmaker",
    *(["flask"] if can_import("flask") else []),
    *(ZOPE if can_import("zope.sqlalchemy") else []),
    *(["django"] if can_import("django") else []),
)


class HostSite(ABC):
    """The bank on a host, with a model of the user's beside the events."""

    host: Host
    Note: Any
    StoredEvent: Any

    @property
    @abstractmethod
    def bank(self) -> Bank:
        """The application."""

    @property
    @abstractmethod
    def session(self) -> orm.Session:
        """The current session."""

    @abstractmethod
    def working(self) -> AbstractContextManager[object]:
        """What is around a piece of work whose session recorders join, and which commits nothing by itself."""

    @abstractmethod
    def close(self) -> None:
        """Close the application and every connection."""

    def remove(self) -> None:
        """Give back what is left after :meth:`close`; mostly nothing."""
        return

    def commit(self) -> None:
        """Commit the current session, as a user of the host does."""
        self.session.commit()

    def rollback(self) -> None:
        """Roll the current session back, as a user of the host does."""
        self.session.rollback()

    def note(self, text: str = "note") -> None:
        """Add a row of the ORM to the current session."""
        self.session.add(self.Note(text=text))

    def elsewhere(self, function: Callable[[], Any]) -> None:
        """Do something in a thread and a transaction of its own, and commit it."""

        def run() -> None:
            with self.host.context(), self.host.transaction():
                function()

        in_thread(run)

    def opened(self) -> UUID:
        """Open an account, commit, and return its id."""
        with self.host.context(), self.host.transaction():
            return self.bank.open_account()

    def stored(self) -> tuple[int, int]:
        """Count the events and the notes that a new transaction sees."""
        with self.host.datastore.engine.connect() as connection:
            events, notes = (
                connection.scalar(sa.select(sa.func.count()).select_from(each))
                for each in (self.StoredEvent, self.Note)
            )
        return events or 0, notes or 0


class PlainSite(HostSite):
    """SQLAlchemy alone."""

    def __init__(self, url: str, *, scoped: bool, env: Mapping[str, str] | None = None) -> None:
        base = orm.declarative_base()
        self.engine = engine_for(url)
        models = make_models(base, "Bank")
        self.StoredEvent = models.StoredEvent
        self.Note = make_note(base)
        base.metadata.create_all(self.engine)
        factory = orm.sessionmaker(self.engine)
        self.scoped = orm.scoped_session(factory) if scoped else None
        self.plain = PlainHost(self.scoped or factory, {Bank: models}, env=env)
        self.host = self.plain

    @property
    def bank(self) -> Bank:
        """The application."""
        return self.plain[Bank]

    @property
    def session(self) -> orm.Session:
        """The current session."""
        unit = self.plain.unit()
        assert unit is not None
        return unit.session

    def working(self) -> AbstractContextManager[object]:
        """The scope's session, or one of the factory's."""
        return self.scoped() if self.scoped is not None else self.plain.session()

    def close(self) -> None:
        """Close the application and every connection."""
        self.plain.close()
        if self.scoped is not None:
            self.scoped.remove()
        self.engine.dispose()


def engine_for(url: str) -> sa.Engine:
    """Make an engine; a database in memory is one for all threads."""
    memory = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    return sa.create_engine(url, **(memory if is_in_memory(sa.make_url(url)) else {}))


def make_note(base: Any) -> Any:
    """Make a model that has nothing to do with events."""
    body = {
        "__tablename__": "note",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "text": orm.mapped_column(sa.Text, nullable=False),
    }
    return type(base)("Note", (base,), body)


def make_host_site(kind: str, url: str) -> HostSite:
    """Return the bank on a kind of host."""
    if kind == "flask":
        made: HostSite = importlib.import_module("tests.hosts.flask_site").FlaskSite(url)
        return made
    if kind == "django":
        on_django: HostSite = importlib.import_module("tests.hosts.django_site").DjangoSite(url)
        return on_django
    if kind in ZOPE:
        on_zope: HostSite = importlib.import_module("tests.hosts.zope_site").ZopeSite(url, scoped=kind == ZOPE[0])
        return on_zope
    return PlainSite(url, scoped=kind == "plain scoped_session")
