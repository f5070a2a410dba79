"""Where a program of saves, commits and rollbacks is run: in a Flask app, or on SQLAlchemy alone.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import logging
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
import pymysql
import sqlalchemy as sa
from django.db import Error as DjangoError
from eventsourcing.application import AggregateNotFoundError
from eventsourcing.persistence import PersistenceError
from sqlalchemy import orm
from transaction.interfaces import TransactionError

from flask_eventsourcing import exceptions
from flask_eventsourcing.web.state import state_of
from tests.bank import Site, make_site
from tests.domain import Bank
from tests.hosts.sites import PlainSite
from tests.hosts.zope_site import ZopeSite

R = TypeVar("R")
CACHES = {
    "none": {},
    "fast-forwarded": {"AGGREGATE_CACHE_MAXSIZE": "100"},
    "plain": {"AGGREGATE_CACHE_MAXSIZE": "100", "AGGREGATE_CACHE_FASTFORWARD": "n"},
}
"""Each with what it needs in the environment of the application."""


@dataclass(frozen=True)
class Setting:
    """What is around a program."""

    place: str = "context"
    """A view that answers with a status, or a context or session without a request."""
    mode: str = "explicit"
    cache: str = "none"
    status: int = 200
    """With which the view answers, if nothing is raised."""


class UsersError(Exception):
    """An error of the user's own code."""


TOLD: tuple[type[Exception], ...] = (
    *(sa.exc.SQLAlchemyError, PersistenceError, exceptions.FlaskEventSourcingError, AggregateNotFoundError, UsersError),
    *(sqlite3.Error, psycopg.Error, pymysql.Error, TransactionError, DjangoError),
)
"""What a program may be told by, and may catch."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a program: the status of the answer, if it was a view, and what was raised."""

    status: int | None
    error: BaseException | None = None


class Stage(ABC):
    """A bank on a database."""

    mode = "explicit"
    begins = True
    """Whether a user may write ``with session.begin():``, which commits the session at its end."""
    tells_by_log = False
    """Whether a warning in the log will do where another host has a signal for what is discarded."""
    memory: bool
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

    @property
    @abstractmethod
    def engine(self) -> sa.Engine:
        """The database."""

    @abstractmethod
    def working(self) -> AbstractContextManager[object]:
        """A context with a session."""

    def commit(self) -> None:
        """Commit as a user of the host does."""
        self.session.commit()

    def rollback(self) -> None:
        """Roll back as a user of the host does."""
        self.session.rollback()

    def after_leaving(self) -> None:
        """Do what a user of the host does who has closed a session with everything in it; mostly nothing."""
        return

    @property
    def excludes(self) -> bool:
        """Whether a transaction keeps all others from writing from its beginning."""
        return self.memory

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction has begun."""
        return self.session.in_transaction()

    def add_row(self, text: str | None) -> None:
        """Write a row with the ORM."""
        self.session.add(self.Note(text=text))
        self.session.flush()

    def add_row_again(self) -> None:
        """Write a second row with the id 1, by a statement past the ORM."""
        self.session.execute(sa.insert(self.Note).values(id=1, text="there is one"))

    def recover(self) -> None:
        """Do what a program does after an error that it did not expect."""
        try:
            self.rollback()
        except TOLD:
            self.session.invalidate()

    @abstractmethod
    def transaction(self) -> AbstractContextManager[object]:
        """A unit of work."""

    @abstractmethod
    def retry(self, function: Callable[[], R], times: int) -> R:
        """Run a function with ``retry_on_conflict``."""

    @abstractmethod
    def elsewhere(self, function: Callable[[], Any]) -> None:
        """Do something in another thread and transaction, and commit it."""

    @abstractmethod
    def remove(self) -> bool:
        """Remove the current session; returns whether there is such a thing."""

    @abstractmethod
    def close(self) -> None:
        """Close every connection."""

    def perform(self, program: Callable[[], Any], setting: Setting) -> Outcome:
        """Run a program in a context of its own."""
        try:
            with self.working():
                program()
        except Exception as error:  # noqa: BLE001  # the caller looks at it
            return Outcome(None, error)
        return Outcome(None)

    @property
    def dialect(self) -> str:
        """The name of the database."""
        return self.engine.dialect.name


class FlaskStage(Stage):
    """A Flask app."""

    def __init__(self, site: Site, mode: str) -> None:
        self.site = site
        self.mode = mode
        self.Note = site.Note
        self.StoredEvent = site.es.StoredEvent
        # It would write every error with its traceback; what is told is told by a signal too.
        site.quiet()
        self.memory = self.engine.url.database in (None, "", ":memory:")

    @property
    def bank(self) -> Bank:
        """The application."""
        return self.site.bank

    @property
    def session(self) -> orm.Session:
        """The session of the app context."""
        session: orm.Session = self.site.db.session()
        return session

    @property
    def engine(self) -> sa.Engine:
        """The app's engine."""
        return state_of(self.site.app).host.datastore.engine

    def working(self) -> AbstractContextManager[object]:
        """An app context."""
        return self.site.app.app_context()

    def transaction(self) -> AbstractContextManager[object]:
        """A unit of work."""
        return self.site.es.transaction()

    def retry(self, function: Callable[[], R], times: int) -> R:
        """Run a function with ``retry_on_conflict``."""
        return self.site.es.retry_on_conflict(times=times)(function)()

    def elsewhere(self, function: Callable[[], Any]) -> None:
        """Do something in another app context."""
        self.site.elsewhere(function)

    def remove(self) -> bool:
        """Remove the current session."""
        self.site.db.session.remove()
        return True

    def close(self) -> None:
        """Close every connection."""
        self.site.close()

    def perform(self, program: Callable[[], Any], setting: Setting) -> Outcome:
        """Run a program in a context, or in a view."""
        if setting.place != "view":
            return super().perform(program, setting)

        def view() -> tuple[str, int]:
            program()
            return "done", setting.status

        return Outcome(self.site.answer(view).status_code)


