"""Steps that save, commit and roll back in every way there is, and what has to be true after them.

A program is a list of steps, which may have steps within them. Its driver takes one after the other and keeps a
model, a ``Truth``. A step that does not fit into the state is left out, so that any list is a program.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import UUID

import psycopg
import pymysql
import sqlalchemy as sa
from eventsourcing.application import AggregateNotFoundError
from eventsourcing.persistence import IntegrityError, PersistenceError

from flask_eventsourcing import events_discarded, events_recorded, exceptions
from tests.domain import Account
from tests.integration.unit_stages import Logged, Outcome, Setting, Stage, UsersError
from tests.integration.unit_truth import Entry, Frame, Holding, Key, Truth

BLOCKS = ("unit", "retry", "begin", "savepoint")
KINDS = frozenset(
    {
        *("read", "open", "change", "save", "row", "conflict", "row error", "statement error", "fault"),
        *("orm savepoint", "connection savepoint", "text savepoint", "release", "roll back to"),
        *("orm commit", "connection commit", "text commit", "driver commit", "ddl"),
        *("orm rollback", "connection rollback", "text rollback", "driver rollback"),
        *("close", "reset", "remove", "with"),
        *BLOCKS,
    }
)
TOLD = (
    *(sa.exc.SQLAlchemyError, PersistenceError, exceptions.FlaskEventSourcingError, AggregateNotFoundError, UsersError),
    *(sqlite3.Error, psycopg.Error, pymysql.Error),
)
"""What a program may be told by, and may catch."""


class _NoSuchError(Exception):
    """Stands for an error that the package does not have."""


STALE: type[Exception] = getattr(exceptions, "StaleAggregateError", _NoSuchError)


@dataclass(frozen=True)
class Step:
    """What is done, on which of its objects and how."""

    kind: str
    number: int = 0
    caught: bool = False
    """Whether the program catches the step's error and goes on; otherwise that ends the block, or the program."""
    body: tuple[Step, ...] = ()
    """What is done within it."""

    def __repr__(self) -> str:
        more = ", ".join([repr(self.number)] * bool(self.number) + ["caught=True"] * self.caught)
        within = f"body={self.body!r}" if self.body else ""
        return f"Step({', '.join(filter(None, [repr(self.kind), more, within]))})"


class Violation(AssertionError):  # noqa: N818
    """A promise was broken."""


class Skip(Exception):  # noqa: N818
    """The step does not fit."""


