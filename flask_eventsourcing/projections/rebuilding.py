"""Builds a projection anew beside the live one, and puts it in its place.

The rebuild has a row of its own, from which it goes on when it was killed. At the end, with the live row locked, it
applies what the live projection has applied by then, and the tables change their names: on PostgreSQL and SQLite in one
transaction. MySQL commits when tables are renamed, so there the state ``swapping`` is committed before, and whoever
finds it tells by the tables whether the renaming came to pass.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import sqlalchemy as sa
from eventsourcing.utils import get_topic
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateTable

from ..exceptions import ProjectionBusyError, RebuildError
from . import shadow
from .applying import Applier
from .consumers import Consumer
from .control import SWAPPING, ControlRow
from .dead_letters import DeadLetters
from .handover import hand_over, settle
from .outages import is_outage
from .runners import Runner
from .status import count_events

logger = logging.getLogger(__name__)

TRIAL_EVENTS = 1000
SWAP_TRIES = 30
SWAP_PATIENCE = 2
"""Seconds for which the swap waits for readers of the live tables, as others queue behind it meanwhile."""
NEAR = 1000
"""How many positions before the head the swap may begin; the rest is applied while the live projection waits."""


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
        self.host = consumer.host
        self.stop = stop or threading.Event()
        self.rebuild = consumer.of_kind("rebuild")
        self.tables = consumer.projection_class.tables()
        self.letters = DeadLetters(self.host.models.tables["dead_letters"])
        self.lock = self.rebuild.lock()
        self.runner = Runner(self.rebuild, self.stop, lock=self.lock, session=self._session)
        if not self.tables or not self.live.handlers:
            raise RebuildError(
                f"{consumer.projection_class.__name__} has no models to rebuild: name them in its models=[…]."
            )

    def run(self, *, restart: bool = False) -> Rebuilt | None:
        """Build, verify and swap; returns None when it was stopped before the end.

        :param restart: begin anew even if an earlier rebuild can be taken up.
        :raises ProjectionBusyError: when another process rebuilds it.
        :raises ProjectionHaltedError: when an event cannot be applied and the projection is to halt.
        :raises RebuildError: when it cannot be rebuilt, or the counts differ.
        """
        self._shadows(shadow.NEW)
        if not self.lock.acquire():
            self.lock.release()
            raise ProjectionBusyError(f"Another process rebuilds {self.live.name} now.")
        try:
            with self.host.app.app_context():
                self.live.control.ensure(self.live.start())
                settle(self.live)
                resumed = self._prepare(restart)
            started = time.monotonic()
            while True:
                self.rebuild.control.resume()
                self.runner.goal = None
                self.runner.run(once=True)
                if self.stop.is_set():
                    return None
                if self.host.head() - self.runner.position <= NEAR:
                    break
            position, rows = self._swap()
            return Rebuilt(self.runner.events, time.monotonic() - started, position, resumed, rows)
        finally:
            self.lock.release()

    def estimate(self) -> Estimate:
        """Count the events and try some of them, on tables that are dropped again; nothing else is changed."""
        shadows = self._shadows(shadow.TRIAL)
        with self.host.app.app_context():
            head = self.host.head()
            with self.host.engine.connect() as connection:
                events = count_events(connection, self.live, 0, head)
            page = self.host.read_log(0, TRIAL_EVENTS, head, self.live.handlers.topics)
            with self.host.engine.begin() as connection:
                shadow.drop(connection, self.tables, shadow.TRIAL)
                shadow.create(connection, shadows)
            try:
                started = time.monotonic()
                with shadow.shadow_session(self.host, shadows) as session:
                    Applier(self.rebuild).try_out(session, page)
                seconds = time.monotonic() - started
            finally:
                with self.host.engine.begin() as connection:
                    shadow.drop(connection, self.tables, shadow.TRIAL)
        return Estimate(events, seconds * events / len(page) if page else 0.0)

    def drop_old(self) -> list[str]:
        """Drop the tables that a rebuild has replaced, and return their names."""
        with self.host.engine.begin() as connection:
            return shadow.drop(connection, self.tables, shadow.OLD)

    def _shadows(self, suffix: str) -> dict[str, sa.Table]:
        return shadow.shadow_tables(self.tables, suffix, self.host.engine.dialect.name)

    def _session(self) -> AbstractContextManager[object]:
        return shadow.shadow_session(self.host, self._shadows(shadow.NEW))

    def _prepare(self, restart: bool) -> bool:
        """Make what the rebuild needs, or find it; returns whether an earlier one is taken up."""
        fingerprint = self._fingerprint()
        row = self.rebuild.control.read()
        with self.host.engine.begin() as connection:
            complete = all(shadow.exists(connection, table, shadow.NEW) for table in self.tables)
            if row is not None and complete and row.fingerprint == fingerprint and not restart:
                return True
        self.rebuild.control.ensure()
        with self.host.engine.begin() as connection:
            self.letters.remove_all(connection, self.rebuild.name)
            shadow.drop(connection, self.tables, shadow.NEW)
            shadow.create(connection, self._shadows(shadow.NEW))
            self.rebuild.control.set_fingerprint(connection, fingerprint)
        return False

    def _fingerprint(self) -> str:
        """What must be the same for an earlier rebuild to be taken up: tables, topics and, if it is known, the code."""
        parts = [str(CreateTable(table).compile(self.host.engine)) for table in self.tables]
        # Not those of subclasses: which of them there are depends on what was imported, and collected.
        parts += sorted(get_topic(event_class) for event_class in self.live.handlers.functions)
        try:
            parts.append(inspect.getsource(self.live.projection_class))
        except (OSError, TypeError):
            parts.append("")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------ the swap

    def _swap(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """Swap, and try again where readers of the live tables keep them locked."""
        in_steps = self.host.engine.dialect.name in shadow.MYSQL
        for attempt in range(SWAP_TRIES):
            try:
                return self._swap_in_steps() if in_steps else self._swap_at_once()
            except Exception as error:
                # An outage ends; anything else is raised, and the live tables are as they were.
                settle(self.live)
                if not is_outage(error) or attempt == SWAP_TRIES - 1 or self.stop.wait(1):
                    raise
                logger.warning("%s: the swap is tried again: %s", self.rebuild.name, error)
        raise RebuildError

    def _swap_at_once(self) -> tuple[int, dict[str, tuple[int, int]]]:
        with self.host.app.app_context(), self._session(), self.host.binding.transaction() as session:
            connection = self._shadow_connection(session)
            row = self._finish(connection, connection)
            rows = self._count_rows(connection)
            shadow.limit_waiting(connection, SWAP_PATIENCE)
            shadow.drop(connection, self.tables, shadow.OLD)
            shadow.swap(connection, self.tables)
            hand_over(self.live, self.rebuild, connection)
            return row.position, rows

    def _shadow_connection(self, session: orm.Session) -> Connection:
        return self.host.binding.unit(session).connection(self.host.engine)

    def _swap_in_steps(self) -> tuple[int, dict[str, tuple[int, int]]]:
        with self.host.engine.connect() as lock, lock.begin():
            if self.live.projection_class.inline:
                # Held over all of the steps, so that no event is saved that only the old tables have.
                self._lock_log(lock)
            with self.host.app.app_context(), self._session(), self.host.binding.transaction() as session:
                connection = self._shadow_connection(session)
                row = self._finish(connection, None)
                rows = self._count_rows(connection)
                self.live.control.set_state(connection, SWAPPING)
            with self.host.engine.connect() as connection:
                connection.detach()
                shadow.limit_waiting(connection, SWAP_PATIENCE)
                shadow.drop(connection, self.tables, shadow.OLD)
                shadow.swap(connection, self.tables)
            with self.host.engine.begin() as connection:
                hand_over(self.live, self.rebuild, connection)
        return row.position, rows

    def _lock_log(self, connection: Connection) -> None:
        recorder = self.host.recorder
        recorder.dialect.lock_log(connection, recorder.events_table)

    def _finish(self, connection: Connection, log_lock: Connection | None) -> ControlRow:
        """Lock the live row, apply what is missing, and compare the counts."""
        inline = self.live.projection_class.inline
        if inline and log_lock is not None:
            self._lock_log(log_lock)
        live = self.live.control.seize(connection)
        row = self.rebuild.control.read(connection)
        if row is None:
            raise RebuildError(f"Another process has finished the rebuild of {self.live.name}.")
        end = self.host.head() if inline else live.position
        applier = Applier(self.rebuild)
        while row.position < end:
            page = self.host.read_log(row.position, NEAR, end, self.live.handlers.topics)
            row = applier.apply(row, page, page[-1].id if len(page) == NEAR else end)
            self.runner.events += len(page)
        self._verify(connection, row)
        return row

    def _verify(self, connection: Connection, row: ControlRow) -> None:
        found = count_events(connection, self.live, 0, row.position)
        failed, _ = self.letters.count(connection, self.rebuild.name)
        if found != row.applied + failed:
            raise RebuildError(
                f"The rebuild of {self.live.name} has applied {row.applied} events and set {failed} aside, but the "
                f"log has {found} up to position {row.position}: the live tables stay as they are; begin anew, with "
                "--restart."
            )

    def _count_rows(self, connection: Connection) -> dict[str, tuple[int, int]]:
        count = shadow.count_rows
        return {t.name: (count(connection, t), count(connection, t, shadow.NEW)) for t in self.tables}
