"""Reads what was recorded beside the state of handled events, if a handler asks for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from eventsourcing.persistence import Notification
from sqlalchemy.engine import Connection

from ...metadata import MetadataBlock, Recorded, caused_by
from ..consumers import Consumer
from ..definitions import MOST_EVENTS


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

        :param connection: called only if it is to be read.
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

    def causing(self, connection: Callable[[], Connection], position: int) -> MetadataBlock:
        """Return a block within which events are saved that the event at a position has caused."""
        return caused_by(lambda: self.of(connection, position))
