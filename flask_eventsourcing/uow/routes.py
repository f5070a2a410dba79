"""Finds the connection of a session for the events: the one that writes its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine import Connection, Engine

from .._patches import as_if_flushing
from ..exceptions import ConfigurationError
from ..persistence.dialects import is_in_memory

OTHER_CONNECTION = (
    "The session writes models to {found} and the events are in {engine}, over another connection, so that the two "
    "could not be one transaction: let get_bind() of the session return one engine for both, or set "
    "EVENTSOURCING_BIND_KEY to the bind key of the events."
)


FIXED = frozenset[Callable[..., Any]]({orm.Session.get_bind})
INSERT = "flask_eventsourcing.insert"
"""The key in ``Table.info`` of a statement that inserts into the table."""


HOW = ("application_name", "charset", "connect_timeout")
"""What an address may have that says how to connect, and not where; Flask-SQLAlchemy adds a ``charset``."""


def same_database(one: Engine, other: Engine) -> bool:
    """Whether two engines are for one database."""
    if one is other or one.pool is other.pool:
        return True
    is_address = one.url.difference_update_query(HOW) == other.url.difference_update_query(HOW)
    return is_address and not is_in_memory(one.url)


def session_of(session: orm.Session | orm.scoped_session[Any]) -> orm.Session:
    """Return a session, which is the current one of a ``scoped_session``."""
    return session() if isinstance(session, orm.scoped_session) else session


def writer_of(session: orm.Session, table: sa.Table) -> Engine | Connection:
    """Return the engine or connection with which a session would write a row of a table.

    A session that sends reads to another engine does that in its ``get_bind()``, by the statement, or by whether the
    session flushes.
    """
    insert = table.info.get(INSERT)
    if insert is None:
        insert = table.info[INSERT] = sa.insert(table)
    with as_if_flushing(session):
        return session.get_bind(clause=insert)


class Route:
    """Finds the connection of a session to the database of the events.

    :param engine: that database.
    :param bind_arguments: arguments with which the session finds it.
    :param fixed: functions ``get_bind`` that look at the table only.
    """

    def __init__(
        self, engine: Engine, bind_arguments: Mapping[str, Any], fixed: frozenset[Callable[..., Any]] = FIXED
    ) -> None:
        self._engine = engine
        self._fixed = fixed
        self.bind_arguments = bind_arguments

    def connection(self, session: orm.Session) -> Connection:
        """Return the connection.

        :raises ConfigurationError: when the session writes its models to another database, and that was not configured.
        """
        # A copy, because the session removes "bind" from its argument.
        connection = session.connection(bind_arguments=dict(self.bind_arguments))
        if same_database(connection.engine, self._engine):
            return connection
        # The session may send reads to a replica, but saves, and reads before a change, need the writer.
        return session.connection(bind_arguments={"bind": self._engine if self._is_apart else self._writer(session)})

    def check(self, session: orm.Session, connection: Connection) -> None:
        """Refuse to write if the session's models would be in another transaction.

        :param connection: the one to write with.

        :raises ConfigurationError: naming both, unless that was configured.
        """
        if type(session).get_bind in self._fixed or self._is_apart:
            return
        writer = self._writer(session)
        if writer.engine is connection.engine:
            return
        if session.connection(bind_arguments={"bind": writer}) is not connection:
            raise self._refusal(writer)

    def _writer(self, session: orm.Session) -> Engine | Connection:
        writer = writer_of(session, self.bind_arguments["clause"])
        if not same_database(writer.engine, self._engine):
            raise self._refusal(writer)
        return writer

    def _refusal(self, writer: Engine | Connection) -> ConfigurationError:
        found, engine = (each.render_as_string(hide_password=True) for each in (writer.engine.url, self._engine.url))
        return ConfigurationError(OTHER_CONNECTION.format(found=found, engine=engine))

    @property
    def _is_apart(self) -> bool:
        """Whether the events have an engine of their own."""
        table = self.bind_arguments.get("clause")
        return table is None or table.metadata.info.get("bind_key") is not None
