"""Tries dead letters again, or gives them up, and applies the events that have waited behind them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from eventsourcing.persistence import Notification

from ..exceptions import DeadLetterError
from ..persistence.dialects import is_outage
from .applying import Applier
from .consumers import Consumer
from .dead_letters import DeadLetter


@dataclass
class Repair:
    """What became of dead letters: those that were applied, were discarded, and have failed again."""

    applied: list[DeadLetter] = field(default_factory=list)
    discarded: list[DeadLetter] = field(default_factory=list)
    failed: list[DeadLetter] = field(default_factory=list)


def retry(consumer: Consumer, letter_ids: Collection[int] | None = None) -> Repair:
    """Apply failed events again, and then those of the same aggregates that wait behind them, in their order.

    Each is a transaction of its own. An event that fails again keeps those behind it waiting. A runner may be at work
    meanwhile.

    :param letter_ids: the dead letters; without them, all of the consumer's.
    :raises DeadLetterError: when there is no such letter.
    """
    with consumer.application.host.context():
        return _Repairer(consumer).retry(letter_ids)


def discard(consumer: Consumer, letter_id: int) -> Repair:
    """Give a failed event up, and apply those of the same aggregate that wait behind it.

    :raises DeadLetterError: when there is no such letter, or it is one that only waits.
    """
    with consumer.application.host.context():
        return _Repairer(consumer).discard(letter_id)


class _Repairer:
    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.applier = Applier(consumer)
        self.letters = self.applier.letters
        self.result = Repair()

    def _select(self, ids: Collection[int] | None = None, originator_id: str | None = None) -> list[DeadLetter]:
        with self.consumer.application.engine.connect() as connection:
            names = [self.consumer.name]
            return list(self.letters.select(connection, names, ids=ids, originator_id=originator_id))

    def retry(self, letter_ids: Collection[int] | None) -> Repair:
        found = self._select(letter_ids)
        missing = sorted(set(letter_ids or ()) - {letter.id for letter in found})
        if missing:
            raise DeadLetterError(f"{self.consumer.name} has no dead letter {', '.join(map(str, missing))}.")
        for originator_id in dict.fromkeys(letter.originator_id for letter in found):
            self._apply_all(originator_id)
        return self.result

    def discard(self, letter_id: int) -> Repair:
        found = self._select([letter_id])
        if not found:
            raise DeadLetterError(f"{self.consumer.name} has no dead letter {letter_id}.")
        letter = found[0]
        if letter.error is None:
            raise DeadLetterError(
                f"Dead letter {letter_id} only waits for an earlier one of {letter.originator_id}: "
                "discard or retry that one."
            )
        with self.consumer.application.host.transaction() as session:
            connection = self.applier.connection(session)
            self.consumer.checkpoint.lock(connection)
            self.letters.remove(connection, letter_id)
        self.result.discarded.append(letter)
        self._apply_all(letter.originator_id, up_to_failed=True)
        return self.result

    def _apply_all(self, originator_id: str, *, up_to_failed: bool = False) -> None:
        while letters := self._select(originator_id=originator_id):
            letter = letters[0]
            if (up_to_failed and letter.error is not None) or not self._apply(letter):
                return

    def _apply(self, letter: DeadLetter) -> bool:
        try:
            with self.consumer.application.host.transaction() as session:
                connection = self.applier.connection(session)
                # Keeps the runner out: what it adds behind this letter comes before or after, not in between.
                self.consumer.checkpoint.lock(connection)
                if not self.letters.select(connection, [self.consumer.name], ids=[letter.id]):
                    return True
                self.applier.handle(session, self._notification(letter))
                session.flush()
                self.letters.remove(connection, letter.id)
        except Exception as error:
            # A handler may raise anything; the letter says what.
            if is_outage(error):
                raise
            with self.consumer.application.engine.begin() as connection:
                self.letters.note_failure(connection, letter, error)
            self.result.failed.append(self._select([letter.id])[0])
            return False
        self.result.applied.append(letter)
        return True

    def _notification(self, letter: DeadLetter) -> Notification:
        found = self.consumer.application.read_log(letter.position - 1, 1, letter.position, ())
        if not found:
            raise DeadLetterError(f"The event of dead letter {letter.id} is not in the log any more: discard it.")
        return found[0]
