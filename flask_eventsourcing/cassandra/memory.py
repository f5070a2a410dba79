"""The memory of one process: the log from its horizon on."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Collection
from uuid import UUID

from .rows import Append, Horizon, Row, Subject, Upstream, row_of

NOTHING = -1
"""Stands for the version of an aggregate without events, and the position of an upstream application without one."""
OFFERED = 10_000
"""How many versions are kept of aggregates without a row since the horizon."""


class Versions:
    """The last versions of aggregates: those in rows of the log, and some that were read from streams."""

    def __init__(self) -> None:
        self._told: dict[Subject, tuple[int, int]] = {}
        """With the position of the row."""
        self._read: OrderedDict[Subject, int] = OrderedDict()
        """It may forget a version, which can be read again."""

    def get(self, key: Subject) -> int | None:
        """Return the last version of an aggregate, or None if it is not known."""
        told = self._told.get(key)
        return self._read.get(key) if told is None else told[0]

    def tell(self, key: Subject, version: int, position: int) -> None:
        """Take the version in a row."""
        self._told[key] = (version, position)

    def offer(self, key: Subject, version: int) -> None:
        """Take a version that was read, unless a row has a later one."""
        if key not in self._told:
            self._read[key] = version
            if len(self._read) > OFFERED:
                self._read.popitem(last=False)

    def forget(self, horizon: int) -> None:
        """Forget the versions that were read, and those in rows below a horizon."""
        # In this order, because the versions in rows are later than those that were read.
        self._read.clear()
        self._told = {key: told for key, told in self._told.items() if told[1] >= horizon}


class Memory:
    """Follows the log row by row.

    If no row since the horizon has an aggregate, one read of its stream after the horizon was read gives its last
    version. What is known from a row may be forgotten only when a later horizon has passed the row.

    :param horizon: where it begins; it must be read before everything else.
    """

    def __init__(self, horizon: Horizon) -> None:
        self.horizon: int = horizon.position
        self.head: int = horizon.position
        self.last_event: int = horizon.last_event
        self.last_row: tuple[int, UUID] | None = None
        """Position and id of the last row, or None if there is none since the horizon."""
        self._positions: deque[int] = deque()
        self._versions = Versions()
        self._unindexed: dict[int, set[Subject]] = {}
        self._lock = threading.Lock()

    def known(self, key: Subject) -> int | None:
        """Return the last version of an aggregate, or the last position of an upstream application; None if unknown."""
        return self._versions.get(key)

    def offer(self, key: Subject, version: int | None, horizon: int) -> None:
        """Take the last version of an aggregate that no row has had yet.

        :param horizon: the horizon of this memory before the version was read.
        """
        with self._lock:
            if horizon == self.horizon:
                self._versions.offer(key, NOTHING if version is None else version)

    def meet(self, row: Row) -> None:
        """Take the row at the head of the log, and move the head behind it."""
        with self._lock:
            for key, version in row.versions:
                self._versions.tell(key, version, row.position)
            for part in row.parts:
                if part.upstream is not None and part.upstream_position is not None:
                    self._versions.tell(Upstream(part.upstream), part.upstream_position, row.position)
            if not row.indexed:
                self._unindexed[row.position] = row.keys
            self.head, self.last_event, self.last_row = row.end, row.last_event, (row.position, row.id)
            self._positions.append(row.position)

    @property
    def rows(self) -> int:
        """How many rows of the log it knows since the horizon."""
        return len(self._positions)

    def row(self, appends: list[Append]) -> Row:
        """Return the row that would record appends at the head."""
        return row_of(self.head, self.last_event, appends)

    def unindexed(self, keys: Collection[Subject], before: int | None = None) -> list[int]:
        """Return the rows about some of these keys that may not be indexed, in their order."""
        with self._lock:
            found = [position for position, about in self._unindexed.items() if not about.isdisjoint(keys)]
        return sorted(each for each in found if before is None or each < before)

    def indexed(self, position: int) -> None:
        """Note that a row is indexed."""
        with self._lock:
            self._unindexed.pop(position, None)

    def is_unindexed(self, position: int) -> bool:
        """Whether a row of the memory may not be indexed."""
        return position in self._unindexed

    def forget(self, horizon: int) -> None:
        """Forget the rows below a later horizon."""
        with self._lock:
            self._versions.forget(horizon)
            self._unindexed = {at: about for at, about in self._unindexed.items() if at >= horizon}
            while self._positions and self._positions[0] < horizon:
                self._positions.popleft()
            self.horizon = horizon
