"""How long a runner pauses, how many events it takes at a time, and what it tells of that."""

from __future__ import annotations

import pytest

from flask_eventsourcing.projections.runners import Progress
from flask_eventsourcing.projections.runners.pace import Backoff, Pace


def test_a_pause_grows_to_its_longest_and_begins_again() -> None:
    """Tries become rarer up to a limit, and after a success the first pause is short again."""
    pause = Backoff(0.1, 0.5)
    seen = []
    for _ in range(5):
        seen.append(pause.seconds)
        pause.grow()
    assert seen == [0.1, 0.2, 0.4, 0.5, 0.5]
    pause.reset()
    assert pause.seconds == 0.1


def test_a_pause_that_is_taken_grows() -> None:
    """Each pause that a runner takes is longer than the one before."""
    pause = Backoff(0.002, 1.0, 1.5)
    assert [pause.take(), pause.take(), pause.seconds] == pytest.approx([0.002, 0.003, 0.0045])


def test_a_pause_grows_as_fast_as_is_asked() -> None:
    """The growth can be chosen."""
    pause = Backoff(1.0, 100.0, 1.5)
    pause.grow()
    pause.grow()
    assert pause.seconds == 2.25


def test_batches_grow_while_they_are_full_and_quick() -> None:
    """Catching up begins with one event, and goes on with as many as are done in most of the time for a batch."""
    pace = Pace(1000, 1.0)
    seen = []
    for _ in range(5):
        seen.append(pace.limit)
        # What each batch takes, and each event.
        pace.adapt(0.03125 + pace.limit * 0.0009765625, pace.limit)
    assert seen == [1, 23, 321, 698, 698]


@pytest.mark.parametrize("seconds", [0.0, 1e-9])
def test_batches_have_a_most(seconds: float) -> None:
    """However quick they are, and even if the clock has not moved, batches have no more events than the most."""
    pace = Pace(40, 1.0)
    pace.adapt(seconds, 1)
    assert pace.limit == 40


def test_a_batch_that_takes_too_long_makes_the_next_one_smaller() -> None:
    """After a slow batch the next one has as many events as fit into the time, and never none."""
    pace = Pace(1000, 0.5)
    pace.limit = 100
    for size, seconds, expected in [(100, 1.0, 37), (10, 0.625, 6), (6, 5.0, 1), (1, 5.0, 1)]:
        pace.adapt(seconds, size)
        assert pace.limit == expected


@pytest.mark.parametrize(("seconds", "size"), [(0.01, 5), (0.4, 16), (0.01, 0)])
def test_what_says_nothing_changes_nothing(seconds: float, size: int) -> None:
    """A page that was not full, and a batch of about the right time, do not change the size."""
    pace = Pace(1000, 0.5)
    pace.limit = 16
    pace.adapt(seconds, size)
    assert pace.limit == 16


def test_progress_is_never_behind_what_it_has_reached() -> None:
    """A runner that is further than it has looked has no lag."""
    progress = Progress()
    assert (progress.end, progress.lag) == (0, 0)
    progress.position, progress.high_water_mark = 3, 10
    assert (progress.end, progress.lag) == (10, 7)
    progress.position = 12
    assert (progress.end, progress.lag) == (12, 0)