class Driver:
    """Runs one program."""

    def __init__(self, stage: Stage, prefix: str) -> None:
        self.stage = stage
        self.truth = Truth()
        self.violation: Violation | None = None
        self._prefix = prefix
        self._numbers = count(1)
        self._slots: dict[int, Holding] = {}
        self._units = Units()
        self._accounts: list[UUID] = []

    # ------------------------------------------------------------------------------------------- the whole

    def run(self, steps: Sequence[Step], setting: Setting) -> None:
        """Run a program, and compare what was said, and what is stored, with what is true."""
        before = self._last_position()
        self._open_accounts()
        with self._heard() as (recorded, discarded, lines), warnings.catch_warnings():
            warnings.simplefilter("ignore", sa.exc.SAWarning)
            outcome = self.stage.perform(lambda: self._take_all(steps), setting)
            if self.violation is not None:
                raise self.violation
            self._ended(outcome, setting)
        self._check_stored(before)
        own = Counter(key for key in self.truth.own if key not in self.truth.unsure)
        _holds(
            Counter(key for key in recorded if key not in self.truth.unsure) == own,
            f"signalled are {recorded}, and stored are {self.truth.own}",
        )
        if setting.place != "view" and not lines:
            untold = set(self.truth.untold) - set(discarded)
            _holds(not untold, f"nobody was told that {untold} is not stored")

    def _ended(self, outcome: Outcome, setting: Setting) -> None:
        truth = self.truth
        if isinstance(outcome.error, TOLD):
            truth.rollback()
        elif outcome.error is not None:
            raise outcome.error
        elif outcome.status is None:
            truth.rollback(told=False)
        elif outcome.status >= 400:
            truth.rollback()
        else:
            _holds(not truth.untold, f"the view answers {outcome.status} although {truth.untold} is not stored")
            if setting.mode == "request":
                truth.commit()
            _holds(not truth.pending_events, f"the view answers {outcome.status} with events that are not committed")
            truth.rollback()

    def _open_accounts(self) -> None:
        def opened() -> None:
            self._accounts = [self.stage.bank.open_account() for _ in range(2)]

        self.stage.elsewhere(opened)
        self.truth.streams = {account_id: [0] for account_id in self._accounts}

    @contextmanager
    def _heard(self) -> Iterator[tuple[list[Key], list[Key], list[str]]]:
        mine, recorded, discarded, logged = threading.get_ident(), list[Key](), list[Key](), Logged()

        def keys(application: Any, notifications: Any) -> list[Key]:
            if threading.get_ident() != mine:
                return []
            events: Any = [application.mapper.to_domain_event(notification) for notification in notifications]
            return [(event.originator_id, getattr(event, "amount", 0)) for event in events]

        def hear_recorded(sender: object, application: Any, notifications: Any) -> None:
            recorded.extend(keys(application, notifications))

        def hear_discarded(sender: object, application: Any, notifications: Any) -> None:
            discarded.extend(keys(application, notifications))

        logger = logging.getLogger("flask_eventsourcing")
        logger.addHandler(logged)
        with events_recorded.connected_to(hear_recorded), events_discarded.connected_to(hear_discarded):
            try:
                yield recorded, discarded, logged.lines
            finally:
                logger.removeHandler(logged)

    def _last_position(self) -> int:
        with self.stage.engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.max(self.stage.StoredEvent.notification_id))) or 0

    def _check_stored(self, before: int) -> None:
        record, note = self.stage.StoredEvent, self.stage.Note
        columns = sa.select(record.originator_id, record.originator_version)
        mine = sa.select(note.text).where(note.text.startswith(self._prefix))
        versions: dict[UUID, list[int]] = {}
        with self.stage.engine.connect() as connection:
            for account_id, version in connection.execute(columns.where(record.notification_id > before)):
                versions.setdefault(account_id, []).append(version)
            texts = list(connection.scalars(mine))
        with self.stage.working():
            streams = {each: [getattr(e, "amount", 0) for e in self._events(each)] for each in versions}
            found = self.truth.differences({each: sorted(all_) for each, all_ in versions.items()}, streams, texts)
            _holds(not found, "; ".join(found))
            for account_id, amounts in streams.items():
                balance = self.stage.bank.account(account_id).balance
                _holds(balance == sum(amounts), f"served is {balance}, and stored are {amounts}")

    def _events(self, account_id: UUID) -> Iterator[Any]:
        return iter(self.stage.bank.events.get(account_id))

    # ------------------------------------------------------------------------------------------- steps

    def _take_all(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if self.violation is not None:
                raise self.violation
            self._take(step)

    def _take(self, step: Step) -> None:
        """Take a step; each returns the error after which the program may go on, and raises any other one."""
        name = "savepoint_block" if step.kind == "savepoint" else step.kind.replace(" ", "_")
        try:
            error = getattr(self, f"_{name}")(step)
        except Skip:
            return
        except TOLD as raised:
            if self._units.within:
                raise
            self._recover()
            error = raised
        except Violation as violation:
            self.violation = self.violation or violation
            raise
        except Exception as surprise:
            self.violation = self.violation or Violation(f"{step} raised {surprise!r}")
            raise self.violation from surprise
        if error is not None and not step.caught:
            raise error

    def _recover(self) -> None:
        """Do what a program does after an error that it did not expect."""
        with suppress(ReferenceError):
            try:
                self.stage.session.rollback()
            except TOLD:
                self.stage.session.invalidate()
        self.truth.rollback()
        self.truth.odd = False

    def _aborted(self) -> bool:
        """Whether PostgreSQL has aborted the transaction."""
        if self.stage.dialect != "postgresql" or not self.stage.session.in_transaction():
            return False
        try:
            return bool(self._raw().info.transaction_status == psycopg.pq.TransactionStatus.INERROR)
        except TOLD:
            return True

    def _raw(self) -> Any:
        return self.stage.session.connection().connection.driver_connection

    def _execute(self, statement: str) -> None:
        self.stage.session.execute(sa.text(statement))

    # ------------------------------------------------------------------------------------------- objects

    def _holding(self, step: Step) -> Holding:
        slot = step.number % 3
        if slot not in self._slots:
            if slot == 2:
                raise Skip
            self._slots[slot] = self._read_account(self._accounts[slot])
        return self._slots[slot]

    def _read_account(self, account_id: UUID) -> Holding:
        stream, is_odd = self.truth.stream(account_id), self.truth.odd or self._aborted()
        try:
            account = self.stage.bank.account(account_id)
        except AggregateNotFoundError:
            _holds(not stream or is_odd, f"an account with {stream} cannot be found")
            raise
        served, version = account.balance, account.version
        _holds(is_odd or sum(stream[:version]) == served, f"{served} is read, and there is {stream}")
        _holds(
            version == len(stream) or is_odd or self.truth.overtaken,
            f"version {version} is read, and there is {stream}",
        )
        return Holding(account, stream[:version])

    def _read(self, step: Step) -> None:
        slot = step.number % 3
        held = self._slots.get(slot)
        if slot == 2 and held is None:
            raise Skip
        self._slots.pop(slot, None)
        self._slots[slot] = self._read_account(self._accounts[slot] if held is None else held.id)

    def _open(self, step: Step) -> None:
        self._slots[2] = Holding(Account("new"), [], unsaved=[0])

    def _change(self, step: Step) -> None:
        self._change_it(self._holding(step))

    def _change_it(self, holding: Holding) -> None:
        amount = 2 ** next(self._numbers)
        holding.aggregate.deposit(amount)
        holding.unsaved.append(amount)

    def _save(self, step: Step) -> Exception | None:
        holding = self._holding(step)
        if step.number // 3 % 4:
            self._change_it(holding)
        expected, truth = self.truth.expected(holding, aborted=self._aborted()), self.truth
        truth.written |= bool(holding.unsaved)
        try:
            self.stage.bank.save(holding.aggregate)
        except STALE as error:
            _holds(expected in ("stale", "refused") or holding.unsure, "a legitimate object was refused as stale")
            holding.lost = True
            return error
        except TOLD as error:
            _holds(expected != "stored", f"a save failed without a reason: {error!r}")
            _holds(expected != "stale" or truth.odd, f"a stale object was refused by {error!r}")
            holding.lost |= bool(holding.unsaved)
            if not isinstance(error, IntegrityError):
                raise
            self._units.conflicts += 1
            return error
        _holds(expected != "stale", "an object whose events were lost was saved")
        _holds(expected not in ("conflict", "refused"), "an object was saved on a state that is not there")
        if holding.unsaved:
            truth.saved(holding)
            self._saved_by_mode()
        return None

    def _saved_by_mode(self) -> None:
        if self.stage.mode != "save":
            return
        if not self.stage.session.in_transaction():
            self.truth.commit()
            return
        waits = self._units.within or len(self.truth.frames) > 1 or self.truth.odd
        _holds(bool(waits), "save() has returned and what it saved is not committed")

    def _row(self, step: Step) -> None:
        text = f"{self._prefix}{next(self._numbers)}"
        self.truth.written = True
        self.stage.session.add(self.stage.Note(text=text))
        self.stage.session.flush()
        self.truth.frames[-1].entries.append(Entry(None, text=text))

    def _row_error(self, step: Step) -> Exception | None:
        levels = [frame.level for frame in self.truth.frames]
        index = max((number for number, level in enumerate(levels) if level == "orm"), default=0)
        if index and "connection" in levels[index:]:
            raise Skip
        self.truth.written = True
        self.stage.session.add(self.stage.Note(text=None))
        try:
            self.stage.session.flush()
        except sa.exc.SQLAlchemyError as error:
            if self._units.within and not step.caught:
                # What is around it rolls back.
                return error
            if index:
                self.truth.frames[index].handle.rollback()
                self.truth.odd |= bool(self._units.begun)
                self.truth.rolled_back(index, stays=False)
            else:
                self._orm_rollback(step)
            return error
        raise Violation("a row without a text was taken")

    def _statement_error(self, step: Step) -> Exception | None:
        row = {"id": 1, "text": "there is one"}
        self.truth.written = True
        try:
            self.stage.session.execute(sa.insert(self.stage.Note).values(**row))
        except sa.exc.IntegrityError as error:
            return error
        raise Violation("a second row with one id was taken")

    def _conflict(self, step: Step) -> None:
        busy = self.truth.written or self.truth.odd or self._units.conflicts
        if busy or (self.stage.memory and self.stage.session.in_transaction()):
            raise Skip
        account_id, amount = self._accounts[step.number % 3 % 2], 2 ** next(self._numbers)
        try:
            self.stage.elsewhere(lambda: self.stage.bank.deposit(account_id, amount))
        except (PersistenceError, sa.exc.SQLAlchemyError) as error:
            raise Violation(f"another writer fails although nothing is in its way: {error!r}") from error
        self.truth.streams[account_id].append(amount)
        self.truth.overtaken |= self.stage.session.in_transaction()

    def _fault(self, step: Step) -> None:
        if not self._units.within:
            raise Skip
        raise UsersError

    # ------------------------------------------------------------------------------------------- savepoints

    def _orm_savepoint(self, step: Step) -> None:
        self._savepoint("orm", self.stage.session.begin_nested)

    def _connection_savepoint(self, step: Step) -> None:
        self._savepoint("connection", lambda: self.stage.session.connection().begin_nested())

    def _text_savepoint(self, step: Step) -> None:
        name = f"s{next(self._numbers)}"

        def begin() -> str:
            self._execute(f"SAVEPOINT {name}")
            return name

        self._savepoint("text", begin)

    def _savepoint(self, level: Any, begin: Callable[[], Any]) -> None:
        self.truth.written = True
        self.truth.frames.append(Frame(level, begin()))

    def _ending(self, step: Step) -> int:
        """Which savepoint a step ends: one within which there are none but textual ones."""
        levels = [frame.level for frame in self.truth.frames]
        ends = [n for n in range(1, len(levels)) if all(level == "text" for level in levels[n + 1 :])]
        if not ends:
            raise Skip
        return ends[-1 - step.number % 3 % len(ends)]

    def _release(self, step: Step) -> None:
        index = self._ending(step)
        frame = self.truth.frames[index]
        if frame.level == "text":
            self._execute(f"RELEASE SAVEPOINT {frame.handle}")
        else:
            frame.handle.commit()
        self.truth.odd |= bool(self._units.begun and frame.level == "orm")
        self.truth.released(index)

    def _roll_back_to(self, step: Step) -> None:
        index = self._ending(step)
        frame = self.truth.frames[index]
        if frame.level == "text":
            self._execute(f"ROLLBACK TO SAVEPOINT {frame.handle}")
        else:
            frame.handle.rollback()
        self.truth.odd |= bool(self._units.begun and frame.level == "orm")
        self.truth.rolled_back(index, stays=frame.level == "text")

    # ------------------------------------------------------------------------------------------- ends

    def _orm_commit(self, step: Step) -> Exception | None:
        return self._commit("orm", self.stage.session.commit)

    def _connection_commit(self, step: Step) -> Exception | None:
        return self._commit("connection", self.stage.session.connection().commit)

    def _text_commit(self, step: Step) -> Exception | None:
        return self._commit("text", lambda: self._execute("COMMIT"))

    def _driver_commit(self, step: Step) -> Exception | None:
        return self._commit("driver", self._raw().commit)

    def _commit(self, level: str, commit: Callable[[], Any]) -> Exception | None:
        truth, aborted = self.truth, self._aborted()
        try:
            commit()
        except TOLD as error:
            if not self._units.depth:
                raise
            return error
        if self._units.depth:
            _holds(level in ("text", "driver"), f"a commit by the {level} was carried out within a unit of work")
            self._units.was_halved = True
        odd = self._is_odd_after(level)
        if aborted and level in ("text", "driver"):
            # The server has turned it into a rollback.
            self._units.lost(truth.pending_events)
            truth.rollback(told=bool(self._units.depth))
        else:
            truth.commit()
        truth.odd = odd
        return None

    def _is_odd_after(self, level: str) -> bool:
        if self._units.begun:
            # SQLAlchemy wants its own block to be left before it goes on.
            return True
        return level != "orm" and (level == "connection" or self.truth.odd or self.truth.has_savepoints)

    def _ddl(self, step: Step) -> None:
        if self.stage.dialect not in ("mysql", "mariadb"):
            raise Skip
        odd = self._is_odd_after("text")
        self._execute(f"CREATE TABLE IF NOT EXISTS t{step.number} (a INTEGER)")
        self._units.was_halved |= bool(self._units.depth)
        self.truth.commit(unsure=True)
        self.truth.odd = odd

    def _orm_rollback(self, step: Step) -> None:
        self._rollback("orm", self.stage.session.rollback)

    def _connection_rollback(self, step: Step) -> None:
        self._rollback("connection", self.stage.session.connection().rollback)

    def _text_rollback(self, step: Step) -> None:
        self._rollback("text", lambda: self._execute("ROLLBACK"))

    def _driver_rollback(self, step: Step) -> None:
        self._rollback("driver", self._raw().rollback)

    def _rollback(self, level: str, rollback: Callable[[], Any]) -> None:
        odd = self._is_odd_after(level)
        rollback()
        self._units.lost(self.truth.pending_events)
        self.truth.rollback()
        self.truth.odd = odd

    def _close(self, step: Step) -> None:
        self._leave(self.stage.session.close)

    def _reset(self, step: Step) -> None:
        self._leave(self.stage.session.reset)

    def _with(self, step: Step) -> None:
        def enter_and_leave() -> None:
            with self.stage.session:
                pass

        self._leave(enter_and_leave)

    def _remove(self, step: Step) -> None:
        def remove() -> None:
            if not self.stage.remove():
                raise Skip

        self._leave(remove)

    def _leave(self, leave: Callable[[], Any]) -> None:
        if self._units.begun:
            raise Skip
        leave()
        self._units.lost(self.truth.pending_events)
        self.truth.rollback(told=bool(self._units.depth))
        self.truth.odd = False

    # ------------------------------------------------------------------------------------------- blocks

    def _unit(self, step: Step) -> Exception | None:
        def unit() -> None:
            with self.stage.transaction():
                self._take_all(step.body)

        return self._outermost(unit) if not self._units.depth else self._inner(unit)

    def _inner(self, unit: Callable[[], Any]) -> Exception | None:
        self._units.depth += 1
        try:
            unit()
        except TOLD as error:
            self._units.has_to_fail = True
            return error
        finally:
            self._units.depth -= 1
        return None

    def _outermost(self, unit: Callable[[], Any]) -> Exception | None:
        units = self._units
        units.depth, units.has_to_fail, units.was_halved = 1, False, False
        try:
            unit()
        except TOLD as error:
            self.truth.rollback()
            return error
        finally:
            units.depth = 0
            self.truth.odd = bool(units.begun)
        _holds(not units.has_to_fail, "a unit of work ended well although a part of it was lost")
        self.truth.commit()
        return None

    def _retry(self, step: Step) -> Exception | None:
        if self._units.depth:
            raise Skip
        tries: list[bool] = []

        def work() -> None:
            if tries:
                _holds(not self._units.was_halved, "a unit was run again of which a part was committed")
                self.truth.rollback()
                self._units.has_to_fail = False
                self.truth.odd = False
            tries.append(True)
            self._take_all(step.body)

        return self._outermost(lambda: self.stage.retry(work, 2))

    def _begin(self, step: Step) -> Exception | None:
        if self._units.within or self.stage.session.in_transaction():
            raise Skip
        self._units.begun += 1
        try:
            with self.stage.session.begin():
                self._take_all(step.body)
        except TOLD as error:
            self.truth.rollback()
            self.truth.odd = False
            return error
        finally:
            self._units.begun -= 1
        self.truth.commit()
        self.truth.odd = False
        return None

    def _savepoint_block(self, step: Step) -> Exception | None:
        truth, frame = self.truth, Frame("orm")
        truth.written = True
        self._units.begun += 1
        try:
            with self.stage.session.begin_nested() as frame.handle:
                truth.frames.append(frame)
                self._take_all(step.body)
        except TOLD as error:
            if frame not in truth.frames or truth.odd:
                raise
            truth.rolled_back(truth.frames.index(frame), stays=False)
            return error
        finally:
            self._units.begun -= 1
        if frame in truth.frames:
            index = truth.frames.index(frame)
            truth.odd |= any(each.level == "connection" for each in truth.frames[index:])
            truth.released(index)
        return None


@dataclass
class Units:
    """The blocks in which a program is."""

    depth: int = 0
    """How many units of work."""
    begun: int = 0
    """How many ``with session.begin()`` and ``.begin_nested()``."""
    has_to_fail: bool = False
    """Whether a part of the unit of work was lost."""
    was_halved: bool = False
    """Whether a part of the unit of work was committed."""
    conflicts: int = 0
    """How many conflicts there were, after which units that may run again queue."""

    @property
    def within(self) -> bool:
        """Whether it is in a block, which an error has to leave."""
        return bool(self.depth or self.begun)

    def lost(self, events: list[Key]) -> None:
        """Events of it are gone."""
        self.has_to_fail |= bool(self.depth and events)


def _holds(condition: bool, promise: str) -> None:
    if not condition:
        raise Violation(promise)
