"""Reads the log by position: only rows without a gap between them, and each after its streams are written."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from uuid import UUID

from eventsourcing.persistence import Notification

from ..exceptions import UnreadableEventError
from ..metadata import Recorded
from .rows import Key, Row, Store, bucket_of
from .walking import FIRST_PAGE, PAGE_BYTES, Walker
from .writing import Writer

EDGES = 256
LOOKED_AT = 10
"""How many aggregates of a row have their streams checked."""
REMEMBERED = 2000
"""How many events have their metadata and ids kept in memory."""


class Reader:
    """Reads the log of one application.

    :param store: what keeps the log.
    :param writer: the writer of this process, which knows what is indexed.
    :param patience: seconds for which each step is tried again.
    """

    def __init__(self, store: Store, writer: Writer, patience: float) -> None:
        self._store = store
        self._writer = writer
        self._walker = Walker(store, patience)
        self._edges: OrderedDict[int, None] = OrderedDict({1: None})
        """Positions at which a row begins, or at which the next row will begin."""
        self._recorded: OrderedDict[int, Recorded] = OrderedDict()
        self._head = 1
        """A position up to which the log is known to have rows."""

    def page(self, start: int, limit: int, stop: int | None, topics: Sequence[str]) -> list[Notification]:
        """Return the events from a position on."""
        found: list[Notification] = []
        if limit <= 0:
            return found
        for row in self._rows(start, page=max(1, min(limit, FIRST_PAGE))):
            for notification in self._notifications(row):
                if stop is not None and notification.id > stop:
                    return found
                if notification.id >= start and (not topics or notification.topic in topics):
                    found.append(notification)
                    if len(found) == limit:
                        return found
            if stop is not None and row.end > stop:
                break
        return found

    def page_to(self, start: int, limit: int, stop: int, size: int = PAGE_BYTES) -> tuple[list[Notification], int]:
        """Return the events from a position on, and the position up to which they are complete.

        :param size: the bytes of states after which it ends; at least one event is returned.
        """
        found: list[Notification] = []
        upto = start - 1
        for row in self._rows(start, page=max(1, min(limit, FIRST_PAGE))):
            for notification in self._notifications(row):
                if notification.id > stop:
                    return found, stop
                if notification.id >= start:
                    found.append(notification)
                    size -= len(notification.state)
                    if len(found) == limit or size <= 0:
                        return found, notification.id
            upto = max(upto, min(row.end - 1, stop))
            if upto == stop:
                break
        return found, upto

    def fitting(self, start: int, limit: int, stop: int | None, topics: Sequence[str]) -> int:
        """Return how many events from a position on can be returned at once because of their size, at least one."""
        found = size = 0
        for row in self._rows(start, page=1):
            for (position, *_), content in zip(row.located(), row.contents or (), strict=True):
                size += len(content.state) * (position >= start)
                if found == limit or size > PAGE_BYTES or (stop is not None and position > stop):
                    return max(1, found)
                found += position >= start and (not topics or content.topic in topics)
        return max(1, limit)

    def recorded(self, positions: Sequence[int]) -> dict[int, Recorded]:
        """Return the metadata and ids that were recorded with events, by position."""
        found: dict[int, Recorded] = {}
        for position in sorted(positions):
            if position not in found and position not in self._recorded:
                for row in self._rows(position, page=1):
                    found.update(recorded_of(row))
                    break
            known = found.get(position) or self._recorded.get(position)
            if known is not None:
                found[position] = known
        return {position: found[position] for position in positions if position in found}

    def write_streams(self) -> int:
        """Write the streams of each row of the log again, and return how many rows there are."""
        count = 0
        for row in self._walker.rows(1, states=True, page=FIRST_PAGE):
            self._walker.index(row)
            count += 1
        return count

    def unstreamed(self) -> list[Key]:
        """Return aggregates of the first and of the last row whose streams lack an event that should be there."""
        missing: list[Key] = []
        for row in (*islice(self._walker.rows(1, page=1), 1), self.last_row()):
            if row is None or not row.indexed:
                continue
            for key, version in islice(dict(row.versions).items(), LOOKED_AT):
                found = self._walker.repeat(partial(self._store.last_version, key))
                if found is None or found < version:
                    missing.append(key)
        return missing

    def last_row(self) -> Row | None:
        """Return the last row of the log without its states, or None for an empty log."""
        if self._head > 1:
            with suppress(UnreadableEventError):
                last = self._last_row()
                if last is not None:
                    return last
            self._forget()
        return self._last_row()

    def _forget(self) -> None:
        """Forget everything, after the tables were emptied, made again or restored."""
        self._edges, self._head = OrderedDict({1: None}), 1
        self._recorded.clear()

    def _last_row(self) -> Row | None:
        if self._head == 1:
            self._head = self._walker.repeat(self._store.read_horizon).position
        last: Row | None = None
        for row in self._walker.rows(self._begin(self._head - 1) if self._head > 1 else 1):
            last = row
        if last is not None:
            self._head = last.end
            self._note(last)
        return last

    def _rows(self, start: int, *, page: int) -> Iterator[Row]:
        """Yield the rows from the one with a position on, each indexed and with its states."""
        is_remembered = start > 1 and start in self._edges
        try:
            for row in self._walker.rows(self._begin(start), states=True, page=page):
                is_remembered = False
                if not self._writer.is_indexed(row):
                    self._walker.index(row)
                    self._writer.was_indexed(row)
                self._note(row)
                yield row
        except UnreadableEventError:
            if not is_remembered:
                raise
            self._forget()
            yield from self._rows(start, page=page)

    def _begin(self, position: int) -> int:
        if position in self._edges:
            return position
        found = self._walker.repeat(lambda: self._store.row_before(position))
        if found is None:
            # The log is empty, or ends far before the position.
            return position if bucket_of(position) > 1 else 1
        return found

    def _note(self, row: Row) -> None:
        self._edges[row.position] = self._edges[row.end] = None
        while len(self._edges) > EDGES:
            self._edges.popitem(last=False)

    def _notifications(self, row: Row) -> Iterator[Notification]:
        self._recorded.update(recorded_of(row))
        while len(self._recorded) > REMEMBERED:
            self._recorded.popitem(last=False)
        for (position, key, version, _), content in zip(row.located(), row.contents or (), strict=True):
            yield notification(position, key, version, content.topic, content.state)


def notification(position: int, key: Key, version: int, topic: str, state: bytes) -> Notification:
    """Make a notification."""
    return Notification(id=position, originator_id=key, originator_version=version, topic=topic, state=state)


def recorded_of(row: Row) -> dict[int, Recorded]:
    """Return the metadata and ids of a row's events, by position."""
    found: dict[int, Recorded] = {}
    for (position, _, _, at), content in zip(row.located(), row.contents or (), strict=True):
        event_id: UUID | None = content.event_id
        found[position] = Recorded(position, event_id, row.parts[at].time, dict(row.parts[at].metadata))
    return found
