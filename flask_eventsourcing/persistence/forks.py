"""Connections that a forked process inherits are never used in it, nor closed.

A pool cannot look after itself: its lock may have been held by another thread at the time of the fork, connections that
were in use then count against it for ever, and its connections are the parent's. So the process is compared before the
pool is asked for anything, and another process gets a new pool. It does what SQLAlchemy's documentation does by hand
after a fork, ``engine.dispose(close=False)`` ("Using Connection Pools with Multiprocessing"), without a hook.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool import Pool, PoolProxiedConnection

from .._patches import engine_pool, left_connection, pool_per_process
from ..lifecycle import ProcessLock, keep_for_ever
from .dialects import is_in_memory

PID = "flask_eventsourcing.pid"

_lock = ProcessLock()
_watched: weakref.WeakSet[Engine] = weakref.WeakSet()
_records: weakref.WeakSet[Any] = weakref.WeakSet()
_left_in = os.getpid()


def drop_inherited_connections(engine: Engine) -> None:
    """Give an engine, in each forked process, a pool of that process's own.

    It holds for all who use the engine, and without ``os.register_at_fork``, which uWSGI does not run. The one
    connection of an in-memory database is the database, and a forked process keeps its own copy of that.
    """
    if engine in _watched or is_in_memory(engine.url):
        return
    _watched.add(engine)
    # Not when it is made: a connection may be older than this.
    sa.event.listen(engine, "checkout", _note_process)
    _watch(engine, engine.pool)


def leave_inherited_connections() -> None:
    """Part from the connections that were in use at the time of the fork; costs nothing in a process that has done so.

    Whoever still has one, such as a session that was held across the fork, may roll back and close it, which sends
    nothing to the server, and gets an error for everything else.
    """
    global _left_in  # noqa: PLW0603
    pid = os.getpid()
    if pid == _left_in:
        return
    for record in list(_records):
        if record.info.get(PID) != pid and record.dbapi_connection is not None:
            _leave(record)
    _left_in = pid


class _Inherited:
    """Takes the place of the driver's connection where somebody still holds one that was inherited."""

    def rollback(self) -> None:
        """Leave the parent's transaction alone."""

    def close(self) -> None:
        """Leave the parent's session on the server alone."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidRequestError(
            "This connection was in use when the process was forked, and belongs to the parent process: roll back or "
            "close the session or connection that has it, and begin anew."
        )


def _note_process(driver: Any, record: Any, proxy: Any) -> None:
    if PID not in record.info:
        record.info[PID] = os.getpid()
        _records.add(record)


def _leave(record: Any) -> None:
    keep_for_ever(record.dbapi_connection)
    fairy = record.fairy_ref() if record.fairy_ref is not None else None
    left_connection(record, fairy, _Inherited())


def _watch(engine: Engine, pool: Pool) -> Pool:
    process = os.getpid()
    connect, dispose, recreate = pool.connect, pool.dispose, pool.recreate

    def connect_in_process() -> PoolProxiedConnection:
        return connect() if os.getpid() == process else _own_pool(engine, pool).connect()

    def dispose_in_process() -> None:
        if os.getpid() == process:
            dispose()

    def recreate_watched() -> Pool:
        return _watch(engine, recreate())

    pool_per_process(pool, connect_in_process, dispose_in_process, recreate_watched)
    return pool


def _own_pool(engine: Engine, pool: Pool) -> Pool:
    """Return the engine's pool of this process, in the place of one from before the fork."""
    leave_inherited_connections()
    with _lock:
        if engine.pool is pool:
            keep_for_ever(pool)
            engine_pool(engine, pool.recreate())
        return engine.pool


# Sooner, where Python forks; not relied on, as uWSGI runs no such hook.
os.register_at_fork(after_in_child=leave_inherited_connections)
