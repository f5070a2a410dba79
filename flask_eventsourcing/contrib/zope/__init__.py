"""Applications on sessions that zope.sqlalchemy has registered, committed by the ``transaction`` package.

It needs neither Flask nor Pyramid; ``flask_eventsourcing.contrib.pyramid`` is built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Generic, Literal, ParamSpec, TypeVar, overload

import sqlalchemy as sa
from eventsourcing.application import Application
from sqlalchemy import orm

from ...applications.erasure import Erasure, erase
from ...exceptions import ConfigurationError
from ...metadata import MetadataBlock, Provider, event_metadata
from ...models import (
    CheckpointMixin,
    DeadLetterMixin,
    InlineRangeMixin,
    Models,
    ProjectionModels,
    SnapshotMixin,
    StoredEventMixin,
    TrackingMixin,
    index_correlation,
    make_models,
    make_projection_models,
)
from ...persistence import DialectOptions
from ...projections.definitions import ModelProjection
from ...projections.registry import PlainProjections
from ...uow import check_times
from .participant import TransientConflictError
from .zope_host import Sessions, ZopeHost

__all__ = ["EventModels", "EventSourcing", "TransientConflictError", "ZopeHost", "event_models"]

A = TypeVar("A", bound=Application[Any])
J = TypeVar("J", bound=ModelProjection)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class EventModels:
    """The record classes of an application and of its projections, on the declarative base in use."""

    events: Models
    projections: ProjectionModels

    @property
    def StoredEvent(self) -> type[StoredEventMixin]:  # noqa: N802
        """The record class of events."""
        return self.events.StoredEvent

    @property
    def Snapshot(self) -> type[SnapshotMixin]:  # noqa: N802
        """The record class of snapshots."""
        return self.events.Snapshot

    @property
    def Tracking(self) -> type[TrackingMixin]:  # noqa: N802
        """The record class of positions in the logs of others."""
        return self.events.Tracking

    @property
    def Projection(self) -> type[CheckpointMixin]:  # noqa: N802
        """The record class of the positions of projections."""
        return self.projections.Projection

    @property
    def DeadLetter(self) -> type[DeadLetterMixin]:  # noqa: N802
        """The record class of events that projections have set aside."""
        return self.projections.DeadLetter

    @property
    def InlineRange(self) -> type[InlineRangeMixin]:  # noqa: N802
        """The record class of what inline projections have applied."""
        return self.projections.InlineRange

    @property
    def tables(self) -> dict[str, sa.Table]:
        """The tables by their use."""
        return {**self.events.tables, **self.projections.tables}


def event_models(
    base: Any,
    application_name: str,
    *,
    originator_id_type: Literal["uuid", "text"] = "uuid",
    schema: str | None = None,
    correlation_index: bool = False,
) -> EventModels:
    """Make the record classes of an application, and of its projections, on a declarative base.

    Call it in the module of your models: what exists in the database then depends on no setting, and Alembic's
    ``env.py``, which imports only the base, sees it.

    :param base: the declarative base.
    :param application_name: the name of the application class, after which the tables are called.
    :param originator_id_type: whether the ids of aggregates are UUIDs or texts.
    :param schema: the schema of the tables, where the database has such a thing.
    :param correlation_index: whether events are found by their correlation with an index.
    :raises ConfigurationError: when a table name is taken.
    """
    place = {"schema": schema, "bind_key": None}
    events = make_models(base, application_name, originator_id_type=originator_id_type, **place)
    if correlation_index:
        index_correlation(events)
    return EventModels(events, make_projection_models(base, application_name, schema=schema))


class EventSourcing(Generic[A]):
    """Applications whose events are committed by a transaction manager, with the rows beside them.

    :param application: the application class, a subclass of ``eventsourcing.application.Application``.
    :param models: its record classes, as :func:`event_models` makes them; with several classes, a mapping of them.
    :param session: a ``scoped_session`` or a ``sessionmaker`` that zope.sqlalchemy has registered, or a function that
        returns the current session.
    :param session_factory: a ``sessionmaker`` for the sessions of workers, by default *session*.
    :param options: what there is to say about the database, as a ``flask_eventsourcing.persistence.DialectOptions``.
    :param env: what the library reads from the environment of an application.
    :param metadata: functions that return metadata for the events of each save, or False, and none are stored.
    :param lease: whether workers of projections hold a lease rather than a lock of the server.
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
        by_class = dict(models) if isinstance(models, Mapping) else {application: models}
        check_models_of(application, by_class)
        self._application_class = application
        events = {each: own.events for each, own in by_class.items()}
        further: dict[str, Any] = {"options": options, "env": env, "metadata": metadata}
        self.host: ZopeHost = ZopeHost(session, events, session_factory=session_factory, **further)
        """What the applications, projections and commands run in."""
        self.projections: PlainProjections = PlainProjections(
            self.host, {each: own.projections for each, own in by_class.items()}, lease=lease
        )
        """The projections that are registered, and what there is to do with them."""

    @property
    def application(self) -> A:
        """The single application of this process."""
        return self.host[self._application_class]

    def __getitem__(self, application_class: type[A]) -> A:
        """Return the single instance of an application class in this process.

        :raises ConfigurationError: when there are no models for the class.
        """
        return self.host[application_class]

    def transaction(self) -> AbstractContextManager[orm.Session]:
        """A unit of work: commits the manager's transaction on success, aborts it on error.

        Within a transaction that somebody has begun it joins that, whose owner commits; on error it dooms it.

        :raises RollbackOnlyError: from the outermost, when an inner one had failed.
        """
        return self.host.transaction()

    def transactional(self, function: Callable[P, R]) -> Callable[P, R]:
        """Run a function in :meth:`transaction`."""

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.host.transaction():
                return function(*args, **kwargs)

        return run

    def retry_on_conflict(self, times: int = 3) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Run a function in :meth:`transaction`, and again as a whole after a conflict.

        Within a transaction that somebody has begun, its owner has to try again: ``transaction.attempts()`` or
        pyramid_retry.

        :param times: how often it is run again, at most.
        :raises ConfigurationError: when that is no whole number from 0 up.
        """
        check_times(times)

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            @wraps(function)
            def run(*args: P.args, **kwargs: P.kwargs) -> R:
                return self.host.retry(partial(function, *args, **kwargs), times)

            return run

        return decorate

    def using(self, session: orm.Session) -> AbstractContextManager[orm.Session]:
        """Within it, a session of your own is the current one; you commit and close it.

        :raises ConfigurationError: when it is for another database than that of the events.
        """
        return self.host.using_session(session)

    @staticmethod
    def event_metadata(**metadata: str) -> MetadataBlock:
        """See :func:`flask_eventsourcing.metadata.event_metadata`."""
        return event_metadata(**metadata)

    @overload
    def projection(self, projection_class: type[J], /) -> type[J]: ...

    @overload
    def projection(self, /, *, of: type[Application[Any]] | None = None) -> Callable[[type[J]], type[J]]: ...

    def projection(self, projection_class: Any = None, /, *, of: type[Application[Any]] | None = None) -> Any:
        """Register a projection, a subclass of ``ModelProjection``; a decorator.

        :param of: the application class whose events it follows; not needed where there is only one.
        :raises ConfigurationError: when the class cannot be used; the message says why.
        """

        def decorate(decorated: type[J]) -> type[J]:
            self.projections.register(decorated, of)
            return decorated

        return decorate if projection_class is None else decorate(projection_class)

    def erase(self, aggregate_id: Any, *, application: type[A] | None = None, redact: bool = False) -> Erasure:
        """Erase an aggregate with the next commit: its events, snapshots and dead letters.

        :param application: the application class, where there are several.
        :param redact: empty the events, rather than delete their rows.
        """
        application_class = application or self._application_class
        letters = self.projections.dead_letters_of(application_class.name)
        return erase(self.host[application_class], aggregate_id, redact=redact, dead_letters=letters)

    def close(self) -> None:
        """Close the applications of this process; it may be called again, and they are constructed again when used."""
        self.projections.close()
        self.host.close()


def check_models_of(application: Any, by_class: Mapping[Any, Any]) -> None:
    """Check what is given as applications with their models.

    :raises ConfigurationError: when one is none.
    """
    if application not in by_class:
        raise ConfigurationError(f"models has none for {application!r}: give event_models(Base, …) for it.")
    for each, own in by_class.items():
        if not (isinstance(each, type) and issubclass(each, Application)):
            raise ConfigurationError(f"{each!r} is no application class, a subclass of {Application.__qualname__}.")
        if not isinstance(own, EventModels):
            raise ConfigurationError(
                f"The models of {each.__name__} are {own!r}: make them with event_models(Base, {each.name!r}) in the "
                "module of your models."
            )
