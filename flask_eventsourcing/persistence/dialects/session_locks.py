"""Server locks that belong to a connection. A process has one connection for all of them."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DisconnectionError

from .calls import in_autocommit
from .locks import NAMESPACE, Lease, RunnerLock


class LostLockError(DisconnectionError):
    """The connection that had the locks of a process was lost."""


CHECKED_FOR = 0.5
"""Seconds for which a connection counts as alive after it has answered."""


class LockConnection:
    """The connection with all locks that a process holds in one database, out of the pool.

    If it is lost, all locks are lost. If a runner then commits before it knows, and another has claimed the projection,
    the commit is refused.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._mutex = threading.Lock()
        self._connection: Connection | None = None
        self._users: set[SessionLock] = set()
        self._owners: dict[str, SessionLock] = {}
        self._checked = 0.0

    def acquire(self, lock: SessionLock) -> bool:
        """Take a lock if it is free, in this process too. A lost connection is replaced."""
        with self._mutex:
            self._users.add(lock)
            owner = self._owners.get(lock.name)
            if owner is lock:
                self._ask("SELECT 1")
            elif owner is None and self._ask(lock.take, lock):
                self._owners[lock.name] = lock
            return self._owners.get(lock.name) is lock

    def check(self, lock: SessionLock) -> None:
        """Check that the connection is alive. This also keeps it from being closed because it is idle.

        :raises LostLockError: when the lock was lost.
        """
        with self._mutex:
            if self._owners.get(lock.name) is not lock:
                raise LostLockError("The connection with the locks of this process was lost.")
            if time.monotonic() > self._checked + CHECKED_FOR:
                self._ask("SELECT 1")

    def release(self, lock: SessionLock) -> None:
        """Give a lock back, and close the connection after the last one."""
        with self._mutex:
            try:
                if self._owners.get(lock.name) is lock:
                    del self._owners[lock.name]
                    self._ask(lock.give, lock)
            except sa.exc.SQLAlchemyError:
                # The connection is lost, and the locks with it.
                pass
            finally:
                self._users.discard(lock)
                if not self._users:
                    self._drop()

    def leave(self) -> None:
        """Close the connection, and lose all locks."""
        with self._mutex:
            self._drop()

    def _ask(self, statement: str, lock: SessionLock | None = None) -> Any:
        if self._connection is None:
            connection = in_autocommit(self.engine.connect())
            # The connection leaves the pool, which is for short uses.
            connection.detach()
            self._connection = connection
            if lock is not None and lock.opening:
                self._ask(lock.opening)
        try:
            answer = self._connection.execute(sa.text(statement), lock.parameters() if lock is not None else {})
            self._checked = time.monotonic()
            return answer.scalar()
        except sa.exc.SQLAlchemyError:
            self._drop()
            raise

    def _drop(self) -> None:
        self._owners.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


_lock_connections: weakref.WeakValueDictionary[tuple[int, int], LockConnection] = weakref.WeakValueDictionary()


def _lock_connection(engine: Engine) -> LockConnection:
    key = (os.getpid(), id(engine))
    found = _lock_connections.get(key)
    # It keeps the engine alive, so that no other engine gets its id.
    return found or _lock_connections.setdefault(key, LockConnection(engine))


class SessionLock(RunnerLock):
    """A lock of the server that belongs to a connection, which a process has for all of them."""

    opening: str = ""
    """What a new connection is told, so that the server soon notices when the machine at its other end is gone."""
    take = ""
    give = ""
    look = ""

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__(engine, name)
        self._connection = _lock_connection(engine)

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return what the statements need to name the lock."""

    def acquire(self) -> bool:
        """Take the lock if it is free."""
        return self._connection.acquire(self)

    def check(self) -> None:
        """Check that the connection with the lock is alive."""
        self._connection.check(self)

    def release(self) -> None:
        """Give the lock back."""
        self._connection.release(self)

    def leave(self) -> None:
        """Give up the connection with all locks."""
        self._connection.leave()

    def is_held(self, connection: Connection, leased_until: datetime | None) -> bool:
        """Ask the server whether the lock is taken."""
        return bool(connection.execute(sa.text(self.look), self.parameters()).scalar())


class NamedLock(SessionLock):
    """``GET_LOCK``, whose names are the whole server's and have at most 64 characters; in a cluster, a lease.

    :param lease: what it is in a cluster.
    :param is_node: whether there are other servers that take writes, which do not know this one's locks.
    """

    take = "SELECT GET_LOCK(:name, 0) = 1"
    give = "SELECT RELEASE_LOCK(:name)"
    look = "SELECT IS_USED_LOCK(:name) IS NOT NULL"

    def __init__(self, engine: Engine, lease: Lease, is_node: Callable[[Connection | None], bool]) -> None:
        super().__init__(engine, lease.name)
        self._lease, self._is_node = lease, is_node

    @property
    def leased(self) -> bool:
        """Whether it is a node of a cluster."""
        return self._is_node(None)

    def acquire(self) -> bool:
        """Take the lock if it is free. A lease is taken with the claim."""
        return self.leased or super().acquire()

    def check(self) -> None:
        """Check that the connection with the lock is alive."""
        if not self.leased:
            super().check()

    def is_held(self, connection: Connection, leased_until: datetime | None) -> bool:
        """Ask the server whether the lock is taken, or look at the lease."""
        if self._is_node(connection):
            return self._lease.is_held(connection, leased_until)
        return super().is_held(connection, leased_until)

    def parameters(self) -> dict[str, Any]:
        """The name is a hash that has the database in it."""
        unique = f"{self.engine.url.database}/{self.name}"
        return {"name": f"{NAMESPACE}:{hashlib.sha1(unique.encode(), usedforsecurity=False).hexdigest()}"}


KEEPALIVE = {"keepalives_idle": 2, "keepalives_interval": 1, "keepalives_count": 3, "user_timeout": 5000}
"""After how many seconds without news the server asks whether a client is there, how often; and milliseconds."""
KEY = "hashtext(:name || coalesce(to_regclass(:table)::oid::text, ''))"
"""Of a lock: a schema of the search path may have a table of the same name, with a projection of the same name."""


class AdvisoryLock(SessionLock):
    """An advisory lock of a connection, in the space of two 32-bit keys."""

    # The server's default is two hours. It has no effect on a connection that is none of TCP.
    opening: str = "SELECT " + ", ".join(
        f"set_config('tcp_{name}', '{value}', false)" for name, value in KEEPALIVE.items()
    )
    take: str = f"SELECT pg_try_advisory_lock(hashtext(:namespace), {KEY})"
    give: str = f"SELECT pg_advisory_unlock(hashtext(:namespace), {KEY})"
    look: str = (
        "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
        "AND classid::bigint = hashtext(:namespace)::bigint & 4294967295 "
        f"AND objid::bigint = {KEY}::bigint & 4294967295)"
    )

    def parameters(self) -> dict[str, Any]:
        """The two keys are hashes, made by the server."""
        schema, _, table = self.name.partition("/")[0].rpartition(".")
        place = f'"{schema}"."{table}"' if schema else f'"{table}"'
        return {"namespace": NAMESPACE, "name": self.name, "table": place}
