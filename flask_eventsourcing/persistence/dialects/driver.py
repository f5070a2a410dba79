"""The way to the driver and back: raw rows, events made of them without their constructors, and the library's errors.

``Connection.exec_driver_sql`` is taken instead of the shortest way when someone watches: when statements are logged, or
an engine has listeners, as those of Flask-SQLAlchemy's recording of queries or of an instrumentation.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import TracebackType
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from eventsourcing import persistence
from eventsourcing.persistence import Notification, StoredEvent
from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine

from ...exceptions import ConstraintError, IdentifierTypeError, MissingTableError

_logger = logging.getLogger("sqlalchemy.engine.Engine")
_new = object.__new__

POSITION = "notification_id"
EVENT_COLUMNS = ("originator_id", "originator_version", "topic", "state")
"""The columns of an event beside its position, as the library's ``StoredEvent`` names them; every statement is made
from these. The first is the aggregate's id."""
VERSION_KEY = EVENT_COLUMNS[:2]
VERSION = VERSION_KEY[1]
"""The columns that tell the events of an application from each other."""
OF_AGGREGATE = ", ".join(EVENT_COLUMNS[1:])
"""Those that differ among the events of an aggregate."""

Processor = Callable[[Any], Any]

# The classes of PEP 249, which SQLAlchemy, every driver and the library have; each stands before those it derives from.
_PEP_249 = (
    "IntegrityError",
    "DataError",
    "OperationalError",
    "InternalError",
    "ProgrammingError",
    "NotSupportedError",
    "DatabaseError",
    "InterfaceError",
)


_VALUES = attrgetter(*EVENT_COLUMNS)


@dataclass(frozen=True)
class EventTable:
    """A table of events or snapshots as the statements need it."""

    table: sa.Table
    name: str
    """Quoted, and qualified by the schema if there is one."""
    id_class: type[UUID] | type[str]
    binds: tuple[tuple[int, Processor], ...]
    """What makes the driver's value of a column's, by the number of the column; none where nothing is to be done."""
    decode_id: Processor
    counter: str | None = None
    """The quoted name of the tracking table, where a database counts positions in it."""
    snapshots: str | None = None
    """The quoted name of the table whose versions may be followed too."""
    statements: dict[str, str] = field(default_factory=dict, compare=False)
    """Statements by their use, filled by the dialect as they are needed."""

    def row(self, event: StoredEvent) -> tuple[Any, ...]:
        """Return an event's values, in the order of ``EVENT_COLUMNS``, as the driver takes them."""
        values: tuple[Any, ...] = _VALUES(event)
        if not isinstance(values[0], self.id_class):
            raise self.wrong_id(values[0])
        for number, bind in self.binds:
            values = (*values[:number], bind(values[number]), *values[number + 1 :])
        return values

    def encode_id(self, originator_id: UUID | str) -> Any:
        """Return an aggregate's id as the driver takes it.

        :raises IdentifierTypeError: for a text where ids are UUIDs, and the reverse.
        """
        if not isinstance(originator_id, self.id_class):
            raise self.wrong_id(originator_id)
        for number, bind in self.binds:
            if number == 0:
                return bind(originator_id)
        return originator_id

    def wrong_id(self, found: object) -> IdentifierTypeError:
        """Return the error that refuses an id of another type than those of the table."""
        remedy = "pass str(…), or set EVENTSOURCING_ORIGINATOR_ID_TYPE to 'uuid'"
        if self.id_class is UUID:
            remedy = "pass uuid.UUID(…), and declare <uuid:id> in a route that has it in its address"
        expected = "UUIDs" if self.id_class is UUID else "texts"
        return IdentifierTypeError(f"The ids in {self.name} are {expected}; found {type(found).__name__}: {remedy}.")

    def follows(self, originator_id: str, version: str, lock: str = "", *, begins: bool, snapshots: bool) -> str:
        """Return the condition under which an event leaves no gap in its stream, with the marks of its id and version.

        Where the event itself is there already, its key decides.

        :param lock: what makes the reads locking ones.
        :param begins: whether its version is one that a stream can begin with.
        :param snapshots: whether the table of snapshots is there.
        """

        def exists(table: str | None, condition: str = "") -> str:
            return f"EXISTS (SELECT 1 FROM {table} AS p WHERE p.originator_id = {originator_id}{condition}{lock})"

        found = exists(self.name, f" AND p.originator_version BETWEEN {version} - 1 AND {version}")
        none = f"NOT {exists(self.name)}"
        if snapshots:
            found += f" OR {exists(self.snapshots, f' AND p.originator_version = {version} - 1')}"
            none += f" AND NOT {exists(self.snapshots)}"
        return f"{found} OR {none}" if begins else found

    @staticmethod
    def follows_values(originator_id: Any, version: int, *, begins: bool, snapshots: bool) -> tuple[Any, ...]:
        """Return the values of that condition, where the marks are those of parameters."""
        found: tuple[Any, ...] = (originator_id, version, version)
        if snapshots:
            found = (*found, originator_id, version)
        return (*found, *([originator_id] * (1 + snapshots))) if begins else found

    def id_decoder(self, rows: Sequence[Sequence[Any]], number: int) -> Processor | None:
        """Return what makes the id of a driver's value, or None where the driver has made it already."""
        return None if not rows or type(rows[0][number]) is self.id_class else self.decode_id


