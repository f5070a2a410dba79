"""Programs of steps in Django's transactions: blocks, savepoints, autocommit switched off, and views."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import count
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from django.db import connections, transaction
from django.http import HttpResponse
from django.test import Client
from sqlalchemy import orm

from flask_eventsourcing.contrib.django import get_application, retry_on_conflict
from tests.django_host import project
from tests.django_host.ledger.models import BankRecords, Note
from tests.django_host.urls import route
from tests.domain import Bank, in_thread
from tests.integration.unit_driver import Driver
from tests.integration.unit_stages import CACHES, TOLD, Outcome, Setting, Stage, Stages, add_row
from tests.integration.unit_steps import Skip, Step, holds
from tests.integration.unit_truth import Frame, Key

R = TypeVar("R")
NUMBERS = count(1)
DJANGO_KINDS = frozenset(
    {
        *("read", "open", "change", "save", "row", "conflict", "row error", "statement error", "fault"),
        *("orm savepoint", "release", "roll back to", "orm commit", "orm rollback", "close"),
        *("set rollback", "unit", "retry", "begin", "savepoint"),
    }
)
"""What there is in Django: its blocks, the functions of ``django.db.transaction``, and a connection that is closed.

Not drawn is what it has no word for, or knows nothing of, for rows as for events: sessions (``connection savepoint``,
``connection commit``, ``reset``, ``remove``, ``with``), and the end of a transaction by text, by the driver or by DDL.
"""
QUIET = ("django.request", "flask_eventsourcing.contrib.django.hosting")


class DjangoStage(Stage):
    """The bank in Django's project, in the database of an alias."""

    memory = False
    Note: Any = sa.table("ledger_note", sa.column("id"), sa.column("text")).c
    StoredEvent: Any = BankRecords.mirror.tables["events"].c

    def __init__(self, alias: str, engine: sa.Engine) -> None:
        self.alias = alias
        self._engine = engine
        self.raised: Exception | None = None

    @property
    def bank(self) -> Bank:
        """The application."""
        return get_application(Bank)

    @property
    def session(self) -> orm.Session:
        """There is none."""
        raise Skip

    @property
    def connection(self) -> Any:
        """Django's connection of this thread."""
        return connections[self.alias]

    @property
    def engine(self) -> sa.Engine:
        """Another way to the database, to look at it."""
        return self._engine

    @property
    def excludes(self) -> bool:
        """Whether a transaction keeps all others from writing from its beginning."""
        return self.dialect == "sqlite"

    @property
    def waits(self) -> bool:
        """Whether what is done now waits for a commit."""
        return bool(self.connection.in_atomic_block or not self.connection.get_autocommit())

    in_transaction = waits

    def working(self) -> AbstractContextManager[object]:
        """Nothing is around it."""
        return nullcontext()

    def add_row(self, text: str | None) -> None:
        """Write a row with the ORM."""
        Note.objects.using(self.alias).create(text=text)

    def add_row_again(self) -> None:
        """Write a second row with the id 1, with a cursor, of whose errors Django takes no note."""
        with self.connection.cursor() as cursor:
            cursor.execute("INSERT INTO ledger_note (id, text) VALUES (1, 'there is one')")

    def recover(self) -> None:
        """Roll back where that is one's own affair."""
        if self.waits:
            self.connection.rollback()

    def transaction(self) -> AbstractContextManager[object]:
        """A block."""
        block: AbstractContextManager[object] = transaction.atomic(using=self.alias)
        return block

    def retry(self, function: Callable[[], R], times: int) -> R:
        """Run a function with ``retry_on_conflict``."""
        return retry_on_conflict(times=times)(function)()

    def elsewhere(self, function: Callable[[], Any]) -> None:
        """Do something in another thread, with a connection of its own."""

        def run() -> None:
            try:
                function()
            finally:
                self.connection.close()

        in_thread(run)

    def remove(self) -> bool:
        """There is nothing to remove."""
        return False

    def perform(self, program: Callable[[], Any], setting: Setting) -> Outcome:
        """Run a program, or have a view run it."""
        try:
            if setting.place != "view":
                return super().perform(program, setting)
            return self._view(program, setting)
        finally:
            if not self.connection.get_autocommit():
                self.connection.rollback()
                self.connection.set_autocommit(True)

    def _view(self, program: Callable[[], Any], setting: Setting) -> Outcome:
        def view(request: Any) -> HttpResponse:
            try:
                program()
            except Exception as error:
                self.raised = error
                raise
            return HttpResponse(status=setting.status)

        self.raised = None
        route(view)
        return Outcome(Client(raise_request_exception=False).get("/").status_code)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class DjangoStages(Stages):
    """The stages of one database; the project has the setting of one of them at a time."""

    def __init__(self, uri: str, host: str) -> None:
        super().__init__(uri, host)
        self._stack, self._current = ExitStack(), ExitStack()
        self._cache: str | None = None
        self._alias = f"drawn{next(NUMBERS)}"
        self._engine = sa.create_engine(uri)
        self._stack.callback(self._engine.dispose)
        self._stack.enter_context(project.database(self._alias, uri))
        self._stack.enter_context(_quiet())
        add_row(self._engine, sa.table("ledger_note", sa.column("id"), sa.column("text")))

    def __getitem__(self, setting: Setting) -> Stage:
        if setting.cache != self._cache:
            self._current.close()
            self._current.enter_context(project.applications({"ENV": CACHES[setting.cache]}, Bank=self._alias))
            self._cache = setting.cache
        return DjangoStage(self._alias, self._engine)

    def close(self) -> None:
        """Close every connection."""
        self._current.close()
        self._stack.close()


