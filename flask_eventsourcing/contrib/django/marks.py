"""Functions for Django's ``on_commit`` on which hangs what was noted in a transaction.

Django calls them after the commit, and drops them when the transaction, or the savepoint in which they were noted, is
rolled back.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol
from uuid import UUID

from django.db import transaction

from ..._patches import django_atomic_exit, django_commit, django_set_rollback, django_watch
from ...failures import OnError
from ...uow import AfterCommit, Batch
from ...uow.pending import AfterRollback, Item, call_all, of_kind

Announce = Callable[[Sequence[Batch]], None]
HARMLESS = re.compile(
    r"\s*(?:SELECT|INSERT|UPDATE|DELETE|REPLACE|MERGE|WITH|VALUES|SHOW|EXPLAIN|PRAGMA|LOCK|NOTIFY|COPY|SAVEPOINT|RELEASE"
    r"|SET CONSTRAINTS|SET STATEMENT|ROLLBACK TO SAVEPOINT \W?s\d+_x\d+(?=\W?\Z))\b[^;]*;?\s*\Z",
    re.IGNORECASE,
)
"""Statements that end no transaction, and the one with which Django rolls a block back, of which it takes note."""


class Database(Protocol):
    """What a unit says of its database."""

    def is_aborted(self) -> bool:
        """Whether a commit would be a rollback."""

    def has_ended(self) -> bool:
        """Whether the driver knows that the transaction has ended."""

    def commits_implicitly(self, statement: str) -> bool:
        """Whether a statement commits."""

    def there(self, batches: Sequence[Batch]) -> set[int] | None:
        """Return which events are in the database, by the batches' ``id()``; None where that cannot be asked."""


