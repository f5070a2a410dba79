"""The databases and sessions of one Flask app, and the app as a host.

Only this module distinguishes Flask-SQLAlchemy and Flask-SQLAlchemy-Lite, by the object that the user passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import sqlalchemy as sa
from flask import Flask, g, has_app_context
from flask.globals import app_ctx
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from .._patches import lite_get_session, lite_sessions, session_scope
from ..exceptions import ConfigurationError, NotInitializedError
from ..host import check_session, mapped_tables, redirected_session
from ..lifecycle import keep_for_ever
from ..persistence import Datastore
from ..persistence.dialects import readable_address_errors
from ..persistence.forks import drop_inherited_connections, leave_inherited_connections
from ..uow import LENT, Run, UnitOfWork, UnitRunner, Units, always, follow, may_lose

R = TypeVar("R")

DEFAULT_URI = "sqlite:///eventsourcing.db"
SESSIONS = "_sqlalchemy_sessions"
"""The attribute of ``flask.g`` in which Flask-SQLAlchemy-Lite keeps the sessions of an application context."""
PID = "_flask_eventsourcing_pid"
"""The attribute of ``flask.g`` with the process that used a context of Flask-SQLAlchemy-Lite."""
ENDED = "_flask_eventsourcing_ended"
"""The attribute of ``flask.g`` that marks a context that is over. A thread may still have a copy of it."""
LEFT = "_flask_eventsourcing_left"
"""The attribute of ``flask.g`` with the sessions that were current for a part of an application context."""
AFTER_THE_END = (
    "An application context that has ended is in use, as by a thread with a copy of it: its session will never be "
    "committed, rolled back or closed. Push a context of its own there: with app.app_context(): …"
)


def check_extension(extension: Any) -> Any:
    """Check the argument ``db``.

    :raises ConfigurationError: when it is neither Flask-SQLAlchemy's nor Flask-SQLAlchemy-Lite's object.
    """
    if not all(hasattr(type(extension), name) for name in ("init_app", "engines")):
        raise ConfigurationError(
            f"db must be a SQLAlchemy() object of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite; found {extension!r}."
        )
    return extension


def registered_extension(app: Flask) -> Any:
    """Return the ``db`` object that is registered on an app, or None.

    :raises ConfigurationError: when it is one that cannot be used.
    """
    registered = app.extensions.get("sqlalchemy")
    return None if registered is None else check_extension(registered)


def register_extension(app: Flask, made: Any) -> Any:
    """Register a ``db`` object on an app that has none.

    :param made: one that was made for another app before, or None.
    :raises ConfigurationError: when the address of the database cannot be used.
    """
    extension = SQLAlchemy() if made is None else made
    if not app.config.get("SQLALCHEMY_BINDS") and not app.config.get("SQLALCHEMY_DATABASE_URI"):
        app.config["SQLALCHEMY_DATABASE_URI"] = DEFAULT_URI
    with readable_address_errors("SQLALCHEMY_DATABASE_URI", ConfigurationError):
        extension.init_app(app)
    return extension


def has_models(extension: Any) -> bool:
    """Whether a ``db`` object brings a declarative base, as Flask-SQLAlchemy's does."""
    return hasattr(extension, "Model")


