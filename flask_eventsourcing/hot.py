"""Which aggregates had a conflict lately, so that units of work queue for them before they read."""

from __future__ import annotations

import time
from collections import OrderedDict
from uuid import UUID

Key = tuple[str, UUID | str]


def sort_key(key: Key) -> tuple[str, str]:
    """The order in which units of work queue for several aggregates."""
    return key[0], str(key[1])


class HotAggregates:
    """Remembers conflicts for a while, in this process.

    :param seconds: how long after its last conflict an aggregate is queued for.
    :param most: how many aggregates are remembered.
    """

    def __init__(self, seconds: float = 1.0, most: int = 1024) -> None:
        self._seconds = seconds
        self._most = most
        self._until: OrderedDict[Key, float] = OrderedDict()

    def heat(self, key: Key) -> None:
        """Note a conflict."""
        self._until[key] = time.monotonic() + self._seconds
        while len(self._until) > self._most:
            try:
                self._until.popitem(last=False)
            except KeyError:  # another thread has emptied it
                break

    def is_hot(self, key: Key) -> bool:
        """Whether there was a conflict lately."""
        until = self._until.get(key)
        if until is None:
            return False
        if until < time.monotonic():
            self._until.pop(key, None)
            return False
        return True
