"""What is done when a block fails, whatever it was: Ctrl-C and the end of a greenlet too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self


class OnError:
    """Calls a function when the block fails, to undo what was begun; the error goes on.

    :param undo: called with the error.
    """

    __slots__ = ("_undo",)

    def __init__(self, undo: Callable[[BaseException], object]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._undo(error)


class Kept:
    """Keeps what fails in the block, and goes on: for calls that may raise anything, where the caller has an answer.

    What is no ``Exception``, as Ctrl-C, goes on.
    """

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        return True


class Logged:
    """Logs what fails in the block, and goes on: for calls of the user's after what cannot be undone any more.

    What is no ``Exception``, as Ctrl-C, goes on.

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