class AppDatabase:
    """The ``SQLAlchemy`` extension object in one Flask app.

    :param app: the app.
    :param extension: of Flask-SQLAlchemy 3.1 or Flask-SQLAlchemy-Lite.
    :raises ConfigurationError: when it is not registered on the app.
    """

    def __init__(self, app: Flask, extension: Any) -> None:
        registered: Any = app.extensions.get("sqlalchemy")
        if registered is not extension:
            raise ConfigurationError(
                "The db object is not registered on this Flask app: call db.init_app(app) before es.init_app(app)."
            )
        self.extension: Any = extension
        self.has_models: bool = has_models(extension)
        with app.app_context():
            self.engines: Mapping[str | None, sa.Engine] = extension.engines
            self._factory: orm.sessionmaker[Any] = (
                extension.session.session_factory if self.has_models else extension.sessionmaker
            )

    def engine_of(self, bind_key: str | None) -> sa.Engine:
        """Return the database of a bind key.

        :raises ConfigurationError: when there is none.
        """
        key = bind_key if self.has_models or bind_key is not None else "default"
        if key not in self.engines:
            found = ", ".join(repr(name) for name in self.engines)
            setting = "SQLALCHEMY_BINDS" if self.has_models else "SQLALCHEMY_ENGINES"
            shown = repr(key) if key is None or "://" not in key else "that is an address"  # with a password
            raise ConfigurationError(
                f"There is no engine for the bind key {shown} (found: {found}): add it to {setting}."
            )
        return self.engines[key]

    def bind_arguments(self, bind_key: str | None, events_table: sa.Table) -> dict[str, Any]:
        """Return the arguments with which a session finds its connection to the database of a bind key."""
        if not self.has_models and bind_key is not None:
            return {"bind": self.engine_of(bind_key)}
        return {"clause": events_table}

    def check_models(self, owner: Any, models: Sequence[Any], bind_key: str | None) -> None:
        """Check that the tables of a projection's models are in the database of the events that it follows.

        :raises ConfigurationError: when one is not.
        """
        for table in [table for model in models for table in mapped_tables(model)] if self.has_models else ():
            found = table.metadata.info.get("bind_key")
            if found != bind_key:
                raise ConfigurationError(
                    f"Table {table.name!r} of {owner.__name__} has the bind key {found!r}, and the events have "
                    f"{bind_key!r}: they must be in one database, as they are committed in one transaction."
                )

    def session(self) -> orm.Session:
        """Return the session of the current application context."""
        session: Any = self.extension.session
        found: orm.Session = session() if isinstance(session, orm.scoped_session) else session
        return found

    def open_session(self) -> orm.Session | None:
        """Return the session of the current application context if it was used already."""
        if not self.has_models:
            return self.session() if "default" in g.get(SESSIONS, {}) else None
        session = self.extension.session
        if isinstance(session, orm.scoped_session):
            return session.registry() if session.registry.has() else None
        return self.session()

    def drop_session(self) -> None:
        """Close a session that was opened after the current application context had closed its own."""
        session = self.open_session()
        if session is not None and (not self.has_models or isinstance(self.extension.session, orm.scoped_session)):
            session.close()
            self._set_session(None)

    @contextmanager
    def using(self, session: orm.Session) -> Iterator[None]:
        """A context in which a session is that of the current application context.

        :raises ConfigurationError: when ``db.session`` was replaced by an object that cannot hold another session.
        """
        if self.has_models and not isinstance(self.extension.session, orm.scoped_session):
            raise ConfigurationError(
                f"db.session is {self.extension.session!r}, not a scoped_session, so no other session can take its "
                "place: leave db.session as Flask-SQLAlchemy has made it."
            )
        before = self.open_session()
        self._set_session(session)
        try:
            yield
        finally:
            self._set_session(before)

    def _set_session(self, session: orm.Session | None) -> None:
        if not self.has_models:
            # At the end of the context, it closes the session that it finds there.
            others = {name: each for name, each in g.get(SESSIONS, {}).items() if name != "default"}
            lite_sessions(g, others if session is None else {**others, "default": session})
        elif session is None:
            self.extension.session.registry.clear()
        else:
            self.extension.session.registry.set(session)

    def redirected_session(self, engine: sa.Engine, connection: Connection) -> orm.Session:
        """Return a new session of the current context, which uses a connection instead of an engine."""
        session = redirected_session(self._factory, engine, connection)
        if isinstance(self.extension.session, orm.scoped_session):
            self.extension.session.remove()
        self._set_session(session)
        return session

    def separate_processes(self) -> None:
        """Prevent that connections and sessions from before a fork are used after it."""
        for engine in self.engines.values():
            drop_inherited_connections(engine)
        if not self.has_models:
            _separate_lite(self.extension)
            return
        registry = getattr(self.extension.session, "registry", None)
        scope = getattr(registry, "scopefunc", None)
        if registry is not None and scope is not None and not isinstance(scope, ScopeInProcess):
            session_scope(registry, ScopeInProcess(scope))


@dataclass(frozen=True, eq=False)
class AppDatastore(Datastore):
    """A database of a Flask app. ``init_app`` prepares it as its last step; recorders do not."""

    def prepare(self) -> None:
        """Do nothing."""

    def install(self) -> None:
        """Install what the engine needs."""
        super().prepare()


def current_context() -> object:
    """Return the application context, which has a session of its own."""
    return app_ctx._get_current_object() if has_app_context() else None  # type: ignore[attr-defined]


