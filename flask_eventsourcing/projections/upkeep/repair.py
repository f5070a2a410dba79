"""Retries or discards dead letters, and applies the events that wait behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from eventsourcing.persistence import Notification

from ...exceptions import DeadLetterError
from ...persistence.dialects import MAY_PASS
from ..applying import Applier, EventError, may_be_its_own, telling
from ..consumers import Consumer
from ..dead_letters import PAGE, Aggregate, DeadLetter

TRIES = 20
"""How often a letter is tried again where another writer was first."""

Outcome = Literal["applied", "discarded", "failed"]


@dataclass
class Repair:
    """The result: dead letters that were applied, were discarded, or failed again."""

    applied: list[DeadLetter] = field(default_factory=list)
    discarded: list[DeadLetter] = field(default_factory=list)
    failed: list[DeadLetter] = field(default_factory=list)

    def add(self, outcome: Outcome, letter: DeadLetter) -> None:
        """Add a letter."""
        found: list[DeadLetter] = getattr(self, outcome)
        found.append(letter)


Tell = Callable[[Outcome, DeadLetter], None]


def retry(consumer: Consumer, letter_ids: Collection[int] | None = None, *, tell: Tell | None = None) -> Repair:
    """Apply failed events again, and then those of the same aggregates that wait behind them, in their order.

    Each event has a transaction of its own. If it fails again, those behind it go on waiting. A runner may run at the
    same time. The letters are read in pages.

    :param letter_ids: the dead letters; by default all that the consumer has at the beginning.
    :param tell: called with the result of each letter. Then the return value is empty, so many thousand letters need
        not be kept in memory.
    :raises DeadLetterError: when there is no such letter; then nothing was tried.
    """
    with consumer.application.host.context():
        return _Repairer(consumer, tell).retry(letter_ids)


def discard(consumer: Consumer, letter_id: int, *, tell: Tell | None = None) -> Repair:
    """Discard a failed event, and apply those of the same aggregate that wait behind it.

    Use it where the row is right without the event; where it is not, correct the handler and call :func:`retry`.

    :param tell: as in :func:`retry`.
    :raises DeadLetterError: when there is no such letter, or it only waits for another one.
    """
    with consumer.application.host.context():
        return _Repairer(consumer, tell).discard(letter_id)


class _Repairer:
    def __init__(self, consumer: Consumer, tell: Tell | None) -> None:
        self.consumer = consumer
        self.engine = consumer.application.engine
        self.applier = Applier(consumer)
        self.letters = self.applier.letters
        self.result = Repair()
        self.tell = tell or self.result.add
        self.handling = False
        """Whether the handler of the letter in progress was called."""
        self.tried: set[int] = set()
        """The positions of those that have failed in this run."""

    def _read(self, **which: Any) -> DeadLetter | None:
        with self.engine.connect() as connection:
            found = self.letters.select(connection, [self.consumer.name], limit=1, **which)
        return found[0] if found else None

    def retry(self, letter_ids: Collection[int] | None) -> Repair:
        name = self.consumer.name
        if letter_ids is None:
            after, last = 0, self._last()
            while page := self._page(after, last):
                after = page[-1].first
                self._apply_page([each for each in page if each.first not in self.tried])
            return self.result
        with self.engine.connect() as connection:
            missing = sorted(set(letter_ids) - set(self.letters.find(connection, [name], letter_ids)))
            if missing:
                raise DeadLetterError(f"{name} has no dead letter {', '.join(map(str, missing))}.")
            originators = self.letters.originators(connection, name, letter_ids)
            found = self.letters.aggregates_of(connection, name, originators)
        for start in range(0, len(found), PAGE):
            self._apply_page(found[start : start + PAGE])
        return self.result

    def _last(self) -> int:
        with self.engine.connect() as connection:
            return self.letters.last(connection, self.consumer.name)

    def _page(self, after: int, last: int) -> Sequence[Aggregate]:
        with self.engine.connect() as connection:
            return self.letters.aggregates(connection, self.consumer.name, after=after, upto=last)

    def discard(self, letter_id: int) -> Repair:
        letter = self._read(ids=[letter_id])
        if letter is None:
            raise DeadLetterError(f"{self.consumer.name} has no dead letter {letter_id}.")
        if letter.error is None:
            raise DeadLetterError(
                f"Dead letter {letter_id} only waits for an earlier one of {letter.originator_id}: "
                "discard or retry that one."
            )
        self.consumer.application.host.retry(partial(self._remove, letter_id), TRIES)
        self.tell("discarded", letter)
        self._apply_page(self._left([letter.originator_id]), up_to_failed=True)
        return self.result

    def _remove(self, letter_id: int) -> None:
        with self.consumer.application.host.transaction() as session:
            connection = self.applier.connection(session)
            self.consumer.checkpoint.lock(connection)
            self.letters.remove(connection, letter_id)

    def _left(self, originator_ids: Sequence[str]) -> Sequence[Aggregate]:
        with self.engine.connect() as connection:
            return self.letters.aggregates_of(connection, self.consumer.name, originator_ids)

    def _apply_page(self, page: Sequence[Aggregate], *, up_to_failed: bool = False) -> None:
        """Apply the letters of some aggregates, each up to one that fails again."""
        while page:
            done = [each for each in page if self._apply_all(each, up_to_failed)]
            # A runner may have set aside further events before it saw that the last letter is gone.
            page = self._left([each.originator_id for each in done])

    def _apply_all(self, aggregate: Aggregate, up_to_failed: bool) -> bool:
        after = aggregate.first - 1
        while after < aggregate.last:
            letter = self._read(originator_id=aggregate.originator_id, after=after)
            if letter is None:
                return True
            if (up_to_failed and letter.error is not None) or not self._apply(letter):
                return False
            after = letter.position
        return True

    def _apply(self, letter: DeadLetter) -> bool:
        self.handling = False
        try:
            with telling():
                if not self.consumer.application.host.retry(partial(self._apply_once, letter), TRIES):
                    return True
        except (EventError, *MAY_PASS) as error:
            if not isinstance(error, EventError) and not (self.handling and may_be_its_own(error)):
                raise
            self.tried.add(letter.position)
            # In an outage this raises the error.
            with self.engine.begin() as connection:
                self.letters.note_failure(connection, letter, error.__cause__ or error)
            self.tell("failed", self._read(ids=[letter.id]) or letter)
            return False
        self.tell("applied", letter)
        return True

    def _apply_once(self, letter: DeadLetter) -> bool:
        """Apply one that is still there; returns False for one that is not."""
        self.handling = False
        with self.consumer.application.host.transaction() as session:
            connection = self.applier.connection(session)
            # Keeps the runner out, which could add a letter behind this one in the meantime.
            self.consumer.checkpoint.lock(connection)
            if not self.letters.select(connection, [self.consumer.name], ids=[letter.id]):
                return False
            notification, self.handling = self._notification(letter), True
            self.applier.handle(session, notification)
            session.flush()
            self.letters.remove(connection, letter.id)
        return True

    def _notification(self, letter: DeadLetter) -> Notification:
        found = self.consumer.application.read_log(letter.position - 1, 1, letter.position, ())
        if not found:
            raise DeadLetterError(f"The event of dead letter {letter.id} is not in the log any more: discard it.")
        return found[0]
