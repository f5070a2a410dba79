"""Applies events: handlers, position and dead letters in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import Notification
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ..exceptions import HandlerError
from .consumers import Consumer
from .control import ControlRow
from .dead_letters import DeadLetters
from .outages import is_outage

PREFETCH_FROM = 8
"""Fewer events than this are not worth a query for the rows of all their aggregates."""
ROWS_AT_ONCE = 500
ENDED = (
    "A handler of {} ended the transaction: it must not call session.commit() or session.rollback(), as its position "
    "is committed with its models."
)
SWALLOWED = (
    "A handler of {} went on after an error of the database, which has aborted the transaction: let the error pass, or "
    "put what may fail into a savepoint, session.begin_nested()."
)


class EventError(Exception):
    """A handler failed, or an event could not be read; the cause is the error itself.

    :param index: which of the events it was, or None when the error came at the end of the batch.
    """

    def __init__(self, index: int | None) -> None:
        super().__init__()
        self.index = index


class Applier:
    """Applies events of a log for one consumer, within an application context."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.host = consumer.host
        self.projection = consumer.projection_class()
        self.letters = DeadLetters(self.host.models.tables["dead_letters"])
        self._keys = list(_id_keys(consumer))
        # Looked up once, as there are many thousand events a second.
        self._mapper = self.host.mapper
        self._handlers = consumer.handlers
        self._kept: list[Any] = []
        self._session: orm.Session | None = None
        # With a lease, and so on SQLite, the row's lock would keep everybody from writing while a reaction takes its
        # time; a reaction may be called again anyway.
        self._advances_last = consumer.kind == "reactions" and consumer.leased

    def apply(
        self,
        claimed: ControlRow,
        notifications: Sequence[Notification],
        position: int,
        *,
        dead: tuple[BaseException, int] | None = None,
    ) -> ControlRow:
        """Apply events and move the position, all in one transaction; returns the row as it is then.

        :param dead: set the one event aside, with its error and the number of tries, rather than applying it.
        :raises FencedError: when the claim was lost; nothing was applied.
        :raises EventError: when an event could not be applied; nothing was applied.
        """
        applied = 0 if dead is not None else len(notifications)
        try:
            with self.host.binding.transaction() as session:
                connection = self.connection(session)
                # First, as its lock keeps everybody else out.
                if not self._advances_last:
                    self._advance(connection, claimed, position, applied)
                if dead is not None:
                    self.letters.add(connection, self.consumer.name, notifications[0], *dead)
                else:
                    self._handle(session, connection, notifications)
                if self._advances_last:
                    self._advance(connection, claimed, position, applied)
        except EventError:
            raise
        except Exception as error:
            # Whatever the commit says, unless it passes by itself, is about what the handlers wrote.
            if is_outage(error):
                raise
            raise EventError(None) from error
        return claimed._replace(position=position, applied=claimed.applied + applied)

    def try_out(self, session: orm.Session, notifications: Sequence[Notification]) -> None:
        """Apply events and roll back, to see how long it takes.

        :raises EventError: when an event could not be applied.
        """
        try:
            self._handle(session, self.connection(session), notifications)
        finally:
            session.rollback()

    def _advance(self, connection: Connection, claimed: ControlRow, position: int, applied: int) -> None:
        self.consumer.control.advance(connection, claimed, position, applied, lease=self.consumer.leased)

    def connection(self, session: orm.Session) -> Connection:
        """Return the session's connection to the database of the events."""
        return self.host.binding.unit(session).connection(self.host.engine)

    def _handle(self, session: orm.Session, connection: Connection, notifications: Sequence[Notification]) -> None:
        unit = self.host.binding.unit(session)
        begun = session.get_transaction()
        blocked: set[str] = set()
        if self.consumer.projection_class.on_failure == "dead-letter":
            blocked = self.letters.blocked(connection, self.consumer.name)
        self._keep_objects(session)
        self._prefetch(session, notifications)
        index: int | None = None
        ended = ENDED.format(self.consumer.projection_class.__name__)
        try:
            with unit.hold(ended):
                for number, notification in enumerate(notifications):
                    index = number
                    if blocked and str(notification.originator_id) in blocked:
                        self.letters.add(connection, self.consumer.name, notification)
                    else:
                        self.handle(session, notification)
                    if session.get_transaction() is not begun:
                        raise HandlerError(ended)
            index = None
            session.flush()
            if unit.dialect.is_aborted(connection):
                # A commit would be a rollback, and nobody would be told.
                raise HandlerError(SWALLOWED.format(self.consumer.projection_class.__name__))
        except Exception as error:
            if is_outage(error):
                raise
            raise EventError(index) from error
        finally:
            self._kept.clear()
        if self.consumer.kind == "rebuild" and self.host.binding.unit(session).batches:
            raise HandlerError(
                f"{self.consumer.projection_class.__name__} saves events, so that it cannot be rebuilt: they would be "
                "saved again."
            )

    def handle(self, session: orm.Session, notification: Notification) -> None:
        """Call the handler of one event, if there is one."""
        event = self._mapper.to_domain_event(notification)
        handler = self._handlers.find(type(event))
        if handler is not None:
            if self.consumer.kind == "reactions":
                handler(self.projection, event, self.idempotency_key(notification))
            else:
                handler(self.projection, event, session)

    def idempotency_key(self, notification: Notification) -> str:
        """The same text for the same event whenever a reaction is called for it."""
        return f"{self.host.application_name}/{self.consumer.projection_class.name}/{notification.id}"

    def _keep_objects(self, session: orm.Session) -> None:
        """Keep what the session loads and inserts to the end of the batch: it refers to it weakly, and would reload it.

        The events are those of the recipe "Creating a Strong Referencing Identity Map" of SQLAlchemy's documentation.
        """
        if session is self._session:
            return
        self._session = session

        def keep(session: orm.Session, instance: Any) -> None:
            self._kept.append(instance)

        sa.event.listen(session, "pending_to_persistent", keep)
        sa.event.listen(session, "loaded_as_persistent", keep)

    def _prefetch(self, session: orm.Session, notifications: Sequence[Notification]) -> None:
        """Load the rows that belong to the events' aggregates, so that ``session.get()`` finds them."""
        if len(notifications) < PREFETCH_FROM or not self._keys:
            return
        ids = list({notification.originator_id for notification in notifications})
        for model, column in self._keys:
            for start in range(0, len(ids), ROWS_AT_ONCE):
                session.scalars(sa.select(model).where(column.in_(ids[start : start + ROWS_AT_ONCE]))).all()


def _id_keys(consumer: Consumer) -> Iterable[tuple[Any, Any]]:
    """The models whose primary key can be the id of an aggregate, with that column."""
    if consumer.kind == "reactions" or not consumer.projection_class.prefetch:
        return
    id_type = _python_type(consumer.host.recorder.events_table.table.c.originator_id)
    for model in consumer.projection_class.models:
        key = sa.inspect(model).primary_key
        if len(key) == 1 and _python_type(key[0]) is id_type is UUID:
            yield model, sa.inspect(model).get_property_by_column(key[0]).class_attribute


def _python_type(column: Any) -> type[Any] | None:
    try:
        found: type[Any] = column.type.python_type
    except NotImplementedError:
        return None
    return found
