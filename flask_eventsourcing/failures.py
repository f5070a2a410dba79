"""What to do when a block of code may fail with any error, because it calls what a user has written.

What has to be undone after an error, and raises it, is a callback of an :class:`contextlib.ExitStack`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self


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


class Logged:
    """Logs the error of the block, and goes on: for calls of user code after something that cannot be undone.

    An error that is not an ``Exception``, such as Ctrl-C, is raised.

    :param message: the log's, with its arguments.
    """

    __slots__ = ("_arguments", "_logger", "_message")

    def __init__(self, logger: logging.Logger, message: str, *arguments: object) -> None:
        self._logger = logger
        self._message = message
        self._arguments = arguments

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._logger.error(self._message, *self._arguments, exc_info=error)
        return True
