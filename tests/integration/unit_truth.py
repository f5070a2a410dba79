"""What is true of the events and rows that a program has saved: a model of the database's transaction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

Level = Literal["root", "orm", "connection", "text"]
Expected = Literal["stored", "nothing", "conflict", "refused", "stale", "any"]
Key = tuple[UUID, int]
"""An event, by its account and its amount, of which there are no two alike; 0 is the one that opens."""


@dataclass(eq=False)
class Holding:
    """An aggregate object that the program holds."""

    aggregate: Any
    history: list[int]
    """The amounts of the events that its state is made of, and that were not lost when it was read or saved."""
    unsaved: list[int] = field(default_factory=list)
    lost: bool = False
    """Whether events of it were rolled back or had a conflict, so that it must be refused."""
    unsure: bool = False
    """Whether the database has committed by itself, so that either will do."""

    @property
    def id(self) -> UUID:
        """The account's id."""
        account_id: UUID = self.aggregate.id
        return account_id


@dataclass(eq=False)
class Entry:
    """An event, or the text of a row, that was written and is not committed."""

    holding: Holding | None
    amount: int = 0
    text: str = ""

    @property
    def key(self) -> Key | None:
        """The event; None for a row."""
        return None if self.holding is None else (self.holding.id, self.amount)


@dataclass(eq=False)
class Frame:
    """The transaction, or a savepoint in it."""

    level: Level = "root"
    handle: Any = None
    entries: list[Entry] = field(default_factory=list)


@dataclass(eq=False)
class Truth:
    """What is stored, and what is pending in which savepoint."""

    streams: dict[UUID, list[int]] = field(default_factory=dict)
    """The amounts of the committed events, by account."""
    texts: list[str] = field(default_factory=list)
    """The committed rows."""
    frames: list[Frame] = field(default_factory=lambda: [Frame()])
    own: list[Key] = field(default_factory=list)
    """The committed events of the program itself, which are to be signalled."""
    unsure: set[Key] = field(default_factory=set)
    """Committed by the database itself: they may be signalled."""
    untold: list[Key] = field(default_factory=list)
    """Lost although nobody asked for that, so that somebody has to be told."""
    odd: bool = False
    """Whether a transaction was ended behind SQLAlchemy, whose own idea of it may make the next step fail."""
    written: bool = False
    """Whether the transaction may hold locks."""
    overtaken: bool = False
    """Whether another connection has committed since the transaction began."""

    @property
    def pending(self) -> list[Entry]:
        """What is written and not committed."""
        return [entry for frame in self.frames for entry in frame.entries]

    @property
    def pending_events(self) -> list[Key]:
        """The events among it."""
        return [entry.key for entry in self.pending if entry.key is not None]

    @property
    def has_savepoints(self) -> bool:
        """Whether there are savepoints of which SQLAlchemy knows."""
        return any(frame.level in ("orm", "connection") for frame in self.frames)

    def stream(self, account_id: UUID) -> list[int]:
        """Return the amounts of an account's events, as the transaction has to see them."""
        return self.streams.get(account_id, []) + [
            amount for owner, amount in self.pending_events if owner == account_id
        ]

    def expected(self, holding: Holding, *, aborted: bool) -> Expected:
        """Return what a save of an object has to do."""
        if holding.unsure or holding.lost:
            return "any" if holding.unsure else "stale"
        stream = self.stream(holding.id)
        if stream[: len(holding.history)] != holding.history:
            # It was read with events that are gone.
            return "refused"
        if not holding.unsaved:
            return "nothing"
        if self.odd or aborted:
            return "any"
        if stream != holding.history:
            return "conflict"
        return "any" if self.overtaken else "stored"

    def saved(self, holding: Holding) -> None:
        """An object's changes were written."""
        self.frames[-1].entries += [Entry(holding, amount) for amount in holding.unsaved]
        holding.history += holding.unsaved
        holding.unsaved = []

    def commit(self, *, unsure: bool = False) -> None:
        """Everything that is pending was committed."""
        for entry in self.pending:
            if entry.holding is None:
                self.texts.append(entry.text)
                continue
            key = entry.holding.id, entry.amount
            self.streams.setdefault(key[0], []).append(key[1])
            self.own.append(key)
            if unsure:
                self.unsure.add(key)
                entry.holding.unsure = True
        self._ended()

    def rollback(self, *, told: bool = True) -> None:
        """Everything that is pending is gone."""
        if not told:
            self.untold += self.pending_events
        self.lose(self.pending)
        self._ended()

    def _ended(self) -> None:
        self.frames = [Frame()]
        self.written = self.overtaken = False

    def lose(self, entries: list[Entry]) -> None:
        """Mark the objects of what is gone."""
        for entry in entries:
            if entry.holding is not None:
                entry.holding.lost = True

    def released(self, index: int) -> None:
        """A savepoint and those within it go on as a part of what is around it."""
        ended, self.frames = self.frames[index:], self.frames[:index]
        self.frames[-1].entries += [entry for frame in ended for entry in frame.entries]

    def rolled_back(self, index: int, *, stays: bool) -> None:
        """What was done since a savepoint is gone."""
        ended, self.frames = self.frames[index:], self.frames[:index]
        self.lose([entry for frame in ended for entry in frame.entries])
        if stays:
            self.frames.append(Frame(ended[0].level, ended[0].handle))

    def differences(
        self, versions: dict[UUID, list[int]], streams: dict[UUID, list[int]], texts: list[str]
    ) -> list[str]:
        """Compare with what the database has."""
        found = []
        for account_id in versions.keys() | self.streams.keys():
            wanted = self.streams.get(account_id, [])
            numbers = versions.get(account_id, [])
            if numbers != list(range(1, len(numbers) + 1)):
                found.append(f"a stream has the versions {numbers}")
            elif streams.get(account_id, []) != wanted:
                found.append(f"stored are {streams.get(account_id, [])}, and it should be {wanted}")
        if Counter(texts) != Counter(self.texts):
            found.append(f"rows are {sorted(texts)}, and it should be {sorted(self.texts)}")
        return found
