"""Pyramid: applications on ``request.dbsession``, committed by pyramid_tm and retried by pyramid_retry.

``config.include("flask_eventsourcing.contrib.pyramid")`` adds ``config.add_eventsourcing``, ``config.add_projection``
and ``request.eventsourcing``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import venusian
from eventsourcing.application import Application
from pyramid.config import PHASE3_CONFIG, Configurator
from pyramid.tweens import EXCVIEW
from sqlalchemy import orm

from ...metadata import Provider
from ...projections.definitions import ModelProjection, check_projection
from ..zope.record_models import EventModels, check_models_of, event_models
from .guard import guard_tween_factory
from .site_state import GUARD, MANAGER, Entry, EventSourcing, state_of

__all__ = ["EventSourcing", "event_models", "guard_tween_factory", "includeme", "projection"]

J = TypeVar("J", bound=ModelProjection)

LAST: int = PHASE3_CONFIG + 1000
"""The order of the action that runs after all others, when the configuration is complete."""


def includeme(config: Configurator) -> None:
    """Add the directives, ``request.eventsourcing`` and the guard.

    Pyramid calls it for ``config.include("flask_eventsourcing.contrib.pyramid")``. Include pyramid_tm and pyramid_retry
    as well: they commit and try again.
    """
    config.add_directive("add_eventsourcing", add_eventsourcing)
    config.add_directive("add_projection", add_projection)
    config.add_request_method(_eventsourcing, "eventsourcing", property=True)
    config.add_tween(GUARD, over=(MANAGER, EXCVIEW))


def _eventsourcing(request: Any) -> EventSourcing:
    return state_of(request.registry)


def add_eventsourcing(
    config: Any,
    application: type[Application[Any]],
    *,
    models: EventModels,
    session: str | orm.scoped_session[Any] | Callable[[Any], orm.Session] = "dbsession",
    session_factory: orm.sessionmaker[Any] | None = None,
    env: Mapping[str, str] | None = None,
    metadata: Sequence[Provider] | Literal[False] = (),
) -> None:
    """Add an event-sourced application to a Pyramid application; call it once for each.

    Afterwards ``request.eventsourcing.application`` is the application, whose events are committed with
    ``request.dbsession``::

        config.add_eventsourcing(Bank, models=models.events)

    :param config: the configurator.
    :param application: the application class.
    :param models: its record classes, as :func:`event_models` makes them in the module of your models.
    :param session: the name of the request's attribute that is the session, a ``scoped_session``, or a function that
        takes the request.
    :param session_factory: makes the sessions of workers; by default ``registry["dbsession_factory"]``.
    :param env: what the library reads from the environment of the application.
    :param metadata: functions that return metadata for the events of each save; with False none are stored.
    :raises ConfigurationError: when an argument or a setting cannot be used.
    """
    application = config.maybe_dotted(application)
    check_models_of(application, {application: models})
    state = state_of(config.registry)
    entry = Entry(application, models, config.maybe_dotted(session) if _is_dotted(session) else session,
                  session_factory, dict(env or {}), metadata)  # fmt: skip
    name = application.name
    introspectable = config.introspectable(
        "event sourcing", name, config.object_description(application), "application"
    )
    introspectable["models"] = models
    config.action(("eventsourcing", name.lower()), state.add, (entry,), introspectables=(introspectable,))
    if not config.autocommit:
        config.action(None, _finish, (state,), order=LAST)


def _is_dotted(session: Any) -> bool:
    return isinstance(session, str) and "." in session


def _finish(state: EventSourcing) -> None:
    if not state.is_finished:
        state.is_finished = True
        state.build()
        state.warn_of_missing_veto()
        state.warn_of_missing_guard()


def add_projection(
    config: Any, projection_class: type[ModelProjection], of: type[Application[Any]] | None = None
) -> None:
    """Register a projection, a subclass of ``ModelProjection``.

    ``pyramid-eventsourcing INI run --all`` keeps it up to date, in a process beside the web server.

    :param config: the configurator.
    :param projection_class: the class, or its dotted name.
    :param of: the application class whose events it follows; not needed if there is only one.
    :raises ConfigurationError: when the class cannot be used; the message says why.
    """
    projection_class = check_projection(config.maybe_dotted(projection_class))
    state = state_of(config.registry)
    discriminator = ("eventsourcing projection", getattr(of, "name", None), projection_class.name.casefold())
    # After the applications, which may be added later in the file.
    config.action(discriminator, state.add_projection, (projection_class, of), order=1)


@overload
def projection(projection_class: type[J], /) -> type[J]: ...


@overload
def projection(*, of: type[Application[Any]] | None = None) -> Callable[[type[J]], type[J]]: ...


def projection(projection_class: Any = None, /, *, of: type[Application[Any]] | None = None) -> Any:
    """Have ``config.scan()`` register a projection, a subclass of ``ModelProjection``; a decorator.

    The module needs no configurator then, so that tests and scripts can import it.

    :param of: the application class whose events it follows; not needed if there is only one.
    """

    def decorate(decorated: type[J]) -> type[J]:
        def register(scanner: Any, name: str, found: type[J]) -> None:
            scanner.config.with_package(info.module).add_projection(found, of=of)

        # The depth counts the calls up to the module of the class.
        info = venusian.attach(decorated, register, category="pyramid", depth=1 if projection_class is None else 2)
        return decorated

    return decorate if projection_class is None else decorate(projection_class)
