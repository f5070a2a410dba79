"""The state of one Flask app: its applications, models and configuration."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask, current_app, has_app_context
from sqlalchemy import orm
from werkzeug.local import LocalProxy

from ..applications import environment
from ..applications.apart import ApartHost
from ..applications.known_sites import add_kind
from ..config import Config
from ..exceptions import ConfigurationError, NotInitializedError
from ..host import by_application, recordings_of, send_recorded
from ..lifecycle import ApplicationSlot
from ..models import Models
from ..persistence import Datastore
from ..persistence.dialects import is_in_memory
from ..projections.registry import BoundProjections
from ..signals import events_discarded, events_recorded
from ..uow import LENT, Batch, UnitOfWork, session_of
from .request_metadata import metadata_to_carry
from .sessions import FlaskHost

EXTENSION = "eventsourcing"
PROGRAM = "flask eventsourcing"
"""How messages call the commands in a Flask app."""
Slots: TypeAlias = Mapping[type[Application[Any]], ApplicationSlot[Application[Any]]]
_states: weakref.WeakSet[EventSourcingState] = weakref.WeakSet()


class Database(Protocol):
    """What the ``db`` objects of Flask-SQLAlchemy and Flask-SQLAlchemy-Lite have in common."""

    @property
    def session(self) -> orm.Session | orm.scoped_session[Any]:
        """The session of the app context."""

    @property
    def engine(self) -> sa.Engine:
        """The engine without a bind key."""

    def init_app(self, app: Flask) -> None:
        """Register on a Flask app."""


class EventSourcingState:
    """The state of Flask-EventSourcing in one Flask app, ``app.extensions["eventsourcing"]``.

    :param hosts: the app as the host of each application, the same one for those in one database.
    :param config: its settings.
    :param models: the record classes by the application's name.
    :param slots: the applications by their class; each is constructed at the first use in each process.
    :param projections: its projections.
    """

    apart: ApartHost | None = None
    """The host of applications whose events are apart from the app's sessions; there are no others then."""

    def __init__(
        self,
        hosts: Mapping[type[Application[Any]], FlaskHost],
        config: Config,
        models: Mapping[str, Models],
        slots: Slots,
        projections: BoundProjections,
    ) -> None:
        self.hosts: Mapping[type[Application[Any]], FlaskHost] = hosts
        self.config: Config = config
        self.models: Mapping[str, Models] = models
        self.slots: Slots = slots
        self.projections: BoundProjections = projections

    def check_models(
        self, projection_class: Any, models: Sequence[Any], application_class: type[Application[Any]]
    ) -> None:
        """Check that the tables of a projection's models are in the database of the events that it follows.

        :raises ConfigurationError: when one is not.
        """
        bind_key = self.config.bind_key_of(application_class.name)
        self.host.database.check_models(projection_class, models, bind_key)

    def take(self, other: EventSourcingState) -> None:
        """Take over all values of another state of the same app."""
        self.hosts, self.config, self.models = other.hosts, other.config, other.models
        self.slots, self.projections = other.slots, other.projections

    @property
    def host(self) -> FlaskHost:
        """The app as the host of the first application."""
        return next(iter(self.hosts.values()))

    @property
    def current_host(self) -> FlaskHost:
        """The app as the host of units of work: for the first application, or the first that fits a lent session."""
        session = self.host.database.open_session() if has_app_context() else None
        if session is None or LENT not in session.info:
            return self.host
        return next((host for host in self._each_host() if host.is_for(session)), self.host)

    @property
    def app(self) -> Flask:
        """The Flask app."""
        return self.host.app

    @property
    def db(self) -> Any:
        """The ``SQLAlchemy`` object in use."""
        return self.host.database.extension

    @property
    def datastore(self) -> Datastore:
        """The database of the events."""
        return self.host.datastore

    @property
    def tables_datastore(self) -> Datastore | None:
        """The database in which commands look for tables, or None if there are none."""
        return self.datastore

    @property
    def application(self) -> Application[Any]:
        """The single application of this app and process, the first one where there are several."""
        return next(iter(self.slots.values())).get()

    @property
    def applications(self) -> Mapping[type[Application[Any]], Application[Any]]:
        """The single instance of each application class in this process."""
        return {application_class: slot.get() for application_class, slot in self.slots.items()}

    def __getitem__(self, application_class: type[Application[Any]]) -> Application[Any]:
        try:
            slot = self.slots[application_class]
        except KeyError:
            names = ", ".join(cls.__qualname__ for cls in self.slots)
            raise ConfigurationError(
                f"{application_class!r} is not registered on this Flask app (registered: {names}): "
                "pass it to EventSourcing(applications=…) or decorate it with @es.register before init_app."
            ) from None
        return slot.get()

    @property
    def env(self) -> dict[str, str]:
        """The environment with which applications, and the library's own runners, use this app's databases."""
        env = dict(self.config.env)
        for application_class, host in self.hosts.items():
            env = environment(host.datastore, env, application_class.name)
        return environment(self.datastore, env)

    def prepare(self) -> None:
        """Install what the app's engines and sessions need."""
        for host in self._each_host():
            host.prepare()

    def open_units(self) -> list[UnitOfWork]:
        """Return the units of work of the current session that recorders have joined."""
        return [unit for host in self._each_host() if (unit := host.open_unit()) is not None]

    def units_of(self, sessions: Iterable[orm.Session]) -> list[UnitOfWork]:
        """Return the units of work of other sessions that recorders have joined."""
        found = (host.open_unit_of(session) for session in sessions for host in self._each_host())
        return [unit for unit in found if unit is not None]

    def _each_host(self) -> list[FlaskHost]:
        return list(dict.fromkeys(self.hosts.values()))

    @contextmanager
    def using(self, session: orm.Session | orm.scoped_session[Any]) -> Iterator[orm.Session]:
        """See ``EventSourcing.using``."""
        session = session_of(session)
        hosts = self._each_host()
        # A session for none of the databases is refused with the reason of the first one.
        with next((host for host in hosts if host.is_for(session)), hosts[0]).using_session(session):
            yield session

    def elsewhere(self) -> dict[sa.Table, sa.Engine]:
        """Return the tables in another database than the first application's, each with that database."""
        tables = {table: host for cls, host in self.hosts.items() for table in self.models[cls.name].tables.values()}
        for registration, projected in self.projections.bound.values():
            host = self.hosts[registration.of]
            own = [table for model in registration.projection_class.models for table in host.tables_of(model)]
            tables |= dict.fromkeys([*projected.models.tables.values(), *own], host)
        return {table: host.datastore.engine for table, host in tables.items() if host is not self.host}

    def metadata_to_carry(self) -> dict[str, str]:
        """Return the metadata for a task that is sent now; empty if metadata are not stored."""
        return {} if self.config.metadata is False else metadata_to_carry(self.app)

    def construct(self) -> None:
        """Construct the applications of this process now, so that the first request does not have to.

        Servers' hooks call it in each worker. An error in a constructor ends the worker, rather than its first request.
        """
        for slot in self.slots.values():
            slot.get()

    def close(self) -> None:
        """Close the applications of this process and its idle connections to their databases.

        It may be called again. An application that is used afterwards is constructed again.
        """
        self.projections.close()
        for slot in self.slots.values():
            slot.close()
        self.release_connections()

    def release_connections(self) -> None:
        """Close the idle connections to the databases."""
        for host in self._each_host():
            engine = host.datastore.engine
            # The one connection of an in-memory database is the database.
            if not is_in_memory(engine.url):
                engine.dispose()


