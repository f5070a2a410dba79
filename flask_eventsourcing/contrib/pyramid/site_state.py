"""The state of one Pyramid application: its settings, and applications, hosts and projections.

These are made at the end of its configuration.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from eventsourcing.application import Application
from pyramid.interfaces import ITweens
from pyramid.registry import Registry
from pyramid.settings import asbool
from pyramid.threadlocal import get_current_request
from sqlalchemy import orm

from ...applications.known_sites import add_kind
from ...config import ProjectionLock, checked
from ...exceptions import ConfigurationError
from ...host import by_application
from ...metadata import Provider
from ...persistence import DialectOptions
from ...projections.registry import PlainProjections
from ...signals import events_discarded
from ...uow import Batch, describe, roll_back
from ..zope.facade import Facade
from ..zope.record_models import EventModels
from ..zope.registered import current_transaction, registration_of
from ..zope.zope_host import ZopeHost
from .pyramid_host import PyramidHost, of_request, of_user

logger: logging.Logger = logging.getLogger(__name__)

PREFIX = "eventsourcing."
PROGRAM = "pyramid-eventsourcing"
CALLED: ContextVar[str] = ContextVar("called", default=f"{PROGRAM} <ini file>")
"""How messages name the commands of an application that is being made; with its ini file, if that is known."""
ENV = "env."
"""The prefix of settings for the library's environment, as in ``eventsourcing.env.CIPHER_KEY``."""
KEY = "flask_eventsourcing"
"""The key of the state in a registry."""
NO_VETO = (
    "tm.commit_veto is not set, so a view that returns a 4xx or 5xx status commits its events and rows: set "
    "tm.commit_veto = pyramid_tm.default_commit_veto, unless you want that."
)

GUARD = "flask_eventsourcing.contrib.pyramid.guard_tween_factory"
MANAGER = "pyramid_tm.tm_tween_factory"
NO_GUARD = (
    f"pyramid.tweens does not list {GUARD} over {MANAGER}, so a client may receive a success although its events are "
    "not stored: list it there."
)


@dataclass(frozen=True)
class IniSettings:
    """The settings of a Pyramid application; each is the key ``eventsourcing.`` + its name in the ini file.

    The settings of ``flask_eventsourcing.persistence.DialectOptions`` are further ones.
    """

    metadata: bool = True
    """Whether the metadata of a request are stored with its events."""
    metadata_user: bool = False
    """Whether ``request.authenticated_userid`` is among them."""
    projection_lock: ProjectionLock = "database"
    options: DialectOptions = field(default_factory=DialectOptions)
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> IniSettings:
        """Read the settings.

        :raises ConfigurationError: for an unknown key or a value that cannot be used; the message names the key.
        """
        plain = {"metadata": True, "metadata_user": False, "projection_lock": "database"}
        options = {each: getattr(DialectOptions(), each) for each in DialectOptions.settings()}
        found: dict[str, Any] = {}
        env: dict[str, str] = {}
        for key, given in settings.items():
            if not key.startswith(PREFIX):
                continue
            name = key.removeprefix(PREFIX)
            if name.startswith(ENV):
                env[name.removeprefix(ENV)] = given
            elif name in plain | options:
                found[name] = _value(key, name, given, (plain | options)[name])
            else:
                close = difflib.get_close_matches(name, plain | options, n=1)
                known = f"did you mean {PREFIX}{close[0]}?" if close else f"known are {', '.join(plain | options)}"
                raise ConfigurationError(f"Unknown setting {key}: {known}")
        given_options = {name: value for name, value in found.items() if name in options}
        chosen = DialectOptions(program=CALLED.get(), setting=f"{PREFIX}{{1}}", **given_options)
        checked("env", env, f"{PREFIX}{ENV}…")
        return cls(**{name: value for name, value in found.items() if name in plain}, options=chosen, env=env)


