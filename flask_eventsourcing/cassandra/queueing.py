"""How writers wait for each other.

The threads of a process that save queue: one of them leads, and hands the lead over. Of several processes, the one that
has written lets the others go first.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

from ..exceptions import CommitOutcomeUnknownError
from .rows import MOST_EVENTS, Append, Store, Subject

MOST_BYTES = 512 * 1024
"""Bytes of states that are committed together. A larger save is committed alone."""
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
        """Set the outcome: it was recorded at this position."""
        self.position = position
        self.woken.set()

    def fail(self, error: BaseException) -> None:
        """Set the outcome: it was not recorded, or this is unknown."""
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
        :raises CommitOutcomeUnknownError: when that thread is gone.
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
                    f"The thread that saves for others did not answer a save for {longest:g} s: read the "
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
                # A later append about the same aggregate does not overtake one that has to wait.
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


FIRST_GUESS = 0.01
LONGEST = 1.0
"""The longest time of an insert that is counted, in seconds."""
SINCE = 1.0
"""Seconds for which other writers count as active after they were seen."""
MOST_OTHERS = 8


class Pace:
    """Lets writers of several processes take turns: waits as long as inserts take and as other writers are active.

    With exponential back-off, the writer that loses most would starve. So the winner waits for about as many inserts as
    there are other writers. A loser waits less after each loss, and not at all when it has lost as often as there are
    other writers.
    """

    def __init__(self, store: Store, draw: random.Random | None = None) -> None:
        self._store = store
        self._draw = draw or random.Random()  # noqa: S311
        self._typical = FIRST_GUESS
        self._others = 1.0
        self._lost_since = 0
        """Losses since this process has written a row."""
        self._lost = float("-inf")
        self._wrote_last = False

    def before(self, losses: int) -> None:
        """Wait before an insert if this process has written the last row and others write too."""
        turn = self._typical * min(self._others, MOST_OTHERS)
        if losses == 0 and self._wrote_last and self._store.now() - self._lost < SINCE + turn:
            self._store.sleep(turn * self._draw.uniform(0.75, 1.25))

    def took(self, seconds: float) -> None:
        """Note how long an insert took."""
        self._typical = min(0.8 * self._typical + 0.2 * seconds, LONGEST)

    def won(self) -> None:
        """Note that this process has written the last row."""
        self._others = max(1.0, (self._others + self._lost_since) / 2)
        self._lost_since, self._wrote_last = 0, True

    def lost(self, losses: int) -> None:
        """Wait after a loss.

        :param losses: how often these appends have lost so far.
        """
        self._lost_since += 1
        self._lost, self._wrote_last = self._store.now(), False
        left = 1 - losses / (min(self._others, MOST_OTHERS) + 1)
        if left > 0:
            self._store.sleep(self._typical * left * self._draw.uniform(0, 0.5))
