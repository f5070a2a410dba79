"""A forked process neither uses nor closes the connections that it inherits.

A forked process cannot use the inherited pool: another thread may have held its lock at the time of the fork,
connections that were in use then count against it for ever, and its connections belong to the parent. So the process is
compared before each use of the pool, and a new process gets a new pool. This is ``engine.dispose(close=False)`` of
SQLAlchemy's documentation ("Using Connection Pools with Multiprocessing"), without a hook.

A database whose locks do not survive a fork must not be open when the process forks. Its idle connections are closed
before the fork, in the parent, without the pool's lock: each idle connection has a mark, and the thread that removes it
first, to use the connection or to close it, owns the connection.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DisconnectionError, InvalidRequestError
from sqlalchemy.pool import Pool, PoolProxiedConnection, QueuePool, StaticPool

from .._patches import engine_pool, left_connection, pool_per_process
from ..exceptions import InheritedDatabaseError
from ..lifecycle import ProcessLock, keep_for_ever
from .dialects import closing_threads, descriptor_id, guard_forks, is_in_memory, note_inherited_files, open_sockets

PID = "flask_eventsourcing.pid"
IDLE = "flask_eventsourcing.idle"
"""Set for a connection in the pool, until its next user or the code that closes it before a fork takes it away."""
USER = "flask_eventsourcing.user"
"""The thread that has a connection, or had it last."""

LONGEST_WAIT = 2.0
"""The most seconds for which a fork waits until other threads are done with the connections that it closes."""

_lock = ProcessLock()
_watched: weakref.WeakSet[Engine] = weakref.WeakSet()
_records: dict[int, weakref.ref[Any]] = {}
"""The pool's records of connections, in a dictionary that can be copied in one step."""
_closable: dict[int, weakref.ref[Any]] = {}
"""The pools whose connections are closed before a fork."""
_forking: dict[int, float] = {}
"""The threads that are about to fork, and until when others wait for that."""
_entering: dict[int, None] = {}
"""The threads that are about to get a connection, which may have to be made."""
_left_in = os.getpid()
_inherited_sockets: set[tuple[int, int]] = set()
"""The sockets that were open at the fork, where Python has forked: later, some may be this process's own."""


def drop_inherited_connections(engine: Engine) -> None:
    """Give an engine, in each forked process, a pool of that process's own.

    This works without ``os.register_at_fork``, which uWSGI does not run. The one connection of an in-memory database is
    the database, and a forked process keeps its own copy of it.
    """
    if engine in _watched or is_in_memory(engine.url):
        return
    _watched.add(engine)
    # A pool of one shared connection does not tell when it is idle.
    if guard_forks(engine) and not isinstance(engine.pool, StaticPool):
        if isinstance(engine.pool, QueuePool):
            # Connections that are already idle have no mark.
            engine.dispose()
        sa.event.listen(engine, "checkout", _claim)
        sa.event.listen(engine, "checkin", _offer)
    else:
        # Not at "connect": a connection may have been made before this listener.
        sa.event.listen(engine, "checkout", _note_process)
        sa.event.listen(engine, "connect", _refuse_inherited, insert=True)
    _watch(engine, engine.pool)


def leave_inherited_connections() -> None:
    """Separate from the connections that were in use at the fork; a second call in a process costs nothing.

    A session that was open at the fork may roll back and close its connection, which sends nothing to the server. It
    gets an error for everything else.
    """
    global _left_in  # noqa: PLW0603
    pid = os.getpid()
    if pid == _left_in:
        return
    note_inherited_files()
    _forking.clear()
    _entering.clear()
    closing_threads.clear()
    for record in _living(_records):
        if record.info.get(PID) != pid and record.dbapi_connection is not None:
            _leave(record)
    _left_in = pid


