"""The way of ``init_app``: database, models, datastore, units of work, host, state, each made whole before the next."""

from __future__ import annotations

import typing
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from eventsourcing.application import Application
from flask import Flask, has_request_context
from sqlalchemy import orm

from ..applications import construct
from ..config import Config, OriginatorIdType
from ..exceptions import ConfigurationError
from ..lifecycle import ApplicationSlot
from ..models import Models, ProjectionModels, check_models, make_models, make_projection_models
from ..persistence import Datastore, DialectOptions
from ..projections.consumers import ProjectedApplication
from ..projections.registry import BoundProjections, Registrations
from ..uow import SessionCommits, Units
from .sessions import AppDatabase, FlaskHost, current_context, has_models
from .state import EventSourcingState, publish
from .uncommitted import lose

Wanted = tuple[OriginatorIdType, str | None, str | None]


class RecordClasses:
    """Makes the record classes of applications, once for each ``db`` object, whatever number of Flask apps use it.

    :param own_models: record classes that the user brings, for the first application.
    :param model_class: the declarative base to use, or None for that of the ``db`` object.
    """

    def __init__(self, own_models: dict[str, Any], model_class: Any) -> None:
        self._own_models = own_models
        self._model_class = model_class
        self._made: weakref.WeakKeyDictionary[Any, dict[str, tuple[Wanted, Models]]] = weakref.WeakKeyDictionary()
        self._projections: weakref.WeakKeyDictionary[Any, dict[str, ProjectionModels]] = weakref.WeakKeyDictionary()

    def make(self, extension: Any, classes: Sequence[type[Application[Any]]], config: Config) -> dict[str, Models]:
        """Return the record classes of application classes by name, made now if need be.

        :raises ConfigurationError: when a table name is taken, or they were made with another configuration; nothing
            was made then.
        """
        made = self._made.setdefault(extension, {})
        wanted = {cls.name: (originator_id_type(cls, config), config.schema, config.bind_key) for cls in classes}
        own = {cls.name: self._own_models if number == 0 else {} for number, cls in enumerate(classes)}
        bind_key = config.bind_key if has_models(extension) else None
        for name, each in wanted.items():
            if name not in made:
                check_models(self._base(extension), name, schema=config.schema, bind_key=bind_key, **own[name])
            elif made[name][0] != each:
                raise ConfigurationError(
                    f"The models of {name} were made for another Flask app with other values of "
                    "EVENTSOURCING_ORIGINATOR_ID_TYPE, EVENTSOURCING_SCHEMA or EVENTSOURCING_BIND_KEY: use the same "
                    "values, or another EventSourcing and db object."
                )
        for name, each in wanted.items():
            if name not in made:
                models = make_models(
                    self._base(extension),
                    name,
                    originator_id_type=each[0],
                    schema=config.schema,
                    bind_key=bind_key,
                    **own[name],
                )
                made[name] = (each, models)
        return {name: models for name, (_, models) in made.items()}

    def make_for_projections(self, extension: Any, application_name: str, config: Config) -> ProjectionModels:
        """Return the record classes for the projections of an application, made now if need be."""
        made = self._projections.setdefault(extension, {})
        if application_name not in made:
            made[application_name] = make_projection_models(
                self._base(extension),
                application_name,
                schema=config.schema,
                bind_key=config.bind_key if has_models(extension) else None,
            )
        return made[application_name]

    def only(self) -> dict[str, Models]:
        """Return the record classes where there is a single ``db`` object.

        :raises ConfigurationError: when there is none yet, or several.
        """
        known = list(self._made.values())
        if len(known) != 1:
            raise ConfigurationError(
                "The record classes are made by es.init_app(app): use them after it, and in an application context "
                "where there are several db objects."
            )
        return {name: models for name, (_, models) in known[0].items()}

    def _base(self, extension: Any) -> Any:
        if self._model_class is None:
            self._model_class = extension.Model if has_models(extension) else orm.declarative_base()
        return self._model_class


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


def make_state(
    app: Flask,
    extension: Any,
    config: Config,
    classes: Sequence[type[Application[Any]]],
    records: RecordClasses,
    registrations: Registrations,
) -> EventSourcingState:
    """Make the state of a Flask app, from the ground up; nothing of it is registered on the app.

    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    database = AppDatabase(app, extension, config.bind_key)
    options = DialectOptions(config.lock_timeout, config.postgres_order, config.postgres_notify, config.sqlite_wal)
    _check_schema(Datastore(database.engine, options), config)
    models = records.make(extension, classes, config)
    tables = {name: each.tables for name, each in models.items()}
    datastore = Datastore(database.engine, options, tables.get)
    commits = SessionCommits(
        at_save=config.commit == "save", is_to_come=has_request_context if config.commit == "request" else bool
    )
    arguments = database.bind_arguments(tables[classes[0].name]["events"])
    units = Units(datastore, commits, partial(publish, app), arguments, partial(lose, app), current_context)
    host = FlaskHost(app, database, units)
    slots = {cls: ApplicationSlot(partial(construct, cls, host.datastore, config.env, host.unit)) for cls in classes}

    def followed(of: type[Application[Any]]) -> ProjectedApplication:
        return ProjectedApplication(
            host,
            of.name,
            slots[of].get,
            records.make_for_projections(extension, of.name, config),
            lease=config.projection_lock == "lease",
        )

    projections = BoundProjections(host, followed, database.check_table)
    for registration in registrations.entries:
        projections.add(registration)
    return EventSourcingState(host, config, models, slots, projections)


def _check_schema(datastore: Datastore, config: Config) -> None:
    if config.schema is not None and not datastore.dialect.has_schemas:
        name = datastore.dialect.title
        raise ConfigurationError(f"EVENTSOURCING_SCHEMA is set, but {name} has no schemas: remove it.")


@contextmanager
def untouched_on_error(app: Flask) -> Iterator[None]:
    """Take back what was done to an app if the block fails."""
    mappings: list[MutableMapping[Any, Any]] = [app.extensions, app.config, app.after_request_funcs, app.cli.commands]
    lists: list[list[Any]] = [app.teardown_appcontext_funcs, app.shell_context_processors]
    before = [dict(mapping) for mapping in mappings], [list(items) for items in lists]
    functions = {key: list(value) for key, value in app.after_request_funcs.items()}
    try:
        yield
    except BaseException:
        # An app that is half made is no use, whatever it was.
        for mapping, old in zip(mappings, before[0], strict=True):
            mapping.clear()
            mapping.update(old)
        for items, old_items in zip(lists, before[1], strict=True):
            items[:] = old_items
        for key, value in functions.items():
            app.after_request_funcs[key][:] = value
        raise
