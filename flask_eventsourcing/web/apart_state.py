"""A Flask app whose events are apart from its sessions, in a store of their own: its state, and how that is made."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask
from sqlalchemy import orm

from ..applications.apart import ApartHost, EventStore, construct_apart
from ..config import PREFIX, Config
from ..exceptions import ConfigurationError
from ..host import send_recorded
from ..lifecycle import ApplicationSlot
from ..metadata import Recorded
from ..persistence import Datastore, DialectOptions
from ..projections.registry import BoundProjections, Registrations
from ..signals import events_recorded
from .request_metadata import make_collector
from .state import EventSourcingState, Slots, state_of

STORES = {"cassandra": "flask_eventsourcing.cassandra.hosted"}
"""Where the store of each kind is, whose driver is not always installed."""
OF_DATABASES = (*DialectOptions.settings(), "bind_key", "binds", "schema", "correlation_index", "projection_lock")
"""The settings of a database of SQLAlchemy's."""


class ApartState(EventSourcingState):
    """The state of Flask-EventSourcing in a Flask app whose events are apart from its sessions.

    :param app: the app.
    :param extension: its ``SQLAlchemy`` object, or None.
    """

    def __init__(
        self, app: Flask, extension: Any, config: Config, apart: ApartHost, slots: Slots, projections: BoundProjections
    ) -> None:
        super().__init__({}, config, {}, slots, projections)
        self._app = app
        self.extension = extension
        self.apart: ApartHost = apart

    def check_models(
        self, projection_class: Any, models: Sequence[Any], application_class: type[Application[Any]]
    ) -> None:
        """Refuse a projection.

        :raises ConfigurationError: always.
        """
        refuse_projection(self.store, projection_class)

    def take(self, other: EventSourcingState) -> None:
        """Become what another state of the same app is."""
        super().take(other)
        if isinstance(other, ApartState):
            self.apart = other.apart

    @property
    def store(self) -> EventStore:
        """Where the events are."""
        return self.apart.store

    @property
    def app(self) -> Flask:
        """The Flask app."""
        return self._app

    @property
    def host(self) -> Any:
        """The app as the host of tasks."""
        return self.apart

    @property
    def current_host(self) -> Any:
        """The same, which refuses units of work."""
        return self.apart

    @property
    def db(self) -> Any:
        """The ``SQLAlchemy`` object that was passed.

        :raises ConfigurationError: where there is none, as none is needed.
        """
        if self.extension is None:
            raise ConfigurationError(
                f"There is no db: the events are in {self.store.title}, and none was passed to EventSourcing(db=…)."
            )
        return self.extension

    @property
    def datastore(self) -> Datastore:
        """There is none."""
        self.apart.refuse("A database of SQLAlchemy")

    @property
    def env(self) -> dict[str, str]:
        """The environment with which applications use this app's store."""
        env = dict(self.config.env)
        for application_class in self.slots:
            env = self.store.environment(env, application_class.name)
        return env

    def using(self, session: orm.Session) -> NoReturn:
        """Refuse it: no session has the events."""
        self.apart.using_session(session)

    def elsewhere(self) -> dict[sa.Table, sa.Engine]:
        """No table is in another database."""
        return {}

    def release_connections(self) -> None:
        """Close the connections to the store."""
        self.store.close()


def make_apart_state(
    app: Flask,
    extension: Any,
    config: Config,
    constructors: Mapping[type[Application[Any]], Any],
    id_types: Mapping[str, str],
    registrations: Registrations,
) -> ApartState:
    """Make the state of a Flask app whose events are apart; nothing of it is registered on the app, nothing connected.

    :param constructors: what constructs each application class.
    :param id_types: the type of the aggregates' ids by the name of the application.
    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    defaults = Config()
    for name in OF_DATABASES:
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigurationError(
                f"{PREFIX}{name.upper()} is a setting of databases of SQLAlchemy, and would have no effect with "
                f"{PREFIX}PERSISTENCE = {config.persistence!r}: remove it."
            )
    try:
        module: Any = importlib.import_module(STORES[config.persistence])
    except ImportError as error:
        raise ConfigurationError(
            f"{PREFIX}PERSISTENCE = {config.persistence!r} needs a driver that cannot be imported: {error}. Run pip "
            f"install 'Flask-EventSourcing[{config.persistence}]'."
        ) from error
    store: EventStore = module.make_store(config, make_collector(app, config), id_types)
    slots = {cls: _slot(app, cls, each, store, config) for cls, each in constructors.items()}
    if registrations.transactional:
        ApartHost(store, app.app_context).refuse(f"{registrations.transactional[0]} with @es.transactional")
    for registration in registrations.entries:
        refuse_projection(store, registration.projection_class)
    apart = ApartHost(store, app.app_context)
    projections = BoundProjections(cast(Any, apart), partial(_no_application, store), lambda *_: None)
    return ApartState(app, extension, config, apart, slots, projections)


def refuse_projection(store: EventStore, projection_class: Any) -> NoReturn:
    """Refuse a projection.

    :raises ConfigurationError: always.
    """
    name = projection_class.__name__
    if projection_class.inline:
        raise ConfigurationError(
            f"Projection {name} is inline, but the events are in {store.title}: it could not be in one transaction "
            "with them."
        )
    raise ConfigurationError(
        f"Projection {name} cannot follow events in {store.title} yet: read application.recorder with "
        "select_notifications() or subscribe(), or with the library's own ProjectionRunner."
    )


def _slot(
    app: Flask, application_class: type[Application[Any]], constructor: Any, store: EventStore, config: Config
) -> ApplicationSlot[Any]:
    return ApplicationSlot(
        partial(construct_apart, constructor, application_class.name, store, config.env, partial(_publish, app))
    )


def _publish(app: Flask, name: str, recordings: Sequence[Any]) -> None:
    """Send ``events_recorded`` for what is stored."""
    if not events_recorded.receivers:
        return
    state = state_of(app)
    application = next((state[cls] for cls in state.slots if cls.name == name), None)

    notifications = tuple(each.notification for each in recordings)
    send_recorded(
        app, application, notifications, lambda: [Recorded(each.id, None, None, {}) for each in notifications]
    )


def _no_application(store: EventStore, of: Any) -> NoReturn:
    raise ConfigurationError(f"No projection follows {of.__name__}, whose events are in {store.title}.")
