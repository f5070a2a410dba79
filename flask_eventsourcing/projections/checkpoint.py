"""The checkpoint of a projection: how far it is, which process runs it, and what stopped it.

A runner that applies events first moves the position, in the same transaction, from its old value and with the token of
its claim. The row's lock keeps others out until the commit, and a runner that has lost its claim moves nothing. So no
event is applied twice, even if locks are lost or processes killed.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, NamedTuple
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ..failures import Kept
from ..persistence import Datastore
from ..persistence.dialects import PassingError, is_outage
from ..persistence.dialects.catalogs import naming_lack
from ..persistence.dialects.locks import RunnerLock, utc_now
from .definitions.fingerprints import retire

logger: logging.Logger = logging.getLogger(__name__)

ACTIVE = "active"
HALTED = "halted"
PAUSED = "paused"
"""An operator has paused it: no process applies events until it is resumed, also after a restart."""
SWAPPING = "swapping"
"""The tables are about to be renamed, or have been: no process applies events until that is settled."""
LEASE = 3.0
"""Seconds after which another may take over from a runner that did not renew its lease."""
BEAT = 1.0
"""Seconds between two heartbeats of a runner."""
NOTED = "of_position"
"""The parameter with the position, for values that a statement reads of the event there."""
MOVED_FROM = "its_position"
"""The parameter with the position before."""
CODE_OF_TOKEN = 8
"""How many characters of its code's fingerprint a runner's token ends with."""


class CheckpointRow(NamedTuple):
    """The row of one projection."""

    name: str
    position: int
    applied: int
    state: str
    runner: str | None
    token: str | None
    running_since: datetime | None
    leased_until: datetime | None
    error: str | None
    failed_position: int | None
    fingerprint: str | None
    earlier_fingerprints: str | None = None
    log_id: int | None = None
    last_originator_id: str | None = None
    last_originator_version: int | None = None
    last_event_id: str | None = None
    tables_id: str | None = None
    topics: str | None = None
    topics_position: int | None = None
    changed_by: str | None = None
    reason: str | None = None
    claim: int | None = None
    """How often the event at *failed_position* was tried, also by processes that have ended while they tried it."""

    @classmethod
    def never_run(cls, name: str) -> CheckpointRow:
        """Return the row of a projection that was never run."""
        return cls(name, 0, 0, ACTIVE, *[None] * 7)

    def is_run_by(self, fingerprint: str) -> bool:
        """Whether the code of a fingerprint has the claim."""
        return self.token is not None and self.token.endswith(fingerprint[:CODE_OF_TOKEN])


class FencedError(PassingError):
    """Another process runs the projection now, or has moved its position."""


def this_process() -> str:
    """Return the name of this process in the status: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


HANDED_OVER = (
    "position",
    "applied",
    "log_id",
    "last_originator_id",
    "last_originator_version",
    "last_event_id",
    "topics",
    "topics_position",
)
"""What a projection takes over from its rebuild; the first two are never null."""


