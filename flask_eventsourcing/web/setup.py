"""The steps of ``init_app``: database, models, datastore, units of work, host and state, one after the other."""

from __future__ import annotations

import inspect
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask, has_request_context
from flask_sqlalchemy.session import Session as FlaskSession
from sqlalchemy import orm

from .._patches import forget_class
from ..applications import check_environment, construct
from ..applications.apart import id_type_of
from ..config import Config, OriginatorIdType
from ..exceptions import ConfigurationError
from ..lifecycle import ApplicationSlot, HostSlot
from ..metadata import Collector
from ..models import Models, ProjectionModels, check_models, index_correlation, make_models, make_projection_models
from ..persistence import Datastore, DialectOptions
from ..persistence.datastore import Tables
from ..projections.consumers import ProjectedApplication
from ..projections.registry import BoundProjections, Registrations
from ..uow import FIXED, SessionCommits, Units
from .request_metadata import make_collector
from .sessions import AppDatabase, FlaskHost, current_context, has_models
from .state import PROGRAM, EventSourcingState, publish
from .uncommitted import lose

FIXED_BINDS = FIXED | {FlaskSession.get_bind}

Wanted = tuple[OriginatorIdType, str | None, str | None, bool]


class RecordClasses:
    """Makes the record classes of applications, once for each ``db`` object; several Flask apps may share it.

    :param own_models: record classes that the user brings, for the first application.
    :param model_class: the declarative base to use, or None for that of the ``db`` object.
    """

    def __init__(self, own_models: dict[str, Any], model_class: Any) -> None:
        self._own_models = own_models
        self._model_class = model_class
        self._bases: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._made: weakref.WeakKeyDictionary[Any, dict[str, tuple[Wanted, Models]]] = weakref.WeakKeyDictionary()
        self._projections: weakref.WeakKeyDictionary[Any, dict[str, ProjectionModels]] = weakref.WeakKeyDictionary()
        self.created = False
        """Whether the tables of a stand-in were created in this process."""

    def make(self, extension: Any, classes: Sequence[type[Application[Any]]], config: Config) -> dict[str, Models]:
        """Return the record classes of application classes by name; missing ones are made.

        :raises ConfigurationError: when a table name is taken, or they were made with another configuration; nothing
            was made then.
        """
        base = self._base(extension)
        made = self._made.setdefault(base, {})
        wanted = {
            cls.name: (originator_id_type(cls, config), config.schema, _key(cls, config), config.correlation_index)
            for cls in classes
        }
        own = {cls.name: self._own_models if number == 0 else {} for number, cls in enumerate(classes)}
        place = {cls.name: _place(extension, cls, config) for cls in classes}
        for name, each in wanted.items():
            if name not in made:
                check_models(base, name, id_type=each[0], **place[name], **own[name])
            elif made[name][0] != each:
                raise ConfigurationError(
                    f"The models of {name} were made for another Flask app with other values of "
                    "EVENTSOURCING_ORIGINATOR_ID_TYPE, EVENTSOURCING_SCHEMA, EVENTSOURCING_BIND_KEY, "
                    "EVENTSOURCING_BINDS or EVENTSOURCING_CORRELATION_INDEX: use the same values, or another "
                    "EventSourcing and db object."
                )
        for name, each in wanted.items():
            if name not in made:
                made[name] = each, make_models(base, name, originator_id_type=each[0], **place[name], **own[name])
                if config.correlation_index:
                    index_correlation(made[name][1])
        return {name: made[name][1] for name in wanted}

    def make_for_projections(
        self, extension: Any, application_class: type[Application[Any]], config: Config
    ) -> ProjectionModels:
        """Return the record classes for the projections of an application; missing ones are made.

        :raises ConfigurationError: when a table name is taken; nothing was made then.
        """
        base, name = self._base(extension), application_class.name
        made = self._projections.setdefault(base, {})
        if name not in made:
            place = _place(extension, application_class, config)
            metadata = extension.metadatas.get(place["bind_key"]) if has_models(extension) else base.metadata
            prefix = f"{place['schema']}.{name.lower()}" if place["schema"] else name.lower()
            for key in (f"{prefix}_{suffix}" for suffix in ("projections", "dead_letters", "inline_ranges")):
                if metadata is not None and key in metadata.tables:
                    raise ConfigurationError(
                        f"Table {key!r} is taken by another model on the same metadata: rename that model's table, "
                        "or give the application another name."
                    )
            made[name] = make_projection_models(base, name, **place)
        return made[name]

    @contextmanager
    def untouched_on_error(self) -> Iterator[None]:
        """Remove the record classes that were made, if the block fails."""
        kinds: list[Mapping[Any, dict[str, Any]]] = [self._made, self._projections]
        before = [{base: set(made) for base, made in each.items()} for each in kinds]

        def forget() -> None:
            for each, names in zip(kinds, before, strict=True):
                for base, made in each.items():
                    for name in set(made) - names.get(base, set()):
                        self._forget(made.pop(name))

        # A later call makes them again.
        with ExitStack() as failed:
            failed.callback(forget)
            yield
            failed.pop_all()

    def watch(self, application_name: str) -> None:
        """Note in :attr:`created` when a table of an application is created."""

        def note(*_: object, **__: object) -> None:
            self.created = True

        for made in self._made.values():
            for table in made[application_name][1].tables.values():
                sa.event.listen(table, "after_create", note)

    def forget(self, application_name: str) -> None:
        """Remove the record classes that were made for an application."""
        for made in self._made.values():
            if application_name in made:
                self._forget(made.pop(application_name))

    def _forget(self, made: tuple[Wanted, Models] | ProjectionModels) -> None:
        models = made[1] if isinstance(made, tuple) else made
        own = [each for each in self._own_models.values() if each is not None]
        for model in (getattr(models, each.name) for each in fields(models)):
            if model not in own:
                forget_class(model)

    def only(self) -> dict[str, Models]:
        """Return the record classes, if there is a single ``db`` object.

        :raises ConfigurationError: when there is none yet, or several.
        """
        known = [made for made in self._made.values() if made]
        if len(known) != 1:
            raise ConfigurationError(
                "The record classes are made by es.init_app(app): use them after it, and in an application context "
                "where there are several db objects."
            )
        return {name: models for name, (_, models) in known[0].items()}

    def _base(self, extension: Any) -> Any:
        if self._model_class is not None:
            return self._model_class
        if has_models(extension):
            return extension.Model
        return self._bases.setdefault(extension, orm.declarative_base())


