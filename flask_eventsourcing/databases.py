"""What Flask-SQLAlchemy and Flask-SQLAlchemy-Lite have in common, and where they differ.

Neither is imported here for its type: the object that the user passes tells which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from flask import Flask
from sqlalchemy import orm

from .exceptions import ConfigurationError


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
