"""Applies events: handlers, position and dead letters in one transaction."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from eventsourcing import utils
from eventsourcing.persistence import Notification
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ...applications.apart import refusing_saves, trying
from ...exceptions import HandlerError, UnknownTopicError, WriteTimeoutError
from ...metadata import Cause, MetadataBlock
from ...persistence.dialects import (
    MAY_PASS,
    has_waited,
    is_canceled,
    is_full,
    is_outage,
    is_read_only,
    is_serialization_failure,
)
from ...persistence.dialects.catalogs import Checks
from ...persistence.dialects.event_values import UnreadableNotification
from ...persistence.dialects.swapping import NEW
from ..checkpoint import PAUSED, CheckpointRow, FencedError
from ..consumers import Consumer, id_keys
from ..consumers.shadows import Undeclared
from ..dead_letters import DeadLetters
from ..definitions import CANCELED, EXITED, ModelProjection
from .batches import Batches
from .pages import Decoding, EventError, ObservedError, Recordings, SuspectError, telling

__all__ = ["Applier", "EventError", "SuspectError", "may_be_its_own", "never", "telling"]

ENDED = (
    "A handler of {} ended the transaction: it must not call session.commit() or session.rollback(), as its position "
    "is committed with its models."
)
SWALLOWED = (
    "A handler of {} went on after an error of the database, which has aborted the transaction: let the error pass, or "
    "put what may fail into a savepoint, session.begin_nested()."
)

APART = (
    "A handler of {} saves events in a store apart from its models. A rollback of the batch would not remove them, and "
    "the next try would save them again: save them in a method with @reaction(…)."
)
UNKNOWN = (
    "The class of topic {!r}, or a class that its state names, is not found: import its module, or, if the class has a "
    "new name, register the old topic for it with eventsourcing.utils.register_topic()."
)


def may_be_its_own(error: BaseException) -> bool:
    """Whether a handler may have caused an error that looks like an outage, if the database answers now."""
    by_itself = is_serialization_failure(error) or is_read_only(error) or is_full(error)
    return not (isinstance(error, FencedError) or by_itself)


def never() -> bool:
    """Return False: the batch does not end before its last event."""
    return False


class Applier:
    """Applies events of a log for one consumer, within the host's context.

    :param joins: whether it is called within a transaction.
    :param ends: asked between two events whether the batch is to end there.
    """

    def __init__(self, consumer: Consumer, *, joins: bool = False, ends: Callable[[], bool] = never) -> None:
        self.ends = ends
        self.consumer = consumer
        self.projection: ModelProjection = consumer.projection_class()
        name = self.projection.__class__.__name__
        models = consumer.projection_class.models
        dialect = consumer.application.datastore.dialect
        look = Undeclared(consumer).look
        self._batches = Batches(dialect, models, list(id_keys(consumer)), ENDED.format(name), look)
        # In a transaction of the caller's, a batch cannot begin again.
        self._batches.flushes_each = joins
        self._recordings = Recordings(consumer)
        self._decoding: Decoding | None = None
        self._has_letters: bool | None = None
        self.has_saved: bool = False
        """Whether a reaction has saved events."""

    @property
    def commits_each(self) -> bool:
        """Whether each event needs a commit of its own, as there are constraints that only the commit looks at."""
        if self._batches.checks is None:
            with self.consumer.application.engine.connect() as connection:
                return self._look(connection).at_commit
        return self._batches.checks.at_commit

    def _look(self, connection: Connection) -> Checks:
        suffix = NEW if self.consumer.kind == "rebuild" else ""
        return self._batches.checks or self._batches.look_at(connection, self.consumer.tables, suffix)

    @property
    def letters(self) -> DeadLetters:
        """The dead letters."""
        return self.consumer.application.dead_letters

    def apply(
        self,
        claimed: CheckpointRow,
        notifications: Sequence[Notification],
        position: int,
        *,
        dead: tuple[BaseException, int] | None = None,
    ) -> CheckpointRow:
        """Apply events and move the position, all in one transaction; returns the row as it is then.

        The batch may end early; then the position is that of the last applied event.

        :param dead: set the one event aside, with its error and the number of tries, rather than applying it.
        :raises FencedError: when the claim was lost; nothing was applied.
        :raises SuspectError: when the database failed while handlers ran; nothing was applied.
        :raises EventError: when an event could not be applied; nothing was applied.
        """
        if self.consumer.kind == "reactions" and notifications and dead is None:
            return self._react(claimed, notifications[0], position)
        try:
            return self._apply(claimed, notifications, position, dead)
        except ObservedError:
            self._batches.flushes_each = True
            return self._apply(claimed, notifications, position, dead)

    def _apply(
        self,
        claimed: CheckpointRow,
        notifications: Sequence[Notification],
        position: int,
        dead: tuple[BaseException, int] | None,
    ) -> CheckpointRow:
        applied = 0 if dead is not None else len(notifications)
        self._batches.last = None
        try:
            # An error of the commit is about what the handlers wrote, unless it passes by itself.
            with telling(self._passes), self.consumer.application.host.transaction() as session:
                connection = self.connection(session)
                # First, because the lock of the row keeps other runners out.
                self._advance(connection, claimed, position, applied, notifications)
                if dead is not None:
                    self.letters.add(connection, self.consumer.name, notifications[0], *dead)
                else:
                    applied = self._handle(session, connection, notifications)
                    if left := notifications[applied:]:
                        moved, notifications = claimed._replace(position=position), notifications[:applied]
                        position = notifications[-1].id
                        self._advance(connection, moved, position, -len(left), notifications)
        except MAY_PASS as error:
            if self._is_suspect(error):
                raise SuspectError from error
            raise
        return claimed._replace(position=position, applied=claimed.applied + applied)

    def _react(self, claimed: CheckpointRow, notification: Notification, position: int) -> CheckpointRow:
        """Call a reaction with no transaction open, because it may take long, and then move the position.

        What it does in the host's session is committed with the position.
        """
        checkpoint = self.consumer.checkpoint
        with self.consumer.application.engine.connect() as connection:
            row = checkpoint.read(connection)
            blocked = self._blocked(connection, [notification])
            # Here, so that the reaction begins without a transaction.
            self._recordings.of(lambda: connection, notification.id)
        if row is None or row.state == PAUSED or (row.token, row.position) != (claimed.token, claimed.position):
            raise FencedError
        is_set_aside = str(notification.originator_id) in blocked
        with self.consumer.application.host.transaction() as session:
            if not is_set_aside:
                self._call(session, notification)
            connection = self.connection(session)
            if is_set_aside:
                self.letters.add(connection, self.consumer.name, notification)
            self._advance(connection, claimed, position, 1, [notification], called=not is_set_aside)
        return claimed._replace(position=position, applied=claimed.applied + 1)

    def _call(self, session: orm.Session, notification: Notification) -> None:
        unit = self.consumer.application.host.unit_of(session)
        name = self.consumer.projection_class.__name__
        try:
            with telling():
                with unit.gate.hold(ENDED.format(name)), trying() as attempt, self._calling(session) as call:
                    call(notification)
                    session.flush()
                if unit.batches or attempt.has_saved:
                    self.has_saved = True
                if unit.dialect.is_aborted(self.connection(session)):
                    raise HandlerError(SWALLOWED.format(name))
        except MAY_PASS as error:
            if isinstance(error, FencedError) or is_serialization_failure(error):
                raise
            raise SuspectError from error

    def _blocked(self, connection: Connection, notifications: Sequence[Notification]) -> set[str]:
        """Return the aggregates of some events that wait behind an event that was set aside."""
        if self._has_letters is None:
            # A projection that halts has letters only if an operator skipped events, which is done while it does not
            # run.
            sets_aside = self.consumer.projection_class.on_failure == "dead-letter"
            self._has_letters = sets_aside or self.letters.any(connection, self.consumer.name)
        if not self._has_letters:
            return set()
        ids = {str(each.originator_id) for each in notifications}
        return self.letters.blocked(connection, self.consumer.name, ids)

    def _passes(self, error: BaseException) -> bool:
        """Whether an error allows another try: before the handlers are called, also a canceled statement does."""
        return is_outage(error) or (self._batches.last is None and is_canceled(error))

    def _is_suspect(self, error: BaseException) -> bool:
        """Whether the handler may have caused an error that allows another try, which would never end."""
        batch = self._batches.last
        if batch is None or isinstance(error, FencedError) or is_serialization_failure(error) or is_full(error):
            return False
        if not has_waited(error):
            return True
        # Others may have had the lock. A wait on a further connection may be for the handler's own transaction.
        dialect = self.consumer.application.datastore.dialect
        return dialect.has_one_writer if isinstance(error, WriteTimeoutError) else not batch.has_failed

    def try_out(self, session: orm.Session, notifications: Sequence[Notification]) -> None:
        """Apply events and roll back, to see how long it takes.

        :raises EventError: when an event could not be applied.
        """
        try:
            self._handle(session, self.connection(session), notifications)
        except ObservedError:
            session.rollback()
            self._batches.flushes_each = True
            self._handle(session, self.connection(session), notifications)
        finally:
            session.rollback()

    def _advance(
        self,
        connection: Connection,
        claimed: CheckpointRow,
        position: int,
        applied: int,
        notifications: Sequence[Notification],
        *,
        called: bool = False,
    ) -> None:
        last, leased = self.consumer.last_event(connection, position, notifications), self.consumer.leased
        advance, unless = self.consumer.checkpoint.advance, self.consumer.applied_inline
        advance(connection, claimed, position, applied, lease=leased, last=last, called=called, unless=unless)

    def connection(self, session: orm.Session) -> Connection:
        """Return the session's connection to the database of the events."""
        application = self.consumer.application
        return application.host.unit_of(session).connection()

    def _handle(self, session: orm.Session, connection: Connection, notifications: Sequence[Notification]) -> int:
        """Call the handlers, and return for how many events: the batch may end early."""
        handled = 0
        unit = self.consumer.application.host.unit_of(session)
        saved = len(unit.batches)  # Some hosts rebuild in a transaction that may have events.
        name = self.consumer.projection_class.__name__
        blocked = self._blocked(connection, notifications)
        self._look(connection)
        self._recordings.begin(connection, notifications)
        with telling():
            with (
                unit.gate.hold(ENDED.format(name)),
                self._refusing_saves(),
                self._batches.applying(session, connection, notifications) as batch,
                self._calling(session) as call,
            ):
                for notification in notifications:
                    if blocked and str(notification.originator_id) in blocked:
                        self.letters.add(connection, self.consumer.name, notification)
                    else:
                        call(notification)
                    batch.end_event()
                    handled += 1
                    if self.ends():
                        break
                session.flush()
            if unit.dialect.is_aborted(connection):
                # The database would roll back at the commit, without an error.
                raise HandlerError(SWALLOWED.format(name))
        if self.consumer.kind == "rebuild" and len(unit.batches) != saved:
            raise HandlerError(
                f"{name} saves events, and a rebuild would save them again: move its models to another projection."
            )
        return handled

    def handle(self, session: orm.Session, notification: Notification) -> None:
        """Handle one event, in the caller's transaction."""
        applying = self._batches.applying(session, self.connection(session), [notification])
        with self._refusing_saves(), applying as batch, self._calling(session) as call:
            call(notification)
            batch.end_event()
            session.flush()

    def _refusing_saves(self) -> AbstractContextManager[None]:
        """Refuse, in a block, saves that a rollback of the handlers' transaction would not undo."""
        is_reaction = self.consumer.kind == "reactions"
        return nullcontext() if is_reaction else refusing_saves(APART.format(self.projection.__class__.__name__))

    @contextmanager
    def _calling(self, session: orm.Session) -> Iterator[_Calls]:
        connection, mapper = partial(self.connection, session), self.consumer.application.mapper
        if self._decoding is None or self._decoding.mapper is not mapper:
            self._decoding = Decoding(mapper)
        calls = _Calls(self.consumer, self.projection, self._recordings, session, connection, self._decoding)
        with self.projection.told_errors(), calls.block:
            yield calls


