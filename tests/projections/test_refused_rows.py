"""An event whose rows the database refuses is found in a batch of any size, whatever a later event makes of them.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.runners import Runner
from tests.domain import Account
from tests.projections.desk import Deposited, Desk

SIZES = (1, 7, 1000)
Step = Callable[[orm.Session, Any], object]
"""What a handler does with an event, with the models."""


@dataclass(frozen=True)
class Models:
    """Models with constraints of each kind, and without a relationship."""

    Plain: Any
    Checked: Any
    Unique: Any
    Parent: Any
    Child: Any

    def tables(self) -> list[Any]:
        """The tables, those that others refer to last."""
        return [each.__table__ for each in (self.Child, self.Parent, self.Unique, self.Checked, self.Plain)]


def make_models(base: Any, **key: Any) -> Models:
    """Make the models; keyword arguments are options of the foreign key."""

    def model(name: str, *constraints: Any, **attributes: Any) -> Any:
        attributes |= {"id": number(primary_key=True, autoincrement=False), "__tablename__": f"refused_{name.lower()}"}
        return type(base)(name, (base,), {"__table_args__": constraints, **attributes})

    def number(**options: Any) -> Any:
        return orm.mapped_column(sa.Integer, **options)

    return Models(
        model("Plain", amount=number(nullable=False), text=orm.mapped_column(sa.String(20))),
        model("Checked", sa.CheckConstraint("amount >= 0"), amount=number()),
        model("Unique", amount=number(unique=True)),
        model("Parent", amount=number()),
        model("Child", amount=number(), parent_id=orm.mapped_column(sa.ForeignKey("refused_parent.id", **key))),
    )


def add(name: str, key: int, **values: Any) -> Step:
    """Return a step that adds a row."""
    return lambda session, models: session.add(getattr(models, name)(id=key, **values))


def change(name: str, key: int, **values: Any) -> Step:
    """Return a step that changes a row, which the session has, so that no statement is sent."""

    def step(session: orm.Session, models: Any) -> None:
        row = session.get_one(getattr(models, name), key)
        for each, value in values.items():
            setattr(row, each, value)

    return step


def take(name: str, key: int, attribute: str) -> Step:
    """Return a step that deletes a value of a row, which becomes NULL."""
    return lambda session, models: delattr(session.get_one(getattr(models, name), key), attribute)


def delete(name: str, key: int) -> Step:
    """Return a step that deletes a row."""
    return lambda session, models: session.delete(session.get_one(getattr(models, name), key))


CASES: dict[str, Sequence[Step]] = {
    "check": (add("Checked", 1, amount=1), change("Checked", 1, amount=-1), change("Checked", 1, amount=2)),
    "null": (add("Plain", 1, amount=1), change("Plain", 1, amount=None), change("Plain", 1, amount=2)),
    "deleted value": (add("Plain", 1, amount=1), take("Plain", 1, "amount"), change("Plain", 1, amount=2)),
    "length": (
        add("Plain", 1, amount=1),
        change("Plain", 1, text="x" * 21),
        change("Plain", 1, amount=2),
        change("Plain", 1, text="y"),
    ),
    "character": (add("Plain", 1, amount=1), change("Plain", 1, text="a\0b"), change("Plain", 1, text="c")),
    "range": (add("Plain", 1, amount=1), change("Plain", 1, amount=2**40), change("Plain", 1, amount=2)),
    "unique": (
        add("Unique", 1, amount=1),
        add("Unique", 2, amount=2),
        change("Unique", 2, amount=1),
        change("Unique", 1, amount=3),
    ),
    "key": (
        add("Plain", 1, amount=1),
        add("Plain", 2, amount=2),
        change("Plain", 1, id=2),
        change("Plain", 2, id=3),
    ),
    "added again": (
        add("Plain", 1, amount=1),
        change("Plain", 1, amount=2),
        add("Plain", 1, amount=3),
        delete("Plain", 1),
    ),
    "foreign key": (
        add("Parent", 7, amount=0),
        add("Child", 1, parent_id=1, amount=1),
        add("Parent", 1, amount=1),
        add("Child", 2, parent_id=1, amount=1),
    ),
}
CORRECTED = pytest.mark.parametrize("steps", CASES.values(), ids=CASES)


class Case:
    """A projection that sets aside what it cannot apply, and whose handler does with each event one of some steps."""

    def __init__(self, desk: Desk, models: Models, steps: Sequence[Step]) -> None:
        self.desk, self.models = desk, models

        class Refused(ModelProjection):
            retries = 0
            on_failure = "dead-letter"

            @on(Deposited)
            def deposited(self, event: Any, session: orm.Session) -> None:
                steps[event.amount](session, models)

        refused: Any = Refused
        refused.models = tuple(each for each in vars(models).values())
        desk.register(Refused)
        # Each of an aggregate of its own, so that none waits behind another one.
        with desk.context() as bank:
            accounts = [Account("Ada") for _ in steps]
            for number, account in enumerate(accounts):
                account.deposit(number)
            bank.save(*accounts)
            desk.session.commit()
        self.consumer = desk.consumer("Refused")

    def found(self) -> tuple[list[Any], list[int]]:
        """Return the rows, and the positions of the dead letters."""
        application = self.consumer.application
        with self.desk.context(), self.desk.engine.connect() as connection:
            rows = [connection.execute(sa.select(t).order_by(*t.primary_key)).all() for t in self.models.tables()]
            letters = application.dead_letters.select(connection, [self.consumer.name])
            return rows, [each.position for each in letters]

    def run(self, size: int) -> tuple[list[Any], list[int]]:
        """Return what is found after a run from the beginning, in batches of a size."""
        checkpoint = self.consumer.checkpoint
        checkpoint.ensure()
        with self.desk.context(), self.desk.engine.begin() as connection:
            for table in self.models.tables():
                connection.execute(sa.delete(table))
            self.consumer.application.dead_letters.remove_all(connection, self.consumer.name)
            values = {"position": 0, "applied": 0, "token": None, "last_originator_id": None}
            checkpoint.set_values(connection, **values, leased_until=None, tables_id=None)
        runner = Runner(self.consumer, threading.Event())
        runner.pace.most = runner.pace.limit = size
        runner.run(once=True)
        return self.found()

    def check(self) -> tuple[list[Any], list[int]]:
        """Check that no way can be told from any other, and return what is found."""
        alone, *others = (self.run(size) for size in SIZES)
        for found in others:
            assert found == alone
        assert Rebuild(self.consumer).run() is not None
        assert self.found() == alone
        return alone


def keep_keys(desk: Desk) -> None:
    """Have SQLite look at foreign keys."""
    if desk.engine.dialect.name == "sqlite":
        sa.event.listen(desk.engine, "connect", lambda driver, _: driver.execute("PRAGMA foreign_keys = ON"))
        desk.engine.dispose()


@CORRECTED
def test_refused_rows_that_a_later_event_corrects(desk: Desk, steps: Sequence[Step]) -> None:
    """The event whose rows the database would refuse alone is set aside in a batch of any size, and no other one."""
    keep_keys(desk)
    Case(desk, make_models(desk.Model), steps).check()


def test_refused_by_an_index_that_no_model_has(desk: Desk) -> None:
    """What only the database checks, such as a unique index of a migration, is checked event by event too."""
    models = make_models(desk.Model)
    first, second = add("Plain", 1, amount=1), add("Plain", 2, amount=2)
    case = Case(desk, models, [first, second, change("Plain", 2, amount=1), change("Plain", 1, amount=3)])
    with desk.engine.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX refused_once ON refused_plain (amount)")
    alone, *others = (case.run(size) for size in SIZES)
    assert others == [alone, alone]
    assert alone[1] == [6]


def test_a_trigger_sees_each_event(desk: Desk) -> None:
    """A trigger of the database fires for each event, as it does if each is alone in its batch."""
    models = make_models(desk.Model)
    changes = (change("Plain", 1, amount=number) for number in (2, 3, 4))
    case = Case(desk, models, [add("Parent", 1, amount=0), add("Plain", 1, amount=1), *changes])
    action = "BEGIN UPDATE refused_parent SET amount = amount + 1; END"
    with desk.engine.begin() as connection:
        if desk.engine.dialect.name == "postgresql":
            connection.exec_driver_sql(
                "CREATE FUNCTION refused_told() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN UPDATE refused_parent SET amount = amount + 1; RETURN NULL; END $$"
            )
            action = "EXECUTE FUNCTION refused_told()"
        connection.exec_driver_sql(f"CREATE TRIGGER refused_told AFTER UPDATE ON refused_plain FOR EACH ROW {action}")
    assert [counted(case.run(size)[0]) for size in SIZES] == [3, 3, 3]


def counted(rows: list[Any]) -> int:
    """Return what the trigger has counted, of the rows of all tables."""
    return int(rows[1][0].amount)


@pytest.mark.parametrize("uri", ["sqlite-file", "postgresql"], indirect=True)
def test_keys_that_the_commit_looks_at(desk: Desk) -> None:
    """A row without its parent is refused after its event, also if the database would wait for the commit."""
    keep_keys(desk)
    models = make_models(desk.Model, deferrable=True, initially="DEFERRED")
    alone = Case(desk, models, CASES["foreign key"]).check()
    assert alone[1] == [4]
