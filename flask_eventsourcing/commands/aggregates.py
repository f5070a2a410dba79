"""``erase`` and ``snapshots``: commands for single aggregates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import AggregateNotFoundError, Application
from eventsourcing.utils import TopicError

from ..applications import take_snapshot
from ..applications.erasure import (
    AggregateErased,
    Erasure,
    EventRedacted,
    Stored,
    count,
    erase,
    not_found,
    recorder_of,
)
from . import CommandError, Output, Subject, UsageError, clear_errors, require_tables

TRIES = 3
"""How often a transaction is run again after a conflict."""
AT_ONCE = 100
"""The aggregates of one page."""


def erase_aggregate(
    subject: Subject,
    output: Output,
    aggregate_id: str,
    *,
    application: str | None = None,
    redact: bool = False,
    yes: bool = False,
) -> int:
    """Erase an aggregate, and commit that.

    :param redact: empty the events rather than delete their rows.
    :param yes: do not ask.
    :raises CommandError: when there is no such aggregate, or it cannot be erased.
    """
    require_tables(subject)
    owner = find(subject, application)
    found_id = as_id(owner, aggregate_id)
    letters = subject.projections.dead_letters_of(owner.name)
    # A session with autobegin=False does not begin by itself.
    with _clear_errors(), subject.projections.host.transaction():
        there = count(owner, found_id, redact=redact, dead_letters=letters)
    if there == Erasure(0, 0):
        output.write(f"{owner.name} {aggregate_id} was erased before, and nothing is left.")
        return 0
    output.write(f"{owner.name} {aggregate_id}: {_told(there)}.")
    if not yes and not output.confirm("This cannot be undone. Erase them?"):
        return 1
    with _clear_errors():
        done = subject.projections.host.retry(
            lambda: erase(owner, found_id, redact=redact, dead_letters=letters), TRIES
        )
    output.write(f"{'Redacted' if redact else 'Erased'}: {_told(done)}.")
    if done.position is not None:
        output.write(f"Event {done.position} tells projections: rebuild those without a handler for AggregateErased.")
    return 0


def _told(erasure: Erasure) -> str:
    counts = {"event": erasure.events, "snapshot": erasure.snapshots, "dead letter": erasure.dead_letters}
    return ", ".join(_counted(number, name) for name, number in counts.items() if number or name != "dead letter")


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def take_snapshots(
    subject: Subject,
    output: Output,
    aggregate_id: str | None = None,
    *,
    everything: bool = False,
    application: str | None = None,
) -> int:
    """Take a snapshot of an aggregate, or of all, from its events; returns 1 if one of all fails."""
    return _Snapshots(subject, output, application, "taken", _take).work(aggregate_id, "events", everything=everything)


def drop_snapshots(
    subject: Subject,
    output: Output,
    aggregate_id: str | None = None,
    *,
    everything: bool = False,
    application: str | None = None,
) -> int:
    """Delete the snapshots of an aggregate, or of all, except those without which it cannot be read."""
    job = _Snapshots(subject, output, application, "dropped", _drop)
    return job.work(aggregate_id, "snapshots", everything=everything)


class _Snapshots:
    """Takes or drops the snapshots of aggregates, each in a transaction of its own.

    :param done: the word for it in messages.
    :param function: does it, and returns the number of snapshots, and a note.
    """

    def __init__(
        self,
        subject: Subject,
        output: Output,
        application: str | None,
        done: str,
        function: Callable[[Application[Any], Any], tuple[int, str]],
    ) -> None:
        require_tables(subject)
        self.output = output
        self.owner = find(subject, application)
        self.done = done
        self._function = function
        self._run = subject.projections.host.retry

    def work(self, aggregate_id: str | None, purpose: str, *, everything: bool) -> int:
        """Do it for an aggregate, or for each aggregate that has rows in the table of a purpose."""
        if (aggregate_id is not None) == everything:
            raise UsageError("Give the id of an aggregate, or --all.")
        if aggregate_id is not None:
            number, note = self._work(as_id(self.owner, aggregate_id))
            self.output.write(f"{self.owner.name} {aggregate_id}: {_counted(number, 'snapshot')} {self.done}{note}.")
            return 0
        total = failed = 0
        for each in _ids(self.owner, purpose):
            try:
                number, note = self._work(each)
            except CommandError as error:
                failed += 1
                self.output.write(f"{self.owner.name} {each}: {error}")
            else:
                total += number
                if note:
                    self.output.write(f"{self.owner.name} {each}{note}.")
        self.output.write(f"{self.owner.name}: {_counted(total, 'snapshot')} {self.done}, {failed} failed.")
        return 1 if failed else 0

    def _work(self, aggregate_id: Any) -> tuple[int, str]:
        with _clear_errors():
            try:
                return self._run(lambda: self._function(self.owner, aggregate_id), TRIES)
            except (AttributeError, LookupError, TypeError, ValueError, AssertionError, TopicError) as error:
                # An error of the aggregate's own code, or of the library.
                raise CommandError(f"It cannot be made of its events: {type(error).__name__}: {error}") from error


def _take(owner: Application[Any], aggregate_id: Any) -> tuple[int, str]:
    take_snapshot(owner, aggregate_id)
    return 1, ""


def _drop(owner: Application[Any], aggregate_id: Any) -> tuple[int, str]:
    with recorder_of(owner).datastore.writing() as write:
        stored = Stored(owner, write.connection, aggregate_id)
        if stored.last() is None:
            raise not_found(owner, aggregate_id)
        dropped = stored.delete_snapshots(unless_needed=True)
        left = stored.count_snapshots()
    return dropped, f", {left} kept, as there are no first events" if left else ""


def find(subject: Subject, name: str | None) -> Application[Any]:
    """Return an application by its name, or the only one.

    :raises UsageError: when there is none of that name, or there are several.
    """
    with clear_errors():
        applications = subject.applications()
    found = [each for key, each in applications.items() if name in (None, key)]
    if len(found) != 1:
        raise UsageError(f"Choose the application with --application: {', '.join(applications)}.")
    return found[0]


def as_id(owner: Application[Any], text: str) -> UUID | str:
    """Return the id of an aggregate from the command line.

    :raises UsageError: when the application's ids are UUIDs and it is none.
    """
    with _clear_errors():
        id_class = recorder_of(owner).events_table.accepted.id_class
    if id_class is str:
        return text
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a UUID, and the ids of {owner.name} are.") from None


def _ids(owner: Application[Any], purpose: str) -> Iterator[Any]:
    """Return the ids of the aggregates that have events, or snapshots, in pages."""
    with _clear_errors():
        recorder = recorder_of(owner)
        tables = recorder.datastore.tables(owner.name)
    table = (tables or {"events": recorder.events_table.table})[purpose]
    column = table.c.originator_id
    # An erased aggregate has no other events.
    is_there = sa.func.coalesce(table.c.topic, "").not_in([AggregateErased.TOPIC, EventRedacted.TOPIC])
    query = sa.select(column).where(is_there).distinct().order_by(column).limit(AT_ONCE)
    after: list[Any] = []
    while True:
        with _clear_errors(), recorder.datastore.reading(join=False) as read:
            page = read.connection.scalars(query.where(*(column > last for last in after))).all()
        yield from page
        if len(page) < AT_ONCE:
            return
        after = [page[-1]]


@contextmanager
def _clear_errors() -> Iterator[None]:
    with clear_errors():
        try:
            yield
        except AggregateNotFoundError as error:
            raise CommandError(str(error)) from error
