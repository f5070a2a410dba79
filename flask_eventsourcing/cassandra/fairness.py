"""How long writers of several processes wait for each other: the winner lets the others go first."""

from __future__ import annotations

import random

from .rows import Store

FIRST_GUESS = 0.01
LONGEST = 1.0
"""The most seconds that an insert is taken to need."""
SINCE = 1.0
"""Seconds for which others are taken to be still at work."""
MOST_OTHERS = 8


class Pace:
    """Lets writers of several processes take turns: waits as long as inserts take and as other writers are active.

    Exponential back-off would let the one starve that loses most. So who has won waits for about as many inserts as
    there are others; who lost waits the less the more often, and not at all when it has lost as often as there are
    others.
    """

    def __init__(self, store: Store, draw: random.Random | None = None) -> None:
        self._store = store
        self._draw = draw or random.Random()  # noqa: S311
        self._typical = FIRST_GUESS
        self._others = 1.0
        self._lost_since = 0
        """Losses since this process has written a row."""
        self._lost = float("-inf")
        self._wrote_last = False

    def before(self, losses: int) -> None:
        """Wait before an insert if this process has written the last row and others write too."""
        turn = self._typical * min(self._others, MOST_OTHERS)
        if losses == 0 and self._wrote_last and self._store.now() - self._lost < SINCE + turn:
            self._store.sleep(turn * self._draw.uniform(0.75, 1.25))

    def took(self, seconds: float) -> None:
        """Note how long an insert took."""
        self._typical = min(0.8 * self._typical + 0.2 * seconds, LONGEST)

    def won(self) -> None:
        """Note that this process has written the last row."""
        self._others = max(1.0, (self._others + self._lost_since) / 2)
        self._lost_since, self._wrote_last = 0, True

    def lost(self, losses: int) -> None:
        """Wait after a loss.

        :param losses: how often these appends have lost so far.
        """
        self._lost_since += 1
        self._lost, self._wrote_last = self._store.now(), False
        left = 1 - losses / (min(self._others, MOST_OTHERS) + 1)
        if left > 0:
            self._store.sleep(self._typical * left * self._draw.uniform(0, 0.5))
