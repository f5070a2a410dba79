"""The record classes of an extension object: made once for each ``db`` object, whatever number of Flask apps use it."""

from __future__ import annotations

import typing
import weakref
from collections.abc import Sequence
from typing import Any

from eventsourcing.application import Application
from sqlalchemy import orm

from .config import Config, OriginatorIdType
from .databases import Database
from .exceptions import ConfigurationError
from .models import Models, make_models
from .projections.tables import ProjectionModels, make_projection_models

Wanted = tuple[OriginatorIdType, str | None, str | None]


class RecordClasses:
    """Makes the record classes of applications on the declarative base of a ``db`` object.

    :param own_models: record classes that the user brings, for the first application.
    :param model_class: the declarative base to use, or None for that of the ``db`` object.
    """

    def __init__(self, own_models: dict[str, Any], model_class: Any) -> None:
        self._own_models = own_models
        self._model_class = model_class
        self._made: weakref.WeakKeyDictionary[Any, dict[str, tuple[Wanted, Models]]] = weakref.WeakKeyDictionary()
        self._projections: weakref.WeakKeyDictionary[Any, dict[str, ProjectionModels]] = weakref.WeakKeyDictionary()

    def make(self, database: Database, classes: Sequence[type[Application[Any]]], config: Config) -> dict[str, Models]:
        """Return the record classes of application classes by name, made now if need be.

        :raises ConfigurationError: when a table name is taken, or they were made with another configuration.
        """
        made = self._made.setdefault(database.extension, {})
        for number, application_class in enumerate(classes):
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

    def make_for_projections(self, database: Database, application_name: str, config: Config) -> ProjectionModels:
        """Return the record classes for the projections of an application, made now if need be."""
        made = self._projections.setdefault(database.extension, {})
        if application_name not in made:
            made[application_name] = make_projection_models(
                self._base(database),
                application_name,
                schema=config.schema,
                bind_key=config.bind_key if database.has_models else None,
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

    def _base(self, database: Database) -> Any:
        if self._model_class is None:
            self._model_class = database.base if database.has_models else orm.declarative_base()
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
