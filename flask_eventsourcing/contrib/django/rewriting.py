"""Rebuilds a projection on Django's models: its rows are deleted and written again, all in one transaction.

Handlers write their models through Django's ORM, which cannot write them to other tables. So readers see the old rows
until the commit, the live projection waits meanwhile, and a rebuild that is killed leaves no row. If the database has
one writer at a time, every writer waits, so such a rebuild must be asked for.

Its progress is noted outside of that transaction, so that the next process knows at which event this one has ended.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from eventsourcing.persistence import Notification
from sqlalchemy.engine import Connection

from ...exceptions import HandlerError, ProjectionBusyError, RebuildError
from ...persistence.dialects.swapping import LEFT, written_tables
from ...projections.applying import Applier, EventError
from ...projections.applying.pages import LogPages, Page
from ...projections.checkpoint import Checkpoint, CheckpointRow
from ...projections.consumers import Consumer, ProjectedApplication
from ...projections.consumers.shadows import REFERS, UNDECLARED, own_tables
from ...projections.dead_letters import describe, event_name
from ...projections.definitions import MOST_EVENTS
from ...projections.rebuilding import BUSY, NO_MODELS, TRIAL_EVENTS, Estimate, Rebuilt
from ...projections.runners import FIRST_PAUSE, LONGEST_PAUSE, Progress
from ...projections.runners.claims import ProcessEndedError
from ...projections.runners.pace import Backoff
from ...projections.swap import NEAR, hand_over, lease_of_rebuild
from ...uow import AfterCommit
from .marks import Mark
from .transactions import DjangoUnit, nothing

ACTS = "Table {!r} has {}, which would act on every row that the rebuild writes: remove it for the rebuild."
SENDS = (
    "A handler of {} registers a function to call after the commit, and a rebuild would call it again for every event: "
    "move the call to a method with @reaction(…)."
)


BROKEN = (
    "The rows that the rebuild of {} has written break a foreign key ({}), so nothing was changed: a handler adds a "
    "row without the one that it refers to."
)


class _UndoneError(Exception):
    """Leaves the transaction, so that it is rolled back."""


class _Left(NamedTuple):
    """Where a process was that has ended in a rebuild: in the page after a position, or trying one of its events."""

    after: int
    at: int = 0
    tries: int = 0


class _Notes:
    """Notes of a rebuild outside of its transaction: in a row, or in a file if no other connection can write."""

    def __init__(self, live: Consumer) -> None:
        self._live = live
        dialect = live.application.datastore.dialect
        self._row: Checkpoint | None = None if dialect.has_one_writer else lease_of_rebuild(live)
        with live.application.engine.connect() as connection:
            path = dialect.file_beside(connection)
        digest = hashlib.sha256(f"{live.application.name}/{live.name}".encode()).hexdigest()[:8]
        self._file: Path | None = None if path is None else path.with_name(f"{path.name}-rebuild-{digest}")

    def begin(self) -> None:
        """Make the row, before the transaction can lock its place."""
        if self._row is not None:
            self._row.ensure()

    def read(self) -> _Left | None:
        """Return where a process with the same code was, if it has ended in a rebuild."""
        code, found = None, _Left(0)
        if self._row is not None and (row := self._row.read()) is not None:
            code, found = row.fingerprint, _Left(row.position, row.failed_position or 0, row.claim or 0)
        elif self._file is not None and self._file.exists():
            code, *noted = json.loads(self._file.read_text())
            found = _Left(*noted)
        return found if code == self._live.fingerprint else None

    def write(self, left: _Left) -> None:
        """Note where the process is."""
        if self._row is not None:
            values = {"position": left.after, "failed_position": left.at, "claim": left.tries}
            with self._row.engine.begin() as connection:
                self._row.set_values(connection, fingerprint=self._live.fingerprint, **values)
        elif self._file is not None:
            self._file.write_text(json.dumps([self._live.fingerprint, *left]))

    def remove(self) -> None:
        """Remove the notes at the end of the rebuild."""
        if self._row is not None:
            with self._row.engine.begin() as connection:
                self._row.remove(connection)
        elif self._file is not None:
            self._file.unlink(missing_ok=True)


class Rewrite:
    """Rebuilds one projection on Django's models.

    :param consumer: the live projection.
    :param stop: ends it after the batch in progress; the rows are as they were then.
    :raises RebuildError: when there is nothing to rebuild.
    """

    def __init__(self, consumer: Consumer, stop: threading.Event | None = None) -> None:
        self.live: Consumer = consumer.of_kind("projection")
        self.rebuild: Consumer = consumer.of_kind("rebuild")
        self.application: ProjectedApplication = consumer.application
        self.stop: threading.Event = stop or threading.Event()
        self.progress: Progress = Progress()
        self.name: str = self.rebuild.name
        self._applier = Applier(self.rebuild, joins=True)
        self._notes = _Notes(self.live)
        if not self.live.tables or not self.live.handlers:
            raise RebuildError(NO_MODELS.format(consumer.projection_class.__name__))

    @property
    def runner(self) -> Rewrite:
        """The runner, whose progress is shown."""
        return self

    @property
    def keeps_writers_waiting(self) -> bool:
        """Whether every writer waits for its end."""
        return self.application.datastore.dialect.has_one_writer

    def run(self, *, restart: bool = False) -> Rebuilt | None:
        """Rebuild it; returns None when it was stopped, and nothing was changed.

        :param restart: also try an event again at which processes have ended. A rebuild always begins from the start.
        :raises ProjectionBusyError: when another process rebuilds it.
        :raises RebuildError: when it cannot be rebuilt, or an event cannot be applied; nothing was changed.
        """
        started = time.monotonic()
        with self._alone():
            self.live.checkpoint.ensure(self.live.start())
            with self._noting(restart), suppress(_UndoneError):
                with self._emptied() as (connection, before):
                    row = self._catch_up(connection)
                    self._check_keys(connection)
                    letters = self._verify(connection, row)
                    pairs = zip(before, self._count_rows(connection), strict=True)
                    rows = dict(zip((table.name for table in self.live.tables), pairs, strict=True))
                    hand_over(self.live, self.rebuild, connection)
                seconds = time.monotonic() - started
                return Rebuilt(self.progress.events, seconds, row.position, False, rows, *letters)
        return None

    @contextmanager
    def _noting(self, restart: bool) -> Iterator[None]:
        """Keep the notes of the process in the block, and remove them at its end."""
        if restart:
            self._notes.remove()
        self._notes.begin()
        is_kept = False
        try:
            yield
        except RebuildError as error:
            # A restart alone must not let the same code try the event again, and end its process.
            is_kept = isinstance(error.__cause__, ProcessEndedError)
            raise
        finally:
            if not is_kept:
                self._notes.remove()

    def estimate(self) -> Estimate:
        """Count the events and try some of them, in a transaction that is rolled back.

        :raises RebuildError: when the rebuild would halt at one of those events.
        """
        tried, failed, seconds = 0, 0, 0.0
        with self._alone():
            mark = self.application.high_water_mark()
            with self._reading() as reading:
                events = sum(self.live.count_topics(reading, 0, mark, exact=False).values())
            self.live.checkpoint.ensure(self.live.start())
            try:
                with self._emptied() as (connection, _):
                    page = LogPages(self.rebuild, None).read(0, TRIAL_EVENTS, mark)
                    started, tried = time.monotonic(), len(page.events)
                    self._deliver(self._begin(connection), page)
                    seconds = time.monotonic() - started
                    failed = sum(self.application.dead_letters.count(connection, self.rebuild.name))
                    raise _UndoneError
            except _UndoneError:
                return Estimate(events, seconds * events / tried if tried else 0.0, tried, failed)

    def drop_old(self) -> list[str]:
        """Return nothing: no table is left to drop."""
        return []

    def give_up(self) -> list[str]:
        """Forget where the process of an unfinished rebuild has ended. Return nothing: no table is left to drop."""
        self._notes.remove()
        return []

    # -------------------------------------------------------------------------------------------- its transaction

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = self.rebuild.lock()
        try:
            # If it is no lock of the server, the lock on the live projection's row keeps other rebuilds out.
            if not lock.leased and not lock.acquire():
                raise ProjectionBusyError(BUSY.format(self.live.name))
            with self.application.host.context():
                yield
        finally:
            lock.release()

    @contextmanager
    def _emptied(self) -> Iterator[tuple[Connection, Sequence[int]]]:
        """Open a transaction, delete the rows, and lock the live projection's row; yields how many rows there were."""
        host = self.application.host
        with host.transaction() as session:
            unit: DjangoUnit = host.unit_of(session)  # type: ignore[assignment]
            connection = unit.connection()
            self._check(connection)
            self.live.checkpoint.lock(connection)
            before = self._count_rows(connection)
            with unit.wrapper.constraint_checks_disabled():
                for table in self.live.tables:
                    connection.execute(sa.delete(table))
            with unit.wrapper.execute_wrapper(self._guard(own_tables(self.live))), self._sending_nothing(unit):
                yield connection, before

    def _check(self, connection: Connection) -> None:
        dialect = self.application.datastore.dialect
        names = {table.name for table in self.live.tables}
        for table in self.live.tables:
            acting = sorted(part.what for part in dialect.parts_of(connection, table, table.name) if part.acts)
            if acting:
                raise RebuildError(ACTS.format(table.name, ", ".join(acting)))
            for other in sorted(set(dialect.referrers(connection, table)) - names):
                if LEFT.fullmatch(other) is None:
                    raise RebuildError(REFERS.format(other, table.name))

    def _guard(self, own: Callable[[], set[str]]) -> Callable[..., Any]:
        """Return a function that refuses to write tables that are not among the projection's models."""
        tables = {table.name for table in self.live.tables}

        def execute(run: Callable[..., Any], sql: Any, parameters: Any, many: bool, context: Any) -> Any:
            for name in written_tables(str(sql), None):
                if str(name) not in tables and str(name) not in own():
                    raise HandlerError(UNDECLARED.format(name))
            return run(sql, parameters, many, context)

        return execute

    @contextmanager
    def _sending_nothing(self, unit: DjangoUnit) -> Iterator[None]:
        def count() -> int:
            plain = sum(not isinstance(function, Mark) for _, function, *_ in unit.wrapper.run_on_commit)
            return plain + sum(each.function is not nothing for each in unit.pending.all(AfterCommit))

        before = count()
        yield
        if count() != before:
            raise RebuildError(SENDS.format(self.live.projection_class.__name__))

    def _count_rows(self, connection: Connection) -> list[int]:
        query = sa.select(sa.func.count())
        return [connection.scalar(query.select_from(table)) or 0 for table in self.live.tables]

    @contextmanager
    def _reading(self, connection: Connection | None = None) -> Iterator[Connection]:
        """A connection that sees the end of the log, which that of the transaction may not see."""
        if connection is not None and self.keeps_writers_waiting:
            yield connection
            return
        with self.application.engine.connect() as own:
            yield own

    # ------------------------------------------------------------------------------------------------- its events

    def _begin(self, connection: Connection) -> CheckpointRow:
        """Make the row in which the rebuild counts."""
        checkpoint = self.rebuild.checkpoint
        checkpoint.remove(connection)
        self.application.dead_letters.remove_all(connection, self.rebuild.name)
        connection.execute(sa.insert(checkpoint.table).values(name=checkpoint.name, position=0))
        checkpoint.begin(connection, fingerprint=self.live.fingerprint)
        row = checkpoint.read(connection)
        if row is None:
            raise RebuildError(f"The row of the rebuild of {self.live.name} was deleted meanwhile: run it again.")
        return row

    def _catch_up(self, connection: Connection) -> CheckpointRow:
        row, pages, progress = self._begin(connection), LogPages(self.rebuild, None), self.progress
        progress.state, progress.position = "catching up", 0
        progress.high_water_mark = self.application.high_water_mark()
        left = self._notes.read()
        # The live projection applies later events.
        while row.position < progress.high_water_mark:
            if self.stop.is_set():
                raise _UndoneError
            is_before = left is not None and row.position < left.after
            stop = min(left.after, progress.high_water_mark) if left and is_before else progress.high_water_mark
            page = pages.read(row.position, MOST_EVENTS, stop)
            if left is not None and not is_before:
                row, left = self._deliver_noted(row, page, left), None
            else:
                if left is None:
                    self._notes.write(_Left(row.position))
                row = self._deliver(row, page)
            progress.position, progress.events = row.position, progress.events + len(page.events)
            if row.position >= progress.high_water_mark:
                mark = self.application.high_water_mark()
                progress.high_water_mark = mark if mark - row.position > NEAR else row.position
        return row

    def _deliver(self, row: CheckpointRow, page: Page) -> CheckpointRow:
        try:
            return self._applier.apply(row, page.events, page.position)
        except EventError:
            # Applied one by one, the events show which of them failed.
            for notification in page.events:
                row = self._deliver_one(row, notification)
        return self._applier.apply(row, (), page.position)

    def _deliver_noted(self, row: CheckpointRow, page: Page, left: _Left) -> CheckpointRow:
        """Apply events of which one may have ended a process. Each is noted first."""
        for notification in page.events:
            tries = left.tries if left.at == notification.id else 0
            if tries > self.live.projection_class.retries:
                # The note as it was read: the row has an earlier event by now.
                self._notes.write(left)
                error = ProcessEndedError(self.live.command("rebuild", "--restart"))
                row = self._set_aside(row, notification, error, tries)
            else:
                self._notes.write(_Left(left.after, notification.id, tries + 1))
                row = self._deliver_one(row, notification, tries)
        return self._applier.apply(row, (), page.position)

    def _deliver_one(self, row: CheckpointRow, notification: Notification, attempts: int = 0) -> CheckpointRow:
        pause = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            try:
                return self._applier.apply(row, [notification], notification.id)
            except EventError as failure:
                error, attempts = failure.__cause__ or failure, attempts + 1
            # What a rebuild refuses is not the fault of one event.
            if isinstance(error, HandlerError) or attempts > self.live.projection_class.retries:
                break
            if self.stop.wait(pause.seconds):
                raise _UndoneError
            pause.grow()
        return self._set_aside(row, notification, error, attempts)

    def _set_aside(
        self, row: CheckpointRow, notification: Notification, error: BaseException, attempts: int
    ) -> CheckpointRow:
        if isinstance(error, HandlerError) or self.live.projection_class.on_failure == "halt":
            raise RebuildError(
                f"The rebuild of {self.live.name} halts before position {notification.id}, and nothing was changed: "
                f"{event_name(notification)}: {describe(error)}"
            ) from error
        return self._applier.apply(row, [notification], notification.id, dead=(error, attempts))

    def _check_keys(self, connection: Connection) -> None:
        """Check the foreign keys that only the commit would check, whose error names neither table nor row."""
        broken = self.application.datastore.dialect.broken_keys(connection, self.live.tables)
        if broken:
            raise RebuildError(BROKEN.format(self.live.name, ", ".join(broken)))

    def _verify(self, connection: Connection, row: CheckpointRow) -> tuple[int, int]:
        failed, waiting = self.application.dead_letters.count(connection, self.rebuild.name)
        if not self.application.log.can_count:
            return failed, waiting
        with self._reading(connection) as reading:
            found = self.live.count_events(reading, 0, row.position)
        if found != row.applied + failed:
            raise RebuildError(
                f"The rebuild of {self.live.name} has applied {row.applied} events and set {failed} aside, but the "
                f"log has {found} up to position {row.position}: the rows stay as they are."
            )
        return failed, waiting
