"""Makes the state of a Flask app: with its events in the database of its sessions, or apart from them.

If the events are apart, in a store of their own, projections have their models and positions in the app's databases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, NoReturn, cast

import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask
from sqlalchemy import orm

from ..applications.apart import ApartHost, EventStore, construct_apart, make_store, tell_recorded
from ..config import PREFIX, Config, OriginatorIdType
from ..exceptions import ConfigurationError
from ..host import mapped_tables
from ..lifecycle import ApplicationSlot, HostSlot
from ..models import ProjectionModels
from ..persistence import Datastore, DialectOptions
from ..persistence.dialects import is_in_memory
from ..projections.consumers import ProjectedApart
from ..projections.registry import BoundProjections, Registrations
from ..signals import events_recorded
from ..uow import Batch, SessionCommits, Units
from .request_metadata import make_collector
from .sessions import AppDatabase, FlaskHost, current_context
from .setup import (
    FIXED_BINDS,
    RecordClasses,
    check_settings,
    make_datastore,
    make_state,
    originator_id_type,
)
from .state import EventSourcingState, Slots, state_of

OF_DATABASES = (*DialectOptions.settings(), "bind_key", "binds", "schema", "correlation_index", "projection_lock")
"""The settings of a database of SQLAlchemy's."""
OF_EVENTS = ("correlation_index",)
"""Those of them that concern only its tables of events."""


class FlaskApart(ApartHost):
    """A Flask app as the host of applications that are apart, and its databases as hosts of their projections.

    :param store: the store of the applications' events.
    :param app: the app.
    :param extension: its ``SQLAlchemy`` object, or None.
    :param records: makes the record classes for projections.
    """

    def __init__(self, store: EventStore, app: Flask, extension: Any, config: Config, records: RecordClasses) -> None:
        super().__init__(store, app.app_context)
        self._app = app
        self._extension = extension
        self._config = config
        self._records = records
        self._hosts: dict[str | None, FlaskHost] = {}
        self._is_prepared = False

    @cached_property
    def _database(self) -> AppDatabase:
        return AppDatabase(self._app, self._extension)

    def check(self, projection_class: Any, models: Sequence[Any], of: type[Application[Any]]) -> None:
        """Check that a projection can follow events of the store.

        :raises ConfigurationError: when it is inline, or there is no database for its models.
        """
        name = projection_class.__name__
        if projection_class.inline:
            raise ConfigurationError(
                f"Projection {name} is inline, but the events are in {self.store.title}: it could not be in one "
                "transaction with them. Set inline = False, and run it in a worker."
            )
        if self._extension is None:
            raise ConfigurationError(
                f"Projection {name} has no database for its models and its position: pass EventSourcing(db=…), or "
                "register Flask-SQLAlchemy on the app before."
            )
        self._database.check_models(projection_class, models, self._config.bind_key_of(of.name))

    def of(self, application_class: type[Application[Any]]) -> FlaskHost:
        """Return the host of an application's projections."""
        key = self._config.bind_key_of(application_class.name)
        if key not in self._hosts:
            self._hosts[key] = self._make(key, self.models(application_class))
        return self._hosts[key]

    def models(self, application_class: type[Application[Any]]) -> ProjectionModels:
        """Return the record classes for an application's projections."""
        return self._records.make_for_projections(self._extension, application_class, self._config)

    def _make(self, key: str | None, models: ProjectionModels) -> FlaskHost:
        table = models.tables["projections"]
        datastore = make_datastore(self._database, key, self._config, None)
        datastore.dialect.check_names(models.tables.values())
        arguments = self._database.bind_arguments(key, table)
        # No recorder joins these units, so no events are to be published.
        units = Units(datastore, SessionCommits(), _nothing, arguments, _nothing, current_context, FIXED_BINDS)
        host = FlaskHost(self._app, self._database, units, table)
        if self._is_prepared:
            host.prepare()
        return host

    def prepare(self) -> None:
        """Prepare the engines and sessions, also those that are made later."""
        self._is_prepared = True
        for host in self.all():
            host.prepare()

    def all(self) -> list[FlaskHost]:
        """Return the hosts that were made."""
        return list(self._hosts.values())

    @property
    def datastore(self) -> Datastore:
        """The first of the databases."""
        return self.all()[0].datastore

    def tables_of(self, model: Any) -> Sequence[sa.Table]:
        """Return the tables of a mapped class."""
        return mapped_tables(model)


