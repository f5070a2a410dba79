"""SQLite's driver connections, which queue before they write: to a file, or one shared connection in memory.

The owner of the queue is the driver's connection for a file, and SQLAlchemy's where all share the driver's one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, Literal

from eventsourcing.persistence import OperationalError
from sqlalchemy.engine import Connection

from ...exceptions import AbortedTransactionError, WriteTimeoutError
from .locks import WriteQueue, write_queue_of
from .sqlite_files import closing_threads

PRIMARY_CODE = 0xFF
"""The bits of an extended code of SQLite's that say what kind it is."""
LOOK_FOR_LOCK = 0.002
"""Seconds between the looks for the lock to write, while another process has it."""

Kind = Literal["write", "read", "begin", "lock", "other"]
"""What a statement does, as :func:`~.sqlite.kind_of` says."""


class QueuedConnection(sqlite3.Connection):
    """A driver connection to a file: it owns the queue from the first write to the end of its transaction."""

    queue: WriteQueue | None = None
    """None before it was configured."""
    pid: int = 0
    timeout: float = 0.0
    busy_timeout: int | None = None
    """Milliseconds that SQLite waits for other processes; None before the first transaction."""
    began: bool = False
    """Whether a write transaction was begun that was neither committed nor rolled back by the client."""
    deferred: bool = False
    """Whether the transaction began with a BEGIN that a listener of the user's has told, and has not written."""
    aborted: bool = False
    """Whether SQLite has rolled such a transaction back by itself, as it does when the disk is full."""
    calls: AbstractContextManager[Any] = nullcontext()
    """Held during each call of SQLite's functions."""

    # The name of a module is None when the interpreter ends, and connections may be closed as late as that.
    _getpid, _get_ident = staticmethod(os.getpid), staticmethod(threading.get_ident)
    _closing_threads = closing_threads

    def configure(self, name: str, timeout: float) -> None:
        """Join the queue of a database."""
        self.queue = write_queue_of(name)
        self.pid = os.getpid()
        self.timeout = timeout

    def own_queue(self) -> WriteQueue | None:
        """Return the queue of this process; only a copy of an in-memory database is ever used after a fork."""
        if self.queue is not None and self.pid != self._getpid():
            self.queue = write_queue_of(self.queue.name)
            self.pid = os.getpid()
            self._leave_parents()
        return self.queue

    def _leave_parents(self) -> None:
        return

    def before(self, connection: Connection, kind: Kind) -> None:
        """Before a statement: acquire the queue and begin a write transaction if it writes."""
        if kind == "begin":
            self.deferred = not self.in_transaction
        if kind not in ("write", "lock"):
            return
        if self.aborted:
            # A new transaction would be committed without what was lost.
            raise AbortedTransactionError
        queue = self.own_queue()
        if queue is None or (self.in_transaction and not self.deferred):
            return
        if kind == "lock" or self.in_transaction:
            queue.acquire(self, self.timeout)
            if self.in_transaction:
                self._begin_again()
        elif self.isolation_level is not None:
            queue.acquire(self, self.timeout)
            self._begin(self)

    def _begin_again(self) -> None:
        """Begin with the lock to write in place of a BEGIN that was told, after which nothing was written yet.

        SQLite refuses the lock to a transaction that has read, if another has committed since.
        """
        self.execute("COMMIT").close()
        self.deferred = False
        self._begin(self)

    def _begin(self, owner: object) -> None:
        try:
            self._begin_immediately()
            self.began = True
        except sqlite3.OperationalError as error:
            self._release(owner)
            if error.sqlite_errorcode & PRIMARY_CODE != sqlite3.SQLITE_BUSY:
                raise OperationalError(str(error)) from error
            raise WriteTimeoutError(
                f"Could not begin a write transaction within {self.timeout:g} s ({error}): another process holds the "
                "database. Keep transactions short, or raise EVENTSOURCING_LOCK_TIMEOUT."
            ) from error

    def _begin_immediately(self) -> None:
        """Wait for other processes with short pauses.

        SQLite's own come to 0.1 s, within which another process can end a transaction and begin the next one.
        """
        until = time.monotonic() + self.timeout
        if self.busy_timeout is None:
            (self.busy_timeout,) = self.execute("PRAGMA busy_timeout").fetchone()
        self.execute("PRAGMA busy_timeout = 0").close()
        try:
            while True:
                try:
                    self.execute("BEGIN IMMEDIATE").close()
                    return
                except sqlite3.OperationalError as error:
                    is_busy = error.sqlite_errorcode & PRIMARY_CODE == sqlite3.SQLITE_BUSY
                    if not is_busy or time.monotonic() > until:
                        raise
                time.sleep(LOOK_FOR_LOCK)
        finally:
            self.execute(f"PRAGMA busy_timeout = {self.busy_timeout}").close()

    def after(self, connection: Connection) -> None:
        """After a statement: release the queue unless a transaction is open."""
        if not self.in_transaction:
            self._release(self)

    def failed(self, connection: Connection) -> None:
        """After a statement that failed: note whether that has ended the transaction."""
        if self.began and not self.in_transaction:
            self.aborted = True
        self.after(connection)

    def has_aborted(self, connection: Connection) -> bool:
        """Whether SQLite has ended this connection's transaction by itself."""
        return self.aborted

    def is_in_use_by(self, connection: Connection) -> bool:
        """Whether the transaction is this connection's, and was not ended by SQLite."""
        return not self.aborted

    def _release(self, owner: object) -> None:
        queue = self.own_queue()
        if queue is not None:
            queue.release(owner)

    def _ending(self, how: str) -> object | None:
        """Return the owner whose transaction the caller ends, or None when it has no transaction of its own."""
        return self

    def _forget(self) -> None:
        self.began = False
        self.aborted = False

    def _ended(self, owner: object) -> None:
        self._forget()
        self.deferred = False
        if not self.in_transaction:
            self._release(owner)

    def commit(self) -> None:
        """Commit, and let the next one in."""
        owner = self._ending("commit")
        if owner is not None:
            try:
                with self.calls:
                    super().commit()
            except sqlite3.IntegrityError:
                # SQLite leaves the transaction open, and SQLAlchemy takes it for ended: there would be no end.
                with self.calls:
                    super().rollback()
                self._ended(owner)
                raise
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
                raise WriteTimeoutError(
                    f"Could not commit within {self.timeout:g} s ({error}): another program reads the file, which is "
                    "not in the journal mode WAL. Keep EVENTSOURCING_SQLITE_WAL on, end that transaction, and look in "
                    "the log why the file could not be switched."
                ) from error
            self._ended(owner)

    def rollback(self) -> None:
        """Roll back, and let the next one in."""
        owner = self._ending("rollback")
        if owner is not None:
            with self.calls:
                super().rollback()
            self._ended(owner)

    def close(self) -> None:
        """Close, and let the next one in."""
        me = self._get_ident()
        self._closing_threads[me] = None
        try:
            super().close()
        finally:
            self._closing_threads.pop(me, None)
        if self.queue is not None and self.pid == self._getpid():
            self.queue.release(self)