class FlaskHost:
    """A Flask app as the ``Host`` of the applications in one database, and of their projections.

    :param app: the app.
    :param database: its databases and sessions.
    :param units: makes the units of work of its sessions in that database.
    :param events_table: a table of events in that database.
    """

    def __init__(self, app: Flask, database: AppDatabase, units: Units, events_table: sa.Table) -> None:
        self.app = app
        self.database = database
        self._units = units
        self._events_table = events_table
        self._runner = UnitRunner(self._required)
        given = {each.name: getattr(units.datastore, each.name) for each in fields(Datastore) if each.init}
        self.datastore: AppDatastore = AppDatastore(**given | {"unit": self.unit})

    def prepare(self) -> None:
        """Prepare the app's engines and sessions."""
        self.datastore.install()
        follow(self.datastore.engine)
        self.database.separate_processes()

    def context(self) -> AbstractContextManager[object]:
        """An application context."""
        return self.app.app_context()

    def unit(self) -> UnitOfWork | None:
        """The unit of work to join, or None outside an application context of this app."""
        context: Any = current_context()
        if context is not None and context.app is self.app:
            session = self.database.session()
            if ENDED in context.g and ENDED not in session.info:
                session.info[ENDED] = True
                self.app.logger.error(AFTER_THE_END)
            if LENT in session.info:
                self.check_session(session)
            return self._units.of(session)
        return None

    def open_unit(self) -> UnitOfWork | None:
        """The unit of work of the current session, if a recorder has joined it already."""
        return self._units.open(self.database.open_session())

    def open_unit_of(self, session: orm.Session) -> UnitOfWork | None:
        """The unit of work of a session, if a recorder has joined it already."""
        return self._units.open(session)

    def unit_of(self, session: orm.Session) -> UnitOfWork:
        """The unit of work of a session."""
        return self._units.of(session)

    def transaction(self, *, queueing: bool = False, run: Run | None = None) -> AbstractContextManager[orm.Session]:
        """See ``EventSourcing.transaction``.

        :raises NotInitializedError: outside an application context of this app.
        """
        return self._runner.transaction(queueing=queueing, run=run)

    def retry(
        self, function: Callable[[], R], times: int, *, lenient: bool = False, rewind: Callable[[], bool] = always
    ) -> R:
        """See ``EventSourcing.retry_on_conflict``."""
        return self._runner.retry(function, times, lenient=lenient, rewind=rewind)

    @contextmanager
    def using(self, connection: Connection) -> Iterator[orm.Session]:
        """A context with an application context, in which a new session on *connection* is the current one."""
        session = self.database.redirected_session(self.datastore.engine, connection)
        self._units.of(session).route.bind_arguments = {"bind": connection}
        try:
            yield session
        finally:
            session.close()

    @contextmanager
    def using_session(self, session: orm.Session) -> Iterator[orm.Session]:
        """A context in which the caller's session is the current one. The caller commits and closes it.

        :raises ConfigurationError: when it is for another database.
        :raises NotInitializedError: outside an application context of this app.
        """
        self._required()
        self.check_session(session)
        session.info[LENT] = True
        unit = self._units.of(session)
        if "bind" in unit.route.bind_arguments:
            unit.route.bind_arguments = {"bind": session.get_bind(clause=self._events_table)}
        try:
            with self.database.using(session):
                yield session
        finally:
            # A context may last as long as its process.
            g._flask_eventsourcing_left = {each: None for each in (*g.get(LEFT, ()), session) if may_lose(each)}

    def check_session(self, session: orm.Session) -> None:
        """Check that a session is for this database.

        :raises ConfigurationError: when it is not.
        """
        check_session(session, self.datastore.engine, self._events_table)

    def is_for(self, session: orm.Session) -> bool:
        """Whether a session is for this database."""
        try:
            self.check_session(session)
        except ConfigurationError:
            return False
        return True

    def tables_of(self, model: Any) -> Sequence[sa.Table]:
        """The tables of a mapped class."""
        return mapped_tables(model)

    def _required(self) -> UnitOfWork:
        unit = self.unit()
        if unit is None:
            raise NotInitializedError(
                "A unit of work needs an application context of its app: with app.app_context(): …"
            )
        return unit


class ScopeInProcess:
    """The scope of a ``scoped_session`` that keeps the sessions of a process apart from inherited ones.

    An application context that was pushed before the fork is the same object in the forked process, so its session
    would be the same too. With another key the inherited session is neither used nor closed.

    :param scope: returns the key of the current session within one process.
    """

    def __init__(self, scope: Callable[[], Hashable]) -> None:
        self._scope = scope
        self._pid = os.getpid()

    def __call__(self) -> Hashable:
        """Return the key of the current session."""
        pid = os.getpid()
        key = self._scope()
        if pid == self._pid:
            return key
        leave_inherited_connections()
        return pid, key


class SessionInProcess:
    """The same for Flask-SQLAlchemy-Lite, which has no scope but keeps its sessions in the application context.

    :param get_session: its own function.
    """

    def __init__(self, get_session: Callable[[str], orm.Session]) -> None:
        self._get_session = get_session
        self._pid = os.getpid()

    def __call__(self, name: str = "default") -> orm.Session:
        """Return a session of the current application context, never one that was made before a fork."""
        pid = os.getpid()
        leave_inherited_connections()
        if has_app_context() and g.get(PID, self._pid) != pid:
            g._flask_eventsourcing_pid = pid
            keep_for_ever(g.pop(SESSIONS, None))
        return self._get_session(name)


def _separate_lite(extension: Any) -> None:
    if not isinstance(extension.get_session, SessionInProcess):
        lite_get_session(extension, SessionInProcess(extension.get_session))