@dataclass(frozen=True)
class Checkpoint:
    """Reads and changes the row of one projection.

    :param table: the table of projections.
    :param name: the projection's.
    """

    datastore: Datastore
    table: sa.Table
    name: str
    _made: dict[Any, sa.Update] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def engine(self) -> Engine:
        """The database of the table."""
        return self.datastore.engine

    @property
    def _row(self) -> Any:
        return self.table.c.name == self.name

    def ensure(self, position: int = 0) -> None:
        """Insert the row if it is not there."""
        if self.read() is not None:
            return
        try:
            with self.engine.begin() as connection:
                connection.execute(sa.insert(self.table).values(name=self.name, position=position))
        except sa.exc.IntegrityError:
            if self.read() is None:
                raise

    def read(self, connection: Connection | None = None, *, latest: bool = False) -> CheckpointRow | None:
        """Return the row, read with a connection of its own unless one is given.

        :param latest: read the committed row even if the transaction's snapshot is older.
        :raises MissingTableError: when the table was not created.
        :raises UnsafeTableError: when it lacks a column.
        """
        if connection is None:
            with self.engine.connect() as own:
                return self.read(own, latest=latest)
        columns = [self.table.c[name] for name in CheckpointRow._fields]
        query = sa.select(*columns).where(self._row)
        with naming_lack(self.datastore.dialect, self.table):
            found = connection.execute(query.with_for_update(read=True) if latest else query).first()
        return None if found is None else CheckpointRow(*found)

    def claim(
        self,
        *,
        lease: bool,
        fingerprint: str = "",
        notes: Mapping[str, Any] | None = None,
        abandoned: CheckpointRow | None = None,
        at: int | None = None,
    ) -> CheckpointRow | None:
        """Make this process the runner; with *lease*, only if no other lease is valid.

        :param fingerprint: of the code that is going to run.
        :param notes: further values that the row is to have then.
        :param at: the position that the row must have, if that matters.
        :param abandoned: a row whose runner has not renewed its lease for long enough, whatever its time says.
        """
        c, time_in = self.table.c, self.datastore.dialect.time_in
        change = sa.update(self.table).where(self._row, c.state.not_in((SWAPPING, PAUSED)))
        if at is not None:
            change = change.where(c.position == at)
        code = fingerprint[:CODE_OF_TOKEN]
        token = uuid4().hex[: 32 - len(code)] + code
        values = {**(notes or {}), "token": token, "runner": this_process(), "running_since": utc_now()}
        if lease:
            free = sa.or_(c.token.is_(None), c.leased_until < time_in(0))
            if abandoned is not None:
                same = sa.and_(c.token == abandoned.token, c.leased_until == abandoned.leased_until)
                free = sa.or_(free, same)
            change = change.where(free)
            values["leased_until"] = time_in(LEASE)
        with self.engine.begin() as connection:
            if connection.execute(change.values(values), {NOTED: values.get("position")}).rowcount == 0:
                return None
            return self.read(connection)

    def advance(
        self,
        connection: Connection,
        claimed: CheckpointRow,
        position: int,
        applied: int,
        *,
        lease: bool,
        last: Mapping[str, Any] | None = None,
        called: bool = False,
        unless: sa.ColumnElement[bool] | None = None,
    ) -> None:
        """Move the position, in the transaction that applies the events.

        :param last: which event is at the position, as values of the row's columns; what the database is to read is the
            same object each time.
        :param called: whether a reaction was called: this is noted even if an operator has paused it meanwhile.
        :param unless: under which condition it must not be moved; the same object each time.
        :raises FencedError: when the claim was lost, the position is not where it was, a rebuild is about to end, or an
            operator has paused it.
        """
        noted = {"position": position, **(last or {})}
        if lease:
            noted["leased_until"] = self.datastore.dialect.time_in(LEASE)
        # Built once, as that takes a third as long as all else of a batch with a single event.
        read = {name: value for name, value in noted.items() if isinstance(value, sa.ClauseElement)}
        change = self._advancing(frozenset(noted), read, called, claimed.token is None, unless)
        parameters = {"its_token": claimed.token, MOVED_FROM: claimed.position, "further": applied}
        parameters |= {f"of_{name}": value for name, value in noted.items() if name not in read}
        if self.datastore.dialect.update_and_notify(connection, self.table, change, self.name, parameters) != 1:
            raise FencedError

    def _advancing(
        self, noted: frozenset[str], read: Mapping[str, Any], called: bool, unclaimed: bool, unless: Any
    ) -> sa.Update:
        key = noted, frozenset((name, id(value)) for name, value in read.items()), called, unclaimed, id(unless)
        made = self._made.get(key)
        if made is None:
            c, bind = self.table.c, sa.bindparam
            values: dict[str, Any] = {"applied": c.applied + bind("further"), "error": None, "failed_position": None}
            values["state"] = sa.case((c.state == PAUSED, PAUSED), else_=ACTIVE)
            values |= {name: bind(f"of_{name}", type_=c[name].type) for name in sorted(noted - read.keys())} | {**read}
            same_token = c.token.is_(None) if unclaimed else c.token == bind("its_token")
            states = (SWAPPING,) if called else (SWAPPING, PAUSED)
            where = [self._row, same_token, c.position == bind(MOVED_FROM), *(c.state != each for each in states)]
            where += [] if unless is None else [sa.not_(unless)]
            made = self._made[key] = sa.update(self.table).where(*where).values(values)
        return made

    def renew(self, claimed: CheckpointRow) -> None:
        """Extend the lease.

        :raises FencedError: when it was lost.
        """
        self._change_claimed(claimed, leased_until=self.datastore.dialect.time_in(LEASE))

    def halt(self, claimed: CheckpointRow, position: int, error: str) -> None:
        """Note that the projection has halted at an event that it cannot apply."""
        state = sa.case((self.table.c.state == PAUSED, PAUSED), else_=HALTED)
        self._change_claimed(claimed, state=state, failed_position=position, error=error)

    def note_try(self, claimed: CheckpointRow, position: int, attempts: int, **error: str) -> None:
        """Note how often an event was tried, this time included, and its *error* once it has failed."""
        self._change_claimed(claimed, failed_position=position, claim=attempts, **error)

    def note(self, claimed: CheckpointRow, **values: Any) -> None:
        """Store notes about a projection that this process runs.

        :raises FencedError: when the claim was lost.
        """
        self._change_claimed(claimed, **values)

    def _change_claimed(self, claimed: CheckpointRow, **values: Any) -> None:
        change = sa.update(self.table).where(self._row, self.table.c.token == claimed.token).values(values)
        with self.engine.begin() as connection:
            if connection.execute(change).rowcount != 1:
                raise FencedError

    def resume(self, fingerprint: str = "") -> None:
        """Let a halted projection try again. If it halted because processes ended, only other code tries again."""
        c, is_left = self.table.c, self.table.c.token.endswith(fingerprint[:CODE_OF_TOKEN])
        halted = sa.update(self.table).where(self._row, c.state == HALTED)
        with self.engine.begin() as connection:
            connection.execute(halted.values(state=ACTIVE, claim=sa.case((is_left, c.claim), else_=0)))

    def release(self, claimed: CheckpointRow) -> None:
        """End the claim, if it is still this process's."""
        values = {"token": None, "runner": None, "running_since": None, "leased_until": None}
        with self.engine.begin() as connection:
            change = sa.update(self.table).where(self._row, self.table.c.token == claimed.token)
            connection.execute(change.values(values))

    def lock(self, connection: Connection) -> CheckpointRow:
        """Lock the row to the end of a transaction, so that no event is applied meanwhile; the claim stays.

        :raises FencedError: when there is no such row.
        """
        # The servers of a cluster share changes but no locks, so the row is changed, and changed back.
        for step in (1, -1) if self.datastore.dialect.is_node(connection) else (0,):
            connection.execute(sa.update(self.table).where(self._row).values(applied=self.table.c.applied + step))
        row = self.read(connection)
        if row is None:
            raise FencedError
        return row

    def take_from(self, connection: Connection, live: CheckpointRow, rebuilt: CheckpointRow) -> None:
        """Set the position and the code of a rebuild. The claim stays if its holder has the same code."""
        fingerprint = rebuilt.fingerprint or live.fingerprint
        values = {name: getattr(rebuilt, name) for name in HANDED_OVER}
        state = PAUSED if PAUSED in (live.state, rebuilt.state) else ACTIVE
        values |= {"state": state, "error": None, "failed_position": None, "tables_id": None}
        earlier = retire(live.earlier_fingerprints, live.fingerprint, fingerprint)
        values |= {"fingerprint": fingerprint, "earlier_fingerprints": earlier}
        if fingerprint is None or not live.is_run_by(fingerprint):
            values |= {"token": None, "leased_until": None}
        connection.execute(sa.update(self.table).where(self._row).values(values))

    def set_values(self, connection: Connection, **values: Any) -> None:
        """Set values that an operator may change."""
        change = sa.update(self.table).where(self._row).values(values)
        connection.execute(change, {NOTED: values.get("position")})

    def set_state(self, connection: Connection, state: str) -> None:
        """Set the state."""
        connection.execute(sa.update(self.table).where(self._row).values(state=state))

    def begin(self, connection: Connection, **values: Any) -> None:
        """Note that a rebuild begins, and with what."""
        beginning = {"position": 0, "applied": 0, "state": ACTIVE, "error": None, "failed_position": None}
        self.set_values(connection, **(beginning | dict.fromkeys(HANDED_OVER[2:]) | values))

    def remove(self, connection: Connection) -> None:
        """Delete the row."""
        connection.execute(sa.delete(self.table).where(self._row))


