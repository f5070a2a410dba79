"""Reads pages of a log for one consumer: its events, and those whose class is unknown; decodes them; and reads what was
recorded of them.

Topics are filtered in the database only if all topics of that part of the log are known. The class of a topic may not
be imported yet, or was moved: whether a topic concerns the consumer is known only after it was resolved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from eventsourcing.persistence import JSONTranscoder, Mapper, Notification, find_id_convertor, pass_through_convertor
from eventsourcing.utils import resolve_topic
from sqlalchemy.engine import Connection

from ...failures import resolve
from ...metadata import Recorded
from ...persistence.dialects import is_outage
from ...persistence.recorders import NEVER_TOO_MANY
from ..checkpoint import CheckpointRow
from ..consumers import Consumer
from ..definitions import MOST_EVENTS, MOST_TOPICS

COLLECT_FROM = 2000
"""How many positions there must be to read for their topics to be worth a look."""
COLLECT_AT_ONCE = 200_000
LONGEST_TOPICS = 15_000
"""Characters of topics that a checkpoint keeps: the shortest column of text has 65,535 bytes."""
NO_TOPIC = "-"


class ObservedError(Exception):
    """The handlers do something that needs a flush before it, which is not possible: begin the batch again."""


class EventError(Exception):
    """A handler failed, or an event could not be read; the cause is the error itself."""


class SuspectError(EventError):
    """The database failed while a handler ran or its writes were committed: if it answers now, the handler did it."""


@contextmanager
def telling(passes: Callable[[BaseException], bool] = is_outage) -> Iterator[None]:
    """Around handlers, which may raise anything: raise an error as the cause of an :class:`EventError`.

    :param passes: whether an error allows another try, and is raised as it is; such errors are among ``MAY_PASS``.
    """
    try:
        yield
    except (EventError, ObservedError):
        raise
    except Exception as error:
        if passes(error):
            raise
        raise EventError from error


@dataclass(frozen=True)
class Page:
    """Events of a log, and the position up to which no others concern the consumer."""

    events: Sequence[Notification]
    position: int
    size: int
    """How many were read for it."""
    full: bool


class LogPages:
    """The pages of a consumer's log.

    :param row: its checkpoint, or that of the live projection for a rebuild, if there is one.
    """

    def __init__(self, consumer: Consumer, row: CheckpointRow | None) -> None:
        self.consumer = consumer
        self.topics: set[str] = set(json.loads(row.topics)) if row is not None and row.topics else set[str]()
        self.known_to: int = (row.topics_position if row is not None else None) or 0
        self._saved = self.known_to
        self._ahead: Sequence[Notification] = ()

    def look_ahead(self, after: int, limit: int) -> int | None:
        """Read the events right after a position, and return where they end, or None if the log has to be asked.

        Between positions that follow each other no event can appear, so that one statement tells what two would. They
        are kept for :meth:`read`.
        """
        self._ahead, application = (), self.consumer.application
        if not application.log.can_filter or self.consumer.follows_models:
            return None
        limit = min(limit + 1, NEVER_TOO_MANY)
        read = application.recorder.read_committed(after, limit)
        if len(read) == limit or any(each.id != position for position, each in enumerate(read, after + 1)):
            return None
        self._ahead = read
        return read[-1].id if read else after

    def read(self, after: int, limit: int, stop: int) -> Page:
        """Read events after a position, up to another one."""
        ahead, self._ahead = self._ahead, ()
        if ahead and ahead[0].id == after + 1 and ahead[-1].id <= stop:
            return self._page(after, ahead, ahead[-1].id, stop)
        log = self.consumer.application.log
        if log.can_filter and stop - after >= COLLECT_FROM and stop > self.known_to:
            self._collect(stop)
        topics: Sequence[str] = ()
        if log.can_filter and after < self.known_to:
            stop = min(stop, self.known_to)
            topics = self._filter()
        read, position = log.page(after, limit, stop, topics)
        return self._page(after, read, position, stop)

    def _page(self, after: int, read: Sequence[Notification], position: int, stop: int) -> Page:
        if after == self.known_to:
            self.topics.update(each.topic for each in read)
            self.known_to = position
        concerns = self.consumer.handlers.concerns
        wanted = {topic for topic in {each.topic for each in read} if concerns(topic)}
        return Page([each for each in read if each.topic in wanted], position, len(read), position < stop)

    def notes(self) -> dict[str, object]:
        """Return what the checkpoint is to keep of the topics, if there is something new."""
        if self._saved == self.known_to:
            return {}
        self._saved = self.known_to
        text = json.dumps(sorted(self.topics))
        return {"topics": text, "topics_position": self.known_to} if len(text) <= LONGEST_TOPICS else {}

    def _collect(self, stop: int) -> None:
        """Find the topics of the rest of the log, in steps, as it may be long."""
        while self.known_to < stop:
            upto = min(stop, self.known_to + COLLECT_AT_ONCE)
            self.topics |= self.consumer.application.log.topics(self.known_to, upto)
            self.known_to = upto

    def _filter(self) -> Sequence[str]:
        """Return the topics to filter by, or none if a topic is unresolved or there are too many."""
        handlers = self.consumer.handlers
        if any(resolve(topic)[0] is None for topic in self.topics):
            return ()
        wanted = [topic for topic in self.topics if handlers.concerns(topic)]
        return (wanted or [NO_TOPIC]) if len(wanted) <= MOST_TOPICS else ()


class Decoding:
    """Makes domain events of stored ones, as the mapper does; what is the same for all of a topic is found once.

    The mapper itself makes those that need more, and all where it or its transcoder is of a class of the user's.
    """

    def __init__(self, mapper: Mapper[Any]) -> None:
        self.mapper = mapper
        self._scan = _scanner_of(mapper)
        self._classes: dict[str, type[Any] | None] = {}

    def __call__(self, stored: Notification) -> Any:
        """Return the domain event.

        :raises TopicError: when its class is not found.
        :raises MapperDeserialisationError: when its state cannot be decoded.
        """
        try:
            event_class = self._classes[stored.topic]
        except KeyError:
            event_class = self._classes[stored.topic] = self._find(stored)
        if event_class is None:
            return self.mapper.to_domain_event(stored)
        state: Any = None
        try:
            text = stored.state.decode()
            # Not behind spaces, which only the decoder skips.
            state, end = self._scan(text, 0) if text[:1] == "{" else ((), 0)
        finally:
            if state is None:
                # For its error, which names the event.
                self.mapper.to_domain_event(stored)
        if type(state) is not dict or end != len(text) or "class_version" in state:
            return self.mapper.to_domain_event(stored)
        state["originator_id"] = stored.originator_id
        state["originator_version"] = stored.originator_version
        event = object.__new__(event_class)
        object.__setattr__(event, "__dict__", state)
        return event

    def _find(self, stored: Notification) -> type[Any] | None:
        """Return the class of an event that needs no more than its state, or None."""
        found, id_class = resolve_topic(stored.topic), cast(Any, type(stored.originator_id))
        try:
            convert = find_id_convertor(found, id_class)
        except TypeError:
            # So does the mapper, after it has decoded the state.
            return None
        is_plain = convert is pass_through_convertor and getattr(found, "class_version", 1) == 1
        return found if is_plain and self._scan is not None else None


def _scanner_of(mapper: Any) -> Any:
    """Return what reads the JSON of a mapper that the library has made, or None for every other one."""
    transcoder = mapper.transcoder
    decoder: Any = getattr(transcoder, "decoder", None)
    is_plain = (
        type(mapper) is Mapper
        and not (mapper.compressor or mapper.cipher)
        and getattr(type(transcoder), "decode", None) is JSONTranscoder.decode
        and not ("to_domain_event" in vars(mapper) or "decode" in vars(transcoder))
        and type(decoder) is json.JSONDecoder
    )
    return decoder.scan_once if is_plain else None


class Recordings:
    """What was recorded of the events of one consumer's batch."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._log = consumer.application.log.identity() if consumer.kind == "reactions" else None
        self._found: dict[int, Recorded] = {}

    def begin(self, connection: Connection, notifications: Sequence[Notification]) -> None:
        """Read it for all events of a batch at once, if a handler wants to be told."""
        self._found = {}
        if self._consumer.handlers.telling:
            log = self._consumer.application.log
            self._found = log.find_recorded([each.id for each in notifications], connection)

    def of(self, connection: Callable[[], Connection], position: int) -> Recorded:
        """Return it for one event.

        :param connection: called only if the log must be read.
        """
        found = self._found.get(position)
        if found is None:
            if len(self._found) >= MOST_EVENTS:
                self._found.clear()
            read = self._consumer.application.log.find_recorded([position], connection())
            found = self._found[position] = read.get(position) or Recorded(position, None, None, {})
        return found

    def key(self, connection: Callable[[], Connection], notification: Notification) -> str:
        """Return the same text for the same event whenever a reaction is called for it."""
        # Another reaction to the event may use the same service.
        reaction = f"{self._consumer.application.name}/{self._consumer.projection_class.name}"
        recorded = self.of(connection, notification.id)
        if recorded.event_id is not None:
            return f"{reaction}/{recorded.event_id}"
        # Not its position, where a restored log has another event.
        event = f"{self._log}/{notification.originator_id}/{notification.originator_version}"
        digest = hashlib.sha256(f"{notification.topic}\n".encode() + bytes(notification.state)).hexdigest()[:16]
        return f"{reaction}/{event}/{digest}"
