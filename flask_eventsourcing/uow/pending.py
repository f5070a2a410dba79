"""The pending items of a transaction: events, functions to call at its end, and reasons to refuse the commit."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import Notification, StoredEvent
from sqlalchemy.engine import Connection

from ..failures import call_each
from ..metadata import Recorded
from ..persistence import Dialect
from ..persistence.describing import PLAIN_DESCRIPTION, Description
from ..persistence.dialects.calls import Calls, ask_on
from ..persistence.dialects.event_tables import EventTable

T = TypeVar("T")

logger: logging.Logger = logging.getLogger(__name__)

NAMED = 5
"""The most events that a message names."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The events of one save."""

    application_name: str
    table: EventTable
    events: Sequence[StoredEvent]
    positions: Sequence[int]
    described: Description = PLAIN_DESCRIPTION
    place: str = ""
    """The name of the table that stays right if names mean other tables later; empty if they cannot."""

    @property
    def recorded(self) -> tuple[Recorded, ...]:
        """The metadata, time and id of each event, made when they are asked for."""
        return self.described.recorded(self.positions)

    @property
    def notifications(self) -> list[Notification]:
        """The events with their positions; made when they are asked for."""
        return [
            Notification(event.originator_id, event.originator_version, event.topic, event.state, position)
            for event, position in zip(self.events, self.positions, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class AfterCommit:
    """A function to call after the work before it is committed."""

    function: Callable[[], None]


@dataclass(frozen=True, eq=False)
class AfterRollback:
    """A function to call if the work before it is rolled back, or its outcome is unknown."""

    function: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Refusal:
    """Why the work so far must not be committed."""

    reason: str


Item = Batch | AfterCommit | AfterRollback | Refusal


def of_kind(items: Iterable[Item], kind: type[T]) -> list[T]:
    """Return the items of one kind, in their order."""
    return [item for item in items if isinstance(item, kind)]


@dataclass(eq=False)
class Pending:
    """What was noted in one transaction of a connection, each with the number of savepoints that were open then."""

    _items: list[tuple[int, Item]] = field(default_factory=list)

    def add(self, level: int, item: Item) -> None:
        """Note an item.

        :param level: how many savepoints are open.
        """
        self._items.append((level, item))

    def __bool__(self) -> bool:
        return bool(self._items)

    def has(self, kind: type[Item]) -> bool:
        """Whether something of one kind was noted, without a look at all of it."""
        for _, item in self._items:  # noqa: SIM110 (a generator takes four times as long)
            if isinstance(item, kind):
                return True
        return False

    def all(self, kind: type[T]) -> list[T]:
        """Return what was noted of one kind, in its order."""
        return [item for _, item in self._items if isinstance(item, kind)]

    def has_events_of(self, originator_id: UUID | str) -> bool:
        """Whether there are events of an aggregate."""
        return any(event.originator_id == originator_id for batch in self.all(Batch) for event in batch.events)

    def add_beside(self, originator_id: UUID | str, item: Item) -> None:
        """Note something that is kept or dropped with the last events of an aggregate."""
        for number in reversed(range(len(self._items))):
            level, known = self._items[number]
            if isinstance(known, Batch) and any(event.originator_id == originator_id for event in known.events):
                # Functions for a rollback are noted before the events.
                self._items.insert(number, (level, item))
                return

    def released(self, level: int) -> None:
        """A savepoint was released: its items now belong to the savepoint around it."""
        self._items = [(min(own, level - 1), item) for own, item in self._items]

    def rolled_back(self, level: int) -> list[Item]:
        """A savepoint was rolled back, or the transaction (level 0): forget its items, and return them."""
        if not level:
            items, self._items = self._items, []
            return [item for _, item in items]
        gone = [item for own, item in self._items if own >= level]
        self._items = [(own, item) for own, item in self._items if own < level]
        return gone

    def keep(self, is_there: Callable[[Batch], bool]) -> list[Item]:
        """Forget the events that no longer exist, with the items that belong to them, and return both."""
        kept: list[tuple[int, Item]] = []
        gone: list[tuple[int, Item]] = []
        before: list[tuple[int, Item]] = []
        last = None
        for entry in self._items:
            # Functions for the commit are noted after the events, those for a rollback before them.
            if isinstance(entry[1], Batch):
                last = kept if is_there(entry[1]) else gone
                last += [*before, entry]
                before = []
            elif last is not None and isinstance(entry[1], AfterCommit):
                last.append(entry)
            else:
                before.append(entry)
        # Items after the last events share the fate of the others.
        (kept if kept or not gone else gone).extend(before)
        self._items = kept
        return [item for _, item in gone]


def call_all(items: Iterable[AfterCommit | AfterRollback]) -> None:
    """Call every function, even if one raises: the transaction has ended, and the caller must not see an error.

    A function may have an attribute ``remedy``, which is logged if it fails.
    """
    # An error here must not look to the caller of commit() like a failed commit, which it would try again.
    call_each(logger, ((item.function, "The %s, and then %r failed. %s", _told(item)) for item in items))


def _told(item: AfterCommit | AfterRollback) -> tuple[object, ...]:
    what = "commit succeeded" if isinstance(item, AfterCommit) else "transaction was rolled back"
    return what, item.function, getattr(item.function, "remedy", "Its error did not reach the caller.")


def log_lost(batches: Sequence[Batch]) -> None:
    """Log that events were lost although no code asked for a rollback."""
    count = sum(len(batch.events) for batch in batches)
    logger.error("%d events were saved and are not stored: their session was closed before a commit.", count)


def describe(batches: Sequence[Batch]) -> str:
    """Return the words for events in a message: ``2 events of Bank (…) were``."""
    notifications = [notification for batch in batches for notification in batch.notifications]
    names = ", ".join(_name(notification) for notification in notifications[:NAMED])
    more = f" and {len(notifications) - NAMED} more" if len(notifications) > NAMED else ""
    applications = ", ".join(dict.fromkeys(batch.application_name for batch in batches))
    count = f"{len(notifications)} event{'s' if len(notifications) > 1 else ''}"
    return f"{count} of {applications} ({names}{more}) {'were' if len(notifications) > 1 else 'was'}"


def _name(notification: Notification) -> str:
    event_class = notification.topic.partition(":")[2]
    return f"{event_class} {notification.originator_id} version {notification.originator_version}"


class ConnectionState:
    """The state of a connection: its open savepoints, the innermost last, and the units that follow it."""

    def __init__(self) -> None:
        self.savepoints: list[str] = []
        self.units: list[weakref.ref[Any]] = []
        self.statements = 0
        """How many statements SQLAlchemy has run on it since then, each with a cursor of the driver's."""
        self._made = 0

    def add(self, unit: object) -> None:
        """Note a unit that follows the connection."""
        self.units = [*(each for each in self.units if each() not in (None, unit)), weakref.ref(unit)]

    def opened(self, name: str | None) -> None:
        """Note a new savepoint. SQLAlchemy gives it a name after it has called the listeners."""
        if name is None:
            self._made += 1
            name = f"sa_savepoint_{self._made}"
        self.savepoints.append(name)

    def left(self, name: str) -> int:
        """Note that a savepoint, with those within it, was released or rolled back. Returns its level, from 1 up."""
        names = self.savepoints
        level = names.index(name) + 1 if name in names else max(1, len(names))
        del names[level - 1 :]
        return level


_states: weakref.WeakKeyDictionary[Connection, ConnectionState] = weakref.WeakKeyDictionary()


def known_state(connection: Connection) -> ConnectionState | None:
    """Return the known state of a connection, or None."""
    return _states.get(connection)


def state_of(connection: Connection) -> ConnectionState:
    """Return the state of a connection, which is made at the first call."""
    found = _states.get(connection)
    if found is None:
        found = _states[connection] = ConnectionState()
    return found


def is_there(dialect: Dialect, connection: Connection, batch: Batch) -> bool:
    """Whether the driver's connection sees the events of a batch, and not other events at their positions.

    :raises: the driver's errors.
    """
    table = dialect.located(connection, batch.table)
    place = batch.place if table is batch.table else ""
    statement = table.between(min(batch.positions), max(batch.positions), place)
    found = {event.id: event for event in table.page(ask_on(connection, statement))}
    return all(found.get(event.id) == event for event in batch.notifications)


def _no_connection() -> Connection | None:
    return None


class Following:
    """Follows the end of the database's transaction for a unit.

    ``rolled_back`` has the events of a rollback, until it is known whether code asked for it.
    """

    def __init__(self) -> None:
        self.connection: Callable[[], Connection | None] = _no_connection
        self.rolled_back: list[Batch] = []
        self.is_committing: bool = False
        self.is_prepared: bool = False
        """Whether it waits for the second phase of its commit: no statement can be run, and it outlives connections."""
        self._suspicion: int = 0
        self.ends: int = 0
        """How often the driver's connection had been committed or rolled back when the first event was noted."""
        self.strays: int = 0
        """How many more cursors than statements there had been, when the unit looked last."""

    def begin(self, calls: Calls, statements: int) -> None:
        """Note the counts at the first event."""
        self.ends = calls.ends
        self.strays = calls.cursors - statements

    def compare(self, calls: Calls, statements: int) -> bool:
        """Suspect a cursor that is not SQLAlchemy's. Return whether the transaction was ended."""
        before = self.strays
        self.strays = calls.cursors - statements
        if self.strays > before:
            self.suspect()
        return calls.ends > self.ends

    def suspect(self) -> None:
        """Note that the transaction may have been ended."""
        self._suspicion = 2

    def asked(self, calls: Calls) -> None:
        """Note that the database was asked for the events."""
        self._suspicion = min(self._suspicion, 1)
        self.ends = calls.ends

    def ended(self) -> None:
        """Note that the transaction has ended, and another may begin."""
        self._suspicion = 0
        self.is_committing = False
        self.is_prepared = False

    @property
    def is_suspicious(self) -> bool:
        """Whether the transaction may have been ended since the database was asked."""
        return self._suspicion == 2

    @property
    def was_suspicious(self) -> bool:
        """Whether it may have been ended and another begun, which sees everything that was committed."""
        return self._suspicion > 0

    def ask(self, dialect: Dialect, connection: Connection, batches: Iterable[Batch]) -> set[int] | None:
        """Return which batches the transaction sees, by their ``id()``, or None if that cannot be asked."""
        try:
            return {id(batch) for batch in batches if is_there(dialect, connection, batch)}
        except (sa.exc.SQLAlchemyError, dialect.driver_error) as error:
            reason = dialect.text(getattr(error, "orig", None) or error)
            logger.warning("It is unknown whether events that were saved are stored: %s", reason)
            return None

    def open_connection(self) -> Connection | None:
        """Return the connection that is followed, unless it is closed or lost."""
        connection = self.connection()
        return None if connection is None or connection.closed or connection.invalidated else connection
