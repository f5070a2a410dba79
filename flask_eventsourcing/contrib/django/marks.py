"""Functions for Django's ``on_commit`` on which hangs what was noted in a transaction.

Django calls them after the commit, and drops them when the transaction, or the savepoint in which they were noted, is
rolled back.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from django.db import transaction

from ..._patches import django_set_rollback
from ...uow import AfterCommit, Batch
from ...uow.pending import AfterRollback, Item, call_all, of_kind

Announce = Callable[[Sequence[Batch]], None]
_EXIT: Any = transaction.Atomic.__exit__.__code__
DEEP = 12
"""The frames between Django's end of a block and what hears of it, at most."""


class Noted:
    """What was noted in one transaction, or in one of its savepoints."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.mark: Callable[[], Mark | None] = _gone

    @property
    def has_events(self) -> bool:
        """Whether events are among it."""
        return any(isinstance(item, Batch) for item in self.items)


class Mark:
    """Called by Django after the commit, and dropped with a rollback."""

    def __init__(self, noted: Noted, committed: Callable[[Noted], None]) -> None:
        self.noted = noted
        self._committed = committed
        # Django names a function that has failed.
        self.__qualname__ = type(self).__qualname__

    def __call__(self) -> None:
        """Tell that what was noted here is committed."""
        self._committed(self.noted)


def _gone() -> Mark | None:
    return None


class Losses:
    """Tells rollbacks that somebody has asked for from those that come of a swallowed error.

    :param wrapper: the connection of Django's.
    :param tell: called with events that are gone although nobody has asked for it.
    """

    def __init__(self, wrapper: Any, tell: Announce) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._tell = tell
        self._asked: int | None = None
        self.lost: list[Batch] | None = None
        """What was lost, while somebody wants to know."""
        django_set_rollback(wrapper, partial(_set_rollback, self._wrapper, weakref.ref(self)))

    def asked(self, *, rollback: bool) -> None:
        """Told that somebody asks for a rollback of the innermost block, or not any more."""
        wrapper: Any = self._wrapper()
        self._asked = len(wrapper.atomic_blocks) if rollback else None

    def forget(self) -> None:
        """Told of a statement: nobody is waiting for a rollback."""
        self._asked = None

    def dropped(self, noted: Noted) -> None:
        """Told of what is rolled back now."""
        batches = of_kind(noted.items, Batch)
        if not batches or not _ends_without_error():
            return
        wrapper: Any = self._wrapper()
        if self._asked is not None and len(wrapper.atomic_blocks) < self._asked:
            return
        if self.lost is None:
            self._tell(batches)
        else:
            self.lost += batches


def _set_rollback(wrapper: Callable[[], Any], losses: Callable[[], Losses | None], rollback: bool) -> None:
    found, told = wrapper(), losses()
    type(found).set_rollback(found, rollback)
    if told is not None:
        told.asked(rollback=rollback)


def _ends_without_error() -> bool:
    """Whether a block of Django's is being ended here that rolls back although no exception has left it."""
    frame = sys._getframe(1)
    for _ in range(DEEP):
        if frame.f_code is _EXIT:
            return frame.f_locals.get("exc_type") is None
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


class Marked:
    """What was noted on one connection of Django's and has not been decided, in its order.

    :param publish: called with the events of a transaction after it was committed.
    :param losses: told of what is rolled back.
    """

    def __init__(self, publish: Announce, losses: Losses) -> None:
        self.noted: list[Noted] = []
        self.ends = 0
        """How often something that was noted was committed or rolled back."""
        self.losses = losses
        self._publish = publish

    def __bool__(self) -> bool:
        return bool(self.noted)

    def all(self, kind: Any) -> list[Any]:
        """Return what was noted of one kind."""
        return [item for each in self.noted for item in of_kind(each.items, kind)]

    def has(self, kind: Any) -> bool:
        """Whether something of one kind was noted."""
        return any(isinstance(item, kind) for each in self.noted for item in each.items)

    def has_events_of(self, originator_id: UUID | str) -> bool:
        """Whether there are events of an aggregate."""
        return any(event.originator_id == originator_id for batch in self.all(Batch) for event in batch.events)

    def add(self, wrapper: Any, item: Item) -> None:
        """Note something in the transaction of a connection, and in its innermost savepoint."""
        self.losses.forget()
        hooks = wrapper.run_on_commit
        savepoints = {each for each in wrapper.savepoint_ids if each is not None}
        last = self.noted[-1] if self.noted else None
        if (
            last is None
            or not hooks
            or hooks[-1][1] is not last.mark()
            or hooks[-1][0] != savepoints
            # One function for each save, so that who looks for those of a block sees it.
            or (last.has_events and not isinstance(item, AfterCommit))
        ):
            last = self._mark(hooks, savepoints)
        last.items.append(item)

    def _mark(self, hooks: list[Any], savepoints: set[str]) -> Noted:
        noted = Noted()
        mark = Mark(noted, self.committed)
        me, dropped = weakref.ref(self), Marked.dropped

        def gone(_: object) -> None:
            marked = me()
            if marked is not None:
                dropped(marked, noted)

        # Told at once where nobody else has it, as a test that looks at the functions has.
        noted.mark = weakref.ref(mark, gone)
        # As on_commit() does, which refuses a connection whose transactions its user begins and ends.
        hooks.append((savepoints, mark, True))
        self.noted.append(noted)
        return noted

    def look(self, wrapper: Any) -> None:
        """Find out what Django has dropped."""
        left = {id(function) for _, function, *_ in wrapper.run_on_commit}
        for noted in [each for each in self.noted if id(each.mark()) not in left]:
            self.dropped(noted)

    def dropped(self, noted: Noted) -> None:
        """What was noted is rolled back."""
        if noted in self.noted:
            self.noted.remove(noted)
            self.ends += 1
            call_all(of_kind(noted.items, AfterRollback))
            self.losses.dropped(noted)

    def committed(self, noted: Noted) -> None:
        """What was noted is committed."""
        if noted not in self.noted:
            return
        self.noted.remove(noted)
        self.ends += 1
        call_all(of_kind(noted.items, AfterCommit))
        batches = of_kind(noted.items, Batch)
        if batches:
            call_all([AfterCommit(partial(self._publish, batches))])
