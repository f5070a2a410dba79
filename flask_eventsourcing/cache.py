"""An aggregate cache that never serves what was rolled back.

The library's repository puts an aggregate into its cache when it is saved or read, before anything is committed, and
fast-forwards the cached object itself. Here an aggregate with uncommitted events passes the cache by, and is put into
it only after the commit.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from eventsourcing.application import Application, Cache

from .persistence import SQLAlchemyAggregateRecorder
from .persistence.dialects.base import EventTable
from .persistence.errors import translated
from .session import UnitOfWork


class CommittedCache(Cache[Any, Any]):
    """Wraps the repository's cache.

    :param inner: the cache that the library made, with its size.
    :param scope: returns the unit of work in which the caller is, or None.
    :param events_table: the table of the aggregates' events.
    """

    def __init__(
        self, inner: Cache[Any, Any], scope: Callable[[], UnitOfWork | None], events_table: EventTable
    ) -> None:
        super().__init__()
        self.inner = inner
        self.cache = inner.cache
        self._scope = scope
        self._events_table = events_table

    def get(self, key: Any, *, evict: bool = False) -> Any:
        """Return a cached aggregate.

        :raises KeyError: when there is none, or this unit of work has uncommitted events of it.
        """
        unit = self._scope()
        if unit is not None and unit.has_pending(key):
            raise KeyError(key)
        if unit is not None and unit.queueing:
            # Before the library takes the aggregate's fast-forward lock: who waited for the turn with that lock would
            # be in the way of who has the turn.
            with translated:
                unit.reading(unit.connection(unit.dialect.engine), self._events_table, key)
        return self.inner.get(key, evict=evict)

    def put(self, key: Any, value: Any) -> None:
        """Cache an aggregate, after the commit if it has uncommitted events."""
        if value is None:
            return
        unit = self._scope()
        if unit is None or not unit.has_pending(key):
            self.inner.put(key, value)
            return
        # A copy, as the caller may go on changing the aggregate before the commit or after it.
        committed = deepcopy(value)
        unit.on_commit(lambda: self.inner.put(key, committed))


def install(application: Application[Any], scope: Callable[[], UnitOfWork | None]) -> None:
    """Wrap the cache of an application's repository, if it has one."""
    cache = application.repository.cache
    recorder = application.recorder
    if cache is not None and isinstance(recorder, SQLAlchemyAggregateRecorder):
        application.repository.cache = CommittedCache(cache, scope, recorder.events_table)
