"""Projections in a host: the log that they follow, the tables that they write, and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, cast
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import Mapper, Notification
from sqlalchemy import orm
from sqlalchemy.engine import Connection, Engine

from ...applications.apart import EventStore
from ...failures import Kept
from ...host import Host
from ...models import ProjectionModels
from ...persistence import Datastore, SQLAlchemyApplicationRecorder
from ...persistence.dialects.event_values import UnreadableNotification
from ...persistence.dialects.locks import Lease, RunnerLock
from ..checkpoint import MOVED_FROM, NOTED, Checkpoint
from ..dead_letters import DeadLetters
from ..definitions import Handlers, ModelProjection
from ..definitions.fingerprints import fingerprint_of
from .logs import REST, EventLog, StoreLog, TableLog, python_type

ROWS_AT_ONCE = 500
Kind = Literal["projection", "reactions", "rebuild"]
SUFFIXES: dict[Kind, str] = {"projection": "", "reactions": ":reactions", "rebuild": ":rebuild"}


@dataclass(frozen=True, eq=False)
class ProjectedApplication:
    """An application in a host, whose log projections follow.

    :param name: of the application.
    :param find: returns the application of this process.
    :param lease: whether runners hold a lease rather than a lock of the server.
    :param rebuild_with: the class that rebuilds its projections instead of ``Rebuild``, with the same arguments.
    """

    host: Host
    name: str
    find: Callable[[], Application[Any]]
    models: ProjectionModels
    lease: bool = False
    registered: dict[str, type[ModelProjection]] = field(default_factory=dict)
    """Its projections by their names."""
    merged: dict[str, float] = field(default_factory=dict)
    """When this process last merged the ranges of each inline projection, by its name."""
    rebuild_with: Callable[..., Any] | None = None

    def is_orphan(self, name: str) -> bool:
        """Whether no projection here has the name of a checkpoint."""
        return name.partition(":")[0].casefold() not in {each.casefold() for each in self.registered}

    @property
    def datastore(self) -> Datastore:
        """The database of the projections and their models, and of the events unless these are in a store."""
        return self.host.datastore

    @property
    def engine(self) -> Engine:
        """The engine of that database."""
        return self.host.datastore.engine

    @property
    def recorder(self) -> SQLAlchemyApplicationRecorder:
        """The recorder of the application, where its events are in the host's database."""
        return cast(SQLAlchemyApplicationRecorder, self.find().recorder)

    @cached_property
    def log(self) -> EventLog:
        """The log of the application."""
        return TableLog(self.host.datastore, self.name, self.find)

    def command(self, words: str) -> str:
        """Return how messages name a command."""
        return self.host.datastore.dialect.command(words)

    @property
    def mapper(self) -> Mapper[Any]:
        """The mapper, which makes domain events from stored ones."""
        return self.find().mapper

    @property
    def dead_letters(self) -> DeadLetters:
        """The events that its projections have set aside."""
        return DeadLetters(self.models.tables["dead_letters"])

    def checkpoint(self, name: str) -> Checkpoint:
        """Return the row of a projection by its name."""
        return Checkpoint(self.datastore, self.models.tables["projections"], name)

    def runner_lock(self, name: str) -> RunnerLock:
        """Return the lock that lets one process run a projection."""
        unique = f"{self.models.tables['projections'].fullname}/{name}"
        dialect = self.datastore.dialect
        return Lease(self.engine, unique, dialect.time_in) if self.lease else dialect.runner_lock(unique)

    def read_log(self, after: int, limit: int, stop: int | None, topics: Sequence[str]) -> Sequence[Notification]:
        """Read the log on a connection of its own, with placeholders for rows that cannot be read."""
        return self.log.read(after, limit, stop, topics)

    def time_of(self, notification: Notification) -> datetime | None:
        """Return the timestamp of an event, None where it has none or cannot be read."""
        event: Any = None
        # The projection halts at an event that cannot be read, so its time is not needed.
        with Kept():
            event = self.mapper.to_domain_event(notification)
        timestamp = getattr(event, "timestamp", None)
        if not isinstance(timestamp, datetime):
            return None
        return timestamp if timestamp.tzinfo is not None else timestamp.replace(tzinfo=UTC)

    def high_water_mark(self) -> int:
        """Return the position up to which the log is complete, read on a connection of its own; 0 for an empty log."""
        return self.log.high_water_mark()


@dataclass(frozen=True, eq=False)
class ProjectedApart(ProjectedApplication):
    """An application whose events are in a store, apart from the database of its projections.

    :param store: where they are.
    """

    store: EventStore = field(kw_only=True)

    @cached_property
    def log(self) -> EventLog:
        """The log of the application."""
        return StoreLog(self.store, self.name, self.find)


