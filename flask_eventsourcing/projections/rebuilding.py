"""Builds a projection again beside the live one, and puts it in its place.

The rebuild has a row of its own, from which it goes on when it was killed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

from eventsourcing.utils import get_topic
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateTable

from ..exceptions import ProjectionBusyError, RebuildError
from .applying import Applier
from .belonging import Belonging
from .checkpoint import CheckpointRow
from .consumers import Consumer
from .pages import LogPages
from .runners import Runner
from .swap import NEAR, NEW, OLD, TRIAL, ShadowTables, Swap, settle

TRIAL_EVENTS = 1000


@dataclass(frozen=True)
class Estimate:
    """What a rebuild would have to do: events, and seconds as far as a trial tells."""

    events: int
    seconds: float


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild has done: the events of this run, its seconds, and the rows of each table before and after."""

    events: int
    seconds: float
    position: int
    resumed: bool
    rows: dict[str, tuple[int, int]]


class Rebuild:
    """Rebuilds one projection.

    :param consumer: the live projection.
    :param stop: ends it after the batch in progress; it can be taken up later.
    """

    def __init__(self, consumer: Consumer, stop: threading.Event | None = None) -> None:
        self.live = consumer.of_kind("projection")
        self.application = consumer.application
        self.stop = stop or threading.Event()
        self.rebuild = consumer.of_kind("rebuild")
        self.new = self._shadows(NEW)
        self.lock = self.rebuild.lock()
        self.runner = Runner(self.rebuild, self.stop, lock=self.lock, session=self._session)
        if not self.live.tables or not self.live.handlers:
            raise RebuildError(
                f"{consumer.projection_class.__name__} has no models to rebuild: name them in its models=[…]."
            )

    def run(self, *, restart: bool = False) -> Rebuilt | None:
        """Build, verify and swap; returns None when it was stopped before the end.

        :param restart: begin from the start even if an earlier rebuild can be taken up.
        :raises ProjectionBusyError: when another process rebuilds it.
        :raises ProjectionHaltedError: when an event cannot be applied and the projection is to halt.
        :raises RebuildError: when it cannot be rebuilt, or the counts differ.
        """
        self.new.check()
        if not self.lock.acquire():
            self.lock.release()
            raise ProjectionBusyError(f"Another process rebuilds {self.live.name} now.")
        try:
            with self.application.host.context():
                self.live.checkpoint.ensure(self.live.start())
                settle(self.live)
                resumed = self._prepare(restart)
            started = time.monotonic()
            if not self._catch_up():
                return None
            swapped = Swap(self.live, self.stop).run()
            events = self.runner.progress.events + swapped.events
            return Rebuilt(events, time.monotonic() - started, swapped.position, resumed, swapped.rows)
        finally:
            self.lock.release()

    def estimate(self) -> Estimate:
        """Count the events and try some of them, on tables that are dropped again; nothing else is changed."""
        trial = self._shadows(TRIAL)
        trial.check()
        with self.application.host.context():
            mark = self.application.high_water_mark()
            with self.application.engine.connect() as connection:
                events = self.live.count_events(connection, 0, mark)
            row = self.live.checkpoint.read()
            page = [] if row is None else LogPages(self.live, row).read(0, TRIAL_EVENTS, mark).events
            with self.application.engine.begin() as connection:
                trial.drop(connection)
                trial.create(connection)
            try:
                started = time.monotonic()
                with trial.session(self.application.host) as session:
                    Applier(self.rebuild).try_out(session, page)
                seconds = time.monotonic() - started
            finally:
                with self.application.engine.begin() as connection:
                    trial.drop(connection)
        return Estimate(events, seconds * events / len(page) if page else 0.0)

    def drop_old(self) -> list[str]:
        """Drop the tables that a rebuild has replaced, and return their names."""
        with self.application.engine.begin() as connection:
            return self._shadows(OLD).drop(connection)

    def _shadows(self, suffix: str) -> ShadowTables:
        return ShadowTables(self.application.datastore, self.live.tables, suffix)

    def _session(self) -> AbstractContextManager[object]:
        return self.new.session(self.application.host)

    def _prepare(self, restart: bool) -> bool:
        """Make what the rebuild needs, or find it; returns whether an earlier one is taken up."""
        row = self.rebuild.checkpoint.read()
        with self.application.engine.begin() as connection:
            if row is not None and not restart and self._can_go_on(connection, row):
                return True
        self.rebuild.checkpoint.ensure()
        with self.application.engine.begin() as connection:
            self.application.dead_letters.remove_all(connection, self.rebuild.name)
            self.new.drop(connection)
            self.new.create(connection)
            known = self._known_topics(connection)
            values = {"fingerprint": self.live.fingerprint, "tables_id": self._shape(), **known}
            self.rebuild.checkpoint.begin(connection, **values)
        return False

    def _known_topics(self, connection: Connection) -> dict[str, object]:
        """What the live projection knows of the log, if that is still the same."""
        live = self.live.checkpoint.read(connection)
        if live is None or Belonging(self.live).find_mismatch(connection, live) is not None:
            return {}
        return {"topics": live.topics, "topics_position": live.topics_position}

    def _can_go_on(self, connection: Connection, row: CheckpointRow) -> bool:
        """Whether an earlier rebuild can be taken up: by the same code, for the same tables, of the same log."""
        return (
            (row.fingerprint, row.tables_id) == (self.live.fingerprint, self._shape())
            and self.new.all_exist(connection)
            and Belonging(self.rebuild).find_mismatch(connection, row) is None
        )

    def _catch_up(self) -> bool:
        """Build until the end of the log is near; returns False when it was stopped before."""
        while True:
            self.rebuild.checkpoint.resume()
            self.runner.goal = None
            self.runner.run(once=True)
            if self.stop.is_set():
                return False
            if self.application.high_water_mark() - self.runner.progress.position <= NEAR:
                return True

    def _shape(self) -> str:
        """What the tables are to be and which events are asked for, beside the code."""
        parts = [str(CreateTable(table).compile(self.application.engine)) for table in self.live.tables]
        # Not those of subclasses: which of them there are depends on what was imported, and collected.
        parts += sorted(get_topic(event_class) for event_class in self.live.handlers.functions)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