class Noted:
    """What was noted in one transaction, or in one of its savepoints."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.mark: Callable[[], Mark | None] = _gone
        self.is_committed = False
        """Whether the database has committed it, of which Django has not told yet."""

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


class Leaving:
    """The end of one block of Django's, while that is going on.

    :param is_quiet: whether no exception leaves the block.
    """

    def __init__(self, *, is_quiet: bool) -> None:
        self.is_quiet = is_quiet
        self.has_committed = False
        self.lost: list[Batch] = []


class Losses:
    """Tells rollbacks that somebody has asked for from those that come of a swallowed error.

    :param wrapper: the connection of Django's.
    :param tell: called with events that are gone although nobody has asked for it.
    """

    def __init__(self, wrapper: Any, tell: Announce) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._tell = tell
        self._asked: int | None = None
        self._dropped: list[Batch] = []
        """What was rolled back last outside of the end of a block."""
        self.lost: list[Batch] | None = None
        """What was lost, while somebody wants to know."""
        self.leaving: Leaving | None = None
        django_set_rollback(wrapper, partial(_set_rollback, self._wrapper, weakref.ref(self)))

    def asked(self, *, rollback: bool) -> None:
        """Told that somebody asks for a rollback of the innermost block, or not any more."""
        wrapper: Any = self._wrapper()
        self._asked = len(wrapper.atomic_blocks) if rollback else None

    def forget(self) -> None:
        """Told of a statement: nobody is waiting for a rollback."""
        self._asked = None
        self._dropped = []

    def dropped(self, noted: Noted) -> None:
        """Told of what is rolled back now."""
        batches = of_kind(noted.items, Batch)
        wrapper: Any = self._wrapper()
        if self.leaving is None:
            self._dropped += batches
        elif self._asked is None or len(wrapper.atomic_blocks) >= self._asked:
            self.leaving.lost += batches

    @contextmanager
    def left(self, *, is_quiet: bool) -> Iterator[Leaving]:
        """Around the end of a block: what is rolled back in it is lost, if neither before nor then an error is raised.

        A connection that was closed inside its block has rolled back too, of which Django says nothing.
        """
        before = self.leaving
        leaving = self.leaving = Leaving(is_quiet=is_quiet)
        try:
            yield leaving
        except BaseException:
            leaving.is_quiet = False
            raise
        finally:
            self.leaving = before
            wrapper: Any = self._wrapper()
            if wrapper.closed_in_transaction:
                leaving.lost += self._dropped
                self._dropped = []
            if leaving.is_quiet and leaving.lost:
                self._lose(leaving.lost)

    def _lose(self, batches: list[Batch]) -> None:
        if self.lost is None:
            self._tell(batches)
        else:
            self.lost += batches


def _set_rollback(wrapper: Callable[[], Any], losses: Callable[[], Losses | None], rollback: bool) -> None:
    found, told = wrapper(), losses()
    type(found).set_rollback(found, rollback)
    if told is not None:
        told.asked(rollback=rollback)


class Marked:
    """What was noted on one connection of Django's and has not been decided, in its order.

    :param publish: called with the events of a transaction after it was committed.
    :param losses: told of what is rolled back.
    """

    def __init__(self, wrapper: Any, publish: Announce, losses: Losses) -> None:
        self.noted: list[Noted] = []
        self.losses = losses
        self.database: Database | None = None
        """What says what is there; of the unit that has this."""
        self._publish = publish
        self._wrapper = weakref.ref(wrapper)
        self._is_suspicious = False
        """Whether a statement may have ended the transaction past Django."""
        _followed[wrapper] = self
        django_commit(wrapper, partial(_commit, self._wrapper, weakref.ref(self)))

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
        me, rolled_back = weakref.ref(self), Marked.rolled_back

        def gone(_: object) -> None:
            marked = me()
            # What is doubtful is decided when the block has been left.
            if marked is not None and not (noted.is_committed or marked._is_suspicious):
                rolled_back(marked, noted)

        # Told at once where nobody else has it, as a test that looks at the functions has.
        noted.mark = weakref.ref(mark, gone)
        # As on_commit() does, which refuses a connection whose transactions its user begins and ends.
        hooks.append((savepoints, mark, True))
        if not self.noted:
            self._is_suspicious = False
            django_watch(self._wrapper(), self._watch, watched=True)
        self.noted.append(noted)
        return noted

    def _watch(self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any) -> Any:
        """Suspect a statement that may end the transaction: one of Django's ``execute_wrappers``."""
        database = self.database
        if HARMLESS.match(str(sql)) is None or (database is not None and database.commits_implicitly(str(sql))):
            self._is_suspicious = True
        return execute(sql, params, many, context)

    # ------------------------------------------------------------------------------------- what becomes of it

    def look(self) -> None:
        """Find out what Django has dropped."""
        wrapper: Any = self._wrapper()
        if self._is_suspicious and (wrapper.in_atomic_block or self.losses.leaving is not None):
            return
        left = {id(function) for _, function, *_ in wrapper.run_on_commit}
        for noted in list(self.noted):
            if noted.is_committed:
                # Its turn comes among Django's functions, unless one of them has failed.
                if self.losses.leaving is None:
                    self.committed(noted)
            elif id(noted.mark()) not in left:
                self.rolled_back(noted)

    def ask(self) -> None:
        """Decide by what is in the database, after the transaction: somebody may have ended it past Django."""
        gone = self._gone()
        self._is_suspicious = False
        for noted in list(self.noted):
            if noted in gone:
                self.rolled_back(noted)
            else:
                self.committed(noted)

    def _gone(self) -> list[Noted]:
        """Return what has events that are not in the database, or with an unknown end."""
        known = [each for each in self.noted if each.has_events]
        batches = [batch for each in known for batch in of_kind(each.items, Batch)]
        there = self.database.there(batches) if batches and self.database is not None else set()
        is_gone = [None if there is None else any(id(b) not in there for b in of_kind(e.items, Batch)) for e in known]
        gone = [each for each, missing in zip(known, is_gone, strict=True) if missing or missing is None]
        # What has no events stands or falls with those around it.
        return gone if len(gone) < len(known) else list(self.noted) if known else []

    def before_commit(self) -> None:
        """Drop what a commit would not store."""
        if self.database is None or not self.has(Batch):
            return
        if self.database.is_aborted():
            gone = list(self.noted)
        elif self._is_suspicious or self.database.has_ended():
            gone = self._gone()
        else:
            return
        self._is_suspicious = False
        for noted in gone:
            self.rolled_back(noted)

    def after_commit(self) -> None:
        """Note that the database has committed; Django's functions are called next, but in manual transactions."""
        self._is_suspicious = False
        for noted in self.noted:
            noted.is_committed = True

    def left(self, leaving: Leaving) -> None:
        """A block has been left."""
        wrapper: Any = self._wrapper()
        if leaving.has_committed:
            for noted in list(self.noted):
                if noted.is_committed:
                    self.committed(noted)
        is_over = wrapper.autocommit or wrapper.connection is None
        if self._is_suspicious and is_over and not wrapper.in_atomic_block:
            self.ask()
        self.look()

    def rolled_back(self, noted: Noted) -> None:
        """What was noted is rolled back."""
        if self._forget(noted):
            call_all(of_kind(noted.items, AfterRollback))
            self.losses.dropped(noted)

    def committed(self, noted: Noted) -> None:
        """What was noted is committed."""
        if self._forget(noted):
            call_all(of_kind(noted.items, AfterCommit))
            batches = of_kind(noted.items, Batch)
            if batches:
                call_all([AfterCommit(partial(self._publish, batches))])

    def _forget(self, noted: Noted) -> bool:
        if noted not in self.noted:
            return False
        self.noted.remove(noted)
        wrapper = self._wrapper()
        if not self.noted and wrapper is not None:
            django_watch(wrapper, self._watch, watched=False)
        return True


def _commit(wrapper: Callable[[], Any], followed: Callable[[], Marked | None]) -> None:
    found, marked = wrapper(), followed()
    if marked is None or not marked:
        type(found).commit(found)
        return
    leaving = marked.losses.leaving
    with nullcontext(leaving) if leaving is not None else marked.losses.left(is_quiet=True) as ending:
        marked.before_commit()
        with OnError(partial(_failed, ending)):
            type(found).commit(found)
        marked.after_commit()
        ending.has_committed = True
    if leaving is None:
        # Nobody knows when Django would call its functions.
        for noted in list(marked.noted):
            marked.committed(noted)


def _failed(leaving: Leaving, error: BaseException) -> None:
    leaving.is_quiet = False


@contextmanager
def _leaving(alias: Any, exc_type: Any) -> Iterator[None]:
    """Around the end of a block."""
    marked = _followed.get(transaction.get_connection(alias))
    if marked is None:
        yield
        return
    with marked.losses.left(is_quiet=exc_type is None) as leaving:
        try:
            yield
        finally:
            marked.left(leaving)


_followed: weakref.WeakKeyDictionary[Any, Marked] = weakref.WeakKeyDictionary()
"""What was noted on each connection of Django's."""
django_atomic_exit(transaction.Atomic, _leaving)
