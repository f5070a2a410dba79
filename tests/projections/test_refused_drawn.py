"""Drawn handlers on tables with constraints of every kind: rows and dead letters are the same for every size of batch.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import orm

from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.runners import Runner
from tests.domain import Account
from tests.length import examples
from tests.projections import test_refused_rows as refused
from tests.projections.desk import Deposited, Desk
from tests.projections.test_refused_rows import SIZES, keep_keys

KEYS = 3
VALUES = 4


@dataclass(frozen=True)
class Models(refused.Models):
    """Models with constraints of each kind, each with a column ``note`` that none is about."""

    Loose: Any
    Priced: Any
    Told: Any


def make_models(base: Any) -> Models:
    """Make the models."""

    def model(name: str, *constraints: Any, **attributes: Any) -> Any:
        attributes |= {"id": number(primary_key=True, autoincrement=False), "__tablename__": f"drawn_{name.lower()}"}
        attributes |= {"note": orm.mapped_column(sa.String(20)), "__table_args__": constraints}
        return type(base)(name, (base,), attributes)

    def number(*key: Any, **options: Any) -> Any:
        return orm.mapped_column(*(key or (sa.Integer,)), **options)

    return Models(
        model("Plain", amount=number(nullable=False), at=orm.mapped_column(sa.DateTime)),
        model("Checked", sa.CheckConstraint("amount >= 0"), amount=number()),
        model("Unique", sa.UniqueConstraint("amount", "kind"), amount=number(), kind=number(nullable=False, default=0)),
        model("Parent", amount=number()),
        model("Child", amount=number(sa.ForeignKey("drawn_parent.id"))),
        model("Loose", amount=number(sa.ForeignKey("drawn_parent.id", ondelete="CASCADE"))),
        model("Priced", amount=orm.mapped_column(sa.Numeric(4, 2))),
        model("Told", amount=number()),
    )


Step = Callable[[orm.Session, Any, int, int], object]
"""What a handler does with a row of a model, by its key, and a value."""


def put(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Add the row, or change what the constraint is about."""
    row = session.get(model, key)
    # A check refuses the first, a key those of no parent.
    amount: Any = Decimal(value) * 40 if model.__name__ == "Priced" else value - 1
    if row is None:
        session.add(model(id=key, amount=amount))
    else:
        row.amount = amount


