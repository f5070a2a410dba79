"""What a worker tells of its progress: a bar on a terminal while it catches up, otherwise a line a period."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from ..projections.runners import Runner
from . import Bar, Output

logger = logging.getLogger(__name__)

FIRST_LINE = 2.0
"""Seconds after which the first lines are logged, or earlier when the period is shorter."""
WORTH_A_BAR = 1000
"""Positions behind from which there is a bar."""


class Reporter:
    """Watches runners and tells how far they are.

    :param period: seconds between two log lines of each.
    """

    def __init__(self, runners: Sequence[Runner], output: Output, period: float) -> None:
        self.runners = runners
        self.output = output
        self.period = period
        now = time.monotonic()
        self._due = now + min(FIRST_LINE, period)
        self._counted = dict.fromkeys(runners, (now, 0))
        self._stretch: _Stretch | None = None
        self._draws = True

    def tick(self) -> None:
        """Log what is due, or move the bar."""
        if self._draws:
            behind = [each for each in self.runners if each.state == "catching up" and _lag(each) > 0]
            if self._stretch is None and sum(map(_lag, behind)) >= WORTH_A_BAR:
                self._start_bar()
            if self._stretch is not None:
                self._stretch.move()
                if not behind:
                    self.finish_bar()
                    self._due = time.monotonic()
        if self._stretch is None and time.monotonic() >= self._due:
            self.log_lines()

    def log_lines(self) -> None:
        """Log a line for each runner."""
        for runner in self.runners:
            logger.info("%s", self._line(runner))
        self._due = time.monotonic() + self.period

    def finish_bar(self) -> None:
        """End the line of the bar."""
        if self._stretch is not None:
            self._stretch.move()
            self._stretch.bar.finish()
            self._stretch = None

    def _start_bar(self) -> None:
        names = ", ".join(runner.name for runner in self.runners)
        bar = self.output.bar(
            sum(map(_end, self.runners)) - _position(self.runners),
            names if len(names) <= 40 else f"{len(self.runners)} projections",
        )
        # Without a terminal, log lines it is from now on.
        self._draws = bar is not None
        self._stretch = None if bar is None else _Stretch(self.runners, bar)

    def _line(self, runner: Runner) -> str:
        now, events = time.monotonic(), runner.events
        since, counted = self._counted[runner]
        self._counted[runner] = now, events
        rate = (events - counted) / max(now - since, 0.001)
        text = f"{runner.name}: {runner.state}, position {runner.position}"
        if runner.state == "standing by":
            return f"{text}; another process runs it"
        return f"{text}, head {_end(runner)}, lag {_lag(runner)}, {rate:.0f} events/s"


class _Stretch:
    """A stretch of the logs that is being caught up with, shown as a bar."""

    def __init__(self, runners: Sequence[Runner], bar: Bar) -> None:
        self.runners = runners
        self.bar = bar
        self.started = time.monotonic()
        self.events = _events(runners)
        self.position = _position(runners)

    def move(self) -> None:
        """Show how far it is; the log grows meanwhile."""
        seconds = time.monotonic() - self.started
        rate = f"{(_events(self.runners) - self.events) / seconds:,.0f} events/s" if seconds > 0.1 else ""
        length = sum(map(_end, self.runners)) - self.position
        self.bar.move(_position(self.runners) - self.position, length, rate)


def _events(runners: Sequence[Runner]) -> int:
    return sum(runner.events for runner in runners)


def _position(runners: Sequence[Runner]) -> int:
    return sum(runner.position for runner in runners)


def _end(runner: Runner) -> int:
    return max(runner.head, runner.position)


def _lag(runner: Runner) -> int:
    return max(0, runner.head - runner.position)