class ConflictError(persistence.IntegrityError):
    """Another writer was first: the same may succeed when it is run again as a whole."""


LATEST_FIRST_VERSION = 1
"""A stream begins with this version or the one before it: the library's own is 1, its contract has both."""


def begins(event: StoredEvent) -> bool:
    """Whether an event's version is one that a stream can begin with."""
    return event.originator_version <= LATEST_FIRST_VERSION


def heads(events: Sequence[StoredEvent]) -> Sequence[StoredEvent]:
    """Return those events of an append whose predecessor is not earlier in it.

    :raises IntegrityError: for an event that would begin a stream behind another one.
    """
    if len(events) == 1:
        return events
    found: list[StoredEvent] = []
    spans: dict[UUID | str, tuple[int, int]] = {}
    for event in events:
        version = event.originator_version
        span = spans.get(event.originator_id)
        if span is not None and span[0] <= version <= span[1] + 1:
            spans[event.originator_id] = (span[0], max(version, span[1]))
            continue
        if span is not None and begins(event):
            raise gap(event)
        found.append(event)
        spans[event.originator_id] = (version, version)
    return found


def gap(event: StoredEvent) -> persistence.IntegrityError:
    """Return the error that refuses an event which cannot follow what is stored."""
    version = event.originator_version
    return persistence.IntegrityError(
        f"Version {version} of aggregate {event.originator_id} would leave a gap: version {version - 1} is neither "
        "among its events nor that of a snapshot. Read the aggregate again, and repeat what was done with it."
    )


class Modified(NamedTuple):
    """What a modifying statement did."""

    rowcount: int
    lastrowid: Any


_own_listeners: weakref.WeakKeyDictionary[Engine, list[int]] = weakref.WeakKeyDictionary()


def root_engine(engine: Engine) -> Engine:
    """Return the engine that was created; that of ``execution_options()`` has its listeners and its pool."""
    while (parent := getattr(engine, "_proxied", None)) is not None:
        engine = parent
    return engine