def keep(state: EventSourcingState) -> None:
    """Remember a state in this process as long as its app lives."""
    _states.add(state)


def states() -> list[EventSourcingState]:
    """Return the states of all Flask apps in this process on which the extension is registered."""
    return list(_states)


def publish(app: Flask, batches: Sequence[Batch]) -> None:
    """Send ``events_recorded`` for what was committed."""
    if events_recorded.receivers:
        state = state_of(app)
        for name, notifications in by_application(batches).items():
            find = partial(recordings_of, batches, name)
            send_recorded(app, _application(state, name), notifications, find)


def discard(state: EventSourcingState, batches: Sequence[Batch]) -> None:
    """Send ``events_discarded`` for events that were neither committed nor rolled back."""
    for name, notifications in by_application(batches).items():
        events_discarded.send(state.app, application=_application(state, name), notifications=notifications)


def _application(state: EventSourcingState, name: str) -> Application[Any] | None:
    return next((state[cls] for cls in state.slots if cls.name == name), None)


def state_of(app: Flask) -> EventSourcingState:
    """Return the state of an app.

    :raises NotInitializedError: when ``es.init_app(app)`` was not called.
    """
    state = app.extensions.get(EXTENSION)
    if not isinstance(state, EventSourcingState):
        raise NotInitializedError(
            f"The Flask app {app.name!r} has no Flask-EventSourcing state: did you call es.init_app(app)?"
        )
    return state


def current_state() -> EventSourcingState:
    """Return the state of the current app.

    :raises NotInitializedError: outside an application context, or without ``init_app``.
    """
    if not has_app_context():
        raise NotInitializedError(
            "This needs an application context: use it in a view or a command, or within 'with app.app_context():'."
        )
    return state_of(current_app._get_current_object())  # type: ignore[attr-defined]


class FlaskSites:
    """Finds the states of Flask apps."""

    def current(self) -> EventSourcingState | None:
        """Return the state of the current app, if it has one."""
        return current_state() if has_app_context() and EXTENSION in current_app.extensions else None

    def of(self, given: object) -> EventSourcingState | None:
        """Return the state of a Flask app."""
        return state_of(given) if isinstance(given, Flask) else None

    def refuse(self) -> None:
        """Raise an error that says what is missing."""
        current_state()


add_kind(FlaskSites())

current_application: Application[Any] = cast(Application[Any], LocalProxy(lambda: current_state().application))
"""The application of the current Flask app, for views."""
