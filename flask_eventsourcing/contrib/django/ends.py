"""Follows the ends of the transactions of Django's connections."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from django.db import transaction

from ..._patches import django_atomic_exit, django_method
from .marks import Leaving, Marked

REPLACED = (
    "clean_savepoints",
    "close",
    "commit",
    "run_and_clear_commit_hooks",
    "savepoint_rollback",
    "set_rollback",
)
"""The methods of a connection that are replaced."""


class Checks(Protocol):
    """The unit of work of a connection."""

    def check_commit(self) -> None:
        """Refuse a commit that would not store the events."""

    def look(self) -> None:
        """Find out whether the events were committed or rolled back."""


class Ends:
    """Wraps some methods of a connection of Django's.

    :param checks: asked before a commit.
    :param marked: what was noted on the connection.
    """

    def __init__(self, wrapper: Any, checks: Checks, marked: Marked) -> None:
        self._checks = weakref.ref(checks)
        self._marked = marked
        self._running = 0
        # Weak, so that neither object keeps the other alive.
        found, told = weakref.ref(wrapper), weakref.ref(self)
        for name in REPLACED:
            django_method(wrapper, name, partial(_called, found, told, name))
        _ends[wrapper] = self

    def leaving(self, wrapper: Any, *, is_quiet: bool) -> Leaving | None:
        """Return a context for the end of a block, or None where nothing is noted that could end with it.

        :param is_quiet: whether no error leaves the block.
        """
        if not self._marked.noted:
            return None
        savepoint = wrapper.savepoint_ids[-1] if wrapper.savepoint_ids else None
        return Leaving(self._marked.losses, savepoint, partial(self._left, wrapper), is_quiet=is_quiet)

    def _left(self, wrapper: Any) -> None:
        checks = self._checks()
        if checks is not None and self._marked.noted:
            checks.look()
        if not self._marked.noted:
            self._marked.watch(wrapper, watched=False)

    def commit(self, wrapper: Any, commit: Callable[[], Any]) -> Any:
        """Commit, unless events would not be stored; without a block, tell here that they are committed.

        :raises TransactionManagementError: when events would not be stored.
        """
        checks = self._checks()
        has_failed = True
        try:
            if checks is not None:
                checks.check_commit()
            commit()
            has_failed = False
        finally:
            if has_failed:
                self._marked.losses.failed()
        self._marked.all_committed()
        if self._marked.losses.leaving is None and not self._running:
            self._marked.tell()

    def run_and_clear_commit_hooks(self, wrapper: Any, run: Callable[[], Any]) -> Any:
        """Call the functions that wait for the commit. This package's are called even if one of the user's fails."""
        self._running += 1
        try:
            run()
        finally:
            self._running -= 1
            if not self._running:
                # But not after another transaction, which one of the functions has committed.
                self._marked.tell()

    def clean_savepoints(self, wrapper: Any, clean: Callable[[], Any]) -> Any:
        """Leave the counter of savepoints as it is within a transaction: it tells what a rollback takes along."""
        if wrapper.autocommit and not wrapper.in_atomic_block:
            clean()

    def savepoint_rollback(self, wrapper: Any, roll_back: Callable[..., Any], sid: Any) -> Any:
        """Roll back to a savepoint, also to one that belongs to no block."""
        roll_back(sid)
        if sid is not None and wrapper.run_on_commit:
            self._marked.rolled_back_to(wrapper.run_on_commit, int(str(sid).rpartition("x")[2]))

    def close(self, wrapper: Any, close: Callable[[], Any]) -> Any:
        """Close the connection; what was not committed is lost."""
        if wrapper.autocommit and not wrapper.in_atomic_block:
            # If autocommit was switched on again, that has committed everything.
            self._marked.all_committed()
            self._marked.tell()
        self._marked.losses.is_closing = True
        try:
            close()
        finally:
            self._marked.losses.is_closing = False

    def set_rollback(self, wrapper: Any, set_rollback: Callable[..., Any], rollback: bool) -> Any:
        """Ask for a rollback, or withdraw the request."""
        set_rollback(rollback)
        self._marked.losses.asked(rollback=rollback)


def _called(
    wrapper: Callable[[], Any], ends: Callable[[], Ends | None], name: str, *arguments: Any, **named: Any
) -> Any:
    found, told = wrapper(), ends()
    own = partial(getattr(type(found), name), found)
    if told is None:
        return own(*arguments, **named)
    return getattr(told, name)(found, own, *arguments, **named)


def _leaving(alias: Any, exc_type: Any) -> Leaving | None:
    """Return the context for the end of a block, on any connection."""
    wrapper = transaction.get_connection(alias)
    ends = _ends.get(wrapper)
    return None if ends is None else ends.leaving(wrapper, is_quiet=exc_type is None)


_ends: weakref.WeakKeyDictionary[Any, Ends] = weakref.WeakKeyDictionary()
"""The ``Ends`` of each connection of Django's on which something was noted."""
django_atomic_exit(transaction.Atomic, _leaving)
