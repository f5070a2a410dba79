"""Steps that save, commit and roll back in every way there is, and what has to be true after them.

A program is a list of steps, which may have steps within them. Its driver takes one after the other and keeps a
model, a ``Truth``. A step that does not fit into the state is left out, so that any list is a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import UUID

import psycopg
import sqlalchemy as sa
from django.db import Error as DjangoError
from django.db import IntegrityError as DjangoIntegrityError
from eventsourcing.application import AggregateNotFoundError
from eventsourcing.persistence import IntegrityError, PersistenceError
from sqlalchemy.orm import SessionTransactionOrigin

from flask_eventsourcing import exceptions
from tests.domain import Account
from tests.integration.unit_stages import TOLD, Stage, UsersError
from tests.integration.unit_truth import Entry, Holding, Key, Truth

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


def holds(condition: bool, promise: str) -> None:
    """Say that a promise was broken, unless a condition holds."""
    if not condition:
        raise Violation(promise)


class Saving:
    """Reads, changes and saves objects and rows."""

    def __init__(self, stage: Stage, prefix: str) -> None:
        self.stage = stage
        self.truth = Truth()
        self.violation: Violation | None = None
        self._prefix = prefix
        self._numbers = count(1)
        self._slots: dict[int, Holding] = {}
        self._units = Units()
        self._accounts: list[UUID] = []

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
            self.stage.recover()
        self.truth.rollback()
        self.truth.odd = False

    def _aborted(self) -> bool:
        """Whether PostgreSQL has aborted the transaction."""
        if self.stage.dialect != "postgresql" or not self.stage.in_transaction:
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
            holds(not stream or is_odd, f"an account with {stream} cannot be found")
            raise
        served, version = account.balance, account.version
        holds(is_odd or sum(stream[:version]) == served, f"{served} is read, and there is {stream}")
        holds(
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
            holds(expected in ("stale", "refused") or holding.unsure, "a legitimate object was refused as stale")
            holding.lost = True
            return error
        except TOLD as error:
            is_refused_unit = self._units.depth and isinstance(error, exceptions.RollbackOnlyError)
            holds(expected != "stored" or bool(is_refused_unit), f"a save failed without a reason: {error!r}")
            holds(expected != "stale" or truth.odd, f"a stale object was refused by {error!r}")
            holding.lost |= bool(holding.unsaved)
            if not isinstance(error, IntegrityError):
                raise
            self._units.conflicts += 1
            return error
        holds(expected != "stale", "an object whose events were lost was saved")
        holds(expected not in ("conflict", "refused"), "an object was saved on a state that is not there")
        if holding.unsaved:
            truth.saved(holding)
            self._saved_by_mode()
        return None

    def _saved_by_mode(self) -> None:
        if self.stage.mode != "save":
            return
        transaction = self.stage.session.get_transaction()
        if transaction is None:
            self.truth.commit()
            return
        # Where somebody has begun a transaction, or a savepoint with one around it, that has an end of its own.
        is_begun = transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        waits = self._units.within or len(self.truth.frames) > 1 or self.truth.odd or is_begun
        holds(bool(waits), "save() has returned and what it saved is not committed")

    def _row(self, step: Step) -> None:
        text = f"{self._prefix}{next(self._numbers)}"
        self.truth.written = True
        self.stage.add_row(text)
        self.truth.frames[-1].entries.append(Entry(None, text=text))

    def _statement_error(self, step: Step) -> Exception | None:
        self.truth.written = True
        try:
            self.stage.add_row_again()
        except (sa.exc.IntegrityError, DjangoIntegrityError) as error:
            return error
        raise Violation("a second row with one id was taken")

    def _conflict(self, step: Step) -> None:
        busy = self.truth.written or self.truth.odd or self._units.conflicts
        if busy or (self.stage.excludes and self.stage.in_transaction):
            raise Skip
        account_id, amount = self._accounts[step.number % 3 % 2], 2 ** next(self._numbers)
        try:
            self.stage.elsewhere(lambda: self.stage.bank.deposit(account_id, amount))
        except (PersistenceError, sa.exc.SQLAlchemyError, DjangoError) as error:
            raise Violation(f"another writer fails although nothing is in its way: {error!r}") from error
        self.truth.streams[account_id].append(amount)
        self.truth.overtaken |= self.stage.in_transaction

    def _fault(self, step: Step) -> None:
        if not self._units.within:
            raise Skip
        raise UsersError
