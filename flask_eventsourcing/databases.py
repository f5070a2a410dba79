"""What Flask-SQLAlchemy and Flask-SQLAlchemy-Lite have in common, and where they differ.

Neither is imported here for its type: the object that the user passes tells which it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import sqlalchemy as sa
from flask import Flask, g, has_app_context
from sqlalchemy import orm

from .exceptions import ConfigurationError
from .lifecycle import keep_for_ever
from .persistence.forks import drop_inherited_connections, leave_inherited_connections

SESSIONS = "_sqlalchemy_sessions"
"""Where Flask-SQLAlchemy-Lite keeps the sessions of an application context, in ``flask.g``."""
PID = "_flask_eventsourcing_pid"


class Database:
    """The ``SQLAlchemy`` extension object of a Flask app.

    :param extension: of Flask-SQLAlchemy 3.1 or Flask-SQLAlchemy-Lite.
    :raises ConfigurationError: when it is neither.
    """

    def __init__(self, extension: Any) -> None:
        if not all(hasattr(type(extension), name) for name in ("init_app", "engines")):
            raise ConfigurationError(
                f"db must be a SQLAlchemy() object of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite; found {extension!r}."
            )
        self.extension: Any = extension
        self.has_models = hasattr(extension, "Model")

    @property
    def base(self) -> Any:
        """The declarative base for models, or None where the user brings one (Flask-SQLAlchemy-Lite)."""
        return self.extension.Model if self.has_models else None

    def engines(self, app: Flask) -> Mapping[str | None, sa.Engine]:
        """Return all engines of an app by their bind keys."""
        with app.app_context():
            engines: Mapping[str | None, sa.Engine] = self.extension.engines
        return engines

    def engine(self, app: Flask, bind_key: str | None) -> sa.Engine:
        """Return the engine of an app for a bind key.

        :raises ConfigurationError: when ``db.init_app(app)`` was not called, or there is no such bind key.
        """
        registered: Any = app.extensions.get("sqlalchemy")
        if registered is not self.extension:
            raise ConfigurationError(
                "The db object is not registered on this Flask app: call db.init_app(app) before es.init_app(app)."
            )
        engines = self.engines(app)
        key = bind_key if self.has_models or bind_key is not None else "default"
        if key not in engines:
            found = ", ".join(repr(name) for name in engines)
            setting = "SQLALCHEMY_BINDS" if self.has_models else "SQLALCHEMY_ENGINES"
            raise ConfigurationError(
                f"There is no engine for the bind key {key!r} (found: {found}): add it to {setting}."
            )
        engine: sa.Engine = engines[key]
        return engine

    def table_checker(self, bind_key: str | None) -> Callable[[Any, sa.Table], None]:
        """Return what raises a ``ConfigurationError`` for a table that is not in the database of a bind key."""

        def check(owner: Any, table: sa.Table) -> None:
            found = table.metadata.info.get("bind_key") if self.has_models else bind_key
            if found != bind_key:
                raise ConfigurationError(
                    f"Table {table.name!r} of {owner.__name__} has the bind key {found!r}, and the events have "
                    f"{bind_key!r}: they must be in one database, as they are committed in one transaction."
                )

        return check

    def use_session(self, session: orm.Session) -> None:
        """Make a session that of the current application context, to the end of which it lasts."""
        if isinstance(self.extension.session, orm.scoped_session):
            self.extension.session.remove()
            self.extension.session.registry.set(session)
        else:
            # Flask-SQLAlchemy-Lite has no other way in; it closes what it finds there at the end of the context.
            g._sqlalchemy_sessions = {"default": session}

    def new_session(self, app: Flask, **options: Any) -> orm.Session:
        """Make a session as the app's own are made."""
        made: orm.Session
        if self.has_models:
            made = self.extension.session.session_factory(**options)
        else:
            with app.app_context():
                made = self.extension.sessionmaker(**options)
        return made

    def separate_processes(self, app: Flask) -> None:
        """See to it that connections and sessions from before a fork are not used after it, by anybody."""
        for engine in self.engines(app).values():
            drop_inherited_connections(engine)
        if not self.has_models:
            self._separate_lite()
            return
        registry = getattr(self.extension.session, "registry", None)
        scope = getattr(registry, "scopefunc", None)
        if registry is not None and scope is not None and not isinstance(scope, ScopeInProcess):
            registry.scopefunc = ScopeInProcess(scope)

    def _separate_lite(self) -> None:
        if PID in vars(self.extension):
            return
        vars(self.extension)[PID] = os.getpid()
        get_session: Callable[[str], orm.Session] = self.extension.get_session

        def get_session_in_process(name: str = "default") -> orm.Session:
            self.drop_inherited_session()
            return get_session(name)

        self.extension.get_session = get_session_in_process

    def drop_inherited_session(self) -> None:
        """Forget the sessions of an application context that was pushed before a fork, without closing them."""
        pid = os.getpid()
        leave_inherited_connections()
        if self.has_models or not has_app_context() or g.get(PID, vars(self.extension)[PID]) == pid:
            return
        setattr(g, PID, pid)
        keep_for_ever(g.pop(SESSIONS, None))

    def session(self) -> orm.Session:
        """Return the session of the current application context."""
        session: Any = self.extension.session
        found: orm.Session = session() if isinstance(session, orm.scoped_session) else session
        return found

    def open_session(self) -> orm.Session | None:
        """Return the session of the current application context if it was used already."""
        session = self.extension.session
        if isinstance(session, orm.scoped_session) and not session.registry.has():
            return None
        return self.session()

    def session_factory(self, app: Flask) -> Any:
        """Return what makes the sessions of an app, to listen on."""
        if self.has_models:
            return self.extension.session
        with app.app_context():
            return self.extension.sessionmaker


class ScopeInProcess:
    """Tells the sessions of a process from those that it inherited, for a ``scoped_session``.

    An application context that was pushed before the fork is the same object in the forked process, so the session
    would be the same too. Under another key it stays where it is, and is neither used nor closed.

    :param scope: what tells the sessions of one process from each other.
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