_level: Any = vars(sqlite3.Connection)["isolation_level"]
_announced: ContextVar[tuple[str, weakref.ref[Connection]] | None] = ContextVar("announced", default=None)


def announce(how: str) -> Callable[[Connection], None]:
    """Return the listener for an engine's event "commit" or "rollback", which tells the driver connection whose it is.

    SQLAlchemy sends it just before it calls the driver, in the same context.
    """

    def listener(connection: Connection) -> None:
        _announced.set((how, weakref.ref(connection)))

    return listener


def _alone(call: Any) -> Any:
    @wraps(call)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.connection.calls:
            return call(self, *args, **kwargs)

    return method


class _SharedCursor(sqlite3.Cursor):
    """A cursor of the connection that all threads share, of which one at a time calls SQLite.

    SQLite keeps the code of the last error for each connection, and the driver reads it after the call: what another
    thread calls in between would change the error, or have none raised at all.
    """

    execute = _alone(sqlite3.Cursor.execute)
    executemany = _alone(sqlite3.Cursor.executemany)
    executescript = _alone(sqlite3.Cursor.executescript)
    __next__ = _alone(sqlite3.Cursor.__next__)
    fetchone = _alone(sqlite3.Cursor.fetchone)
    fetchmany = _alone(sqlite3.Cursor.fetchmany)
    fetchall = _alone(sqlite3.Cursor.fetchall)
    close = _alone(sqlite3.Cursor.close)


