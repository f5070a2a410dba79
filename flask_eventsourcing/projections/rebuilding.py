"""Rebuilds a projection in new tables beside the live ones, and swaps them.

The rebuild has a checkpoint of its own, from which it goes on after it was killed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import sqlalchemy as sa
from eventsourcing.persistence import Notification
from eventsourcing.utils import get_topic
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateTable

from ..exceptions import ProjectionBusyError, RebuildError
from ..persistence.dialects import MAY_PASS, is_outage
from ..persistence.dialects.locks import RunnerLock
from ..persistence.dialects.swapping import LEFT, NEW, OLD, TRIAL
from .applying import Applier, EventError, may_be_its_own, telling
from .applying.pages import LogPages
from .checkpoint import LEASE, Checkpoint, CheckpointRow, Heartbeat
from .consumers import Consumer, ProjectedApplication
from .consumers.belonging import Belonging
from .consumers.shadows import ShadowTables, shadows_of
from .dead_letters import describe, event_name
from .runners import Runner
from .swap import NEAR, Swap, lease_of_rebuild, settle

TRIAL_EVENTS = 1000
BUSY = "Another process rebuilds {} now: wait for its end, or end it."
ALTERED = (
    "The columns of table {} were changed while its copy was built, so that a swap would lose some: run the rebuild "
    "again, with the code that has them in its models."
)
NO_MODELS = "{} has no models to rebuild: name them in its models=[…]."
SEVERAL = (
    "{} is inline, and the database has several servers that take writes: a rebuild cannot stop the others while it "
    "swaps the tables. Set inline = False and let a worker run it, rebuild it, and set inline = True again."
)
LOOK = 0.1
"""Seconds between two checks whether another process renews its lease."""


@dataclass(frozen=True)
class Estimate:
    """What a rebuild would have to do: events, and seconds as estimated by a trial.

    :param tried: the events of the trial.
    :param failed: those of them that the rebuild would set aside.
    """

    events: int
    seconds: float
    tried: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Leftovers:
    """What rebuilds have left behind: replaced tables, tables of an unfinished rebuild or trial, its position."""

    replaced: Sequence[str]
    unfinished: Sequence[str]
    position: int | None

    def __bool__(self) -> bool:
        return bool(self.replaced or self.unfinished or self.position is not None)


@dataclass(frozen=True)
class Rebuilt:
    """The result of a rebuild: the events of this run, its seconds, and the rows of each table before and after.

    ``dead_letters`` are the events that all runs have set aside, ``waiting`` those that wait behind them.
    """

    events: int
    seconds: float
    position: int
    resumed: bool
    rows: dict[str, tuple[int, int]]
    dead_letters: int = 0
    waiting: int = 0


class Rebuild:
    """Rebuilds one projection.

    :param consumer: the live projection.
    :param stop: ends it after the batch in progress; it can be continued later.
    """

    keeps_writers_waiting: bool = False
    """Whether every writer waits for its end."""

    def __init__(self, consumer: Consumer, stop: threading.Event | None = None) -> None:
        self.live: Consumer = consumer.of_kind("projection")
        self.application: ProjectedApplication = consumer.application
        self.stop: threading.Event = stop or threading.Event()
        self.rebuild: Consumer = consumer.of_kind("rebuild")
        self.new: ShadowTables = self._shadows(NEW)
        self.lock: RunnerLock = self.rebuild.lock()
        self.runner: Runner = Runner(self.rebuild, self.stop, lock=self.lock, session=self._session)
        if not self.live.tables or not self.live.handlers:
            raise RebuildError(NO_MODELS.format(consumer.projection_class.__name__))

    def run(self, *, restart: bool = False) -> Rebuilt | None:
        """Build, verify and swap. Return None if it was stopped before the end.

        :param restart: begin from the start even if an earlier rebuild can be continued.
        :raises ProjectionBusyError: when another process rebuilds it.
        :raises ProjectionHaltedError: when an event cannot be applied and the projection is to halt.
        :raises RebuildError: when it cannot be rebuilt, or the counts differ.
        """
        self.new.check()
        if self.live.projection_class.inline and self.application.datastore.dialect.is_node():
            raise RebuildError(SEVERAL.format(self.live.name))
        with self._alone() as confirm:
            swap = Swap(self.live, self.stop, self._also_of_tables(confirm))
            with self.application.host.context():
                self.live.checkpoint.ensure(self.live.start())
                settle(self.live)
                resumed = self._prepare(restart, swap)
            started = time.monotonic()
            if not self._catch_up():
                return None
            swapped = swap.run()
            if swapped is None:
                return None
            events = self.runner.progress.events + swapped.events
            seconds = time.monotonic() - started
            return Rebuilt(events, seconds, swapped.position, resumed, swapped.rows, *swapped.letters)

    def _also_of_tables(self, confirm: Callable[[Connection], None]) -> Callable[[Connection], None]:
        """Return a function that calls *confirm*, and checks that the live tables are as they were at the start."""

        def confirm_both(connection: Connection) -> None:
            confirm(connection)
            row = self.rebuild.checkpoint.read(connection)
            if row is not None and row.tables_id != self._shape(connection):
                names = ", ".join(repr(table.name) for table in self.live.tables)
                raise RebuildError(ALTERED.format(names))

        return confirm_both

    @contextmanager
    def _alone(self) -> Iterator[Callable[[Connection], None]]:
        """Keep other processes from rebuilding in the block; yields a function that raises an error if one does.

        :raises ProjectionBusyError: when another process rebuilds it.
        """
        if self.lock.leased:
            with self._leased() as confirm:
                yield confirm
            return
        try:
            if not self.lock.acquire():
                raise ProjectionBusyError(BUSY.format(self.live.name))
            # A lock of the server ends with its connection.
            yield lambda connection: self.lock.check()
        finally:
            self.lock.release()

    @contextmanager
    def _leased(self) -> Iterator[Callable[[Connection], None]]:
        # It has a row of its own, because the runner claims the row of the rebuild, and gives it back.
        checkpoint = lease_of_rebuild(self.live)
        claimed = self._claim(checkpoint)

        def confirm(connection: Connection) -> None:
            if checkpoint.lock(connection).token != claimed.token:
                raise ProjectionBusyError(BUSY.format(self.live.name))

        try:
            with Heartbeat(checkpoint, claimed, self.lock):
                yield confirm
        finally:
            table = checkpoint.table
            own = sa.delete(table).where(table.c.name == checkpoint.name, table.c.token == claimed.token)
            with self.application.engine.begin() as connection:
                connection.execute(own)

    def _claim(self, checkpoint: Checkpoint) -> CheckpointRow:
        """Claim a row, and wait for one whose process does not renew its lease."""
        checkpoint.ensure()
        seen = checkpoint.read()
        until = time.monotonic() + LEASE + LOOK
        while (claimed := checkpoint.claim(lease=True)) is None:
            row = checkpoint.read()
            # If the lease is renewed, its process is alive.
            renewed = seen is None or row is None or (row.token, row.leased_until) != (seen.token, seen.leased_until)
            if renewed or time.monotonic() > until or self.stop.is_set():
                raise ProjectionBusyError(BUSY.format(self.live.name))
            time.sleep(LOOK)
        return claimed

    def estimate(self) -> Estimate:
        """Count the events and try some of them, on tables that are dropped afterwards. Nothing else is changed.

        :raises RebuildError: when the rebuild would halt at one of those events.
        """
        # The suffix is its own, because other processes may try at the same time.
        trial = self._shadows(TRIAL + token_hex(2))
        trial.check()
        with self.application.host.context():
            mark = self.application.high_water_mark()
            with self.application.engine.connect() as connection:
                events = sum(self.live.count_topics(connection, 0, mark, exact=False).values())
            page = LogPages(self.live, self.live.checkpoint.read()).read(0, TRIAL_EVENTS, mark).events
            try:
                with self.application.engine.begin() as connection:
                    trial.create(connection)
                with trial.session(self.application.host) as session:
                    seconds, failed = self._try(session, page)
            finally:
                with self.application.engine.begin() as connection:
                    trial.drop(connection)
        return Estimate(events, seconds * events / len(page) if page else 0.0, len(page), failed)

    def _try(self, session: orm.Session, page: Sequence[Notification]) -> tuple[float, int]:
        """Try events; returns the seconds, and how many of them cannot be applied."""
        applier = Applier(self.rebuild)
        started = time.monotonic()
        try:
            applier.try_out(session, page)
        except (EventError, *MAY_PASS) as error:
            # One by one it is seen which event it was, and whether the handler or the database failed.
            if not (isinstance(error, EventError) or is_outage(error)):
                raise
            session.rollback()
            started = time.monotonic()
            failed = self._count_failing(applier, session, page)
        else:
            failed = 0
        return time.monotonic() - started, failed

    def _count_failing(self, applier: Applier, session: orm.Session, page: Sequence[Notification]) -> int:
        """Try events one by one, and return how many cannot be applied."""
        blocked: set[object] = set()
        failed = 0
        try:
            for notification in page:
                if notification.originator_id in blocked:
                    failed += 1
                    continue
                try:
                    with telling(), session.begin_nested():
                        applier.handle(session, notification)
                        session.flush()
                except (EventError, *MAY_PASS) as error:
                    lost = not isinstance(error, EventError)
                    if lost:
                        session.rollback()
                        if not (may_be_its_own(error) and self._database_answers()):
                            raise
                    # What the trial did before is gone with its connection.
                    if lost or self.live.projection_class.on_failure == "halt":
                        cause = error if lost else error.__cause__ or error
                        raise RebuildError(
                            f"The rebuild of {self.live.name} would halt before position {notification.id}: "
                            f"{event_name(notification)}: {describe(cause)}"
                        ) from cause
                    failed += 1
                    blocked.add(notification.originator_id)
        finally:
            session.rollback()
        return failed

    def _database_answers(self) -> bool:
        with suppress(sa.exc.SQLAlchemyError), self.application.engine.connect() as connection:
            connection.execute(sa.select(1))
            return True
        return False

    def drop_old(self) -> list[str]:
        """Drop the tables that a rebuild has replaced, and return their names."""
        with self.application.engine.begin() as connection:
            return self._shadows(OLD).drop(connection)

    def give_up(self) -> list[str]:
        """Drop the tables of an unfinished rebuild or a trial, and return their names.

        :raises ProjectionBusyError: when another process rebuilds the projection now.
        """
        with self._alone(), self.application.engine.begin() as connection:
            suffixes = {suffix for table, suffix in _left(connection, self.live) if suffix != OLD}
            dropped = [name for suffix in sorted(suffixes) for name in self._shadows(suffix).drop(connection)]
            self.application.dead_letters.remove_all(connection, self.rebuild.name)
            self.rebuild.checkpoint.remove(connection)
        return dropped

    def _shadows(self, suffix: str) -> ShadowTables:
        return shadows_of(self.live, suffix)

    def _session(self) -> AbstractContextManager[object]:
        return self.new.session(self.application.host)

    def _prepare(self, restart: bool, swap: Swap) -> bool:
        """Make what the rebuild needs, or find it; returns whether an earlier one is taken up."""
        row = self.rebuild.checkpoint.read()
        with self.application.engine.begin() as connection:
            can_go_on = row is not None and not restart and self._can_go_on(connection, row)
        if can_go_on:
            swap.check()
            return True
        self.rebuild.checkpoint.ensure()
        with self.application.engine.begin() as connection:
            self.application.dead_letters.remove_all(connection, self.rebuild.name)
            self.new.drop(connection)
            self.new.create(connection)
            # Without the topics that the live projection knows: a migration may have changed topics of events since.
            values = {"fingerprint": self.live.fingerprint, "tables_id": self._shape(connection)}
            self.rebuild.checkpoint.begin(connection, **values)
        try:
            swap.check()
        except RebuildError:
            with self.application.engine.begin() as connection:
                self.new.drop(connection)
                self.rebuild.checkpoint.remove(connection)
            raise
        return False

    def _can_go_on(self, connection: Connection, row: CheckpointRow) -> bool:
        """Whether an earlier rebuild can be taken up: by the same code, for the same tables, of the same log."""
        return (
            (row.fingerprint, row.tables_id) == (self.live.fingerprint, self._shape(connection))
            and self.new.all_exist(connection)
            and Belonging(self.rebuild).find_mismatch(connection, row) is None
        )

    def _catch_up(self) -> bool:
        """Build until the end of the log is near; returns False when it was stopped before."""
        while True:
            self.rebuild.checkpoint.resume()
            self.runner.run(once=True)
            if self.stop.is_set():
                return False
            if self.application.high_water_mark() - self.runner.progress.position <= NEAR:
                return True

    def _shape(self, connection: Connection) -> str:
        """Return the shape of the tables, in the models and in the database, and the event classes of the handlers."""
        parts = [str(CreateTable(table).compile(self.application.engine)) for table in self.live.tables]
        dialect = self.application.datastore.dialect
        parts += [" ".join(sorted(dialect.columns_of(connection, table))) for table in self.live.tables]
        # Without subclasses: which of them exist depends on what was imported, and on the garbage collector.
        parts += sorted(get_topic(event_class) for event_class in self.live.handlers.functions)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def leftovers(consumer: Consumer) -> Leftovers:
    """Return what rebuilds of a projection have left behind; it is not needed unless one is running."""
    row = consumer.of_kind("rebuild").checkpoint.read()
    with consumer.application.engine.connect() as connection:
        found = _left(connection, consumer)
    return Leftovers(
        [name for name, suffix in found if suffix == OLD],
        [name for name, suffix in found if suffix != OLD],
        None if row is None else row.position,
    )


def _left(connection: Connection, consumer: Consumer) -> list[tuple[str, str]]:
    """The tables that rebuilds of a projection have made, with their suffixes."""
    inspector: Any = sa.inspect(connection)
    found: list[tuple[str, str]] = []
    for schema in dict.fromkeys(table.schema for table in consumer.tables):
        live = {table.name for table in consumer.tables if table.schema == schema}
        matches = map(LEFT.fullmatch, sorted(inspector.get_table_names(schema=schema)))
        found += [(match[0], match["suffix"]) for match in matches if match is not None and match["live"] in live]
    return found