class _Call(NamedTuple):
    """How the handler of an event class is called."""

    handler: Callable[..., Any]
    last: Sequence[Any]
    """The arguments after the event; a reaction's is the key."""
    named: dict[str, Any]
    is_told: bool
    """Whether it has the parameter ``recorded``."""


class _Calls:
    """Calls handlers in one session, within :attr:`block`, so that what each saves has its event as the cause.

    What is the same for all events of a class is found once, as there are many thousand events a second.
    """

    def __init__(
        self,
        consumer: Consumer,
        projection: ModelProjection,
        recordings: Recordings,
        session: orm.Session,
        connection: Callable[[], Connection],
        to_domain_event: Decoding,
    ) -> None:
        self._consumer = consumer
        self._projection = projection
        self._recordings = recordings
        self._session = session
        self._connection = connection
        self._to_domain_event = to_domain_event
        self._known: dict[type[Any], _Call | None] = {}
        self.block: MetadataBlock = MetadataBlock({}, fills=True)

    def __call__(self, notification: Notification) -> None:
        """Call the handler of one event, if there is one.

        :raises UnreadableEventError: when the row of the event cannot be read.
        :raises HandlerError: when it would end the process.
        """
        if isinstance(notification, UnreadableNotification):
            raise notification.error
        try:
            event = self._to_domain_event(notification)
        except utils.TopicError as error:
            raise UnknownTopicError(UNKNOWN.format(notification.topic)) from error
        event_class = type(event)
        if event_class not in self._known:
            self._known[event_class] = self._find(event_class)
        call = self._known[event_class]
        if call is None:
            return
        handler, last, named, is_told = call
        if self._consumer.kind == "reactions":
            last = (self._recordings.key(self._connection, notification),)
        recorded = partial(self._recordings.of, self._connection, notification.id)
        self.block.turn_to(Cause(recorded))
        try:
            if is_told:
                handler(self._projection, event, *last, **named, recorded=recorded())
            else:
                handler(self._projection, event, *last, **named)
        except (SystemExit, CancelledError) as error:
            text = EXITED if isinstance(error, SystemExit) else CANCELED
            raise HandlerError(text.format(type(self._projection).__name__)) from error

    def _find(self, event_class: type[Any]) -> _Call | None:
        handlers = self._consumer.handlers
        handler = handlers.find(event_class)
        if handler is None:
            return None
        last, named = self._projection.arguments_of(handler, self._session)
        is_reaction = self._consumer.kind == "reactions"
        return _Call(handler, last, {} if is_reaction else named, handler in handlers.telling)
