"""What is pending in a transaction: events, functions to call at its end, and reasons to refuse the commit."""

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

from ..failures import Logged
from ..metadata import Recorded
from ..persistence.describing import PLAIN_DESCRIPTION, Description
from ..persistence.dialects.calls import Calls
from ..persistence.dialects.event_tables import POSITION, EventTable

T = TypeVar("T")

logger: logging.Logger = logging.getLogger(__name__)

NAMED = 5
"""The events that a message names."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The events of one save."""

    application_name: str
    table: EventTable
    events: Sequence[StoredEvent]
    positions: Sequence[int]
    described: Description = PLAIN_DESCRIPTION

    @property
    def recorded(self) -> tuple[Recorded, ...]:
        """What was recorded of each event beside its state; made only when somebody asks."""
        return self.described.recorded(self.positions)

    @property
    def notifications(self) -> list[Notification]:
        """The events with their positions; made only when somebody asks."""
        return [
            Notification(event.originator_id, event.originator_version, event.topic, event.state, position)
            for event, position in zip(self.events, self.positions, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class AfterCommit:
    """A function to call once everything that was done before it is committed."""

    function: Callable[[], None]


@dataclass(frozen=True, eq=False)
class AfterRollback:
    """A function to call if what was done before it is rolled back, or nobody knows what became of it."""

    function: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Refusal:
    """Why what was done so far must not be committed."""

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
        """Note something.

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

    def released(self, level: int) -> None:
        """A savepoint was released: what it has stands or falls with the one around it from now on."""
        self._items = [(min(own, level - 1), item) for own, item in self._items]

    def rolled_back(self, level: int) -> list[Item]:
        """A savepoint was rolled back, or all of the transaction (level 0): forget what it had, and return that."""
        if not level:
            items, self._items = self._items, []
            return [item for _, item in items]
        gone = [item for own, item in self._items if own >= level]
        self._items = [(own, item) for own, item in self._items if own < level]
        return gone

    def keep(self, is_there: Callable[[Batch], bool]) -> list[Item]:
        """Forget the events that are not there any more, and what was noted for each of them; return all of that."""
        kept: list[tuple[int, Item]] = []
        gone: list[tuple[int, Item]] = []
        before: list[tuple[int, Item]] = []
        last = None
        for entry in self._items:
            # What is to follow the commit is noted after the events, what is to follow a rollback before them.
            if isinstance(entry[1], Batch):
                last = kept if is_there(entry[1]) else gone
                last += [*before, entry]
                before = []
            elif last is not None and isinstance(entry[1], AfterCommit):
                last.append(entry)
            else:
                before.append(entry)
        # What came after the last events stands or falls with the others.
        (kept if kept or not gone else gone).extend(before)
        self._items = kept
        return [item for _, item in gone]


def call_all(items: Iterable[AfterCommit | AfterRollback]) -> None:
    """Call every function, whatever comes of another: its transaction has ended, and the caller has to be told so."""
    for item in items:
        what = "commit succeeded" if isinstance(item, AfterCommit) else "transaction was rolled back"
        # The caller of commit() must not take that for a failure, nor try again.
        with Logged(logger, "The %s, and then %r failed.", what, item.function):
            item.function()


def log_lost(batches: Sequence[Batch]) -> None:
    """Log that events were dropped although nobody asked for it."""
    count = sum(len(batch.events) for batch in batches)
    logger.error("%d events were saved and are not stored: their session was closed before a commit.", count)


def describe(batches: Sequence[Batch]) -> str:
    """Return what messages say of events: ``2 events of Bank (…) were``."""
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
    """What is known of a connection: its open savepoints, the innermost last, and the units that follow it."""

    def __init__(self) -> None:
        self.savepoints: list[str] = []
        self.units: list[weakref.ref[Any]] = []
        self.statements = 0
        """How many SQLAlchemy has run on it since it is known here, each with a cursor of the driver's."""
        self._made = 0

    def add(self, unit: object) -> None:
        """Note a unit that follows the connection."""
        self.units = [*(each for each in self.units if each() not in (None, unit)), weakref.ref(unit)]

    def opened(self, name: str | None) -> None:
        """A savepoint was made; SQLAlchemy names those without a name after it has told of them."""
        if name is None:
            self._made += 1
            name = f"sa_savepoint_{self._made}"
        self.savepoints.append(name)

    def left(self, name: str) -> int:
        """A savepoint was released or rolled back, and with it those within it; returns its level, from 1 up."""
        names = self.savepoints
        level = names.index(name) + 1 if name in names else max(1, len(names))
        del names[level - 1 :]
        return level


_states: weakref.WeakKeyDictionary[Connection, ConnectionState] = weakref.WeakKeyDictionary()


def known_state(connection: Connection) -> ConnectionState | None:
    """Return what is known of a connection, or None."""
    return _states.get(connection)


def state_of(connection: Connection) -> ConnectionState:
    """Return what is known of a connection."""
    found = _states.get(connection)
    if found is None:
        found = _states[connection] = ConnectionState()
    return found


def is_there(connection: Connection, batch: Batch) -> bool:
    """Whether a connection's transaction sees the events of a batch, at their positions."""
    table = batch.table.table
    columns = table.c[POSITION], table.c.originator_version
    wanted = set(zip(batch.positions, (event.originator_version for event in batch.events), strict=True))
    first, last = min(batch.positions), max(batch.positions)
    found = connection.execute(sa.select(*columns).where(columns[0] >= first, columns[0] <= last))
    return wanted <= {(row[0], row[1]) for row in found}


def _no_connection() -> Connection | None:
    return None


class Following:
    """What a unit knows of the end of its database's transaction.

    ``rolled_back`` is what a rollback has taken away, until it is known whether somebody asked for it.
    """

    def __init__(self) -> None:
        self.connection: Callable[[], Connection | None] = _no_connection
        self.rolled_back: list[Batch] = []
        self.is_committing: bool = False
        self.is_prepared: bool = False
        """Whether it waits for the second phase of its commit: no statement can be run, and it outlives connections."""
        self._suspicion: int = 0
        self.is_asking: bool = False
        self.ends: int = 0
        """How often the driver's connection had been committed or rolled back when the first event was noted."""
        self.strays: int = 0
        """How many more cursors than statements there had been, when the unit looked last."""

    def begin(self, calls: Calls, statements: int) -> None:
        """Note what was counted when the first event is noted."""
        self.ends = calls.ends
        self.strays = calls.cursors - statements

    def compare(self, calls: Calls, statements: int) -> bool:
        """Suspect what a cursor may have done that is none of SQLAlchemy's; whether the transaction was ended."""
        before = self.strays
        self.strays = calls.cursors - statements
        if self.strays > before:
            self.suspect()
        return calls.ends > self.ends

    def suspect(self) -> None:
        """Note that somebody may have ended the transaction."""
        self._suspicion = 2

    def asked(self, calls: Calls) -> None:
        """Note that the database was asked what is there."""
        self._suspicion = min(self._suspicion, 1)
        self.ends = calls.ends

    def ended(self) -> None:
        """Note that the transaction has ended, and another may begin."""
        self._suspicion = 0
        self.is_committing = False
        self.is_prepared = False

    @property
    def is_suspicious(self) -> bool:
        """Whether somebody may have ended the transaction since the database was asked."""
        return self._suspicion == 2

    @property
    def was_suspicious(self) -> bool:
        """Whether somebody may have ended it and begun another, in which all that was committed is seen as well."""
        return self._suspicion > 0

    def ask(
        self, connection: Connection, batches: Iterable[Batch], text: Callable[[BaseException], str]
    ) -> set[int] | None:
        """Return which batches the transaction sees, by their ``id()``, or None if that cannot be asked."""
        self.is_asking = True
        try:
            return {id(batch) for batch in batches if is_there(connection, batch)}
        except sa.exc.SQLAlchemyError as error:
            reason = text(getattr(error, "orig", None) or error)
            logger.warning("Nobody knows what became of events that were saved: %s", reason)
            return None
        finally:
            self.is_asking = False

    def open_connection(self) -> Connection | None:
        """Return the connection that is followed, unless it is closed or lost."""
        connection = self.connection()
        return None if connection is None or connection.closed or connection.invalidated else connection

    @property
    def is_busy(self) -> bool:
        """Whether the database cannot be asked now."""
        return self.is_asking or self.is_prepared
