"""The end of a rebuild: the new tables replace the live ones, with everything that belonged to these.

The live checkpoint is locked, and the events that the live projection has applied meanwhile are applied to the new
tables. If, by the catalogs, nothing would be lost with the replaced tables, the tables are then renamed, in one
transaction if the database can do that. If renaming commits, the state ``swapping`` is committed before, and the next
process sees by the tables whether they were renamed.

If something would be lost, such as grants or a view, the live rows are deleted and the new ones inserted, in one
transaction: readers see the old rows until its commit. This takes longer with more rows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..exceptions import RebuildError
from ..persistence import Dialect
from ..persistence.dialects import MAY_PASS, is_canceled, is_outage, without_values
from ..persistence.dialects.swapping import LEFT, NEW, OLD, Part
from .applying import Applier
from .applying.pages import LogPages
from .checkpoint import ACTIVE, PAUSED, SWAPPING, Checkpoint, CheckpointRow
from .consumers import Consumer, ProjectedApplication
from .consumers.shadows import REFERS, ShadowTables, shadows_of

logger: logging.Logger = logging.getLogger(__name__)

TRIES = 30
PATIENCE = 2
"""Seconds for which the swap waits for readers of the live tables; new readers queue behind it meanwhile."""
NEAR = 1000
"""Positions before the end of the log at which the swap may begin. The rest is applied while the live one waits."""


@dataclass(frozen=True)
class Swapped:
    """The result of a swap: the events that were missing, and the rows of each table before and after.

    ``letters`` counts the events that were set aside in all of the rebuild, and those that wait behind them.
    """

    position: int
    events: int
    rows: dict[str, tuple[int, int]]
    letters: tuple[int, int] = (0, 0)


class Swap:
    """Ends a rebuild.

    :param stop: ends the tries.
    :param confirm: raises an error when another process rebuilds the projection now.
    """

    def __init__(self, live: Consumer, stop: threading.Event, confirm: Callable[[Connection], None]) -> None:
        self.live = live
        self.rebuild: Consumer = live.of_kind("rebuild")
        self.stop = stop
        self.confirm = confirm
        self.application: ProjectedApplication = live.application
        self.new: ShadowTables = shadows_of(live, NEW)
        self.old: ShadowTables = shadows_of(live, OLD)
        self._lacked: Sequence[str] = []

    def run(self) -> Swapped | None:
        """Swap; try again while readers of the live tables keep them locked. Return None if it was stopped.

        :raises RebuildError: when the counts of events differ, or another session keeps the tables locked.
        """
        held: Sequence[str] = ()
        for tries in range(1, TRIES + 1):
            done = self._try()
            if isinstance(done, Swapped):
                self._drop_built()
                return done
            before, held = held, self._holders()
            if tries == 1 or (held and held != before):
                logger.warning("%s: the swap is tried again: %s", self.rebuild.name, _why(held) or done)
            if tries == TRIES:
                raise RebuildError(
                    f"The tables of {self.live.name} could not be swapped: {_why(held) or done}. What was built is "
                    "kept: run the rebuild again to go on."
                ) from done
            if self.stop.wait(1):
                return None
        raise RebuildError("There was no try.")

    def _try(self) -> Swapped | Exception:
        """Swap once, or return the outage that has ended it; after any error the live tables are as they were."""
        with ExitStack() as failed:
            failed.callback(settle, self.live)
            try:
                swapped = self._swap()
            except MAY_PASS as error:
                if is_canceled(error):
                    raise RebuildError(
                        TOO_LONG.format(self.live.name, without_values(getattr(error, "orig", None) or error))
                    ) from error
                if not is_outage(error):
                    raise
                return error
            failed.pop_all()
        return swapped

    def _holders(self) -> Sequence[str]:
        try:
            return self.application.datastore.dialect.holders(self.live.tables, PATIENCE)
        except sa.exc.DBAPIError as error:
            logger.debug("%s: the sessions that lock the tables cannot be listed: %s", self.rebuild.name, error)
            return ()

    def check(self) -> bool:
        """Whether to replace the rows of the live tables, because new tables would lack something that these have.

        :raises RebuildError: naming what would be lost where that cannot be done.
        """
        with self.application.engine.connect() as connection:
            replacing, lacked = replaces(connection, self.new, self.old)
        if not replacing and lacked != self._lacked:
            self._lacked = lacked
            logger.warning(LACKED, self.live.name, ", ".join(lacked))
        return replacing

    def _swap(self) -> Swapped:
        replacing = self.check()
        if not replacing:
            self.new.gather_statistics()
        if self.application.datastore.dialect.is_node():
            self._hold_live()
        if not replacing and not self.application.datastore.dialect.swaps_in_transaction:
            with self._log_locked():
                return self._in_steps()
        with self._log_locked():
            return self._at_once(replacing)

    def _hold_live(self) -> None:
        """Stop the live projection on all servers of a cluster, where the lock of its row counts on one server only.

        A worker that runs it would move its position again and again, and each time the cluster would end this swap.
        """
        with self.application.engine.begin() as connection:
            self.confirm(connection)
            if self.live.checkpoint.lock(connection).state != PAUSED:
                held = {"state": SWAPPING, "token": None, "leased_until": None}
                self.live.checkpoint.set_values(connection, **held)

    def _drop_built(self) -> None:
        """Drop the tables whose rows were copied."""
        try:
            with self.application.engine.begin() as connection:
                self.new.drop(connection)
        except sa.exc.DBAPIError as error:
            # The rebuild has succeeded, and the next one drops these tables.
            logger.warning("%s: what was built could not be dropped: %s", self.rebuild.name, error)

    def _at_once(self, replacing: bool) -> Swapped:
        host, dialect = self.application.host, self.application.datastore.dialect
        with host.context(), self.new.session(host) as session, host.transaction():
            connection = host.unit_of(session).connection()
            if self.live.projection_class.inline and dialect.swaps_in_transaction:
                self._lock_log(connection)
            swapped = self._finish(connection)
            if replacing:
                self._replace(connection)
            else:
                self._rename(connection)
            hand_over(self.live, self.rebuild, connection)
            return swapped

    def _in_steps(self) -> Swapped:
        host, engine = self.application.host, self.application.engine
        with host.context(), self.new.session(host) as session, host.transaction():
            connection = host.unit_of(session).connection()
            swapped = self._finish(connection)
            if _is_paused(self.live, connection):
                # Noted in the row of the rebuild, because the live row has no place for two states.
                self.rebuild.checkpoint.set_state(connection, PAUSED)
            self.live.checkpoint.set_state(connection, SWAPPING)
        with engine.connect() as connection:
            connection.detach()
            self._rename(connection)
        with engine.begin() as connection:
            hand_over(self.live, self.rebuild, connection)
        return swapped

    @contextmanager
    def _log_locked(self) -> Iterator[None]:
        """Lock the log if the swap takes several transactions, so that no event reaches only the old tables."""
        dialect = self.application.datastore.dialect
        if not self.live.projection_class.inline or dialect.swaps_in_transaction:
            yield
            return
        with self.application.engine.connect() as lock:
            # The connection leaves the pool, which may have no second one for the swap.
            lock.detach()
            with lock.begin():
                self._lock_log(lock)
                yield

    def _lock_log(self, connection: Connection) -> None:
        recorder = self.application.recorder
        recorder.dialect.lock_log(connection, recorder.events_table)

    def _rename(self, connection: Connection) -> None:
        dialect = self.application.datastore.dialect
        dialect.limit_ddl_waiting(connection, PATIENCE)
        self.old.drop(connection)
        dialect.swap_tables(connection, self.live.tables, NEW, OLD)

    def _replace(self, connection: Connection) -> None:
        dialect = self.application.datastore.dialect
        if dialect.swaps_in_transaction:
            dialect.limit_ddl_waiting(connection, PATIENCE)
        try:
            dialect.replace_rows(connection, sa.schema.sort_tables(self.live.tables), NEW)
            broken = dialect.broken_keys(connection, self.live.tables)
        except sa.exc.DBAPIError as error:
            if is_outage(error) or is_canceled(error):
                raise
            raise RebuildError(NO_FIT.format(self.live.name, dialect.text(error.orig))) from error
        if broken:
            raise RebuildError(NO_FIT.format(self.live.name, f"they break a foreign key ({', '.join(broken)})"))
        if self._live().count_rows(connection) != self.new.count_rows(connection):
            raise RebuildError(f"The live tables of {self.live.name} have not taken all rows: they stay as they were.")

    def _live(self) -> ShadowTables:
        return ShadowTables(self.application.datastore, self.live.tables, "")

    def _finish(self, connection: Connection) -> Swapped:
        """Lock the live row, apply what is missing, and compare the counts."""
        self.confirm(connection)
        live = self.live.checkpoint.lock(connection)
        row = self.rebuild.checkpoint.read(connection)
        if row is None:
            raise RebuildError(f"Another process has finished the rebuild of {self.live.name}.")
        end = self.application.high_water_mark()
        if not self.live.projection_class.inline:
            # The live projection may be ahead of a log that was restored.
            end = min(end, live.position)
        applier, pages, events = Applier(self.rebuild, joins=True), LogPages(self.rebuild, row), 0
        while row.position < end:
            page = pages.read(row.position, NEAR, end)
            row = applier.apply(row, page.events, page.position)
            events += len(page.events)
        letters = self._verify(connection, row)
        before = self._live().count_rows(connection)
        counts = zip(before, self.new.count_rows(connection), strict=True)
        names = (table.name for table in self.live.tables)
        return Swapped(row.position, events, dict(zip(names, counts, strict=True)), letters)

    def _verify(self, connection: Connection, row: CheckpointRow) -> tuple[int, int]:
        failed, waiting = self.application.dead_letters.count(connection, self.rebuild.name)
        if not self.application.log.can_count:
            return failed, waiting
        found = self.live.count_events(connection, 0, row.position)
        if found != row.applied + failed:
            raise RebuildError(
                f"The rebuild of {self.live.name} has applied {row.applied} events and set {failed} aside, but the "
                f"log has {found} up to position {row.position}: the live tables stay as they are; begin again, with "
                "--restart."
            )
        return failed, waiting


NO_FIT = "The rows of {} do not fit into the live tables, which stay as they were: {}"
LACKED = (
    "%s: columns of its tables are not in its models, and the new tables will be without them: %s. If they are of a "
    "migration that came before its code, run the rebuild again with that code; the replaced tables have them meanwhile"
)
TOO_LONG = (
    "The tables of {} could not be swapped, as a statement took longer than a setting of the server allows: {}. What "
    "was built is kept: allow this role longer statements, and run the rebuild again."
)


def _why(held: Sequence[str]) -> str:
    return f"the tables are in use by {'; '.join(held)}" if held else ""


def replaces(connection: Connection, new: ShadowTables, old: ShadowTables) -> tuple[bool, Sequence[str]]:
    """Whether to replace the rows of live tables, as new ones would lack something; and what columns models lack.

    :raises RebuildError: naming what would be lost where that cannot be done.
    """
    dialect = new.datastore.dialect
    lost, missing, lacked = list[str](), list[str](), list[str]()
    for table in new.live:
        has = dialect.columns_of(connection, table)
        wanted = {column.name for column in table.columns}
        parts = _lost_parts(connection, dialect, table, has - wanted)
        _refuse_acting(connection, new, table, parts)
        lost += [f"{part.what} of table {table.name!r}" for part in parts]
        missing += [f"{table.name}.{name}" for name in sorted(wanted - has)]
        lacked += [f"{table.name}.{name}" for name in sorted(has - wanted)]
    lost += _needed(connection, old)
    if lost and missing:
        raise RebuildError(
            f"A rebuild would lose {'; '.join(sorted(lost))}. It could replace the rows instead, but the tables have "
            f"no column {', '.join(missing)}: add it with a migration first."
        )
    if lost:
        _try(connection, new)
        logger.info("The rows are going to be replaced, as renamed tables would lose %s", "; ".join(sorted(lost)))
    return bool(lost), lacked


def _lost_parts(connection: Connection, dialect: Dialect, table: sa.Table, gone: set[str]) -> list[Part]:
    """Return the parts that the new table lacks, except those of columns that the model no longer has."""
    there = {part.without(NEW) for part in dialect.parts_of(connection, table, table.name + NEW)}
    found = dialect.parts_of(connection, table, table.name)
    return [part for part in found if part not in there and not part.columns & gone]


def _refuse_acting(connection: Connection, new: ShadowTables, table: sa.Table, parts: Sequence[Part]) -> None:
    """Refuse parts that a new table would lack and that would act on replaced rows."""
    acting = [part.what for part in parts if part.acts]
    if acting:
        raise RebuildError(
            f"Table {table.name!r} has {', '.join(sorted(acting))}, which a rebuilt table would lack, and which would "
            "act on replaced rows: remove it for the rebuild."
        )
    referring = set(new.datastore.dialect.referrers(connection, table)) - {each.name for each in new.live}
    for other in sorted(referring):
        if LEFT.fullmatch(other) is None:
            raise RebuildError(REFERS.format(other, table.name))


def _needed(connection: Connection, old: ShadowTables) -> list[str]:
    """Return what else depends on tables that an earlier rebuild has replaced, so that they cannot be dropped."""
    dialect = old.datastore.dialect
    return [
        f"{part.what}, which depends on {table.name + OLD!r}"
        for table in old.live
        if old.exists(connection, table)
        for part in dialect.parts_of(connection, table, table.name + OLD)
        if part.dependent
    ]


def _try(connection: Connection, new: ShadowTables) -> None:
    """Copy no rows, to see whether the rights and the types of the columns allow the copy."""
    dialect = new.datastore.dialect
    try:
        dialect.copy_rows(connection, sa.schema.sort_tables(new.live), NEW, " WHERE 1 = 0")
    except sa.exc.DBAPIError as error:
        if is_outage(error):
            raise
        raise RebuildError(f"The rows of the live tables cannot be replaced: {dialect.text(error.orig)}") from error


def hand_over(live: Consumer, rebuild: Consumer, connection: Connection) -> None:
    """Give the live projection the position and the dead letters of its rebuild. This ends the rebuild."""
    row = rebuild.checkpoint.read(connection)
    if row is None:
        raise RebuildError(f"The row of the rebuild of {live.name} was deleted meanwhile: run it again.")
    letters = live.application.dead_letters
    letters.remove_all(connection, live.name)
    letters.rename(connection, rebuild.name, live.name)
    live.checkpoint.take_from(connection, live.checkpoint.lock(connection), row)
    rebuild.checkpoint.remove(connection)


def _is_paused(consumer: Consumer, connection: Connection) -> bool:
    row = consumer.checkpoint.read(connection)
    return row is not None and row.state == PAUSED


def lease_of_rebuild(live: Consumer) -> Checkpoint:
    """Return the checkpoint with the lease of the process that rebuilds a projection without a lock of the server."""
    return live.application.checkpoint(f"{live.name}:rebuilding")


def is_rebuilding(live: Consumer) -> bool:
    """Whether a process has that lease."""
    with live.application.engine.connect() as connection:
        row = lease_of_rebuild(live).read(connection)
        return row is not None and row.token is not None and live.lock().is_held(connection, row.leased_until)


def settle(live: Consumer) -> None:
    """Finish or undo an interrupted swap."""
    row = live.checkpoint.read()
    if row is None or row.state != SWAPPING:
        return
    with live.application.engine.begin() as connection:
        if live.checkpoint.lock(connection).state != SWAPPING:
            return
        if shadows_of(live, NEW).any_exist(connection):
            rebuild = live.of_kind("rebuild")
            live.checkpoint.set_state(connection, PAUSED if _is_paused(rebuild, connection) else ACTIVE)
            rebuild.checkpoint.set_state(connection, ACTIVE)
        else:
            hand_over(live, live.of_kind("rebuild"), connection)
