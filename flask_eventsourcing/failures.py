"""What to do when a block of code may fail with any error, because it calls what a user has written.

Code that undoes something after an error, and lets the error pass, is a callback of a :class:`contextlib.ExitStack`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from eventsourcing.utils import resolve_topic


class Kept:
    """Keeps the error of the block for the caller, and goes on: for calls that may raise anything.

    An error that is not an ``Exception``, such as Ctrl-C, is raised.

    :param tell: called with the error, also with one that is raised.
    """

    __slots__ = ("_tell", "error")

    def __init__(self, tell: Callable[[BaseException], object] | None = None) -> None:
        self._tell = tell
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is not None and self._tell is not None:
            self._tell(error)
        if not isinstance(error, Exception):
            return False
        self.error = error
        return True


@contextmanager
def raised_as(made: Callable[[Exception], Exception]) -> Iterator[None]:
    """Around code of a user: raise another error instead of any error, with that one as the cause.

    :param made: makes the error.
    """
    with Kept() as kept:
        yield
    if kept.error is not None:
        raise made(kept.error) from kept.error


def call_each(logger: logging.Logger, calls: Iterable[tuple[Callable[[], object], str, tuple[object, ...]]]) -> None:
    """Call functions of a user after something that cannot be undone: each of them, even if one fails.

    An error that is not an ``Exception``, such as Ctrl-C, is raised.

    :param calls: the functions, each with the message, and its arguments, that is logged with its error.
    """
    for function, message, arguments in calls:
        with Kept() as kept:
            function()
        if kept.error is not None:
            logger.error(message, *arguments, exc_info=kept.error)


def resolve(topic: str) -> tuple[Any, Exception | None]:
    """Return the object that a topic names, or None and the error: the import of a module may raise any error."""
    with Kept() as kept:
        return resolve_topic(topic), None
    return None, kept.error
