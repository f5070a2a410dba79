"""Applications of the library, constructed on a datastore: what makes them right in a unit of work, and quick.

The library's ``project_aggregate()`` checks with ``isinstance()`` that each event has the attributes of a protocol. Up
to Python 3.11 that takes four times as long as to read the event and to apply it. Here the first event of each class
goes that way, and the others of that class do not.

The library's repository puts an aggregate into its cache when it is saved or read, before anything is committed, and
fast-forwards the cached object itself. Here an aggregate with uncommitted events passes the cache by, and is put into
it only after the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, TypeVar

from eventsourcing.application import Application, Cache, ProjectorFunction, Repository, project_aggregate

from .._patches import repository_cache, repository_class
from ..persistence import Datastore, Factory, SQLAlchemyAggregateRecorder
from ..persistence.dialects.event_tables import EventTable
from ..uow import UnitOfWork

A = TypeVar("A", bound=Application[Any])


def environment(datastore: Datastore, env: Mapping[str, str], application_name: str | None = None) -> dict[str, str]:
    """Return the environment with which an application, or one of the library's own runners, uses a datastore.

    :param env: what the user has configured.
    :param application_name: of the one application that it is for.
    """
    ours = {
        Factory.PERSISTENCE_MODULE: "flask_eventsourcing.persistence",
        Factory.DATASTORE: datastore.token,
    }
    if application_name is not None:
        # A variable with the application's name in front, set in the process's environment, would win otherwise.
        ours |= {f"{application_name.upper()}_{key}": value for key, value in ours.items()}
    return {**env, **ours}


def construct(
    application_class: type[A], datastore: Datastore, env: Mapping[str, str], unit: Callable[[], UnitOfWork | None]
) -> A:
    """Construct an application whose recorders use a datastore.

    :param unit: returns the unit of work in which the caller is, or None.
    """
    application = application_class(env=environment(datastore, env, application_class.name))
    install_repository(application)
    install_cache(application, unit)
    return application


_checked: set[type[Any]] = set()
"""As in the library's own cache of topics, classes of events are kept for ever."""


def project_checked(aggregate: Any, domain_events: Iterable[Any]) -> Any:
    """Do what ``project_aggregate()`` does, with its check once for each class of events.

    :raises AssertionError: as that does, for an object that is no event of an aggregate.
    """
    for domain_event in domain_events:
        if type(domain_event) in _checked:
            aggregate = domain_event.mutate(aggregate)
        else:
            aggregate = project_aggregate(aggregate, (domain_event,))
            _checked.add(type(domain_event))
    return aggregate


class CheckedRepository(Repository[Any]):
    """The library's repository, but for the function that it takes where none is given."""

    def get(
        self,
        aggregate_id: Any,
        *,
        version: int | None = None,
        projector_func: ProjectorFunction[Any, Any] = project_aggregate,
        fastforward_skipping: bool = False,
        deepcopy_from_cache: bool = True,
    ) -> Any:
        """See ``Repository.get()``."""
        return super().get(
            aggregate_id,
            version=version,
            projector_func=project_checked if projector_func is project_aggregate else projector_func,
            fastforward_skipping=fastforward_skipping,
            deepcopy_from_cache=deepcopy_from_cache,
        )


def install_repository(application: Application[Any]) -> None:
    """Let an application's repository be one of this kind, unless it has brought one of its own."""
    if type(application.repository) is Repository:
        repository_class(application.repository, CheckedRepository)


class CommittedCache(Cache[Any, Any]):
    """Wraps the repository's cache.

    :param inner: the cache that the library made, with its size.
    :param unit: returns the unit of work in which the caller is, or None.
    :param events_table: the table of the aggregates' events.
    """

    def __init__(self, inner: Cache[Any, Any], unit: Callable[[], UnitOfWork | None], events_table: EventTable) -> None:
        super().__init__()
        self.inner = inner
        self.cache = inner.cache
        self._unit = unit
        self._events_table = events_table

    def get(self, key: Any, *, evict: bool = False) -> Any:
        """Return a cached aggregate.

        :raises KeyError: when there is none, or this unit of work has uncommitted events of it.
        """
        unit = self._unit()
        if unit is not None and unit.pending.has_events_of(key):
            raise KeyError(key)
        if unit is not None and unit.queue.active:
            # Before the library takes the aggregate's fast-forward lock: a unit that waited in the queue with that lock
            # would be in the way of the one that is first in it.
            with unit.dialect.translated:
                unit.before_read(unit.connection(), self._events_table, key)
        return self.inner.get(key, evict=evict)

    def put(self, key: Any, value: Any) -> None:
        """Cache an aggregate, after the commit if it has uncommitted events."""
        if value is None:
            return
        unit = self._unit()
        if unit is None or not unit.pending.has_events_of(key):
            self.inner.put(key, value)
            return
        # A copy, as the caller may go on changing the aggregate before the commit or after it.
        committed = deepcopy(value)
        unit.on_commit(lambda: self.inner.put(key, committed))


def install_cache(application: Application[Any], unit: Callable[[], UnitOfWork | None]) -> None:
    """Wrap the cache of an application's repository, if it has one."""
    cache = application.repository.cache
    recorder = application.recorder
    if cache is not None and isinstance(recorder, SQLAlchemyAggregateRecorder):
        repository_cache(application.repository, CommittedCache(cache, unit, recorder.events_table))
