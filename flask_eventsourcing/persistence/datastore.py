"""A database as the recorders see it: an engine, its dialect, and the session to join if there is one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar
from uuid import UUID, uuid4

from eventsourcing.persistence import StoredEvent
from sqlalchemy.engine import Connection, Engine

from ..config import OriginatorIdType
from ..models import Models
from .dialects import DialectOptions, dialect_for
from .dialects.base import EventTable
from .errors import Translated
from .forks import drop_inherited_connections

T = TypeVar("T")


class SessionScope(Protocol):
    """The session that recorders join, as ``flask_eventsourcing.session`` provides it."""

    def connection(self, engine: Engine) -> Connection:
        """The session's connection."""

    def failed(self, connection: Connection) -> None:
        """Told after a write that failed."""

    def written(self) -> None:
        """Told after a write that succeeded, and after :meth:`recorded`."""

    def reading(self, connection: Connection, table: EventTable, originator_id: UUID | str) -> None:
        """Told before an aggregate is read."""

    def recorded(self, application_name: str, events: Sequence[StoredEvent], positions: Sequence[int]) -> None:
        """Told after events were written, which are not committed yet."""

    def conflicted(self, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """Told when events could not be written because another writer was first."""


AfterAppend = Callable[[Connection, SessionScope | None, Sequence[StoredEvent]], None]


class Datastore:
    """What the recorders of one or more applications share.

    :param engine: where the tables are.
    :param session_scope: returns the session to join, or None where recorders are to commit on their own.
    :param models: record classes by the application's name; those of an application without are made on demand.
    """

    def __init__(
        self,
        engine: Engine,
        options: DialectOptions | None = None,
        *,
        session_scope: Callable[[], SessionScope | None] = lambda: None,
        models: Mapping[str, Models] | None = None,
        originator_id_type: OriginatorIdType = "uuid",
        schema: str | None = None,
    ) -> None:
        self.engine = engine
        self.dialect = dialect_for(engine, options or DialectOptions())
        self.dialect.prepare_engine()
        drop_inherited_connections(engine)
        self.translated = Translated(engine.dialect.dbapi)
        self.session_scope = session_scope
        self.models = dict(models or {})
        self.originator_id_type = originator_id_type
        self.schema = schema
        self.after_append: dict[str, AfterAppend] = {}
        """By the application's name, what is called within the transaction of an append."""
        self.token = uuid4().hex
        _datastores[self.token] = self

    @staticmethod
    def check(engine: Engine, options: DialectOptions) -> None:
        """Check that a database is supported, without touching its engine.

        :raises ConfigurationError: when it is not.
        """
        dialect_for(engine, options)

    def write(self, work: Callable[[Connection, SessionScope | None], T], *, one_append: bool = False) -> T:
        """Call a function with a connection to write with: the session's, or one that is committed at the end.

        With *one_append* the function does no more than that, which may save the transaction's own round trips.
        """
        scope = self.session_scope()
        with self.translated:
            if scope is None:
                if one_append and self.dialect.appends_in_autocommit:
                    with self.engine.connect() as connection:
                        return work(connection.execution_options(isolation_level="AUTOCOMMIT"), None)
                with self.engine.begin() as connection:
                    return work(connection, None)
            connection = scope.connection(self.engine)
            try:
                result = work(connection, scope)
            except BaseException:
                # Whatever it was, the session must know before it commits.
                scope.failed(connection)
                raise
            scope.written()
            return result

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """As :meth:`write`, for a ``with`` block."""
        scope = self.session_scope()
        with self.translated:
            if scope is None:
                with self.engine.begin() as connection:
                    yield connection
                return
            connection = scope.connection(self.engine)
            try:
                yield connection
            except BaseException:
                # Whatever it was, the session must know before it commits.
                scope.failed(connection)
                raise
            scope.written()

    @contextmanager
    def reading(self, *, join: bool = True) -> Iterator[tuple[Connection, SessionScope | None]]:
        """A connection to read with: the session's, if there is one and *join* is set, or one of its own."""
        scope = self.session_scope() if join else None
        with self.translated:
            if scope is not None:
                yield scope.connection(self.engine), scope
                return
            with self.engine.connect() as connection:
                if self.dialect.reads_in_autocommit:
                    connection.execution_options(isolation_level="AUTOCOMMIT")
                yield connection, None


_datastores: weakref.WeakValueDictionary[str, Datastore] = weakref.WeakValueDictionary()


def find_datastore(token: str) -> Datastore | None:
    """Return the datastore that was registered under a token, if it is still in use."""
    return _datastores.get(token)