def _nothing(batches: Sequence[Batch]) -> None:
    """Do nothing: there are no events."""


class ApartState(EventSourcingState):
    """The state of Flask-EventSourcing in a Flask app whose events are apart from its sessions.

    :param app: the app.
    :param extension: its ``SQLAlchemy`` object, or None.
    """

    def __init__(
        self,
        app: Flask,
        extension: Any,
        config: Config,
        apart: FlaskApart,
        slots: Slots,
        projections: BoundProjections,
    ) -> None:
        super().__init__({}, config, {}, slots, projections)
        self._app = app
        self.extension = extension
        self.apart: FlaskApart = apart

    def check_models(
        self, projection_class: Any, models: Sequence[Any], application_class: type[Application[Any]]
    ) -> None:
        """Check that a projection can follow events of the store.

        :raises ConfigurationError: when it is inline, or there is no database for its models.
        """
        self.apart.check(projection_class, models, application_class)

    def take(self, other: EventSourcingState) -> None:
        """Take over all values of another state of the same app."""
        super().take(other)
        if isinstance(other, ApartState):
            self.apart = other.apart

    @property
    def store(self) -> EventStore:
        """The store of the events."""
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
                f"There is no db: the events are in {self.store.title}, and none was passed: pass EventSourcing(db=…)."
            )
        return self.extension

    @property
    def datastore(self) -> Datastore:
        """None: there is no datastore."""
        self.apart.refuse("A database of SQLAlchemy")

    @property
    def tables_datastore(self) -> Datastore | None:
        """The database in which projections have their tables; of several, the first."""
        return next((host.datastore for host in self.apart.all()), None)

    @property
    def env(self) -> dict[str, str]:
        """The environment with which applications use this app's store."""
        env = dict(self.config.env)
        for application_class in self.slots:
            env = self.store.environment(env, application_class.name)
        return env

    def using(self, session: orm.Session | orm.scoped_session[Any]) -> NoReturn:
        """Refuse it: no session has the events."""
        self.apart.using_session(session)

    def elsewhere(self) -> dict[sa.Table, sa.Engine]:
        """Return the tables of projections in another database than the first one's, each with that database."""
        found: dict[sa.Table, sa.Engine] = {}
        for registration, projected in self.projections.bound.values():
            own = [table for model in registration.projection_class.models for table in mapped_tables(model)]
            if projected.datastore is not self.tables_datastore:
                found |= dict.fromkeys([*projected.models.tables.values(), *own], projected.engine)
        return found

    def prepare(self) -> None:
        """Prepare the engines and sessions of projections."""
        self.apart.prepare()

    def release_connections(self) -> None:
        """Close the connections to the store, and those of projections."""
        self.store.close()
        for host in self.apart.all():
            if not is_in_memory(host.datastore.engine.url):
                host.datastore.engine.dispose()