def _key(application_class: type[Application[Any]], config: Config) -> str | None:
    return config.bind_key_of(application_class.name)


def _place(extension: Any, application_class: type[Application[Any]], config: Config) -> dict[str, Any]:
    bind_key = _key(application_class, config) if has_models(extension) else None
    return {"schema": config.schema, "bind_key": bind_key}


class MadeBy:
    """Calls a factory of the user's in the way in which the library constructs an application class.

    :param application_class: the class of the applications that it makes.
    :param factory: takes the environment and returns an application.
    """

    def __init__(self, application_class: type[Application[Any]], factory: Callable[..., Any]) -> None:
        self.name: str = application_class.name
        self._application_class = application_class
        self._factory = factory

    def __call__(self, env: Mapping[str, str]) -> Application[Any]:
        """Construct it.

        :raises ConfigurationError: when the factory returns something else.
        """
        # A constructor of a class gets it by its name, as from the library.
        made = self._factory(env=env) if isinstance(self._factory, partial) else self._factory(env)
        if not isinstance(made, self._application_class):
            raise ConfigurationError(
                f"{self._factory!r} was to return a {self._application_class.__qualname__}; it returned {made!r}."
            )
        return made


def constructor_of(given: Any) -> tuple[type[Application[Any]], Any]:
    """Return an application class and its constructor, for a class or a factory that the user has passed.

    :raises ConfigurationError: when it is neither, or cannot be called with the environment alone.
    """
    if isinstance(given, type) and issubclass(given, Application):
        _check_arguments(given, given.__qualname__)
        return given, given
    found = given.func if isinstance(given, partial) else None
    if found is None and callable(given) and not isinstance(given, type):
        try:
            found = typing.get_type_hints(given).get("return")
        except (NameError, TypeError) as error:
            raise ConfigurationError(f"The annotations of {given!r} cannot be read: {error}") from error
    _refuse_dcb(given, found)
    if not isinstance(found, type) or not issubclass(found, Application):
        raise ConfigurationError(
            f"{given!r} is not an application class: pass a subclass of eventsourcing.application.Application, not an "
            "instance of one, or a function that takes env and says by its return annotation which class it makes: "
            "def make_bank(env) -> Bank."
        )
    _check_arguments(given, repr(given))
    return found, MadeBy(found, given)


def _refuse_dcb(*given: Any) -> None:
    for cls in (each for found in given if isinstance(found, type) for each in found.__mro__):
        if (cls.__module__, cls.__qualname__) == ("eventsourcing.dcb.application", "DCBApplication"):
            raise ConfigurationError(
                f"{given[0]!r} is a DCB application, with dynamic consistency boundaries: these are not supported yet. "
                "Construct it yourself, with a persistence module of the library's."
            )


def _check_arguments(called: Any, name: str) -> None:
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):  # it does not tell
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [each.name for each in parameters if each.kind not in kinds and each.default is each.empty]
    by_name = isinstance(called, type | partial)
    further = [each for each in required if each != "env"] if by_name else required[1:]
    if further:
        raise ConfigurationError(
            f"{name} takes the argument {', '.join(repr(each) for each in further)} beside env, which is not given: "
            "pass a function that does, application=make_bank, with def make_bank(env) -> Bank: return Bank(env, …)."
        )