class _Inherited:
    """Replaces the driver's connection where code still holds an inherited one."""

    def rollback(self) -> None:
        """Leave the parent's transaction alone."""

    def close(self) -> None:
        """Leave the parent's session on the server alone."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidRequestError(
            "This connection was in use when the process was forked, and belongs to the parent process: roll back or "
            "close the session or connection that has it, and begin again."
        )


def _living(records: dict[int, weakref.ref[Any]]) -> list[Any]:
    return [record for reference in records.copy().values() if (record := reference()) is not None]


def _keep(records: dict[int, weakref.ref[Any]], record: Any) -> None:
    key = id(record)
    records[key] = weakref.ref(record, lambda _: records.pop(key, None))


def _note_process(driver: Any, record: Any, proxy: Any) -> None:
    if PID not in record.info:
        record.info[PID] = os.getpid()
        _keep(_records, record)


def _refuse_inherited(driver: Any, record: Any) -> None:
    """Refuse a connection of the parent's, which the engine's own function to connect may return.

    :raises InheritedDatabaseError: when it is one; nothing is sent on it.
    """
    if _inherited_sockets and hasattr(driver, "fileno") and descriptor_id(driver.fileno()) in _inherited_sockets:
        keep_for_ever(driver)
        left_connection(record, None, _Inherited())
        raise InheritedDatabaseError(
            "The engine's creator has returned a connection that was made before this process was forked, and two "
            "processes would read each other's answers on it: have it connect, or make the driver's own pool in each "
            "process, after the fork."
        )


def _forked_child() -> None:
    leave_inherited_connections()
    if _watched:
        _inherited_sockets.update(open_sockets())


def _leave(record: Any) -> None:
    keep_for_ever(record.dbapi_connection)
    fairy = record.fairy_ref() if record.fairy_ref is not None else None
    left_connection(record, fairy, _Inherited())


# ------------------------------------------------------------------------------------------------------ before a fork


def _claim(driver: Any, record: Any, proxy: Any) -> None:
    """Take a connection out of the pool, or let the pool make another one."""
    info = record.info
    info[USER] = threading.get_ident()
    if info.pop(IDLE, None) is None:
        if PID in info:
            raise DisconnectionError("The connection was closed before a fork.")
        _note_process(driver, record, proxy)
        _keep(_closable, record)


def _offer(driver: Any, record: Any) -> None:
    """Mark a connection as idle."""
    if _forks_without_hooks():
        record.close()
    elif driver is not None:
        record.info[IDLE] = True


def _forks_without_hooks() -> bool:
    # uWSGI's master, where this module exists without an import.
    server: Any = sys.modules.get("uwsgi")
    return server is not None and server.worker_id() == 0


def _close_idle() -> None:
    """Close idle connections, and wait a moment for other threads that are using one. No lock is taken."""
    me = threading.get_ident()
    deadline = _forking[me] = time.monotonic() + LONGEST_WAIT
    while True:
        in_hand = bool(_entering.keys() - {me} or closing_threads)
        for record in _living(_closable):
            if record.info.pop(IDLE, None):
                record.close()
            elif record.dbapi_connection is not None:
                in_hand |= record.info.get(USER) != me
        if not in_hand or time.monotonic() > deadline:
            return
        time.sleep(0.001)


def _wait_for_forks(me: int) -> None:
    """Wait for threads that are about to fork, before this thread gets a connection."""
    while me not in _forking and time.monotonic() < max(_forking.copy().values(), default=0):
        _entering.pop(me, None)
        time.sleep(0.001)
        # It notes itself first, and then looks. The thread that forks does it the other way around.
        _entering[me] = None


def _forked() -> None:
    _forking.pop(threading.get_ident(), None)


def _watch(engine: Engine, pool: Pool) -> Pool:
    # Not by the name of the module, which is None when the interpreter ends.
    getpid, get_ident = os.getpid, threading.get_ident
    process = getpid()
    connect, dispose, recreate = pool.connect, pool.dispose, pool.recreate

    def connect_in_process() -> PoolProxiedConnection:
        if getpid() != process:
            return _own_pool(engine, pool).connect()
        me = get_ident()
        _entering[me] = None
        try:
            if _forking:
                _wait_for_forks(me)
            return connect()
        finally:
            _entering.pop(me, None)

    def dispose_in_process() -> None:
        if getpid() == process:
            dispose()

    def recreate_watched() -> Pool:
        return _watch(engine, recreate())

    pool_per_process(pool, connect_in_process, dispose_in_process, recreate_watched)
    return pool


def _own_pool(engine: Engine, pool: Pool) -> Pool:
    """Return the engine's pool of this process, which replaces one from before the fork."""
    leave_inherited_connections()
    with _lock:
        if engine.pool is pool:
            keep_for_ever(pool)
            engine_pool(engine, pool.recreate())
        return engine.pool


# If Python forks, this happens at once. Only the closing of idle connections relies on it: uWSGI runs no such hook.
os.register_at_fork(before=_close_idle, after_in_parent=_forked, after_in_child=_forked_child)
# At its end, a process that has used nothing must not close its parent's connections either.
atexit.register(leave_inherited_connections)
