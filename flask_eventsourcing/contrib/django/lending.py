"""Django's connections, lent to a SQLAlchemy engine that neither begins, commits nor closes them.

Every statement runs on a cursor of Django's own wrappers, and so Django logs, counts and wraps it, and refuses it in a
broken transaction, in an event loop and where a test case forbids it. SQLAlchemy and the dialects get the driver's
errors, after Django has noted each of them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from django.core import mail
from django.db import connections
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from ..._patches import django_pool
from ...exceptions import ConfigurationError, InheritedDatabaseError
from ...lifecycle import keep_for_ever
from ...persistence.dialects import DIALECTS
from ...persistence.dialects.event_tables import Known
from .lent_connections import LentConnection, OwnConnection, ThreadConnection, driver_errors, place_of_tables
from .record_fields import zone_of

_initialized: weakref.WeakSet[Engine] = weakref.WeakSet()


INHERITED = (
    "The connection of DATABASES[{alias!r}] was made before this process was forked{why}: call "
    "django.db.connections.close_all() before the fork, at the end of the code that used the connection."
)
_opened_in: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""The processes in which Django's connections were made."""
_pools: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()
"""The process in which each of Django's pools was made, and the dictionary in which Django keeps it."""
_begun_in = os.getpid()


def note_process(*, connection: Any, **_: Any) -> None:
    """Note in which process a connection was made, and the pool it came from: Django's ``connection_created``."""
    _opened_in[connection] = os.getpid()
    pools = getattr(connection, "_connection_pools", {})
    if connection.alias not in pools or not connection.settings_dict["OPTIONS"].get("pool"):
        return
    made_in, _ = _pools.setdefault(pools[connection.alias], (os.getpid(), pools))
    if made_in != os.getpid():
        # The connection is the parent's: a fork outside of Python calls no function that would replace the pool.
        _leave_pools()
        keep_for_ever(connection.connection)
        connection.connection = None
        connection.connect()


def close_before_fork() -> None:
    """Close idle connections to databases that must not be open when a process forks: this thread's, and ours."""
    for wrapper in connections.all(initialized_only=True):
        is_idle = wrapper.connection is not None and wrapper.autocommit and not wrapper.in_atomic_block
        if is_idle and not (_survives_forks(wrapper.vendor) or is_shared(wrapper)):
            wrapper.close()
    for engine in list(_initialized):
        if not _survives_forks(engine.dialect.name):
            engine.dispose()


def leave_after_fork() -> None:
    """Leave this thread's connections, and all pools, to the parent of a process that was forked."""
    _leave_pools()
    for wrapper in connections.all(initialized_only=True):
        with suppress(InheritedDatabaseError):
            own_connection(wrapper.alias)


def _leave_pools() -> None:
    """Make Django use new pools in this process."""
    for pool in filter(None, (reference() for reference in _pools.keyrefs())):
        pid, pools = _pools[pool]
        if pid != os.getpid():
            keep_for_ever(pool)
            del _pools[pool]
            django_pool(pools, pool)


def _survives_forks(vendor: str) -> bool:
    known = DIALECTS.get(vendor)
    return known is None or known.survives_forks


def own_connection(alias: str) -> Any:
    """Return Django's connection of this thread. One that was inherited at a fork is left to the parent.

    :raises InheritedDatabaseError: when it is in a transaction, or its database cannot be opened again.
    """
    wrapper: Any = connections[alias]
    if os.getpid() == _begun_in or is_in_memory(wrapper):
        # Each process has its own copy of a database in memory.
        return wrapper
    _leave_pools()
    if not _survives_forks(wrapper.vendor) and _is_inherited(wrapper.settings_dict["NAME"]):
        raise InheritedDatabaseError(INHERITED.format(alias=alias, why=", and its locks do not survive a fork"))
    if wrapper.connection is None or _opened_in.get(wrapper, os.getpid()) == os.getpid():
        return wrapper
    if wrapper.in_atomic_block:
        raise InheritedDatabaseError(INHERITED.format(alias=alias, why=", inside an atomic() block"))
    keep_for_ever(wrapper)
    del connections[alias]
    return connections[alias]


def _is_inherited(name: Any) -> bool:
    """Whether a connection to a database, of any thread, was made before this process was forked."""
    known = [reference() for reference in _opened_in.keyrefs()]
    return any(
        each.connection is not None and _opened_in[each] != os.getpid() and str(each.settings_dict["NAME"]) == str(name)
        for each in filter(None, known)
    )


