"""How long a runner waits between two tries, and how many events it takes at a time."""

from __future__ import annotations

import time

AIM = 0.75
"""How much of the longest time of a batch the next batch is to take."""


class Backoff:
    """A pause that grows from one try to the next.

    :param shortest: its seconds at first.
    :param longest: the seconds to which it grows.
    :param growth: by how much it is multiplied.
    """

    def __init__(self, shortest: float, longest: float, growth: float = 2.0) -> None:
        self.seconds: float = shortest
        self._shortest = shortest
        self._longest = longest
        self._growth = growth

    def take(self) -> float:
        """Return the seconds of a pause, and make the next one longer."""
        seconds = self.seconds
        self.grow()
        return seconds

    def grow(self) -> None:
        """Make the next pause longer."""
        self.seconds = min(self.seconds * self._growth, self._longest)

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self.seconds = self._shortest


class Pace:
    """How many events are taken at a time: more while it catches up, fewer where a batch takes too long.

    :param most: events in one commit.
    :param seconds: that a batch takes at most, roughly.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self.limit: int = 1
        self.begin()

    def begin(self) -> None:
        """Note that a batch begins."""
        self._began = time.monotonic()
        self.until: float = self._began + self.seconds
        """When it is to end, by the monotonic clock."""

    @property
    def spent(self) -> float:
        """The seconds since the batch began."""
        return time.monotonic() - self._began

    def adapt(self, seconds: float, size: int) -> None:
        """Adapt to the time that a batch of a size has taken."""
        # At the end of the log a page is often a single event, which tells nothing about the speed.
        if seconds > self.seconds or (size == self.limit and seconds < self.seconds / 2):
            fitting = int(size * AIM * self.seconds / seconds) if seconds > 0 else self.most
            self.limit = min(self.most, max(1, fitting))
