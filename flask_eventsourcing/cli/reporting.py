"""What a worker tells of its progress: a bar on a terminal while it catches up, otherwise a line a period."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from ..projections.runners import Runner

logger = logging.getLogger(__name__)

FIRST_LINE = 2.0
"""Seconds after which the first lines are logged, or earlier when the period is shorter."""
WORTH_A_BAR = 1000
"""Positions behind from which there is a bar."""


class Reporter:
    """Watches runners and tells how far they are.

    :param period: seconds between two log lines of each.
    """

    def __init__(self, runners: Sequence[Runner], period: float) -> None:
        self.runners = runners
        self.period = period
        self.on_terminal = sys.stderr.isatty()
        now = time.monotonic()
        self._due = now + min(FIRST_LINE, period)
        self._counted = dict.fromkeys(runners, (now, 0))
        self._bar: Any = None
        self._bar_counted = (now, 0)

    def tick(self) -> None:
        """Log what is due, or move the bar."""
        if self.on_terminal:
            behind = [each for each in self.runners if each.state == "catching up" and _lag(each) > 0]
            if self._bar is None and sum(map(_lag, behind)) >= WORTH_A_BAR:
                self._start_bar()
            if self._bar is not None:
                self._move_bar()
                if not behind:
                    self.finish_bar()
                    self._due = time.monotonic()
        if self._bar is None and time.monotonic() >= self._due:
            self.log_lines()

    def log_lines(self) -> None:
        """Log a line for each runner."""
        for runner in self.runners:
            logger.info("%s", self._line(runner))
        self._due = time.monotonic() + self.period

    def finish_bar(self) -> None:
        """End the line of the bar."""
        if self._bar is not None:
            self._move_bar()
            self._bar.render_finish()
            self._bar = None

    def _line(self, runner: Runner) -> str:
        now, events = time.monotonic(), runner.events
        since, counted = self._counted[runner]
        self._counted[runner] = now, events
        rate = (events - counted) / max(now - since, 0.001)
        head = max(runner.head, runner.position)
        text = f"{runner.name}: {runner.state}, position {runner.position}"
        if runner.state == "standing by":
            return f"{text}; another process runs it"
        return f"{text}, head {head}, lag {head - runner.position}, {rate:.0f} events/s"

    def _start_bar(self) -> None:
        self._bar_counted = time.monotonic(), self._events()
        self._from = sum(runner.position for runner in self.runners)
        names = ", ".join(runner.name for runner in self.runners)
        self._bar = click.progressbar(
            length=self._length(),
            label=names if len(names) <= 40 else f"{len(self.runners)} projections",
            show_percent=True,
            item_show_func=lambda _: self._rate(),
            file=sys.stderr,
        )
        self._bar.__enter__()

    def _move_bar(self) -> None:
        # The log grows meanwhile.
        self._bar.length = self._length()
        done = sum(runner.position for runner in self.runners) - self._from
        if done > self._bar.pos:
            self._bar.update(done - self._bar.pos)

    def _length(self) -> int:
        return sum(max(runner.head, runner.position) for runner in self.runners) - self._from

    def _events(self) -> int:
        return sum(runner.events for runner in self.runners)

    def _rate(self) -> str:
        since, counted = self._bar_counted
        seconds = time.monotonic() - since
        return f"{(self._events() - counted) / seconds:,.0f} events/s" if seconds > 0.1 else ""


def _lag(runner: Runner) -> int:
    return max(0, runner.head - runner.position)
