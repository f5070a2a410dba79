"""How long writers of several processes wait for each other, in a time that is simulated."""

from __future__ import annotations

import pytest

from flask_eventsourcing.cassandra.fairness import Pace
from tests.cassandra.contention import Contention, bare

SECONDS = 15.0


class BacksOff(Pace):
    """Waits the longer the more often it lost."""

    def before(self, losses: int) -> None:
        """Wait for nobody."""

    def lost(self, losses: int) -> None:
        """Wait."""
        self._store.sleep(self._typical * self._draw.random() * 2 ** min(losses, 6))


@pytest.mark.parametrize("seed", range(2))
def test_nobody_starves(seed: int) -> None:
    """While four processes save all the time, none of their threads waits as long as exponential back-off lets some."""
    fair = Contention(seed, 4, 4, 0.03)
    assert fair.run(SECONDS) < 1.0
    assert Contention(seed, 4, 4, 0.03, BacksOff).run(SECONDS) > 3.0
    assert len(fair.done) > 2 * bare(seed, 4, SECONDS)


def test_who_is_alone_waits_for_nobody() -> None:
    """Without others nothing is waited for, and threads that share rows save more than bare inserts in turn."""
    alone = Contention(1, 1, 4)
    assert alone.run(SECONDS) < 0.2
    assert len(alone.done) > 1.5 * bare(1, 1, SECONDS)
