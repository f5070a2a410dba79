"""Walks along the log row by row, and repeats what is safe to repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from eventsourcing.persistence import OperationalError

from ..exceptions import UnreadableEventError
from .rows import MaybeDoneError, NotDoneError, Row, Store, bucket_of

T = TypeVar("T")
PAUSE, LONGEST_PAUSE = 0.01, 0.5
"""Seconds between tries."""
PAGE = 500
"""Rows that are read at once without their states."""
FIRST_PAGE = 8
PAGE_BYTES = 4 * 2**20
"""The bytes of states after which fewer rows are read at once."""
LONGEST_PAGE = 128
"""The most rows that are read at once with their states: the next rows may be larger than those before."""
FEWER = 8
"""After an answer that was late, the next one has this many times fewer rows, because they may be large."""


class Tries:
    """Repeats a function until it succeeds or the time is over.

    :param patience: seconds.
    """

    def __init__(self, store: Store, patience: float) -> None:
        self._store = store
        self._end = store.now() + patience
        self._pause = PAUSE
        self.maybe: bool = False
        """Whether one of the tries may have succeeded."""

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self._store.now() >= self._end

    def failed(self, error: Exception) -> None:
        """Wait before the next try.

        :raises OperationalError: when the time is over.
        """
        self.maybe = self.maybe or isinstance(error, MaybeDoneError)
        if self.over:
            raise OperationalError(f"Cassandra did not answer in time: {error}") from error
        self._store.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def repeat(self, work: Callable[[], T]) -> T:
        """Call a function until it succeeds.

        :raises OperationalError: when the time is over.
        """
        while True:
            try:
                return work()
            except (NotDoneError, MaybeDoneError) as error:
                self.failed(error)


class Walker:
    """Reads the log of a store, and writes what is derived from it.

    :param patience: seconds for which each step is tried again.
    """

    def __init__(self, store: Store, patience: float) -> None:
        self.store: Store = store
        self._patience = patience

    def repeat(self, work: Callable[[], T]) -> T:
        """Call a function that may be repeated until it succeeds.

        :raises OperationalError: when the time is over.
        """
        return Tries(self.store, self._patience).repeat(work)

    def rows(self, position: int, *, states: bool = False, page: int = PAGE) -> Iterator[Row]:
        """Yield the rows from a position on to the end of the log; a row must begin at the position."""
        while True:
            at = position
            rows, page = self._page(at, page, states=states)
            for row in rows:
                if row.position != position:
                    found = self.settled(position)
                    yield found
                    position = found.end
                    break
                yield row
                position = row.end
            else:
                if len(rows) < page and bucket_of(position) == bucket_of(at):
                    return
            page = fitting(page, rows) if states else PAGE

    def _page(self, position: int, page: int, *, states: bool) -> tuple[Sequence[Row], int]:
        """Read rows, and fewer of them after an answer that was late. Return them, and how many were asked for."""
        sizes = [page]

        def read() -> Sequence[Row]:
            try:
                return self.store.read_rows(position, sizes[-1], states=states)
            except (NotDoneError, MaybeDoneError):
                sizes.append(max(1, sizes[-1] // FEWER))
                raise

        rows = self.repeat(read)
        return rows, sizes[-1]

    def settled(self, position: int) -> Row:
        """Return the row at a position where one is known to begin. Afterwards, reads without SERIAL see it too.

        :raises UnreadableEventError: when there is none, as another program has written the log.
        """
        found = self.repeat(lambda: self.store.read_row(position))
        if found is None:
            raise UnreadableEventError(
                f"The log has no row at position {position}, but one after it: another program has written to the log, "
                "or rows were lost. Restore the log from a backup."
            )
        return found

    def index(self, row: Row) -> None:
        """Write the rows that are derived from a row, and flag it."""
        full = self.settled(row.position) if row.contents is None else row
        self.repeat(lambda: self.store.index(full))
        self.store.flag(full)


def fitting(page: int, rows: Sequence[Row]) -> int:
    """Return how many rows to read next, by the size of those that were read with their states."""
    size = sum(len(each.state) for row in rows for each in row.contents or ())
    return max(1, page // 2) if size > PAGE_BYTES else min(2 * page, LONGEST_PAGE)
