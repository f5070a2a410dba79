"""The middleware: events get the correlation of their request, and no client gets a success for events that are lost.

Django rolls back after an exception and not after a returned 4xx, and so it is for events. The middleware finds events
that were lost although no code asked for a rollback: after an error that was caught inside ``atomic()``, or where
autocommit was switched off and no code has committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...exceptions import UncommittedEventsError
from ...uow import Batch
from .hosting import Database, lost_text, site
from .of_requests import answer_in_steps, answering
from .transactions import DjangoUnit

FAILURE = 400
"""The lowest HTTP status that tells the client that the request was not carried out."""


class _Looked:
    """The state of one database while a request is answered."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.unit: DjangoUnit = database.units.current()
        self._blocks = len(self.unit.wrapper.atomic_blocks)
        self._before = list(self.unit.batches)
        self._outer = self.unit.losses.lost
        self.lost: list[Batch] = []
        self.doomed: Sequence[Batch] = ()
        """The events that a block around this middleware is going to lose, and reports itself."""
        self.unit.losses.lost = self.lost

    def end(self) -> Sequence[Batch]:
        """Return the lost events, and roll back what was not committed."""
        self.unit.losses.lost = self._outer
        pending = [each for each in self.unit.batches if each not in self._before]
        wrapper = self.unit.wrapper
        if pending and len(wrapper.atomic_blocks) > self._blocks:
            wrapper.set_rollback(True)
            self.lost += pending
        elif pending and not wrapper.in_atomic_block:
            wrapper.rollback()
            self.lost += pending
        elif (
            pending
            and wrapper.needs_rollback
            and not (self.unit.losses.is_asked or wrapper.atomic_blocks[-1]._from_testcase)
        ):
            self.doomed = pending
        return self.lost


class EventSourcingMiddleware:
    """Answers 500 instead of a success if events of the request are not stored.

    Add it to ``MIDDLEWARE``::

        MIDDLEWARE += ["flask_eventsourcing.contrib.django.middleware.EventSourcingMiddleware"]

    :param get_response: the rest of the middleware, and the view.
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self._get_response = get_response

    def __call__(self, request: Any) -> Any:
        """Answer a request.

        :raises UncommittedEventsError: for a response below 400 although events were lost; Django answers 500 for it.
        """
        with answering(request), _looking() as looked:
            response = self._get_response(request)
        lost = [batch for each in looked for batch in (*each.lost, *each.doomed)]
        if lost and response.status_code < FAILURE:
            response.close()
            raise UncommittedEventsError(lost_text(lost))
        answer_in_steps(request, response)
        return response


@contextmanager
def _looking() -> Iterator[Sequence[_Looked]]:
    looked = [_Looked(database) for database in site().databases.values()]
    try:
        yield looked
    finally:
        for each in looked:
            lost = each.end()
            if lost:
                each.database.lose(lost)
