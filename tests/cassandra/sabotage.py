"""Writers and readers that lack one protection each: the tests are to find each of them missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from uuid import uuid4

from flask_eventsourcing.cassandra.memory import NOTHING, Memory
from flask_eventsourcing.cassandra.queueing import Ticket
from flask_eventsourcing.cassandra.rows import Append, MaybeDoneError, NotDoneError, Row, Subject, Upstream
from flask_eventsourcing.cassandra.walking import Tries, Walker
from flask_eventsourcing.cassandra.writing import Writer


class ForgetsWinner(Writer):
    """Does not look at the row that won."""

    def _check(self, memory: Memory, winner: Row) -> None:
        memory.meet(replace(winner, parts=[], versions=[]))


class SendsAnother(Writer):
    """Sends a row with another id after a time-out."""

    def _insert(self, row: Row, tries: Tries) -> Row | None:
        sent = replace(row, id=uuid4())
        try:
            return self._store.insert(sent)
        except (NotDoneError, MaybeDoneError) as error:
            self._again(row, tries, error)
            return self._insert(row, tries)


class ReadsNoStream(Writer):
    """Takes for granted what the caller has read of an aggregate."""

    def _refusal(self, memory: Memory, append: Append) -> str | None:
        for span in append.spans():
            if memory.known(span.originator_id) is None:
                memory.offer(span.originator_id, span.first - 1, memory.horizon)
        return super()._refusal(memory, append)

    def _load_all(self, memory: Memory, batch: Sequence[Ticket]) -> None:
        """Read nothing."""

    def _load(self, memory: Memory, key: Subject) -> int:
        return super()._load(memory, key) if isinstance(key, Upstream) else NOTHING


class LeavesUnindexed(Writer):
    """Refuses without writing what a writer that died has left."""

    def _before_refusal(self, memory: Memory, ticket: Ticket) -> None:
        pass


class AdmitsOnce(Writer):
    """Does not check again what it has checked before it met further rows."""

    def _admit_all(self, memory: Memory, batch: list[Ticket]) -> None:
        batch[:] = [each for each in batch if self._admit(memory, each)]

    def _is_ahead(self, memory: Memory, append: Append) -> bool:
        return True


class LeavesGaps(Walker):
    """Takes the rows that it sees, be it that they do not touch."""

    def rows(self, position: int, *, states: bool = False, page: int = 200) -> Iterator[Row]:
        """Yield what is there."""
        while found := self.repeat(partial(self.store.read_rows, position, page, states=states)):
            yield from found
            position = found[-1].end


def leave_gaps(part: object) -> None:
    """Let a writer or reader take rows that do not touch."""
    walker: Walker = part._walker  # type: ignore[attr-defined]
    part._walker = LeavesGaps(walker.store, walker._patience)  # type: ignore[attr-defined]


WITHOUT: dict[str, type[Writer]] = {
    "check of the winner": ForgetsWinner,
    "same id again": SendsAnother,
    "read of the stream": ReadsNoStream,
    "one head for a row": AdmitsOnce,
}
"""The writers by what they lack."""
TOUCHING = "touching"
"""What a writer or reader lacks after :func:`leave_gaps`."""


def without(protection: str, writer: type[Writer]) -> type[Writer]:
    """Return a class of writers that lacks a protection, if it is one of a writer alone."""
    sabotaged = WITHOUT.get(protection)
    return writer if sabotaged is None else type(f"{sabotaged.__name__}{writer.__name__}", (sabotaged, writer), {})
