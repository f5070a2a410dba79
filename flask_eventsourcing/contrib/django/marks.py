"""Functions for Django's ``on_commit`` that hold what was noted in a transaction.

Django calls them after the commit, and drops them when the transaction, or the savepoint in which they were noted, is
rolled back.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType
from typing import Any
from uuid import UUID

from ..._patches import django_watch
from ...persistence.dialects.calls import BLOCK
from ...uow import AfterCommit, Batch
from ...uow.pending import AfterRollback, Item, call_all, of_kind

Announce = Callable[[Sequence[Batch]], None]
HARMLESS = re.compile(
    r"\s*(?:SELECT|INSERT|UPDATE|DELETE|REPLACE|MERGE|WITH|VALUES|SHOW|EXPLAIN|PRAGMA|LOCK|NOTIFY|COPY|SAVEPOINT|RELEASE"
    r"|SET CONSTRAINTS|SET STATEMENT|ROLLBACK TO SAVEPOINT \W?s\d+_x\d+(?=\W?\Z))\b[^;]*;?\s*\Z",
    re.IGNORECASE,
)
"""Statements that end no transaction, and the one with which Django rolls back a block and which it notes itself."""


class Noted:
    """What was noted in one transaction, or in one of its savepoints."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.mark: Callable[[], Mark | None] = _gone
        self.savepoints = 0
        """How many savepoints there had been on the connection."""
        self.is_committed = False
        """Whether it is committed, but Django has not called the functions yet."""

    @property
    def has_events(self) -> bool:
        """Whether it has events."""
        return any(isinstance(item, Batch) for item in self.items)


class Mark:
    """Called by Django after the commit, and dropped with a rollback."""

    def __init__(self, noted: Noted, committed: Callable[[Noted], None]) -> None:
        self.noted = noted
        self._committed = committed
        # Django logs the name of a function that has failed.
        self.__qualname__ = type(self).__qualname__

    def __call__(self) -> None:
        """Note that everything in it is committed."""
        self._committed(self.noted)


def _gone() -> Mark | None:
    return None


class Leaving:
    """The end of one block of Django's, while that is going on.

    Events that the block rolls back are lost, if no error has left it, neither before nor now.

    :param losses: those of the connection.
    :param savepoint: the block's, if it has one.
    :param is_quiet: whether no error leaves the block.
    :param look: called when Django has left it, and finds out what was rolled back.
    """

    __slots__ = ("_before", "_is_quiet", "_look", "_losses", "lost", "savepoint")

    def __init__(self, losses: Losses, savepoint: str | None, look: Callable[[], None], *, is_quiet: bool) -> None:
        self._losses = losses
        self._look = look
        self._is_quiet = is_quiet
        self._before = losses.leaving
        self.savepoint = savepoint
        self.lost: list[Batch] = []

    def __enter__(self) -> None:
        self._losses.leaving = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._look()
        finally:
            self._losses.leaving = self._before
        if self._is_quiet and kind is None:
            self._losses.lose(self.lost)


class Losses:
    """Distinguishes rollbacks that code has asked for from those after a swallowed error.

    :param wrapper: the connection of Django's.
    :param tell: called with events that were rolled back although no code asked for it.
    """

    def __init__(self, wrapper: Any, tell: Announce) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._tell = tell
        self._asked: tuple[str | None] | None = None
        """The savepoint whose rollback code has asked for, or None for the whole transaction."""
        self.is_closing = False
        """Whether the connection is being closed."""
        self.lost: list[Batch] | None = None
        """The lost events, while a caller collects them."""
        self.leaving: Leaving | None = None

    def asked(self, *, rollback: bool) -> None:
        """Called when code asks for a rollback of the innermost block, or withdraws the request."""
        wrapper: Any = self._wrapper()
        # A block without a savepoint is rolled back with the one around it.
        innermost = next((each for each in reversed(wrapper.savepoint_ids) if each is not None), None)
        self._asked = (innermost,) if rollback else None

    def failed(self) -> None:
        """Called when the commit has failed with an error, which the caller of the commit gets."""
        self._asked = (None,)

    @property
    def is_asked(self) -> bool:
        """Whether code has asked for a rollback that was not done yet."""
        return self._asked is not None

    def forget(self) -> None:
        """Called at a statement: no code is waiting for a rollback."""
        self._asked = None

    def dropped(self, noted: Noted) -> None:
        """Called with what is being rolled back."""
        batches = of_kind(noted.items, Batch)
        leaving = self.leaving
        if leaving is None:
            if self.is_closing:
                self.lose(batches)
        elif self._asked != (leaving.savepoint,):
            leaving.lost += batches

    def lose(self, batches: list[Batch]) -> None:
        """Called with events that were rolled back although no code asked for it."""
        if self.lost is not None:
            self.lost += batches
        elif batches:
            self._tell(batches)


