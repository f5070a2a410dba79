"""How long writers of several processes wait for each other: who lost more waits less."""

from __future__ import annotations

import random

from .rows import Store

FIRST_GUESS = 0.01
LONGEST = 0.2
SINCE = 1.0
"""Seconds for which others are taken to be still at work."""
PATIENT = 4
"""Losses behind which nobody waits."""


class Pace:
    """Measures how long an insert takes, and waits by it.

    Exponential back-off would let the one starve that loses most: those who come last wait least.
    """

    def __init__(self, store: Store, draw: random.Random | None = None) -> None:
        self._store = store
        self._draw = draw or random.Random()  # noqa: S311
        self._typical = FIRST_GUESS
        self._lost = float("-inf")
        self._wrote_last = False

    def before(self, losses: int) -> None:
        """Let others go first, if this process has written the last row while they write too."""
        if losses == 0 and self._wrote_last and self._store.now() - self._lost < SINCE:
            self._store.sleep(self._typical * self._draw.uniform(0.25, 0.75))

    def took(self, seconds: float) -> None:
        """Note how long an insert took."""
        self._typical = min(0.8 * self._typical + 0.2 * seconds, LONGEST)

    def won(self) -> None:
        """Note that this process has written the last row."""
        self._wrote_last = True

    def lost(self, losses: int) -> None:
        """Wait after a loss.

        :param losses: how many there were for these appends.
        """
        self._lost, self._wrote_last = self._store.now(), False
        if losses < PATIENT:
            self._store.sleep(self._typical * self._draw.random() / losses)