def add(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Add a row that may be there."""
    session.add(model(id=key, amount=value))


def note(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Change what no constraint is about."""
    row = session.get(model, key)
    if row is not None:
        row.note = f"{row.note or ''}{value}"[-20:]


def lengthen(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Set a text that may be too long."""
    row = session.get(model, key)
    if row is not None:
        row.note = "x" * (18 + value)


def overflow(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Set a number that is too large, and perhaps another one after it."""
    row = session.get(model, key)
    if row is not None:
        row.amount = 2**40
        if value % 2:
            row.amount = 1


def empty(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Set NULL, which may be refused."""
    row = session.get(model, key)
    if row is not None:
        row.amount = None


def move(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Give the row another key, which another one may have."""
    row = session.get(model, key)
    if row is not None:
        row.id = value % KEYS


def remove(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Delete the row, which others may refer to."""
    row = session.get(model, key)
    if row is not None:
        session.delete(row)


def exchange(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Give two rows each the other's value."""
    one, other = session.get(model, key), session.get(model, value % KEYS)
    if one is not None and other is not None:
        one.amount, other.amount = other.amount, one.amount


def change_past(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Change rows past the ORM, and note what comes of it."""
    table = model.__table__
    session.execute(sa.update(table).where(table.c.id >= key).values(amount=value))
    note(session, model, key, value)


def count(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Note what a query finds."""
    found = session.scalar(sa.select(sa.func.count()).where(model.amount == value))
    session.merge(model(id=key, amount=value, note=str(found)))


def hold_back(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Query without a flush before it."""
    with session.no_autoflush:
        found = session.scalars(sa.select(model.note).order_by(model.id)).all()
        row = session.get(model, key)
        if row is not None:
            row.note = "".join(each or "-" for each in found)[:20]


def date(session: orm.Session, model: Any, key: int, value: int) -> None:
    """Set a moment that not each database keeps, or takes."""
    row = session.get(model, key)
    if row is not None and model.__name__ == "Plain":
        row.at = datetime(2000 if value else 1, 1, 1, microsecond=value)


STEPS: Sequence[Step] = (
    put,
    note,
    put,
    note,
    add,
    lengthen,
    overflow,
    empty,
    move,
    remove,
    exchange,
    change_past,
    count,
    hold_back,
    date,
)
NAMES = tuple(Models.__dataclass_fields__)
DRAWN = st.tuples(
    st.sampled_from(range(len(STEPS))),
    st.sampled_from(range(len(NAMES))),
    st.sampled_from(range(KEYS)),
    st.sampled_from(range(VALUES)),
)
Drawn = tuple[int, int, int, int]


def step(what: Step, name: str, key: int, value: int) -> Drawn:
    """Return a step as if it were drawn."""
    return STEPS.index(what), NAMES.index(name), key, value


CORRECTED: Sequence[list[Drawn]] = (
    # A row takes the key of another one, which gets another key only after that.
    [step(add, "Plain", 1, 1), step(add, "Plain", 2, 1), step(move, "Plain", 2, 1), step(move, "Plain", 1, 0)],
    # A second row with a key, before the first one is deleted, which the session has.
    [step(add, "Plain", 1, 1), step(count, "Checked", 2, 1), step(add, "Plain", 1, 2), step(remove, "Plain", 1, 1)],
    [step(add, "Checked", 1, 1), step(put, "Checked", 1, 0), step(put, "Checked", 1, 2)],
    [step(add, "Plain", 1, 1), step(lengthen, "Plain", 1, 3), step(note, "Plain", 1, 1)],
    [step(add, "Plain", 1, 1), step(empty, "Plain", 1, 0), step(put, "Plain", 1, 2)],
    [step(add, "Plain", 1, 1), step(note, "Plain", 1, 2), step(hold_back, "Plain", 1, 1)],
)
"""What the database would not see, if it saw what several events do at once."""


class Case:
    """A projection whose handler does what was drawn, and that sets aside what it cannot apply."""

    def __init__(self, desk: Desk, **attributes: Any) -> None:
        self.desk, self.models = desk, make_models(desk.Model)
        self.drawn: Sequence[Drawn] = ()
        self.begin = 0
        case = self

        class Refused(ModelProjection):
            retries = 0
            on_failure = "dead-letter"

            @on(Deposited)
            def deposited(self, event: Any, session: orm.Session) -> None:
                step, name, key, value = case.drawn[event.amount]
                STEPS[step](session, getattr(case.models, NAMES[name]), key, value)

        refused: Any = type("Refused", (Refused,), attributes)
        refused.models = tuple(vars(self.models).values())
        desk.register(refused)
        self.consumer = desk.consumer("Refused")
        self._add_trigger()

    def _add_trigger(self) -> None:
        """Have the database count each change of the rows of one table."""
        action = "BEGIN UPDATE drawn_parent SET amount = amount + 1 WHERE id = NEW.id; END"
        with self.desk.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(
                    "CREATE FUNCTION drawn_told() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                    "UPDATE drawn_parent SET amount = amount + 1 WHERE id = NEW.id; RETURN NULL; END $$"
                )
                action = "EXECUTE FUNCTION drawn_told()"
            connection.exec_driver_sql(f"CREATE TRIGGER drawn_told AFTER UPDATE ON drawn_told FOR EACH ROW {action}")

    def log(self, drawn: Sequence[Drawn]) -> None:
        """Store an event for each step, of an aggregate of its own, so that none waits behind another one."""
        self.begin, self.drawn = self.desk.head(), drawn
        with self.desk.context() as bank:
            accounts = [Account("Ada") for _ in drawn]
            for number, account in enumerate(accounts):
                account.deposit(number)
            bank.save(*accounts)
            self.desk.session.commit()

    def run(self, size: int) -> tuple[list[Any], list[int]]:
        """Return the rows and the positions of the dead letters after a run in batches of a size."""
        checkpoint = self.consumer.checkpoint
        checkpoint.ensure()
        letters = self.consumer.application.dead_letters
        with self.desk.context(), self.desk.engine.begin() as connection:
            for table in self.tables():
                connection.execute(sa.delete(table))
            letters.remove_all(connection, self.consumer.name)
            unknown = dict.fromkeys(("token", "leased_until", "last_originator_id", "last_event_id", "tables_id"))
            checkpoint.set_values(connection, position=self.begin, applied=0, **unknown)
        runner = Runner(self.consumer, threading.Event())
        runner.pace.most = runner.pace.limit = size
        # However slow it is.
        runner.pace.seconds = 1000.0
        runner.run(once=True)
        return self.found()

    def found(self) -> tuple[list[Any], list[int]]:
        """Return the rows, and the positions of the dead letters."""
        with self.desk.context(), self.desk.engine.connect() as connection:
            rows = [connection.execute(sa.select(t).order_by(*t.primary_key)).all() for t in self.tables()]
            letters = self.consumer.application.dead_letters.select(connection, [self.consumer.name])
            return rows, [each.position for each in letters]

    def tables(self) -> list[Any]:
        """The tables, those that others refer to last."""
        models = vars(self.models).values()
        return sorted((each.__table__ for each in models), key=lambda table: table.name == "drawn_parent")


@pytest.mark.parametrize("host", ["flask", "plain"], indirect=True)
def test_refused_rows_cannot_tell_the_size_of_a_batch(desk: Desk) -> None:
    """The same events are set aside, and the same rows stored, whatever the handlers do to rows with constraints."""
    keep_keys(desk)
    case = Case(desk)

    @settings(
        max_examples=examples(12),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.lists(DRAWN, min_size=2, max_size=25))
    def compare(drawn: list[Drawn]) -> None:
        case.log(drawn)
        alone, *others = (case.run(size) for size in SIZES)
        for found in others:
            assert found == alone

    for drawn in CORRECTED:
        compare = example(drawn)(compare)
    compare()


@pytest.mark.parametrize("host", ["flask"], indirect=True)
def test_a_batch_without_a_refused_row_stays_one(desk: Desk) -> None:
    """Events that change what no constraint is about are sent with one statement for each row, not for each event."""
    keep_keys(desk)
    case = Case(desk)
    # Elsewhere the catalog does not tell which columns a check is about.
    names = ("Parent", "Unique", "Child", *(["Checked"] if desk.engine.dialect.name == "postgresql" else []))
    add_rows = [(STEPS.index(add), NAMES.index(name), 1, 1) for name in names]
    notes = [(STEPS.index(note), name, 1, value) for value in range(VALUES) for _, name, _, _ in add_rows]
    case.log([*add_rows, *notes])
    statements: list[str] = []
    sa.event.listen(desk.engine, "before_cursor_execute", lambda *told: statements.append(told[2]))
    rows, letters = case.run(1000)
    assert letters == []
    updates = [each for each in statements if each.startswith("UPDATE drawn_") and "note" in each]
    assert len(updates) == len(names)
    assert all(found[0].note == "0123" for found in rows if found)