def originator_id_type(application_class: type[Application[Any]], config: Config) -> OriginatorIdType:
    """Return the type of an application's ids: as configured, or as ``Application[str]`` says, or ``uuid``."""
    return config.originator_id_type or id_type_of(application_class, config.env)


def make_state(
    app: Flask,
    extension: Any,
    config: Config,
    constructors: Mapping[type[Application[Any]], Any],
    records: RecordClasses,
    registrations: Registrations,
) -> EventSourcingState:
    """Make the state of a Flask app, without registering anything on the app.

    :param constructors: what constructs each application class.
    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    classes = list(constructors)
    check_settings(config, classes)
    database = AppDatabase(app, extension)
    stores = _make_stores(app, database, config, classes)
    for each in registrations.entries:
        database.check_models(each.projection_class, each.projection_class.models, _key(each.of, config))
    models = records.make(extension, classes, config)
    for cls in classes:
        stores[_key(cls, config)].dialect.check_names(models[cls.name].tables.values())
    hosts = _make_hosts(app, database, stores, config, {cls: models[cls.name].tables for cls in classes})
    slots = {cls: _slot(constructor, hosts[cls], config) for cls, constructor in constructors.items()}

    def followed(of: type[Application[Any]]) -> ProjectedApplication:
        own = records.make_for_projections(extension, of, config)
        hosts[of].datastore.dialect.check_names(own.tables.values())
        return ProjectedApplication(hosts[of], of.name, slots[of].get, own, lease=config.projection_lock == "lease")

    # The tables of their models are checked before anything is made, as in EventSourcing.projection().
    projections = BoundProjections(hosts[classes[0]], followed, lambda *_: None)
    for registration in registrations.entries:
        projections.add(registration)
    return EventSourcingState(hosts, config, models, slots, projections)


def _make_stores(
    app: Flask, database: AppDatabase, config: Config, classes: Sequence[type[Application[Any]]]
) -> dict[str | None, Datastore]:
    """Make the datastore of each database, by its bind key."""
    return {
        key: make_datastore(database, key, config, make_collector(app, config))
        for key in dict.fromkeys(_key(cls, config) for cls in classes)
    }


def make_datastore(
    database: AppDatabase, bind_key: str | None, config: Config, collector: Collector | None
) -> Datastore:
    """Make the datastore of one database.

    :raises ConfigurationError: when there is none, or settings do not go with it.
    """
    given = {name: getattr(config, name) for name in DialectOptions.settings()}
    options = DialectOptions(program=PROGRAM, ends=("db.session.commit()", "db.session.rollback()"), **given)
    store = Datastore(database.engine_of(bind_key), options, metadata=collector)
    _check_schema(store, config)
    return store


def _slot(constructor: Any, host: FlaskHost, config: Config) -> ApplicationSlot[Any]:
    return HostSlot(partial(construct, constructor, host.datastore, config.env, host.unit, host.using_session))


def _make_hosts(
    app: Flask,
    database: AppDatabase,
    stores: Mapping[str | None, Datastore],
    config: Config,
    tables: Mapping[type[Application[Any]], Tables],
) -> dict[type[Application[Any]], FlaskHost]:
    """Make the host of each application, the same one for those in one database."""
    by_name = {cls.name: each for cls, each in tables.items()}
    commits = SessionCommits(
        at_save=config.commit == "save", is_to_come=has_request_context if config.commit == "request" else bool
    )
    hosts: dict[str | None, FlaskHost] = {}
    for cls, own in tables.items():
        key = _key(cls, config)
        if key not in hosts:
            datastore = replace(stores[key], tables=by_name.get)
            arguments = database.bind_arguments(key, own["events"])
            units = Units(
                datastore, commits, partial(publish, app), arguments, partial(lose, app), current_context, FIXED_BINDS
            )
            hosts[key] = FlaskHost(app, database, units, own["events"])
    return {cls: hosts[_key(cls, config)] for cls in tables}


def check_settings(config: Config, classes: Sequence[type[Application[Any]]]) -> None:
    """Check settings that depend on something else.

    :raises ConfigurationError: for a bind key of an unknown application, or a fault in the library's environment.
    """
    names = [cls.name for cls in classes]
    for name in config.binds:
        if name not in names:
            raise ConfigurationError(
                f"EVENTSOURCING_BINDS names {name!r}, which is no application (registered: {', '.join(names)})."
            )
    check_environment(config.env, classes)


def _check_schema(datastore: Datastore, config: Config) -> None:
    if config.schema is not None and not datastore.dialect.has_schemas:
        name = datastore.dialect.title
        raise ConfigurationError(f"EVENTSOURCING_SCHEMA is set, but {name} has no schemas: remove it.")