class SharedConnection(QueuedConnection):
    """The one driver connection of an in-memory database; SQLAlchemy's connections own the queue, one at a time.

    Reads wait too, as they would see what is not committed; but those of the thread that would wait for itself go
    through. The pool rolls back each connection that is returned to it, without an event: that, and the end of a
    connection that only reads, must not end the transaction of the owner.

    What is written without SQLAlchemy, with a cursor of the driver, cannot be told apart from what others do with it.
    It joins what is open, and if nothing is, the first connection that ends a transaction ends this one.
    """

    level: str | None = ""
    """The isolation level of connections that have no option of their own."""
    owner: weakref.ref[Connection] | None = None

    def configure(self, name: str, timeout: float) -> None:
        """Join the queue of a database."""
        self.level = self.isolation_level
        self.calls: threading.RLock = threading.RLock()
        super().configure(name, timeout)

    def cursor(self, factory: Any = _SharedCursor) -> Any:
        """Return a cursor whose calls wait for those of other threads."""
        return super().cursor(factory)

    @property  # type: ignore[override]
    def isolation_level(self) -> str | None:
        """The level of the owner, which is set when the queue is acquired.

        SQLAlchemy sets it for a connection of its own, at any time, and the driver commits when it is set to None.
        """
        level: str | None = _level.__get__(self)
        return level

    @isolation_level.setter
    def isolation_level(self, level: str | None) -> None:
        if self.queue is None:
            _level.__set__(self, level)

    def _leave_parents(self) -> None:
        # The child must not commit what the parent had not. The parent's threads, which may have the lock, are gone.
        self.calls = threading.RLock()
        sqlite3.Connection.rollback(self)
        self._forget()

    def _end_left(self) -> None:
        """Roll back what an owner has begun that is gone without having ended it."""
        if self.began:
            with self.calls:
                sqlite3.Connection.rollback(self)
            self._forget()

    def before(self, connection: Connection, kind: Kind) -> None:
        """Before a statement: acquire the queue, and begin a write transaction if it writes."""
        queue = self.own_queue()
        if queue is None:
            return
        continues = queue.is_owner(connection)
        if not queue.acquire(connection, self.timeout, reading=kind == "read"):
            return
        if not continues:
            self._begin_ownership(connection)
        if kind != "write":
            return
        if self.aborted:
            raise AbortedTransactionError
        if not self.in_transaction and self.isolation_level is not None:
            self._begin(connection)

    def _begin_ownership(self, connection: Connection) -> None:
        self.owner = weakref.ref(connection)
        self._end_left()
        if not self.in_transaction:
            option = connection.get_execution_options().get("isolation_level")
            self._set_level(None if option == "AUTOCOMMIT" else self.level if option is None else self.level or "")

    def _set_level(self, level: str | None) -> None:
        if level != self.isolation_level:
            _level.__set__(self, level)

    def _release(self, owner: object) -> None:
        if self._is_owner(owner):
            # Users of the driver find it as it was.
            self._set_level(self.level)
            super()._release(owner)

    def after(self, connection: Connection) -> None:
        """After a statement: release the queue unless a transaction is open, or was aborted and not ended."""
        if not self.in_transaction and not self.aborted:
            self._release(connection)

    def failed(self, connection: Connection) -> None:
        """After a statement that failed, perhaps before it had acquired the queue."""
        if self._is_owner(connection):
            super().failed(connection)

    def has_aborted(self, connection: Connection) -> bool:
        """Whether SQLite has ended this connection's transaction by itself."""
        return self.aborted and self._is_owner(connection)

    def is_in_use_by(self, connection: Connection) -> bool:
        """Whether the transaction is this connection's, and was not ended by SQLite."""
        return not self.aborted and self._is_owner(connection)

    def _is_owner(self, owner: object) -> bool:
        queue = self.own_queue()
        return queue is not None and queue.is_owner(owner)

    def _ending(self, how: str) -> object | None:
        queue = self.own_queue()
        if queue is None:
            return self
        announced, owner = _announced.get(), None
        if announced is not None and announced[0] == how:
            _announced.set(None)
            owner = announced[1]()
        if owner is not None and queue.is_owner(owner):
            return owner
        if not self.in_transaction:
            return None
        found = owner or self
        if owner is None and how == "commit":
            # Called by user code on the driver. It must not report as committed what has joined another's transaction.
            queue.acquire(self, 0)
        elif not queue.try_acquire(found, blocking=owner is not None):
            # The pool's rollback may come from the garbage collector, and waits for nothing.
            return None
        self._end_left()
        return found

    def close(self) -> None:
        """Close, which ends the transaction that is open."""
        owner = self.owner() if self.owner is not None else None
        super().close()
        if owner is not None and self.queue is not None and self.pid == self._getpid():
            self.queue.release(owner)
