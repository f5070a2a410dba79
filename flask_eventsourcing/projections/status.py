"""What is known of projections: how far they are, who runs them, what is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .consumers import Consumer
from .control import ACTIVE, HALTED, ControlRow
from .dead_letters import DeadLetters


@dataclass(frozen=True)
class ProjectionStatus:
    """The state of one projection, of the reactions of one, or of a rebuild.

    ``state`` is ``inline``, ``halted``, ``running`` or ``stopped``. ``lag_events`` counts the events of its topics that
    it has not dealt with, ``lag_seconds`` is the age of the first of them. ``since`` is when the runner took over.
    """

    name: str
    application: str
    state: str
    position: int
    head: int
    lag_events: int
    lag_seconds: float | None
    runner: str | None
    since: datetime | None
    error: str | None
    failed_position: int | None
    dead_letters: int
    waiting: int

    @property
    def healthy(self) -> bool:
        """Whether it is being run, or need not be, and nothing was set aside."""
        return self.state in ("running", "inline") and not self.dead_letters

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        values = asdict(self)
        values["since"] = None if self.since is None else self.since.isoformat()
        return values


@dataclass(frozen=True)
class Health:
    """All projections of a Flask app."""

    projections: tuple[ProjectionStatus, ...]

    @property
    def ok(self) -> bool:
        """Whether each of them is healthy."""
        return all(projection.healthy for projection in self.projections)

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {"ok": self.ok, "projections": [projection.to_dict() for projection in self.projections]}


def status_of(consumer: Consumer) -> ProjectionStatus:
    """Look at a consumer's row, its lock and its log."""
    head = consumer.host.head()
    inline = consumer.kind == "projection" and consumer.projection_class.inline
    letters = DeadLetters(consumer.host.models.tables["dead_letters"])
    with consumer.host.engine.connect() as connection:
        row = consumer.control.read(connection) or _never_run(consumer)
        position = head if inline else row.position
        running = row.token is not None and consumer.lock().is_held(connection, row.leased_until)
        failed, waiting = letters.count(connection, consumer.name)
        lag = _lag(connection, consumer, position, head)
    state = "inline" if inline else "halted" if row.state == HALTED else "running" if running else "stopped"
    return ProjectionStatus(
        name=consumer.name,
        application=consumer.host.application_name,
        state=state,
        position=position,
        head=head,
        lag_events=lag,
        lag_seconds=_age(consumer, position, head) if lag else 0.0,
        runner=row.runner if running else None,
        since=_aware(row.running_since) if running else None,
        error=row.error,
        failed_position=row.failed_position,
        dead_letters=failed,
        waiting=waiting,
    )


def _never_run(consumer: Consumer) -> ControlRow:
    return ControlRow(consumer.name, 0, 0, ACTIVE, None, None, None, None, None, None, None)


def _aware(time: datetime | None) -> datetime | None:
    return None if time is None else time.replace(tzinfo=UTC)


def _lag(connection: Connection, consumer: Consumer, position: int, head: int) -> int:
    return 0 if position >= head else count_events(connection, consumer, position, head)


def count_events(connection: Connection, consumer: Consumer, after: int, to: int) -> int:
    """Count the events of a consumer's topics between two positions."""
    table = consumer.host.recorder.events_table.table
    query = sa.select(sa.func.count()).where(table.c.notification_id > after, table.c.notification_id <= to)
    topics = consumer.handlers.topics
    if topics:
        query = query.where(table.c.topic.in_(topics))
    return int(connection.scalar(query) or 0)


def _age(consumer: Consumer, position: int, head: int) -> float | None:
    found = consumer.host.read_log(position, 1, head, consumer.handlers.topics)
    if not found:
        return 0.0
    try:
        event = consumer.host.mapper.to_domain_event(found[0])
    except Exception:  # noqa: BLE001
        # An event that cannot be read is what the projection halts at; its age is not known.
        return None
    timestamp = getattr(event, "timestamp", None)
    if not isinstance(timestamp, datetime):
        return None
    if timestamp.tzinfo is None:
        timestamp = timestamp.replace(tzinfo=UTC)
    return max(0.0, (datetime.now(UTC) - timestamp).total_seconds())