class LentDialect:
    """The part of a SQLAlchemy dialect that leaves transactions to Django, whose connection it uses."""

    supports_statement_cache = True

    def do_begin(self, dbapi_connection: Any) -> None:
        """Begin a transaction, unless the connection is a thread's."""
        dbapi_connection.begin()

    def do_commit(self, dbapi_connection: Any) -> None:
        """Commit, unless the connection is a thread's."""
        dbapi_connection.commit()

    def do_rollback(self, dbapi_connection: Any) -> None:
        """Roll back, unless the connection is a thread's."""
        dbapi_connection.rollback()

    def do_close(self, dbapi_connection: Any) -> None:
        """Close the connection, unless it is a thread's."""
        dbapi_connection.close()

    do_terminate = do_close

    def do_ping(self, dbapi_connection: Any) -> bool:
        """Whether a connection that is not a thread's can be used."""
        found: bool = dbapi_connection.is_usable()
        return found

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        """Set the isolation level, unless the connection is a thread's, which has Django's."""
        dbapi_connection.isolate(level)

    def reset_isolation_level(self, dbapi_connection: Any) -> None:
        """Go back to transactions."""
        dbapi_connection.isolate(None)

    def get_default_isolation_level(self, dbapi_connection: Any) -> Any:
        """Refuse: Django has set the level, and none is ever set again."""
        raise NotImplementedError

    def detect_autocommit_setting(self, dbapi_connection: Any) -> bool:
        """Whether SQLAlchemy must not roll back."""
        return False


def _converted(known: Any) -> dict[Any, Any]:
    """Return the types of a dialect's columns, but for times, which Django may have the driver convert."""
    kinds: dict[Any, Any] = dict(known.colspecs)
    own: Any = kinds.get(sa.DateTime, sa.DateTime)

    class Converted(own):
        def result_processor(self, dialect: Any, coltype: Any) -> Any:
            read: Any = super().result_processor(dialect, coltype)

            def convert(value: Any) -> Any:
                if not isinstance(value, datetime):
                    return value if read is None else read(value)
                if self.timezone and value.tzinfo is None:
                    value = value.replace(tzinfo=zone_of(connections[dialect.alias]))
                return value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo is not None else value

            return convert

    kinds[sa.DateTime] = Converted
    return kinds


def drivername(wrapper: Any) -> str:
    """Return SQLAlchemy's name of the database and the driver of a connection of Django's.

    :raises ConfigurationError: for a database, or a driver, that is not supported.
    """
    known = DIALECTS.get(wrapper.vendor)
    for driver in () if known is None else known.drivers:
        found = f"{wrapper.vendor}+{driver}"
        with suppress(ImportError):
            if sa.make_url(f"{found}://").get_dialect().import_dbapi() is wrapper.Database:
                return found
    raise ConfigurationError(
        f"DATABASES[{wrapper.alias!r}] is a database of {wrapper.vendor!r} with the driver "
        f"{wrapper.Database.__name__!r}, where the order of events is not known to be safe: use one of "
        f"{', '.join(sorted(DIALECTS))} for them."
    )


def address(wrapper: Any) -> sa.URL:
    """Return a text that identifies a database, without user and password."""
    settings = wrapper.settings_dict
    host, port, name = (str(settings.get(key) or "") or None for key in ("HOST", "PORT", "NAME"))
    # Each of several hosts may have its own port.
    query = {"port": port} if port and not port.isdigit() else {}
    number = int(port) if port and not query else None
    return sa.URL.create(drivername(wrapper), host=host, port=number, database=name, query=query)


def make_engine(alias: str) -> Engine:
    """Return an engine on the connections of one of Django's databases, without connecting.

    :raises ConfigurationError: for a database that is not supported.
    """
    wrapper: Any = connections[alias]
    url = address(wrapper)
    known: Any = url.get_dialect()
    body: dict[str, Any] = {"supports_statement_cache": True, "colspecs": _converted(known)}
    dialect: Any = type(f"Lent{known.__name__}", (LentDialect, known), body)(dbapi=wrapper.Database)
    # The user's fields ask the connection for their types.
    dialect.alias = alias
    # SQLAlchemy would register this type on the connection.
    dialect.use_native_hstore = False

    # SQLAlchemy's own function would set up each connection, but Django has done that.
    # These connections outlive requests, whatever CONN_MAX_AGE is, so each is checked before its use.
    pool = QueuePool(lambda: OwnConnection(connections[alias]), dialect=dialect, pre_ping=True)
    return LentEngine(alias, pool, dialect, url)