class Marked:
    """What was noted on one connection of Django's and is neither committed nor rolled back, in its order.

    :param publish: called with the events of a transaction after it was committed.
    :param losses: its methods are called with what is rolled back.
    """

    def __init__(self, publish: Announce, losses: Losses) -> None:
        self.noted: list[Noted] = []
        self.ends = 0
        """How often something noted was committed or rolled back."""
        self.losses = losses
        self.is_suspicious = False
        """Whether a statement may have ended the transaction without Django's knowledge."""
        self._publish = publish

    def all(self, kind: Any) -> list[Any]:
        """Return what was noted of one kind."""
        return [item for each in self.noted if not each.is_committed for item in of_kind(each.items, kind)]

    def has(self, kind: Any) -> bool:
        """Whether something of one kind was noted."""
        return any(isinstance(item, kind) for each in self.noted if not each.is_committed for item in each.items)

    def has_events_of(self, originator_id: UUID | str) -> bool:
        """Whether there are events of an aggregate."""
        return any(event.originator_id == originator_id for batch in self.all(Batch) for event in batch.events)

    def add_beside(self, originator_id: UUID | str, item: Item) -> None:
        """Note something that is committed or rolled back together with the last events of an aggregate."""
        for noted in reversed(self.noted):
            batches = of_kind(noted.items, Batch)
            if any(event.originator_id == originator_id for batch in batches for event in batch.events):
                noted.items.append(item)
                return

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
            or last.savepoints != wrapper.savepoint_state
            # One function for each save, so that it can be found among those of a block.
            or (last.has_events and not isinstance(item, AfterCommit))
        ):
            if not self.noted:
                self.is_suspicious = False
                self.watch(wrapper, watched=True)
            last = self._mark(hooks, savepoints)
            last.savepoints = wrapper.savepoint_state
        last.items.append(item)

    def _mark(self, hooks: list[Any], savepoints: set[str]) -> Noted:
        noted = Noted()
        mark = Mark(noted, self.committed)
        me, dropped = weakref.ref(self), Marked.dropped

        def gone(_: object) -> None:
            marked = me()
            # If it is in doubt, the database decides after the transaction.
            if marked is not None and not marked.is_suspicious:
                dropped(marked, noted)

        # Called at once, unless other code holds the functions, such as a test that collects them.
        noted.mark = weakref.ref(mark, gone)
        # Like on_commit(), but that refuses a connection whose transactions the user begins and ends.
        hooks.append((savepoints, mark, True))
        self.noted.append(noted)
        return noted

    def look(self, wrapper: Any) -> None:
        """Find out what Django has dropped. If that is in doubt, the end of the transaction decides."""
        if self.is_suspicious:
            return
        left = {id(function) for _, function, *_ in wrapper.run_on_commit}
        for noted in [each for each in self.noted if id(each.mark()) not in left]:
            # After a commit, Django calls the functions one after the other.
            if not noted.is_committed:
                self.dropped(noted)

    def watch(self, wrapper: Any, *, watched: bool) -> None:
        """Begin to watch the statements of a connection, or stop watching them."""
        django_watch(wrapper, self._statement, watched=watched)

    def _statement(self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any) -> Any:
        """Suspect a statement that may end the transaction: one of Django's ``execute_wrappers``."""
        if not self.noted:
            self.watch(context["connection"], watched=False)
        elif not str(sql).startswith(BLOCK) and HARMLESS.match(str(sql)) is None:
            self.is_suspicious = True
        return execute(sql, params, many, context)

    def decide(self, there: Collection[int] | None) -> None:
        """After a transaction that may have ended without Django's knowledge, tell whether it was committed.

        :param there: the ``id()`` of the batches whose events are in the database; None if that is unknown.
        """
        self.is_suspicious = False
        known = [each for each in self.noted if each.has_events]
        gone = [each for each in known if there is None or any(id(b) not in there for b in of_kind(each.items, Batch))]
        for noted in list(self.noted):
            # Other things are committed or rolled back together with the events.
            if noted in gone or (noted not in known and len(gone) == len(known)):
                noted.is_committed = False
                self.dropped(noted)
            else:
                self.committed(noted)

    def rolled_back_to(self, hooks: list[Any], number: int) -> None:
        """Drop everything that was noted since the connection's savepoint with a number was made.

        :param hooks: Django's functions.
        """
        gone = {id(each.mark()) for each in self.noted if each.savepoints >= number}
        hooks[:] = [each for each in hooks if id(each[1]) not in gone]

    def all_committed(self) -> None:
        """Note that everything is committed, and that Django is going to call the functions."""
        self.is_suspicious = False
        for noted in self.noted:
            noted.is_committed = True

    def tell(self) -> None:
        """Call the functions of what is committed instead of Django."""
        for noted in [each for each in self.noted if each.is_committed]:
            self.committed(noted)

    def dropped(self, noted: Noted) -> None:
        """Note that something is rolled back, unless it was committed before Django dropped it."""
        if noted.is_committed:
            self.committed(noted)
        elif noted in self.noted:
            self.noted.remove(noted)
            self.ends += 1
            call_all(of_kind(noted.items, AfterRollback))
            self.losses.dropped(noted)

    def committed(self, noted: Noted) -> None:
        """Note that something is committed."""
        if noted not in self.noted:
            return
        self.noted.remove(noted)
        self.ends += 1
        # Django drops it now, without a further call.
        noted.mark = _gone
        functions, batches = of_kind(noted.items, AfterCommit), of_kind(noted.items, Batch)
        if batches:
            functions.append(AfterCommit(partial(self._publish, batches)))
        call_all(functions)