@contextmanager
def _quiet() -> Any:
    loggers = [logging.getLogger(name) for name in QUIET]
    for each in loggers:
        each.disabled = True
    yield
    for each in loggers:
        each.disabled = False


class DjangoDriver(Driver):
    """Begins and ends Django's blocks and savepoints."""

    stage: DjangoStage
    asked: Frame | None = None
    """The frame whose rollback was asked for."""

    def _begun(self, steps: Sequence[Step], setting: Setting) -> None:
        if setting.mode == "manual":
            self.stage.connection.set_autocommit(False)
        if setting.mode != "atomic":
            self._take_all(steps)
            return
        error = self._block(lambda inner: self._run_block(inner, {}), lambda: self._take_all(steps))
        if error is not None:
            raise error

    def _ended(self, outcome: Outcome, setting: Setting) -> None:
        truth = self.truth
        error = self.stage.raised if setting.place == "view" else outcome.error
        self.stage.raised = None
        if error is not None and not isinstance(error, TOLD):
            raise error
        if error is None and setting.place == "view":
            status, left = outcome.status, truth.pending_events
            is_lost = bool(truth.untold or left)
            wanted = 500 if is_lost and setting.status < 400 else setting.status
            holds(status == wanted, f"the view answers {status}; gone are {truth.untold}, not committed are {left}")
        truth.rollback()

    def _check_discarded(self, discarded: Sequence[Key]) -> None:
        stored = [key for key in discarded if key in self.truth.own]
        holds(not stored, f"told as gone is what is stored: {stored}")

    def _aborted(self) -> bool:
        connection = self.stage.connection
        return bool(connection.needs_rollback or connection.closed_in_transaction or self._is_refused_by_server())

    def _is_refused_by_server(self) -> bool:
        driver = self.stage.connection.connection
        if not isinstance(driver, psycopg.Connection):
            return False
        return driver.info.transaction_status == psycopg.pq.TransactionStatus.INERROR

    # ------------------------------------------------------------------------------------------- what is saved

    def _save(self, step: Step) -> Exception | None:
        is_broken = self.stage.connection.needs_rollback
        before = len(self.truth.pending)
        error = super()._save(step)
        holds(not (is_broken and len(self.truth.pending) > before), "a save succeeded in a broken transaction")
        self._committed_at_once()
        return error

    def _row(self, step: Step) -> None:
        super()._row(step)
        self._committed_at_once()

    def _committed_at_once(self) -> None:
        if not self.stage.waits:
            self.truth.commit()

    def _row_error(self, step: Step) -> Exception | None:
        try:
            self.stage.add_row(None)
        except TOLD as error:
            return error
        raise AssertionError("a row without a text was taken")

    # ------------------------------------------------------------------------------------------- savepoints

    def _orm_savepoint(self, step: Step) -> None:
        if not self.stage.waits or self._is_unsafe():
            raise Skip
        self.truth.written = True
        self.truth.frames.append(Frame("connection", self.stage.connection.savepoint()))

    def _is_unsafe(self) -> bool:
        """Whether it is the case in which Django's documentation says that savepoints and blocks are of no use."""
        connection = self.stage.connection
        return self.stage.dialect == "sqlite" and not connection.in_atomic_block and not connection.get_autocommit()

    def _savepoint_to_end(self, step: Step) -> int:
        levels = [frame.level for frame in self.truth.frames]
        first = max(number for number, level in enumerate(levels) if level != "connection") + 1
        if first == len(levels) or not self.stage.waits:
            raise Skip
        return len(levels) - 1 - step.number % 3 % (len(levels) - first)

    def _release(self, step: Step) -> None:
        index = self._savepoint_to_end(step)
        self.stage.connection.savepoint_commit(self.truth.frames[index].handle)
        self.truth.released(index)

    def _roll_back_to(self, step: Step) -> None:
        index, connection = self._savepoint_to_end(step), self.stage.connection
        if connection.needs_rollback:
            if not connection.in_atomic_block or connection.closed_in_transaction:
                raise Skip
            connection.set_rollback(False)
            self.asked = None
        connection.savepoint_rollback(self.truth.frames[index].handle)
        self.truth.rolled_back(index, stays=True)

    # ------------------------------------------------------------------------------------------- ends

    def _orm_commit(self, step: Step) -> None:
        if self.stage.connection.in_atomic_block:
            raise Skip
        is_refused, events = self._is_refused_by_server(), self.truth.pending_events
        try:
            self.stage.connection.commit()
        except TOLD as error:
            holds(bool(is_refused and events), f"a commit failed without a reason: {error!r}")
            raise
        holds(not (is_refused and events), "a commit succeeded that the server has turned into a rollback")
        if is_refused:
            self.truth.rollback()
        else:
            self.truth.commit()

    def _orm_rollback(self, step: Step) -> None:
        if self.stage.connection.in_atomic_block:
            raise Skip
        self.stage.connection.rollback()
        self.truth.rollback()

    def _set_rollback(self, step: Step) -> None:
        if not self.stage.connection.in_atomic_block:
            raise Skip
        self.stage.connection.set_rollback(True)
        self.asked = next(frame for frame in reversed(self.truth.frames) if frame.level != "connection")

    def _close(self, step: Step) -> None:
        connection = self.stage.connection
        if connection.connection is None or connection.closed_in_transaction:
            raise Skip
        if connection.in_atomic_block and not connection.commit_on_exit:
            # With autocommit switched off Django never leaves such a block, and the connection is of no use any more.
            raise Skip
        connection.close()
        self.truth.rollback(told=False)

    # ------------------------------------------------------------------------------------------- blocks

    def _unit(self, step: Step) -> Exception | None:
        return self._atomic(step)

    def _savepoint_block(self, step: Step) -> Exception | None:
        return self._atomic(step, savepoint=step.number % 3 != 2)

    def _begin(self, step: Step) -> Exception | None:
        if self.stage.connection.in_atomic_block:
            raise Skip
        return self._atomic(step, durable=True)

    def _retry(self, step: Step) -> Exception | None:
        if self.stage.connection.in_atomic_block:
            raise Skip
        return self._block(lambda inner: self.stage.retry(inner, 2), lambda: self._take_all(step.body))

    def _atomic(self, step: Step, **options: bool) -> Exception | None:
        return self._block(lambda inner: self._run_block(inner, options), lambda: self._take_all(step.body))

    def _run_block(self, inner: Callable[[], None], options: dict[str, bool]) -> None:
        with transaction.atomic(using=self.stage.alias, **options):
            inner()

    def _block(self, run: Callable[[Callable[[], None]], Any], body: Callable[[], None]) -> Exception | None:
        """Run what is in a block, and note what becomes of it."""
        connection, truth = self.stage.connection, self.truth
        if self._is_unsafe():
            raise Skip
        frame: Frame | None = None
        is_broken = False

        def inner() -> None:
            nonlocal frame, is_broken
            # The block of a try before was rolled back.
            self._rolled_back(frame)
            if not connection.savepoint_ids:
                frame = truth.frames[0]
            elif connection.savepoint_ids[-1] is not None:
                frame = Frame("orm")
                truth.frames.append(frame)
                truth.written = True
            body()
            is_broken = connection.needs_rollback

        self._units.begun += 1
        try:
            run(inner)
        except TOLD as error:
            self._rolled_back(frame)
            return error
        finally:
            self._units.begun -= 1
        if is_broken:
            self._rolled_back(frame, told=self.asked is frame)
        elif frame is truth.frames[0]:
            truth.commit()
        elif frame in truth.frames:
            truth.released(truth.frames.index(frame))
        return None

    def _rolled_back(self, frame: Frame | None, *, told: bool = True) -> None:
        """Note that a block was rolled back; one without a savepoint marks what is around it."""
        truth = self.truth
        if frame is None or frame not in truth.frames:
            return
        index = truth.frames.index(frame)
        if not told:
            truth.untold += [entry.key for each in truth.frames[index:] for entry in each.entries if entry.key]
        if index == 0:
            truth.rollback()
        else:
            truth.rolled_back(index, stays=False)
        if self.asked is frame:
            self.asked = None
