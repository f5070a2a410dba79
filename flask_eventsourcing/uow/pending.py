"""What waits for the end of a session's transaction: events, functions to call, and reasons to refuse the commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import UUID

from eventsourcing.persistence import Notification, StoredEvent
from sqlalchemy import orm


@dataclass(frozen=True, eq=False)
class Batch:
    """The events of one save."""

    application_name: str
    events: Sequence[StoredEvent]
    positions: Sequence[int]

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
    """A function to call once what was done before it is rolled back, or nobody knows what became of it."""

    function: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Refusal:
    """Why what was done so far must not be committed."""

    reason: str


Item = Batch | AfterCommit | AfterRollback | Refusal
T = TypeVar("T")


@dataclass(eq=False)
class Pending:
    """What was noted in one transaction of a session, each with the savepoint in which that was, or the transaction."""

    _items: list[tuple[orm.SessionTransaction | None, Item]] = field(default_factory=list)

    def add(self, transaction: orm.SessionTransaction | None, item: Item) -> None:
        """Note something."""
        self._items.append((transaction, item))

    def all(self, kind: type[T]) -> list[T]:
        """Return what was noted of one kind, in its order."""
        return [item for _, item in self._items if isinstance(item, kind)]

    def has_events_of(self, originator_id: UUID | str) -> bool:
        """Whether there are events of an aggregate."""
        return any(event.originator_id == originator_id for batch in self.all(Batch) for event in batch.events)

    def released(self, savepoint: orm.SessionTransaction, parent: orm.SessionTransaction | None) -> None:
        """Give what a savepoint has to its parent, with which it stands or falls from now on."""
        self._items = [(parent if own is savepoint else own, item) for own, item in self._items]

    def rolled_back(self, savepoint: orm.SessionTransaction) -> Pending:
        """Return what was noted in a savepoint, and forget it here."""
        lost = Pending([(own, item) for own, item in self._items if own is savepoint])
        self._items = [(own, item) for own, item in self._items if own is not savepoint]
        return lost

    def take(self) -> Pending:
        """Return everything, and forget it here."""
        items, self._items = self._items, []
        return Pending(items)

    def tell_rollback(self) -> None:
        """Call what waits for a rollback of this."""
        for item in self.all(AfterRollback):
            item.function()
