"""Applications on sessions that zope.sqlalchemy has registered, committed by the ``transaction`` package.

It needs neither Flask nor Pyramid; ``flask_eventsourcing.contrib.pyramid`` is built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

from eventsourcing.application import Application
from sqlalchemy import orm

from ...metadata import Provider
from ...persistence import DialectOptions
from ...projections.definitions import ModelProjection
from ...projections.registry import PlainProjections
from .facade import Facade
from .participant import TransientConflictError
from .record_models import EventModels, check_models_of, event_models
from .zope_host import Sessions, ZopeHost

__all__ = ["EventModels", "EventSourcing", "TransientConflictError", "ZopeHost", "event_models"]

A = TypeVar("A", bound=Application[Any])
J = TypeVar("J", bound=ModelProjection)


class EventSourcing(Facade, Generic[A]):
    """Applications whose events a transaction manager commits, together with the rows of the same session.

    Make one object where you make your sessions::

        es = EventSourcing(Bank, models=events, session=Session)

    :param application: the application class, a subclass of ``eventsourcing.application.Application``.
    :param models: its record classes, as :func:`event_models` makes them; with several classes, a mapping of them.
    :param session: a ``scoped_session`` or a ``sessionmaker`` that zope.sqlalchemy has registered, or a function that
        returns the current session.
    :param session_factory: a ``sessionmaker`` for the sessions of workers, by default *session*.
    :param options: options of the database, a ``flask_eventsourcing.persistence.DialectOptions``.
    :param env: the environment of the applications, which the library reads.
    :param metadata: functions that return metadata for the events of each save; with False none are stored.
    :param lease: whether workers of projections hold a lease rather than a server lock.
    :raises ConfigurationError: when an argument cannot be used.
    """

    def __init__(
        self,
        application: type[A],
        *,
        models: EventModels | Mapping[type[Application[Any]], EventModels],
        session: Sessions,
        session_factory: orm.sessionmaker[Any] | None = None,
        options: DialectOptions | None = None,
        env: Mapping[str, str] | None = None,
        metadata: Sequence[Provider] | Literal[False] = (),
        lease: bool = False,
    ) -> None:
        super().__init__()
        by_class = dict(models) if isinstance(models, Mapping) else {application: models}
        check_models_of(application, by_class)
        self._application_class = application
        events = {each: own.events for each, own in by_class.items()}
        further: dict[str, Any] = {"options": options, "env": env, "metadata": metadata}
        self._host = ZopeHost(session, events, session_factory=session_factory, **further)
        self._projections = PlainProjections(
            self._host, {each: own.projections for each, own in by_class.items()}, lease=lease
        )

    @property
    def hosts(self) -> Mapping[type[Application[Any]], ZopeHost]:
        """The host of each application class: how recorders find the session and its transaction.

        The adapters for task queues and the commands take hosts; views do not need them.
        """
        return dict.fromkeys(self._host.models, self._host)

    @property
    def projections(self) -> PlainProjections:
        """The registered projections: iterate over them, or call ``.worker().run()`` in a process of its own.

        A web process does not run them, as one process at a time runs a projection.
        """
        return self._projections

    @property
    def application(self) -> A:
        """The single application of this process, the first one where there are several.

        It is constructed at its first use, in each forked process again.
        """
        return self._host[self._application_class]

    @overload
    def projection(self, projection_class: type[J], /) -> type[J]: ...

    @overload
    def projection(self, /, *, of: type[Application[Any]] | None = None) -> Callable[[type[J]], type[J]]: ...

    def projection(self, projection_class: Any = None, /, *, of: type[Application[Any]] | None = None) -> Any:
        """Register a projection, a subclass of ``ModelProjection``; a decorator.

        A process of its own keeps its models up to date, with ``projections.worker().run()``.

        :param of: the application class whose events it follows; not needed if there is only one.
        :raises ConfigurationError: when the class cannot be used; the message says why.
        """

        def decorate(decorated: type[J]) -> type[J]:
            self.projections.register(decorated, of)
            return decorated

        return decorate if projection_class is None else decorate(projection_class)