def _lend(engine: Engine, wrapper: Any) -> Connection:
    """Return a SQLAlchemy connection on a connection of Django's."""
    pool = NullPool(lambda: LentConnection(wrapper), reset_on_return=None, dialect=engine.dialect)
    connection = ThreadConnection(engine, pool.connect(), wrapper)
    initialize(engine, connection)
    return connection


def initialize(engine: Engine, connection: Connection) -> None:
    """Let a dialect read the server's settings, as SQLAlchemy does for its first connection."""
    if engine not in _initialized:
        engine.dialect.initialize(connection)
        # The next user of the connection may rely on autocommit.
        connection.rollback()
        _initialized.add(engine)


class LentEngine(Engine):
    """An engine with connections of its own, with Django's settings, for work outside a thread's transaction.

    In a test case's transaction, or with a database in memory, no other connection would see the thread's rows, so the
    thread's own connection is used.
    """

    def __init__(self, alias: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._alias = alias
        sa.event.listen(self, "checkin", _close_in_tests)

    def connect(self) -> Connection:
        """Return a connection."""
        wrapper: Any = own_connection(self._alias)
        if is_shared(wrapper):
            with driver_errors():
                wrapper.ensure_connection()
            return _lend(self, wrapper)
        found = address(wrapper)
        if found != self.url:
            # Django has replaced the database in the settings by the database of its tests.
            self.url = found
            self.dispose()
        connection = super().connect()
        own: Any = connection.connection.dbapi_connection
        own.follow(*place_of_tables(wrapper))
        initialize(self, connection)
        return connection


def _close_in_tests(_: Any, record: ConnectionPoolEntry) -> None:
    # A server may refuse to drop the tests' database while a pool keeps connections to it.
    if hasattr(mail, "outbox"):
        record.invalidate()


def is_shared(wrapper: Any) -> bool:
    """Whether no other connection sees the rows of this one."""
    blocks = wrapper.atomic_blocks
    return bool(blocks and blocks[0]._from_testcase) or is_in_memory(wrapper)


def is_in_memory(wrapper: Any) -> bool:
    """Whether a database is in the memory of this process."""
    found = getattr(wrapper, "is_in_memory_db", None)
    return found is not None and bool(found())


def refresh(wrapper: Any) -> None:
    """Close a connection of Django's that is lost, as Django does between two requests."""
    if wrapper.connection is not None and wrapper.errors_occurred and not wrapper.in_atomic_block:
        if wrapper.is_usable():
            wrapper.errors_occurred = False
        else:
            wrapper.close()


@contextmanager
def sqlalchemy_errors(engine: Engine) -> Iterator[None]:
    """Raise SQLAlchemy's error instead of Django's for an error of the driver."""
    found: BaseException | None = None
    try:
        with driver_errors():
            yield
    except engine.dialect.dbapi.Error as error:  # type: ignore[union-attr]
        found = error
    if found is not None:
        dialect = engine.dialect
        is_lost = dialect.is_disconnect(found, None, None)  # type: ignore[arg-type]
        raise sa.exc.DBAPIError.instance(
            None,
            None,
            found,
            dialect.dbapi.Error,  # type: ignore[union-attr]
            connection_invalidated=is_lost,
            dialect=dialect,
        ) from found


class Borrowed:
    """A connection of Django's, and SQLAlchemy's connection on the same driver connection.

    :param wrapper: ``django.db.connections[alias]``.
    """

    def __init__(self, engine: Engine, wrapper: Any) -> None:
        self._engine = engine
        self.find = weakref.ref(wrapper)
        """Returns the connection of Django's."""
        self._driver: Any = None
        self.known: Connection | None = None
        """SQLAlchemy's connection, once it was asked for."""
        self.ends: object = None
        """Follows the ends of the connection's transactions."""

    def connection(self) -> Connection:
        """Return SQLAlchemy's connection; Django connects if necessary."""
        wrapper: Any = self.find()
        known, driver = self.known, wrapper.connection
        if known is None or driver is None or driver is not self._driver or known.invalidated:
            known = self._lent(wrapper)
        return known

    def _lent(self, wrapper: Any) -> Connection:
        if self.known is not None and self.known.invalidated:
            refresh(wrapper)
        with driver_errors():
            wrapper.ensure_connection()
        if self.known is None or self._driver is not wrapper.connection or self.known.invalidated:
            self.known = _lend(self._engine, wrapper)
            self._driver = wrapper.connection
        return self.known

    def end(self) -> None:
        """Tell SQLAlchemy, and the listeners on its connection, that the transaction has ended."""
        known = self.known
        if known is None or known.invalidated:
            return
        if known.in_transaction():
            known.rollback()
        Known.of(known).ended()