class Heartbeat:
    """A thread that renews a runner's lease, or checks that the connection with its lock is alive.

    A handler may take longer than a lease lasts, and a firewall or a server may close an idle connection. A process
    that is stopped or killed has no heartbeat.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        claimed: CheckpointRow,
        lock: RunnerLock,
        look: Callable[[CheckpointRow], None] | None = None,
    ) -> None:
        self._control = checkpoint
        self._claimed = claimed
        self._lock = lock
        self._also_look = look
        self._ended = threading.Event()
        self._error: Exception | None = None
        self.resting: CheckpointRow | None = None
        """The row as the runner knows it, while that waits for events and so sees nothing of the row."""
        self._thread = threading.Thread(target=self._run, name=f"heartbeat of {checkpoint.name}", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raise the error if the right to run was lost.

        :raises FencedError: when another runner has it.
        """
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            # Any error that ends this thread ends the run: check() raises it in the runner's thread.
            with Kept() as kept:
                if self._lock.leased:
                    self._control.renew(self._claimed)
                else:
                    self._lock.check()
                self._look()
            error = kept.error
            if error and self._lock.leased and is_outage(error) and not isinstance(error, FencedError):
                logger.info("%s: its lease could not be renewed in time: %s", self._control.name, error)
            elif error:
                self._error = error
                return

    def _look(self) -> None:
        """Check that the row is still as the runner knows it: a restore or a rebuild may have changed it."""
        resting = self.resting
        if resting is None:
            return
        row = self._control.read()
        # At its end, a rebuild leaves the claim in the row, unless the code is another.
        same = row is not None and (row.token, row.position) == (resting.token, resting.position)
        if (not same or (row is not None and row.state not in (resting.state, SWAPPING))) and self.resting is resting:
            # And the runner itself has not moved it in the meantime.
            raise FencedError
        if row is not None and same and self._also_look is not None:
            self._also_look(row)
