"""The queue of the threads of a process that save. One thread leads, and hands the lead over."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

from ..exceptions import CommitOutcomeUnknownError
from .rows import MOST_EVENTS, Append, Subject

MOST_BYTES = 512 * 1024
"""Bytes of states that are committed together; a larger save goes alone."""
MOST_APPENDS = 256


class Ticket:
    """An append that waits for its outcome.

    :param append: the events to record.
    :param until: when it has waited long enough, by the store's clock.
    """

    def __init__(self, append: Append, until: float = float("inf")) -> None:
        self.append: Append = append
        self.until: float = until
        self.keys: set[Subject] = append.keys
        self.bytes: int = sum(len(event.state) for event in append.events)
        self.position: int | None = None
        self.error: BaseException | None = None
        self.leads: bool = False
        self.woken: threading.Event = threading.Event()

    def succeed(self, position: int) -> None:
        """Tell that it was recorded."""
        self.position = position
        self.woken.set()

    def fail(self, error: BaseException) -> None:
        """Tell that it was not, or that this is unknown."""
        if not self.is_done:
            self.error = error
            self.woken.set()

    @property
    def is_done(self) -> bool:
        """Whether its outcome is known."""
        return self.position is not None or self.error is not None

    def outcome(self) -> int:
        """Return its position, or raise the error of the append."""
        if self.error is not None:
            raise self.error
        if self.position is None:
            raise RuntimeError("A save has no outcome: this is a fault of Flask-EventSourcing.")
        return self.position


class Queue:
    """Keeps the appends of all threads in their order, and says which thread leads.

    The leader commits what waits, and then hands over to the first thread that came meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._is_led = False

    def join(self, ticket: Ticket, longest: float) -> bool:
        """Wait in the queue; return True if this thread leads now, and False if its append has an outcome.

        :param longest: seconds after which the thread that leads must be gone, however it was ended.
        :raises CommitOutcomeUnknownError: when it is.
        """
        with self._lock:
            self._waiting.append(ticket)
            if not self._is_led:
                self._is_led = ticket.leads = True
                return True
        with ExitStack() as interrupted:
            interrupted.callback(self._leave, ticket)
            if not ticket.woken.wait(longest):
                raise CommitOutcomeUnknownError(
                    f"A save was told nothing for {longest:g} s by the thread that saves for others: read the "
                    "aggregate again before you repeat it."
                )
            interrupted.pop_all()
        return not ticket.is_done

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        if ticket.leads and not ticket.is_done:
            self.hand_over()

    def take(self, taken: Sequence[Ticket]) -> list[Ticket]:
        """Take the appends that can be committed with those that are taken: no two are about one aggregate."""
        room = MOST_BYTES - sum(each.bytes for each in taken)
        places = MOST_EVENTS - sum(each.append.size for each in taken)
        about: set[Subject] = {key for each in taken for key in each.keys}
        found: list[Ticket] = []
        with self._lock:
            left: deque[Ticket] = deque()
            while self._waiting and len(taken) + len(found) < MOST_APPENDS:
                ticket = self._waiting.popleft()
                first = not taken and not found
                fits = ticket.bytes <= room and ticket.append.size <= places
                if ticket.keys.isdisjoint(about) and (first or fits):
                    found.append(ticket)
                    room -= ticket.bytes
                    places -= ticket.append.size
                else:
                    left.append(ticket)
                # One that has to wait is not overtaken by others about the same aggregate.
                about |= ticket.keys
            self._waiting.extendleft(reversed(left))
        return found

    def hand_over(self) -> None:
        """Let the first thread that waits lead, if there is one."""
        with self._lock:
            if not self._waiting:
                self._is_led = False
                return
            heir = self._waiting[0]
            heir.leads = True
        heir.woken.set()