@dataclass(frozen=True, eq=False)
class Consumer:
    """What follows a log: a projection, the reactions of one, or a rebuild."""

    application: ProjectedApplication
    projection_class: type[ModelProjection]
    kind: Kind = "projection"

    @property
    def name(self) -> str:
        """The name of its row."""
        return self.projection_class.name + SUFFIXES[self.kind]

    def command(self, words: str, *further: object) -> str:
        """Return how messages name a command that is about it."""
        return self.application.command(" ".join(map(str, (words, self.name, *further))))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its row."""
        return self.application.checkpoint(self.name)

    @cached_property
    def tables(self) -> Sequence[sa.Table]:
        """The tables of the models that it owns, and those between two of these models."""
        found = tables_of(self.application.host, self.projection_class)
        return list(dict.fromkeys((*found, *_tables_between(self.projection_class.models))))

    @property
    def handlers(self) -> Handlers:
        """Its handlers."""
        return self.projection_class.reactions if self.kind == "reactions" else self.projection_class.handlers

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of its code."""
        functions = (
            *self.projection_class.handlers.functions.values(),
            *self.projection_class.reactions.functions.values(),
        )
        return fingerprint_of(self.projection_class, functions)

    @property
    def batch_size(self) -> int:
        """The most events in one commit: a reaction's position is noted after each."""
        return 1 if self.kind == "reactions" else self.projection_class.batch_size

    def lock(self) -> RunnerLock:
        """Return the lock that lets one process run it."""
        return self.application.runner_lock(self.name)

    @cached_property
    def leased(self) -> bool:
        """Whether its runner holds a lease rather than a lock of the server."""
        return self.lock().leased

    def of_kind(self, kind: Kind) -> Consumer:
        """Return the consumer of another kind for the same projection."""
        return Consumer(self.application, self.projection_class, kind)

    def start(self) -> int:
        """The position at which it begins when it has no row yet."""
        if self.kind == "reactions" and self.projection_class.reactions_start == "end":
            return self.application.high_water_mark()
        return 0

    def count_events(self, connection: Connection, after: int, to: int) -> int:
        """Count the events between two positions that concern it."""
        return sum(self.count_topics(connection, after, to).values())

    def count_topics(self, connection: Connection, after: int, to: int, *, exact: bool = True) -> dict[str, int]:
        """Count the events between two positions that concern it, by their topics.

        :param exact: whether every event is counted. Otherwise positions that were not read count as events.
        """
        found = self.application.log.count_topics(connection, after, to, exact=exact)
        return {topic: count for topic, count in found.items() if topic == REST or self.handlers.concerns(topic)}

    def last_event(
        self, connection: Connection, position: int, notifications: Sequence[Notification]
    ) -> dict[str, Any]:
        """Return the columns for the event at the position: the last of *notifications*, or one without a handler."""
        log = self.application.log
        if notifications and notifications[-1].id == position:
            last = notifications[-1]
            at: tuple[Any, Any] = str(last.originator_id), last.originator_version
        else:
            at = log.at(position, self.checkpoint.table.c.last_originator_id.type)
        event_id = log.event_id(connection, position)
        return {"last_originator_id": at[0], "last_originator_version": at[1], "last_event_id": event_id}

    @cached_property
    def applied_inline(self) -> sa.ColumnElement[bool] | None:
        """A condition for the statement that moves the position: others have applied inline what it passes over.

        None for reactions and rebuilds, and where the condition would lock rows, so that it is asked before.
        """
        if self.kind != "projection" or self.application.datastore.dialect.locks_what_it_compares:
            return None
        c = self.application.models.tables["inline_ranges"].c
        passed = (c.last_position > sa.bindparam(MOVED_FROM), c.last_position <= sa.bindparam(NOTED))
        return sa.exists(sa.select(sa.literal(1)).where(c.projection == self.name, *passed))

    @property
    def follows_models(self) -> bool:
        """Whether it goes no further than the projection's models, as reactions do."""
        return self.kind == "reactions" and bool(self.projection_class.handlers) and not self.projection_class.inline

    def end(self) -> int:
        """How far it may go now: up to the high-water mark, and reactions no further than the projection's models."""
        mark = self.application.high_water_mark()
        if self.follows_models:
            row = self.of_kind("projection").checkpoint.read()
            return min(mark, row.position if row is not None else 0)
        return mark


def tables_of(host: Host, projection_class: type[ModelProjection]) -> Sequence[sa.Table]:
    """Return the tables of the models that a projection owns."""
    found = {table.key: table for model in projection_class.models for table in host.tables_of(model)}
    return list(found.values())


def _tables_between(models: Sequence[Any]) -> Iterable[sa.Table]:
    """Return the tables without a model in which rows of one model refer to several of another, if both are given."""
    mappers = [mapper for model in models if isinstance(mapper := sa.inspect(model, raiseerr=False), orm.Mapper)]
    for mapper in mappers:
        for each in mapper.relationships:
            if isinstance(each.secondary, sa.Table) and each.mapper in mappers:
                yield each.secondary


def consumers_of(application: ProjectedApplication, projection_class: type[ModelProjection]) -> list[Consumer]:
    """Return what a worker runs for a projection class: the projection unless it is inline, and its reactions."""
    found = []
    if projection_class.handlers and not projection_class.inline:
        found.append(Consumer(application, projection_class))
    if projection_class.reactions:
        found.append(Consumer(application, projection_class, "reactions"))
    return found


def id_keys(consumer: Consumer) -> Iterable[tuple[Any, Any]]:
    """Return the models whose primary key can be the id of an aggregate, with that column."""
    if consumer.kind == "reactions" or not consumer.projection_class.prefetch:
        return
    id_type = consumer.application.log.id_type()
    for model in consumer.projection_class.models:
        key = sa.inspect(model).primary_key
        if len(key) == 1 and python_type(key[0]) is id_type is UUID:
            yield model, sa.inspect(model).get_property_by_column(key[0]).class_attribute


def load_rows(
    session: orm.Session, keys: Sequence[tuple[Any, Any]], notifications: Sequence[Notification]
) -> list[Any]:
    """Load the rows that belong to the events' aggregates, so that ``session.get()`` finds them.

    :param keys: of :func:`id_keys`.
    """
    # By their numbers, because the hash of a UUID is a call of a Python function.
    readable: Any = (each.originator_id for each in notifications if type(each) is not UnreadableNotification)
    ids = list({each.int: each for each in readable}.values()) if keys else []
    found: list[Any] = []
    for model, column in keys:
        for start in range(0, len(ids), ROWS_AT_ONCE):
            found += session.scalars(sa.select(model).where(column.in_(ids[start : start + ROWS_AT_ONCE])))
    return found