def _value(key: str, name: str, given: Any, default: Any) -> Any:
    """Return the value of a setting; an ini file gives it as a text."""
    value = given
    if isinstance(given, str) and isinstance(default, bool):
        if given.strip().lower() not in ("true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"):
            raise ConfigurationError(f"{key} must be true or false; found {given!r}.")
        value = asbool(given)
    elif isinstance(given, str) and isinstance(default, float):
        try:
            value = float(given)
        except ValueError:
            raise ConfigurationError(f"{key} must be a number of seconds; found {given!r}.") from None
    if name in ("metadata", "metadata_user"):
        if not isinstance(value, bool):
            raise ConfigurationError(f"{key} must be true or false; found a value of type {type(value).__name__}.")
        return value
    return checked(name, value, key)


@dataclass(frozen=True, eq=False)
class Entry:
    """The arguments of one call of ``config.add_eventsourcing``."""

    application: type[Application[Any]]
    models: EventModels
    session: Any
    session_factory: Any
    env: Mapping[str, str]
    metadata: Sequence[Provider] | Literal[False]


@dataclass(frozen=True, eq=False)
class Built:
    """The hosts and projections of a complete configuration."""

    hosts: Mapping[type[Application[Any]], PyramidHost]
    projections: PlainProjections


class EventSourcing(Facade):
    """The event sourcing of one Pyramid application, ``request.eventsourcing``.

    It has the same methods in every host: ``transaction()``, ``retry_on_conflict()``, ``wait_for()``, ``erase()``. In a
    request, pyramid_tm commits, so that a view needs none of them to save events.

    :param registry: of the application.
    :raises ConfigurationError: for a setting that cannot be used.
    """

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.settings: IniSettings = IniSettings.from_mapping(registry.settings or {})
        """The settings ``eventsourcing.…``."""
        self._registry = registry
        self._entries: dict[type[Application[Any]], Entry] = {}
        self._projections: dict[tuple[Any, str], tuple[Any, Any]] = {}
        self._built: Built | None = None
        self._lock = threading.Lock()
        self.is_finished: bool = False
        """Whether the hosts and projections are made."""

    def add(self, entry: Entry) -> None:
        """Add an application."""
        self._entries[entry.application] = entry
        self._built = None

    def add_projection(self, projection_class: Any, of: type[Application[Any]] | None) -> None:
        """Add a projection."""
        self._projections[of, projection_class.name] = projection_class, of
        self._built = None

    @property
    def application(self) -> Any:
        """The single application of this process, the first one where there are several.

        It is constructed at its first use, in each forked process again.
        """
        return self[next(iter(self.hosts))]

    @property
    def hosts(self) -> Mapping[type[Application[Any]], ZopeHost]:
        """The host of each application class; those with the same sessions have one."""
        return self.build().hosts

    @property
    def projections(self) -> PlainProjections:
        """The registered projections: iterate over them, or call ``.worker().run()`` in a process of its own.

        ``pyramid-eventsourcing INI run --all`` does that. A web process does not run them.
        """
        return self.build().projections

    def build(self) -> Built:
        """Make the hosts and projections, once.

        :raises ConfigurationError: when the configuration cannot be used.
        """
        with self._lock:
            if self._built is None:
                self._built = self._make()
            return self._built

    def is_at_work(self) -> bool:
        """Return False: the current request decides which site is used."""
        return False

    def construct(self) -> None:
        """Construct the applications of this process now, so that the first request does not have to.

        Call it in your server's hook for a new worker, so that an error in a constructor ends the worker.
        """
        for application_class in self.hosts:
            self[application_class]

    def _of_request(self) -> Mapping[str, str]:
        return of_request()

    def _make(self) -> Built:
        if not self._entries:
            raise ConfigurationError("There is no application: call config.add_eventsourcing(Bank, models=…).")
        groups: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in self._entries.values():
            given = None if entry.metadata is False else tuple(entry.metadata)
            key = (_key(entry.session), id(entry.session_factory), given, tuple(sorted(entry.env.items())))
            groups.setdefault(key, []).append(entry)
        hosts: dict[type[Application[Any]], PyramidHost] = {}
        for entries in groups.values():
            hosts |= dict.fromkeys([entry.application for entry in entries], self._make_host(entries))
        models = {each: entry.models.projections for each, entry in self._entries.items()}
        lease = self.settings.projection_lock == "lease"
        projections = PlainProjections(next(iter(hosts.values())), models, lease=lease, hosts=hosts)
        for projection_class, of in self._projections.values():
            projections.register(projection_class, of)
        return Built(hosts, projections)

    def _make_host(self, entries: Sequence[Entry]) -> PyramidHost:
        first = entries[0]
        factory = first.session_factory
        if factory is None and not isinstance(first.session, orm.scoped_session):
            factory = self._registry.get("dbsession_factory")
            if factory is None:
                raise ConfigurationError(
                    'Workers need a sessionmaker: set registry["dbsession_factory"], or pass one to '
                    "config.add_eventsourcing(…, session_factory=…)."
                )
        metadata: Sequence[Provider] | Literal[False] = False
        if self.settings.metadata and first.metadata is not False:
            metadata = [of_request, *([of_user] if self.settings.metadata_user else []), *first.metadata]
        return PyramidHost(
            first.session,
            {entry.application: entry.models.events for entry in entries},
            session_factory=factory,
            options=self.settings.options,
            env={**self.settings.env, **first.env},
            metadata=metadata,
            ended=self.finish,
        )

    def warn_of_missing_veto(self) -> None:
        """Warn if a response with an error status commits."""
        settings = self._registry.settings or {}
        if not (settings.get("tm.commit_veto") or settings.get("pyramid_tm.commit_veto")):
            logger.warning(NO_VETO)

    def warn_of_missing_guard(self) -> None:
        """Log a warning if the settings list every tween and leave out the guard, as no response is checked then."""
        tweens: Any = self._registry.queryUtility(ITweens)
        names = [name for name, _ in tweens.explicit] if tweens is not None else []
        if names and GUARD not in names[: names.index(MANAGER) if MANAGER in names else None]:
            logger.warning(NO_GUARD)

    def drop_pending(self) -> list[Batch]:
        """Roll back and return the events that the current request has saved and that nothing will commit."""
        batches: list[Batch] = []
        built = self._built
        for host in set(built.hosts.values()) if built is not None else ():
            unit = host.open_unit()
            pending = [] if unit is None else unit.batches
            if unit is None or not pending:
                continue
            batches += pending
            registered = registration_of(unit.session)
            roll_back(unit.session)
            if registered is not None and current_transaction(registered.transaction_manager) is not None:
                registered.transaction_manager.abort()
        return batches

    def finish(self, request: Any) -> None:
        """When a request has ended, see to it that nothing is left for the next one of this thread."""
        pending = self.drop_pending()
        if pending:
            logger.error(
                "%s neither committed nor rolled back when the request ended, so the session is rolled back: let "
                "pyramid_tm manage the request, or commit with 'with request.tm:'.",
                describe(pending),
            )
            self.discard(pending)

    def discard(self, batches: Sequence[Batch]) -> None:
        """Send ``events_discarded``."""
        by_name = {application_class.name: application_class for application_class in self.hosts}
        for name, notifications in by_application(batches).items():
            application = self[by_name[name]]
            events_discarded.send(application, application=application, notifications=notifications)


def _key(session: Any) -> Any:
    return session if isinstance(session, str) else id(session)


def state_of(registry: Registry) -> EventSourcing:
    """Return the state of a registry, made at the first call.

    :raises ConfigurationError: for a setting that cannot be used.
    """
    found: EventSourcing | None = registry.get(KEY)
    if found is None:
        found = registry[KEY] = EventSourcing(registry)
    return found


class PyramidSites:
    """Finds the states of Pyramid applications."""

    def current(self) -> EventSourcing | None:
        """Return the state of the current request's application."""
        found: EventSourcing | None = getattr(get_current_request(), "registry", {}).get(KEY)
        return found

    def of(self, given: object) -> EventSourcing | None:
        """Return the state of a registry, or of the application that a configurator has made."""
        registry = getattr(given, "registry", given)
        return registry.get(KEY) if isinstance(registry, Registry) else None

    def refuse(self) -> None:
        """Do nothing: the general message is enough."""


add_kind(PyramidSites())
