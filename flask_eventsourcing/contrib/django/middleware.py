"""The middleware: events have the correlation of their request, and no client is told "done" for those that are gone.

An exception rolls back, and a returned 4xx does not: that is Django's, and for events it is the same. What is looked
for are events that are gone although nobody has asked for that: after an error that was swallowed inside ``atomic()``,
or where autocommit was switched off and nobody has committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...exceptions import UncommittedEventsError
from ...uow import Batch
from .hosting import Database, lost_text, site
from .of_requests import answering
from .transactions import DjangoUnit

FAILURE = 400
"""The lowest HTTP status that tells the client that the request was not carried out."""


class _Looked:
    """What is known of one database while a request is answered."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.unit: DjangoUnit = database.units.current()
        self._blocks = len(self.unit.wrapper.atomic_blocks)
        self._before = list(self.unit.batches)
        self._outer = self.unit.losses.lost
        self.lost: list[Batch] = []
        self.unit.losses.lost = self.lost

    def end(self) -> Sequence[Batch]:
        """Return what is lost, and see to it that what is not committed will not be."""
        self.unit.losses.lost = self._outer
        pending = [each for each in self.unit.batches if each not in self._before]
        wrapper = self.unit.wrapper
        if pending and len(wrapper.atomic_blocks) > self._blocks:
            wrapper.set_rollback(True)
            self.lost += pending
        elif pending and not wrapper.in_atomic_block:
            wrapper.rollback()
            self.lost += pending
        return self.lost


class EventSourcingMiddleware:
    """Answers 500 in the place of a success for events that are not stored.

    :param get_response: the rest of the middleware, and the view.
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self._get_response = get_response

    def __call__(self, request: Any) -> Any:
        """Answer a request.

        :raises UncommittedEventsError: for an answer below 400 although events were dropped; Django makes a 500 of it.
        """
        with answering(request), _looking() as looked:
            response = self._get_response(request)
        lost = [batch for each in looked for batch in each.lost]
        if lost and response.status_code < FAILURE:
            response.close()
            raise UncommittedEventsError(lost_text(lost))
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