def make_apart_state(
    app: Flask,
    extension: Any,
    config: Config,
    constructors: Mapping[type[Application[Any]], Any],
    id_types: Mapping[str, OriginatorIdType],
    records: RecordClasses,
    registrations: Registrations,
) -> ApartState:
    """Make the state of a Flask app whose events are apart; nothing of it is registered on the app, nothing connected.

    :param constructors: what constructs each application class.
    :param id_types: the type of the aggregates' ids by the name of the application.
    :param records: makes the record classes for projections.
    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    _check_effects(config, OF_DATABASES if extension is None else OF_EVENTS)
    where = f"{PREFIX}PERSISTENCE = {config.persistence!r}"
    store = make_store(config, make_collector(app, config), id_types, where)
    slots = {cls: _slot(app, cls, each, store, config) for cls, each in constructors.items()}
    apart = FlaskApart(store, app, extension, config, records)
    if registrations.transactional:
        apart.refuse(f"{registrations.transactional[0]} with @es.transactional")
    for each in registrations.entries:
        apart.check(each.projection_class, each.projection_class.models, each.of)

    def followed(of: type[Application[Any]]) -> ProjectedApart:
        lease = config.projection_lock == "lease"
        return ProjectedApart(apart.of(of), of.name, slots[of].get, apart.models(of), lease=lease, store=store)

    projections = BoundProjections(cast(Any, apart), followed, lambda *_: None)
    for each in registrations.entries:
        projections.add(each)
    return ApartState(app, extension, config, apart, slots, projections)


def _check_effects(config: Config, names: Sequence[str]) -> None:
    """Refuse settings that would have no effect."""
    defaults = Config()
    for name in names:
        if getattr(config, name) != getattr(defaults, name):
            what = "databases of SQLAlchemy" if names is OF_DATABASES else "tables of events"
            raise ConfigurationError(
                f"{PREFIX}{name.upper()} is a setting of {what}, and would have no effect with "
                f"{PREFIX}PERSISTENCE = {config.persistence!r}: remove it."
            )


def _slot(
    app: Flask, application_class: type[Application[Any]], constructor: Any, store: EventStore, config: Config
) -> ApplicationSlot[Any]:
    return HostSlot(
        partial(construct_apart, constructor, application_class.name, store, config.env, partial(_publish, app))
    )


def _publish(app: Flask, name: str, recordings: Sequence[Any]) -> None:
    """Send ``events_recorded`` for what is stored."""
    if not events_recorded.receivers:
        return
    state = state_of(app)
    application = next((state[cls] for cls in state.slots if cls.name == name), None)
    tell_recorded(app, application, recordings)


def made_state(
    app: Flask,
    extension: Any,
    config: Config,
    constructors: Mapping[type[Application[Any]], Any],
    records: RecordClasses,
    registrations: Registrations,
) -> EventSourcingState:
    """Make the state of a Flask app; nothing of it is registered on the app.

    :param extension: its ``SQLAlchemy`` object; where events are apart there need be none.
    :param constructors: what constructs each application class.
    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    if not config.is_apart:
        return make_state(app, extension, config, constructors, records, registrations)
    check_settings(config, list(constructors))
    id_types = {cls.name: originator_id_type(cls, config) for cls in constructors}
    return make_apart_state(app, extension, config, constructors, id_types, records, registrations)


def made_again(
    state: EventSourcingState,
    constructors: Mapping[type[Application[Any]], Any],
    records: RecordClasses,
    registrations: Registrations,
) -> EventSourcingState:
    """Make the state of an app that has one, with other applications."""
    extension = state.extension if isinstance(state, ApartState) else state.db
    return made_state(state.app, extension, state.config, constructors, records, registrations)


def construct_now(state: EventSourcingState) -> None:
    """Construct the applications now, if ``EVENTSOURCING_CONSTRUCT`` says so, on engines that are not prepared yet."""
    if state.config.construct != "init":
        return
    # Applications that were constructed before the one that failed are useless too.
    with ExitStack() as failed, state.app.app_context():
        failed.callback(state.close)
        state.construct()
        failed.pop_all()
    state.release_connections()


def followed_by(projection_class: Any, of: Any, classes: Sequence[type[Application[Any]]]) -> type[Application[Any]]:
    """Return the application class whose events a projection follows, as the argument *of* names it.

    :param classes: the registered application classes.
    :raises ConfigurationError: when it is none of these, or is not given and there are several.
    """
    if of is None and len(classes) == 1:
        return classes[0]
    if of not in classes:
        names = ", ".join(cls.__qualname__ for cls in classes) or "none"
        raise ConfigurationError(
            f"Projection {projection_class!r}: of={of!r} is not a registered application class (registered: {names})."
        )
    found: type[Application[Any]] = of
    return found


@contextmanager
def untouched_on_error(app: Flask) -> Iterator[None]:
    """Take back what was done to an app if the block fails."""
    mappings: list[MutableMapping[Any, Any]] = [app.extensions, app.config, app.after_request_funcs, app.cli.commands]
    lists: list[list[Any]] = [app.teardown_appcontext_funcs, app.shell_context_processors]
    before = [dict(mapping) for mapping in mappings], [list(items) for items in lists]
    functions = {key: list(value) for key, value in app.after_request_funcs.items()}

    def restore() -> None:
        for mapping, old in zip(mappings, before[0], strict=True):
            mapping.clear()
            mapping.update(old)
        for items, old_items in zip(lists, before[1], strict=True):
            items[:] = old_items
        for key, value in functions.items():
            app.after_request_funcs[key][:] = value

    # A half-made app would be useless.
    with ExitStack() as failed:
        failed.callback(restore)
        yield
        failed.pop_all()
