"""The extension object."""

from __future__ import annotations

import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, overload

import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask, has_app_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm

from . import guard, session
from .binding import SessionBinding
from .cli import group
from .config import Config, OriginatorIdType
from .databases import Database
from .exceptions import ConfigurationError
from .models import Models, make_models
from .persistence import Datastore, DialectOptions
from .persistence.forks import drop_inherited_connections
from .state import EXTENSION, EventSourcingState, current_state, publisher, state_of

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A", bound=Application[Any])

DEFAULT_URI = "sqlite:///eventsourcing.db"


class EventSourcing:
    """Makes applications of the ``eventsourcing`` library part of Flask apps.

    :param app: call :meth:`init_app` with it now.
    :param db: the ``SQLAlchemy`` object of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite. Without it, the object that is
        registered on the app is used, and if there is none, one is made.
    :param application: the application class, a subclass of ``eventsourcing.application.Application``.
    :param applications: application classes, where there are several; each keeps to its own tables.
    :param stored_event_model: your own record class of events, with the columns of ``StoredEventMixin``.
    :param snapshot_model: your own record class of snapshots, with the columns of ``SnapshotMixin``.
    :param tracking_model: your own record class of positions, with the columns of ``TrackingMixin``.
    :param model_class: the declarative base for the record classes that are made; by default ``db.Model``, and with
        Flask-SQLAlchemy-Lite a base of its own, see :attr:`metadata`.
    :raises ConfigurationError: when an argument cannot be used.

    One object serves any number of Flask apps. Your own record classes belong to the first application.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        db: Any = None,
        application: type[Application[Any]] | None = None,
        applications: Iterable[type[Application[Any]]] = (),
        stored_event_model: Any = None,
        snapshot_model: Any = None,
        tracking_model: Any = None,
        model_class: Any = None,
    ) -> None:
        self._database = None if db is None else Database(db)
        self._classes: list[type[Application[Any]]] = []
        self._own_models = {
            "stored_event_model": stored_event_model,
            "snapshot_model": snapshot_model,
            "tracking_model": tracking_model,
        }
        self._model_class = model_class
        self._made_database: Database | None = None
        self._models: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, Models]]] = weakref.WeakKeyDictionary()
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        for application_class in (application, *applications) if application is not None else applications:
            self._add_class(application_class)
        if app is not None:
            self.init_app(app)

    def register(self, application_class: type[A]) -> type[A]:
        """Register an application class; usable as a decorator, before :meth:`init_app`.

        :raises ConfigurationError: when it is none, its name is taken, or an app was initialised already.
        """
        if self._apps:
            raise ConfigurationError(
                f"{application_class!r} is registered after es.init_app(app): register it before, as its tables belong "
                "to the app's models."
            )
        self._add_class(application_class)
        return application_class

    def _add_class(self, application_class: Any) -> None:
        if not isinstance(application_class, type) or not issubclass(application_class, Application):
            raise ConfigurationError(
                f"{application_class!r} is not an application class: pass a subclass of "
                "eventsourcing.application.Application, not an instance of one."
            )
        for other in self._classes:
            if other.name.lower() == application_class.name.lower():
                raise ConfigurationError(
                    f"Two application classes are called {application_class.name!r}, so they would share their tables: "
                    "set another class attribute 'name' on one of them."
                )
        self._classes.append(application_class)

    # ------------------------------------------------------------------------------------------------- registering

    def init_app(self, app: Flask) -> None:
        """Register on a Flask app, after ``db.init_app(app)`` and after its configuration is complete.

        Everything is checked before anything is registered; no table is created and no connection opened.

        :raises ConfigurationError: naming what is wrong and the remedy; the app is then as it was before.
        """
        if not isinstance(app, Flask):
            raise ConfigurationError(f"init_app takes a Flask app; found {app!r}.")
        if EXTENSION in app.extensions:
            raise ConfigurationError(
                f"Flask-EventSourcing is registered on the app {app.name!r} already: call init_app once for an app, "
                "and pass several application classes to one EventSourcing(applications=…)."
            )
        if not self._classes:
            raise ConfigurationError(
                "There is no application class: pass EventSourcing(application=…) or use @es.register."
            )
        config = Config.from_mapping(app.config)
        with _untouched_on_error(app):
            database = self._database or self._find_database(app)
            state = self._make_state(app, database, config)
            guard.install(app)
            app.cli.add_command(group)
            app.shell_context_processor(lambda: {"es": self})
            app.extensions[EXTENSION] = state
            self._apps.add(app)

    def _find_database(self, app: Flask) -> Database:
        registered = app.extensions.get("sqlalchemy")
        if registered is not None:
            return Database(registered)
        if self._made_database is None:
            self._made_database = Database(SQLAlchemy())
        if not app.config.get("SQLALCHEMY_BINDS") and not app.config.get("SQLALCHEMY_DATABASE_URI"):
            app.config["SQLALCHEMY_DATABASE_URI"] = DEFAULT_URI
        try:
            self._made_database.extension.init_app(app)
        except (sa.exc.SQLAlchemyError, RuntimeError, ImportError) as error:
            raise ConfigurationError(f"SQLALCHEMY_DATABASE_URI cannot be used: {error}") from error
        return self._made_database

    def _make_state(self, app: Flask, database: Database, config: Config) -> EventSourcingState:
        engine = database.engine(app, config.bind_key)
        options = DialectOptions(config.lock_timeout, config.postgres_order, config.postgres_notify, config.sqlite_wal)
        if config.schema is not None and engine.dialect.name == "sqlite":
            raise ConfigurationError("EVENTSOURCING_SCHEMA is set, but SQLite has no schemas: remove it.")
        Datastore.check(engine, options)
        models = self._make_models(database, config)
        binding = SessionBinding(
            app,
            database,
            config.commit,
            {"clause": models[self._classes[0].name].tables["events"]},
            publisher(app, lambda: state_of(app)),
        )
        if not database.has_models and config.bind_key is not None:
            binding.bind_arguments = {"bind": engine}
        datastore = Datastore(engine, options, session_scope=binding.scope, models=models)
        binding.datastore = datastore
        session.listen(database.session_factory(app))
        for each in database.engines(app).values():
            drop_inherited_connections(each)
        state = EventSourcingState(app, database.extension, config, models, binding, datastore)
        for application_class in self._classes:
            state.add(application_class)
        return state

    def _make_models(self, database: Database, config: Config) -> dict[str, Models]:
        made = self._models.setdefault(database.extension, {})
        for number, application_class in enumerate(self._classes):
            id_type = originator_id_type(application_class, config)
            wanted = (id_type, config.schema, config.bind_key)
            known = made.get(application_class.name)
            if known is None:
                models = make_models(
                    self._base(database),
                    application_class.name,
                    originator_id_type=id_type,
                    schema=config.schema,
                    bind_key=config.bind_key if database.has_models else None,
                    **(self._own_models if number == 0 else {}),
                )
                made[application_class.name] = (wanted, models)
            elif known[0] != wanted:
                raise ConfigurationError(
                    f"The models of {application_class.name} were made for another Flask app with other values of "
                    "EVENTSOURCING_ORIGINATOR_ID_TYPE, EVENTSOURCING_SCHEMA or EVENTSOURCING_BIND_KEY: use the same "
                    "values, or another EventSourcing and db object."
                )
        return {name: models for name, (_, models) in made.items()}

    def _base(self, database: Database) -> Any:
        if self._model_class is None:
            self._model_class = database.base if database.has_models else orm.declarative_base()
        return self._model_class

    # ---------------------------------------------------------------------------------------------------- using

    @property
    def application(self) -> Any:
        """The single application of the current Flask app and this process, the first one where there are several.

        :raises NotInitializedError: outside an application context, or before :meth:`init_app`.
        """
        return current_state().application

    def __getitem__(self, application_class: type[A]) -> A:
        """Return the single instance of an application class in the current Flask app and this process.

        :raises ConfigurationError: when the class is not registered.
        """
        return current_state()[application_class]  # type: ignore[return-value]

    @property
    def db(self) -> Any:
        """The ``SQLAlchemy`` object in use."""
        if has_app_context():
            return current_state().db
        database = self._database or self._made_database
        if database is None:
            raise ConfigurationError("There is no db yet: call es.init_app(app), or use it in an application context.")
        return database.extension

    @property
    def models(self) -> dict[type[Application[Any]], Models]:
        """The record classes by application class."""
        found = self._known_models()
        return {cls: found[cls.name] for cls in self._classes}

    @property
    def StoredEvent(self) -> Any:  # noqa: N802
        """The record class of the first application's events."""
        return self.models[self._classes[0]].StoredEvent

    @property
    def Snapshot(self) -> Any:  # noqa: N802
        """The record class of the first application's snapshots."""
        return self.models[self._classes[0]].Snapshot

    @property
    def Tracking(self) -> Any:  # noqa: N802
        """The record class of the first application's positions in the logs of others."""
        return self.models[self._classes[0]].Tracking

    @property
    def metadata(self) -> sa.MetaData:
        """The metadata of the record classes, for Alembic and ``create_all`` with Flask-SQLAlchemy-Lite."""
        metadata: sa.MetaData = self.StoredEvent.metadata
        return metadata

    def _known_models(self) -> dict[str, Models]:
        if has_app_context():
            return dict(current_state().models)
        known = list(self._models.values())
        if len(known) != 1:
            raise ConfigurationError(
                "The record classes are made by es.init_app(app): use them after it, and in an application context "
                "where there are several db objects."
            )
        return {name: models for name, (_, models) in known[0].items()}

    def transaction(self) -> AbstractContextManager[orm.Session]:
        """A unit of work: commits ``db.session`` on success, rolls it back on error.

        Within another one it joins that: the outermost commits. If an inner one fails and its error is caught, the
        outer one is rolled back too.

        :raises NotInitializedError: outside an application context.
        :raises RollbackOnlyError: from the outermost, when an inner one had failed.
        """
        return current_state().binding.transaction()

    def transactional(self, function: Callable[P, R]) -> Callable[P, R]:
        """Run a function, a view for example, in :meth:`transaction`."""

        @wraps(function)
        def in_transaction(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.transaction():
                return function(*args, **kwargs)

        return in_transaction

    @overload
    def retry_on_conflict(self, function: Callable[P, R], /) -> Callable[P, R]: ...

    @overload
    def retry_on_conflict(self, /, *, times: int = 3) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def retry_on_conflict(self, function: Callable[..., Any] | None = None, /, *, times: int = 3) -> Any:
        """Run a function in :meth:`transaction`, and all of it again after an optimistic conflict.

        Before the next try there is a short random pause, and the next try queues for the aggregates that had the
        conflict before it reads them, so that it is not in vain again. When there were uncommitted events, or models
        that were not flushed, before the function began, the conflict is raised at once: they cannot be done again.

        :param times: how often the function is run again at most; the last conflict is raised.
        :raises ConfigurationError: when *times* is not a whole number from 0 up.
        """

        def decorate(decorated: Callable[P, R]) -> Callable[P, R]:
            check_times(times)

            @wraps(decorated)
            def retried(*args: P.args, **kwargs: P.kwargs) -> R:
                return current_state().binding.retry(lambda: decorated(*args, **kwargs), times)

            return retried

        return decorate if function is None else decorate(function)

    def close(self, app: Flask | None = None) -> None:
        """Close the applications of this process, of one Flask app or of all that this object serves.

        It may be called again; an application that is used after it is constructed anew.
        """
        for each in [app] if app is not None else list(self._apps):
            state_of(each).close()


def check_times(times: Any) -> None:
    """Check the number of retries.

    :raises ConfigurationError: when it is not a whole number from 0 up.
    """
    if not isinstance(times, int) or isinstance(times, bool) or times < 0:
        raise ConfigurationError(f"retry_on_conflict(times=…) takes a whole number from 0 up; found {times!r}.")


def originator_id_type(application_class: type[Application[Any]], config: Config) -> OriginatorIdType:
    """Return the type of an application's ids: as configured, or as ``Application[str]`` says, or ``uuid``."""
    if config.originator_id_type is not None:
        return config.originator_id_type
    for env in (config.env, application_class.env):
        if env.get("ORIGINATOR_ID_TYPE", "").lower() == "text":
            return "text"
    for cls in application_class.__mro__:
        for base in getattr(cls, "__orig_bases__", ()):
            if typing.get_args(base) == (str,) and issubclass(typing.get_origin(base) or object, Application):
                return "text"
    return "uuid"


@contextmanager
def _untouched_on_error(app: Flask) -> Iterator[None]:
    """Take back what was done to an app if the block fails."""
    mappings: list[MutableMapping[Any, Any]] = [app.extensions, app.config, app.after_request_funcs, app.cli.commands]
    lists: list[list[Any]] = [app.teardown_appcontext_funcs, app.shell_context_processors]
    before = [dict(mapping) for mapping in mappings], [list(items) for items in lists]
    functions = {key: list(value) for key, value in app.after_request_funcs.items()}
    try:
        yield
    except BaseException:
        for mapping, old in zip(mappings, before[0], strict=True):
            mapping.clear()
            mapping.update(old)
        for items, old_items in zip(lists, before[1], strict=True):
            items[:] = old_items
        for key, value in functions.items():
            app.after_request_funcs[key][:] = value
        raise
