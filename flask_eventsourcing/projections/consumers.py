"""Projections bound to a Flask app: where their events come from, where they write, and in which row they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

from eventsourcing.application import Application
from eventsourcing.persistence import Mapper, Notification
from flask import Flask
from sqlalchemy.engine import Engine

from ..binding import SessionBinding
from ..persistence import SQLAlchemyApplicationRecorder
from .control import Control
from .definitions import Handlers, ModelProjection
from .locks import RunnerLock, lock_for
from .tables import ProjectionModels

Kind = Literal["projection", "reactions", "rebuild"]
SUFFIXES: dict[Kind, str] = {"projection": "", "reactions": ":reactions", "rebuild": ":rebuild"}


@dataclass(frozen=True, eq=False)
class ProjectionHost:
    """What the projections of one application in one Flask app share.

    :param application: returns the application of this process.
    :param lease: whether runners hold a lease rather than a lock of the server.
    :param notify: whether PostgreSQL is to notify those who wait for a position.
    """

    app: Flask
    binding: SessionBinding
    application_name: str
    application: Callable[[], Application[Any]]
    models: ProjectionModels
    lease: bool = False
    notify: bool = True

    @property
    def engine(self) -> Engine:
        """The database of the events, the projections and their models."""
        if self.binding.datastore is None:
            raise RuntimeError("The binding has no datastore yet.")
        return self.binding.datastore.engine

    @property
    def channel(self) -> str | None:
        """What PostgreSQL notifies when a position moves."""
        return (
            self.models.tables["projections"].name if self.notify and self.engine.dialect.name == "postgresql" else None
        )

    @property
    def recorder(self) -> SQLAlchemyApplicationRecorder:
        """The recorder of the application, from which the log is read."""
        return cast(SQLAlchemyApplicationRecorder, self.application().recorder)

    @property
    def mapper(self) -> Mapper[Any]:
        """What makes domain events of stored ones."""
        return self.application().mapper

    def control(self, name: str) -> Control:
        """Return the row of a projection by its name."""
        return Control(self.engine, self.models.tables["projections"], name, self.channel)

    def read_log(self, after: int, limit: int, stop: int | None, topics: Sequence[str]) -> Sequence[Notification]:
        """Read the log on a connection of its own."""
        return self.recorder.read_log(after, limit, stop, topics, inclusive_of_start=False)

    def head(self) -> int:
        """Return the last position of the log, read on a connection of its own; 0 for an empty log."""
        return self.recorder.log_end() or 0


@dataclass(frozen=True, eq=False)
class Consumer:
    """One who follows a log: a projection, the reactions of one, or a projection that is being rebuilt."""

    host: ProjectionHost
    projection_class: type[ModelProjection]
    kind: Kind = "projection"

    @property
    def name(self) -> str:
        """The name of its row."""
        return self.projection_class.name + SUFFIXES[self.kind]

    @cached_property
    def control(self) -> Control:
        """Its row."""
        return self.host.control(self.name)

    @property
    def handlers(self) -> Handlers:
        """What it does with events."""
        return self.projection_class.reactions if self.kind == "reactions" else self.projection_class.handlers

    @property
    def batch_size(self) -> int:
        """The most events in one commit: a reaction's position is noted after each."""
        return 1 if self.kind == "reactions" else self.projection_class.batch_size

    def lock(self) -> RunnerLock:
        """Return the lock that lets one process run it."""
        name = f"{self.host.models.tables['projections'].fullname}/{self.name}"
        return lock_for(self.host.engine, name, lease=self.host.lease)

    @cached_property
    def leased(self) -> bool:
        """Whether its runner holds a lease rather than a lock of the server."""
        return self.lock().leased

    def of_kind(self, kind: Kind) -> Consumer:
        """Return the consumer of another kind for the same projection."""
        return Consumer(self.host, self.projection_class, kind)

    def start(self) -> int:
        """The position at which it begins when it has no row yet."""
        if self.kind == "reactions" and self.projection_class.reactions_start == "end":
            return self.host.head()
        return 0

    def end(self) -> int:
        """How far it may go now: to the head, and reactions not past the models of their projection."""
        head = self.host.head()
        if self.kind == "reactions" and self.projection_class.handlers and not self.projection_class.inline:
            row = self.of_kind("projection").control.read()
            return min(head, row.position if row is not None else 0)
        return head


def consumers_of(host: ProjectionHost, projection_class: type[ModelProjection]) -> list[Consumer]:
    """Return what a worker runs for a projection class: the projection unless it is inline, and its reactions."""
    found = []
    if projection_class.handlers and not projection_class.inline:
        found.append(Consumer(host, projection_class))
    if projection_class.reactions:
        found.append(Consumer(host, projection_class, "reactions"))
    return found