class PlainStage(Stage):
    """SQLAlchemy alone, or with transactions of Zope's."""

    tells_by_log = True

    def __init__(self, site: PlainSite | ZopeSite) -> None:
        self.site = site
        self.begins = not isinstance(site, ZopeSite)
        self.Note = self.site.Note
        self.StoredEvent = self.site.StoredEvent
        self.memory = self.engine.url.database in (None, "", ":memory:")

    @property
    def bank(self) -> Bank:
        """The application."""
        return self.site.bank

    @property
    def session(self) -> orm.Session:
        """The current session."""
        return self.site.session

    @property
    def engine(self) -> sa.Engine:
        """The engine of the host."""
        return self.site.engine

    def commit(self) -> None:
        """Commit as a user of the host does."""
        self.site.commit()

    def rollback(self) -> None:
        """Roll back as a user of the host does."""
        self.site.rollback()

    def after_leaving(self) -> None:
        """Abort the transaction of a manager, which cannot commit a session any more that was closed."""
        if not self.begins:
            self.site.rollback()

    def working(self) -> AbstractContextManager[object]:
        """The scope's session, or one of the factory's."""
        return self.site.working()

    def transaction(self) -> AbstractContextManager[object]:
        """A unit of work."""
        return self.site.host.transaction()

    def retry(self, function: Callable[[], R], times: int) -> R:
        """Run a function with the host's ``retry``."""
        return self.site.host.retry(function, times)

    def elsewhere(self, function: Callable[[], Any]) -> None:
        """Do something in another thread."""
        self.site.elsewhere(function)

    def remove(self) -> bool:
        """Remove the scope's session, where there is a scope."""
        if self.site.scoped is None:
            return False
        self.site.scoped.remove()
        return True

    def perform(self, program: Callable[[], Any], setting: Setting) -> Outcome:
        """Run a program, and let nothing of its session stay."""
        outcome = super().perform(program, setting)
        with suppress(sa.exc.SQLAlchemyError):
            self.remove()
        if isinstance(self.site, ZopeSite):
            # Nobody tries again what had a conflict.
            self.site.es.host.memory(self.site.manager).clear()
        return outcome

    def close(self) -> None:
        """Close every connection."""
        self.site.close()


class Stages:
    """The stages of one database, made when they are needed.

    :param host: ``flask``, one of the kinds of ``PlainSite``, or one of ``ZopeSite``.
    """

    def __init__(self, uri: str, host: str) -> None:
        self._uri = uri
        self.host = host
        self._made: dict[tuple[str, str], Stage] = {}

    def __getitem__(self, setting: Setting) -> Stage:
        key = setting.mode, setting.cache
        if key not in self._made:
            self._made[key] = self._make(*key)
            _hurry(self._made[key].engine)
            add_row(self._made[key].engine, self._made[key].Note)
        return self._made[key]

    def _make(self, mode: str, cache: str) -> Stage:
        if self.host != "flask":
            made = ZopeSite if self.host.startswith("zope") else PlainSite
            return PlainStage(made(self._uri, scoped=self.host.endswith("scoped_session"), env=CACHES[cache]))
        site = make_site(
            self._uri,
            EVENTSOURCING_COMMIT=mode,
            EVENTSOURCING_ENV=CACHES[cache],
            EVENTSOURCING_LOCK_TIMEOUT=2,
            PROPAGATE_EXCEPTIONS=False,
        )
        return FlaskStage(site, mode)

    def close(self) -> None:
        """Close every connection."""
        for stage in self._made.values():
            stage.close()


def _hurry(engine: sa.Engine) -> None:
    """Let SQLite not wait for the disk."""
    if engine.dialect.name != "sqlite" or engine.url.database in (None, "", ":memory:"):
        return
    engine.dispose()
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF").close())


def add_row(engine: sa.Engine, note: Any) -> None:
    """See to it that there is a row with the id 1."""
    with engine.begin() as connection:
        if not connection.scalar(sa.select(sa.func.count()).select_from(note)):
            connection.execute(sa.insert(note).values(id=1, text="there is one"))


class Logged(logging.Handler):
    """Keeps the warnings and errors of the package, in the place of a signal where a host has none."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())
