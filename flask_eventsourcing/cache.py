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

from .session import UnitOfWork


class CommittedCache(Cache[Any, Any]):
    """Wraps the repository's cache.

    :param inner: the cache that the library made, with its size.
    :param scope: returns the unit of work in which the caller is, or None.
    """

    def __init__(self, inner: Cache[Any, Any], scope: Callable[[], UnitOfWork | None]) -> None:
        super().__init__()
        self.inner = inner
        self.cache = inner.cache
        self._scope = scope

    def get(self, key: Any, *, evict: bool = False) -> Any:
        """Return a cached aggregate.

        :raises KeyError: when there is none, or this unit of work has uncommitted events of it.
        """
        unit = self._scope()
        if unit is not None and unit.has_pending(key):
            raise KeyError(key)
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
    if cache is not None:
        application.repository.cache = CommittedCache(cache, scope)
