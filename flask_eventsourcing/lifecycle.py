"""One application object in each process. Works without Flask.

The pattern is that of the deployment guide of the ``eventsourcing`` library, version 7: construct the application
once in a process, after the database is configured and before requests are handled. The process id is compared at
every access rather than relying on ``os.register_at_fork``, because uWSGI forks in C and runs no such hook.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from .exceptions import (
    ApplicationConstructingError,
    ApplicationInitializedError,
    ApplicationNotInitializedError,
)

T = TypeVar("T")


def keep_for_ever(thing: object) -> None:
    """Keep an object from being finalized in this process, even when the interpreter ends.

    Some drivers' finalizers tell the server to end the session, which belongs to the parent process.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class PerProcess(Generic[T]):
    """Makes something once in each process, so that a forked child does not use its parent's.

    :param make: makes it, called without arguments; threads that ask at the same time get the same object.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def get(self) -> T:
        """Return what belongs to this process."""
        pid = os.getpid()
        try:
            return self._made[pid]
        except KeyError:
            # setdefault() is atomic, and needs no lock that another thread may have held at the time of the fork.
            return self._made.setdefault(pid, self._make())


class ProcessLock:
    """A re-entrant lock; a forked child gets a new one, even if a thread of the parent held it."""

    def __init__(self) -> None:
        # Looked up at the time of the call, because gevent may replace it.
        self._locks = PerProcess(lambda: threading.RLock())  # noqa: PLW0108

    def __enter__(self) -> None:
        self._locks.get().acquire()

    def __exit__(self, *_: object) -> None:
        self._locks.get().release()


@dataclass(frozen=True)
class _Held(Generic[T]):
    pid: int
    application: T


class ApplicationSlot(Generic[T]):
    """Hold the single application of a process.

    Use one where there is no Flask app, such as in a worker of your own, and make the application by its constructor::

        slot = ApplicationSlot(Bank)
        slot.get().open_account("Ada")

    :param constructor: called without arguments, at most once in a process, by the first :meth:`get`. A slot without
        one is filled by :meth:`init`.

    A process that was forked from one that has an application never uses, nor closes, what it inherited: it
    constructs its own at the first :meth:`get`. A slot is also a context manager that closes at exit.

    A slot that is garbage-collected before it was closed warns with a ``ResourceWarning``, in the process that has
    constructed the application. What is there until the process ends needs no ``close()``.

    .. versionchanged:: 0.1.0 A slot that was not closed warns.
    """

    _warns = True
    _held: _Held[T] | None = None

    def __init__(self, constructor: Callable[[], T] | None = None) -> None:
        self._lazy = constructor
        self._constructor = constructor
        self._lock = ProcessLock()
        self._constructing: int | None = None
        self._failed = ""
        _slots.add(self)

    @property
    def constructed(self) -> bool:
        """Whether this process, not its parent, has constructed its application. It constructs nothing."""
        held = self._held
        return held is not None and held.pid == os.getpid()

    def init(self, constructor: Callable[[], T] | None = None) -> T:
        """Construct the application of this process and return it.

        Call it when a worker starts, so that an error ends the worker and not its first request.

        :raises ApplicationInitializedError: when this process has one already.
        :raises ApplicationNotInitializedError: when there is no constructor.
        """
        with self._lock:
            if self.constructed:
                raise ApplicationInitializedError
            if constructor is None:
                return self._construct()
            self._constructor, self._failed = constructor, ""
            with ExitStack() as stack:
                stack.push(self._note_failure)
                return self._construct()

    def _note_failure(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        made_by = self._constructor.func if isinstance(self._constructor, partial) else self._constructor
        name = getattr(made_by, "__qualname__", repr(made_by))
        self._constructor, self._failed = None, f"{name} failed with {type(error).__name__}: {error}"

    def get(self) -> T:
        """Return the application of this process; a lazy or a forked slot constructs it first.

        Threads that ask at the same time get the same object: one constructs it, and the others wait.

        :raises ApplicationNotInitializedError: when there is no constructor to make it, or :meth:`init` failed.
        """
        held = self._held
        if held is not None and held.pid == os.getpid():
            return held.application
        with self._lock:
            held = self._held
            if held is not None and held.pid == os.getpid():
                return held.application
            return self._construct()

    def _construct(self) -> T:
        pid = os.getpid()
        if self._constructor is None:
            raise ApplicationNotInitializedError(
                f"This process has no application: {self._failed}. Call init_application(...) again."
                if self._failed
                else None
            )
        if self._constructing == pid:
            raise ApplicationConstructingError
        self._constructing = pid
        try:
            application = self._constructor()
        finally:
            self._constructing = None
        self._keep_inherited()
        self._held = _Held(pid, application)
        return application

    def _keep_inherited(self) -> None:
        # Finalizers of an inherited application would close what belongs to the parent.
        held = self._held
        if held is not None and held.pid != os.getpid():
            keep_for_ever(held.application)

    def close(self) -> None:
        """Close the application of this process, if there is one. Calling it again does nothing."""
        with self._lock:
            if self.constructed and self._held is not None:
                application, self._held = self._held.application, None
                self._constructor, self._failed = self._lazy, ""
                close = getattr(application, "close", None)
                if close is not None:
                    close()
            elif self._held is None:
                self._constructor, self._failed = self._lazy, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._warns and self._held is not None and self.constructed and hasattr(self._held.application, "close"):
            name = type(self._held.application).__qualname__
            warnings.warn(
                f"An ApplicationSlot with a {name} was not closed: call its close(), or use it in a with statement.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


class HostSlot(ApplicationSlot[T]):
    """The slot of a Flask app or of another site. No framework closes it, so it does not warn."""

    _warns = False


_slots: weakref.WeakSet[ApplicationSlot[Any]] = weakref.WeakSet()


@atexit.register
def _keep_inherited_at_exit() -> None:
    for slot in list(_slots):
        slot._keep_inherited()
        # The end of the process closes what is left.
        slot._warns = False


_process_slot: ApplicationSlot[Any] = ApplicationSlot()


def init_application(constructor: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Construct the application of this process as ``constructor(*args, **kwargs)`` and return it.

    Call it when the process starts, after its configuration is complete; :func:`get_application` returns the same
    object everywhere else.

    :raises ApplicationInitializedError: when it was constructed already in this process.
    """
    application: T = _process_slot.init(partial(constructor, *args, **kwargs))
    return application


def get_application() -> Any:
    """Return the application of this process; after a fork it is constructed again, with the arguments of the first.

    A forked process does not use its parent's object, whose connections and locks belong to the parent.

    :raises ApplicationNotInitializedError: before :func:`init_application`, or after one that failed.

    .. versionchanged:: 0.1.0 After an :func:`init_application` that failed, it raises instead of trying again.
    """
    return _process_slot.get()


def close_application() -> None:
    """Close the application of this process, if there is one, so that it can be initialised again.

    Tests call it at their end. A second call does nothing.
    """
    _process_slot.close()
