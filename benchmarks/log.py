"""Reads a log to its end."""

from __future__ import annotations

from .contenders import Worker

PAGE = 1000
"""Events of the log that are read at a time."""


def read_log(worker: Worker) -> int:
    """Read the log from its beginning to its end, and return how many events there are."""
    found, position = 0, 0
    while True:
        number, position = worker.page(position + 1, PAGE)
        worker.rollback()
        found += number
        if number < PAGE:
            return found