class Driver:
    """Runs statements on the driver's connection of a SQLAlchemy connection, and tells its errors apart."""

    mark: ClassVar[str] = "%s"
    """The driver's parameter placeholder."""
    serialization_failures: ClassVar[frozenset[object]] = frozenset()
    """The server's codes that mean: another transaction was first, the whole transaction may be tried again."""
    duplicates: ClassVar[frozenset[object]] = frozenset()
    """The server's codes that mean: there is a row with this key."""
    missing_table: ClassVar[re.Pattern[str] | None] = None
    """What the server says of a table that is not there, with the table's name as the group ``name``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        dbapi: Any = engine.dialect.dbapi
        self.driver_error: type[Exception] = dbapi.Error
        self.translated = Translated(self)
        self.own_listeners = _own_listeners.setdefault(root_engine(engine), [0, 0])
        """How many listeners of ours the engine has before and after each statement."""
        self.tables: dict[str, sa.Table] = {}
        """The tables of events, snapshots and positions by their quoted names."""

    # ------------------------------------------------------------------------------------------------- statements

    def listen_to_statements(self, engine: Engine, function: Any) -> None:
        """Call a function after each statement of others, with the arguments of ``after_cursor_execute``."""
        sa.event.listen(engine, "after_cursor_execute", function)
        self.own_listeners[1] += 1

    def commits_implicitly(self, statement: str) -> bool:
        """Whether the database commits the transaction before it runs a statement."""
        return False

    def before(self, connection: Connection, statement: str) -> None:
        """Called before a statement that goes the shorter way."""
        return

    def after(self, connection: Connection) -> None:
        """Called after a statement that went the shorter way."""
        return

    def open_cursor(self, driver_connection: Any) -> Any:
        """Open a cursor of the driver for reading."""
        return driver_connection.cursor()

    def fetch(self, connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Run a statement and return its rows, as the driver gives them."""
        if self._is_watched(connection):
            return list(self._watched(connection, statement, tuple(parameters)).fetchall())
        self.before(connection, statement)
        cursor = self.open_cursor(connection.connection.dbapi_connection)
        try:
            cursor.execute(statement, parameters)
            rows: list[Any] = cursor.fetchall()
        except self.driver_error as error:
            raise self.failed(connection, error, cursor, statement) from error
        finally:
            cursor.close()
            self.after(connection)
        return rows

    def modify(self, connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> Modified:
        """Run a statement that returns no rows."""
        if self._is_watched(connection):
            result = self._watched(connection, statement, tuple(parameters))
            # Not the result's own, which only an INSERT has: a counting UPDATE of MySQL's has one too.
            return Modified(result.rowcount, getattr(result.context.cursor, "lastrowid", None))
        return self._modify(connection, statement, parameters, many=False)

    def modify_many(self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement once for each row of parameters."""
        if self._is_watched(connection):
            self._watched(connection, statement, list(rows))
        else:
            self._modify(connection, statement, rows, many=True)

    def _modify(self, connection: Connection, statement: str, parameters: Sequence[Any], *, many: bool) -> Modified:
        self.before(connection, statement)
        cursor: Any = connection.connection.dbapi_connection.cursor()  # type: ignore[union-attr]
        try:
            if many:
                cursor.executemany(statement, parameters)
            else:
                cursor.execute(statement, parameters)
            return Modified(cursor.rowcount, getattr(cursor, "lastrowid", None))
        except self.driver_error as error:
            raise self.failed(connection, error, cursor, statement) from error
        finally:
            cursor.close()
            self.after(connection)

    def _watched(self, connection: Connection, statement: str, parameters: Any) -> sa.CursorResult[Any]:
        try:
            return connection.exec_driver_sql(statement, parameters)
        except exc.DBAPIError as error:
            raise self.own_error(connection, error.orig, statement) from error

    def _is_watched(self, connection: Connection) -> bool:
        # A connection without listeners of its own has those of its engine; to ask it would make it copy them.
        events = connection.dispatch if "dispatch" in connection.__dict__ else connection.engine.dispatch
        before, after = self.own_listeners
        return (
            len(events.before_cursor_execute) > before
            or len(events.after_cursor_execute) > after
            or bool(self.engine.echo)
            or _logger.isEnabledFor(logging.INFO)
        )

    def failed(self, connection: Connection, error: Exception, cursor: Any, statement: str) -> Exception:
        """Return the error to raise; a lost connection is taken out of the pool, as SQLAlchemy does it."""
        dbapi_connection = connection.connection.dbapi_connection
        lost: Any = self.engine.dialect.is_disconnect
        if lost(error, dbapi_connection, cursor):
            connection.invalidate(error)
        return self.own_error(connection, error, statement)

    # ------------------------------------------------------------------------------------------------- errors

    @classmethod
    def code(cls, driver_error: Any) -> object:
        """Return the server's code of a driver's exception, or None."""
        return None

    @classmethod
    def text(cls, driver_error: Any) -> str:
        """Return what a driver's exception says, without ids, states and other values."""
        return str(driver_error).strip()

    @classmethod
    def is_serialization_failure(cls, driver_error: Any) -> bool:
        """Whether a driver's exception means that the whole transaction may be tried again."""
        return cls.code(driver_error) in cls.serialization_failures

    def is_conflict(self, error: BaseException | None) -> bool:
        """Whether an error, of whom ever, means that another writer was first and the whole unit may be run again.

        Of the library's ``IntegrityError`` this is one kind: a gap in a stream, or a position that was processed
        already, would be the same the next time.
        """
        if isinstance(error, exc.DBAPIError):
            error = error.orig
        if isinstance(error, self.driver_error):
            return self.is_serialization_failure(error)
        return isinstance(error, ConflictError)

    def own_error(self, connection: Connection, error: Any, statement: str) -> persistence.PersistenceError:
        """Return the library's exception for the driver's error of a statement that is the recorders' own."""
        found = self.translate_driver(error)
        if not isinstance(found, persistence.IntegrityError) or isinstance(found, ConflictError):
            return found
        table = next((table for name, table in self.tables.items() if f"INTO {name} (" in statement), None)
        columns = None
        if table is not None and self.code(error) in self.duplicates:
            columns = self.violated(connection, error, table)
        if table is None or columns is None or not is_key(table, columns):
            return ConstraintError(f"A constraint of the database that is no key of the events refused this: {found}")
        text = f"Another writer was first: {found}"
        return ConflictError(text) if POSITION in table.c and VERSION in table.c else persistence.IntegrityError(text)

    def violated(self, connection: Connection, error: Any, table: sa.Table) -> Collection[str] | None:
        """Return the columns of a table that a driver's exception says are not unique, or None if it says otherwise."""
        return None

    def translate(self, error: exc.SQLAlchemyError) -> persistence.PersistenceError:
        """Return the library's exception for one of SQLAlchemy's, in whose statement it may be."""
        driver_error: Any = getattr(error, "orig", None)
        text = self.text(driver_error if driver_error is not None else error)
        special = self._special(driver_error, text)
        if special is not None:
            return special
        if isinstance(error, exc.TimeoutError | exc.PendingRollbackError):
            # Of SQLAlchemy's own: the pool is exhausted, or the session waits for a rollback.
            return persistence.OperationalError(text)
        return _counterpart(error, exc, text)

    def translate_driver(self, error: Exception) -> persistence.PersistenceError:
        """Return the library's exception for one of the driver's, by the classes of PEP 249."""
        text = self.text(error)
        return self._special(error, text) or _counterpart(error, self.engine.dialect.dbapi, text)

    def _special(self, driver_error: Any, text: str) -> persistence.PersistenceError | None:
        missing = None if self.missing_table is None else self.missing_table.search(text)
        if missing:
            return MissingTableError(
                f"Table {missing['name']!r} does not exist: run 'flask eventsourcing init-db', "
                "db.create_all() or your migrations."
            )
        if self.is_serialization_failure(driver_error):
            return ConflictError(f"Another transaction was first: {text}")
        return persistence.IntegrityError(text) if self.code(driver_error) in self.duplicates else None


def is_key(table: sa.Table, columns: Collection[str]) -> bool:
    """Whether columns are a key by which the library tells events, snapshots or positions from each other."""
    keys: list[Collection[str]] = [(POSITION,), VERSION_KEY, table.primary_key.columns.keys()]
    return any(set(columns) == set(key) for key in keys)


def columns_of(table: sa.Table, name: str) -> Collection[str] | None:
    """Return the columns of a unique constraint or index of that name, or None where the table's class has none."""
    uniques = [each for each in table.constraints if isinstance(each, sa.PrimaryKeyConstraint | sa.UniqueConstraint)]
    for unique in [*uniques, *(index for index in table.indexes if index.unique)]:
        if str(unique.name) == name:
            return unique.columns.keys()
    return None


def _counterpart(error: Exception, module: Any, text: str) -> persistence.PersistenceError:
    """Return the library's exception of the same name as the class of PEP 249, in *module*, that an error is of."""
    for name in _PEP_249:
        if isinstance(error, getattr(module, name)):
            theirs: type[persistence.PersistenceError] = getattr(persistence, name)
            return theirs(text)
    return persistence.PersistenceError(text)


class Translated:
    """Context manager within which SQLAlchemy's exceptions, and the driver's, become the library's.

    Those of a statement stay as they are: the recorders' own were translated where they came up.
    SQLAlchemy lets the driver's through when it resets a connection.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.check(error)

    def check(self, error: BaseException) -> None:
        """Raise the library's exception for an error that is SQLAlchemy's or the driver's."""
        if isinstance(error, exc.DBAPIError) and error.statement is not None:
            # Of a statement that is not the recorders' own, as the session's when it flushes.
            return
        if isinstance(error, exc.SQLAlchemyError):
            raise self._driver.translate(error) from error
        if isinstance(error, self._driver.driver_error):
            raise self._driver.translate_driver(error) from error


def stored_event(originator_id: UUID | str, version: int, topic: str, state: Any) -> StoredEvent:
    """Make a ``StoredEvent``; the constructor of a frozen dataclass takes more than twice as long."""
    event = _new(StoredEvent)
    attributes = event.__dict__
    attributes["originator_id"] = originator_id
    attributes["originator_version"] = version
    attributes["topic"] = topic
    attributes["state"] = state if type(state) is bytes else bytes(state)
    return event


def notification(position: int, originator_id: UUID | str, version: int, topic: str, state: Any) -> Notification:
    """Make a ``Notification`` in the same way."""
    event = _new(Notification)
    attributes = event.__dict__
    attributes["originator_id"] = originator_id
    attributes["originator_version"] = version
    attributes["topic"] = topic
    attributes["state"] = state if type(state) is bytes else bytes(state)
    attributes["id"] = position
    return event
