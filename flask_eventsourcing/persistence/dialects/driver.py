"""The shortest way to the driver and back: raw rows, and events made of them without their constructors.

``Connection.exec_driver_sql`` is taken instead when someone watches: when statements are logged, or an engine has
listeners, as those of Flask-SQLAlchemy's recording of queries or of an instrumentation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from eventsourcing.persistence import Notification, StoredEvent
from sqlalchemy.engine import Connection, Engine

from ..errors import translate_driver

_logger = logging.getLogger("sqlalchemy.engine.Engine")
_new = object.__new__


class Modified(NamedTuple):
    """What a modifying statement did."""

    rowcount: int
    lastrowid: Any


class Driver:
    """Runs statements on the driver's connection of a SQLAlchemy connection."""

    mark = "%s"
    """The driver's parameter placeholder."""
    own_listeners = (0, 0)
    """How many listeners of ours the engine has before and after each statement."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        dbapi: Any = engine.dialect.dbapi
        self.driver_error: type[Exception] = dbapi.Error

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
            return list(connection.exec_driver_sql(statement, tuple(parameters)).fetchall())
        self.before(connection, statement)
        cursor = self.open_cursor(connection.connection.dbapi_connection)
        try:
            cursor.execute(statement, parameters)
            rows: list[Any] = cursor.fetchall()
        except self.driver_error as error:
            raise self.failed(connection, error, cursor) from error
        finally:
            cursor.close()
            self.after(connection)
        return rows

    def modify(self, connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> Modified:
        """Run a statement that returns no rows."""
        if self._is_watched(connection):
            result = connection.exec_driver_sql(statement, tuple(parameters))
            # Not the result's own, which only an INSERT has: a counting UPDATE of MySQL's has one too.
            return Modified(result.rowcount, getattr(result.context.cursor, "lastrowid", None))
        return self._modify(connection, statement, parameters, many=False)

    def modify_many(self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement once for each row of parameters."""
        if self._is_watched(connection):
            connection.exec_driver_sql(statement, list(rows))
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
            raise self.failed(connection, error, cursor) from error
        finally:
            cursor.close()
            self.after(connection)

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

    def failed(self, connection: Connection, error: Exception, cursor: Any) -> Exception:
        """Return the error to raise; a lost connection is taken out of the pool, as SQLAlchemy does it."""
        dbapi_connection = connection.connection.dbapi_connection
        lost: Any = self.engine.dialect.is_disconnect
        if lost(error, dbapi_connection, cursor):
            connection.invalidate(error)
        return translate_driver(error, self.engine.dialect.dbapi)


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
