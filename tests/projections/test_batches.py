"""The size of a batch cannot be observed: handlers see what they would see if each event were alone.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import Notification
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import orm

from flask_eventsourcing.exceptions import HandlerError
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.applying import Applier, EventError
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.runners import Runner
from tests.domain import Account
from tests.length import examples
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Deposited, Desk, PoisonError

on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)

ACCOUNTS = 3
SIZES = (1, 7, 1000)


@dataclass(frozen=True)
class Models:
    """A plain model, one whose values come back as others, and one with a relationship."""

    Plain: Any
    Priced: Any
    Owner: Any
    Thing: Any


def make_models(desk: Desk) -> Models:
    """Make the models."""
    base: Any = desk.Model

    def model(name: str, **attributes: Any) -> Any:
        return type(base)(name, (base,), {"__tablename__": name.lower(), **attributes})

    def number(**options: Any) -> Any:
        return orm.mapped_column(sa.Integer, nullable=False, **options)

    plain = model("Plain", id=number(primary_key=True, autoincrement=False), amount=number(default=0), text=text())
    priced = model(
        "Priced", id=number(primary_key=True, autoincrement=False), price=orm.mapped_column(sa.Numeric(10, 2))
    )
    owner = model(
        "Owner",
        id=number(primary_key=True, autoincrement=False),
        count=number(),
        things=orm.relationship("Thing", cascade="all, delete-orphan", order_by="Thing.number"),
    )
    thing = model(
        "Thing",
        owner_id=orm.mapped_column(sa.ForeignKey("owner.id", ondelete="CASCADE"), primary_key=True),
        number=number(primary_key=True, autoincrement=False),
    )
    return Models(plain, priced, owner, thing)


def text() -> Any:
    """Make a column of text."""
    return orm.mapped_column(sa.String(20), nullable=True)


Operation = Callable[[orm.Session, Models, int, int], None]


def put(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Add the row, or change it."""
    row = session.get(models.Plain, key)
    if row is None:
        session.add(models.Plain(id=key, amount=amount))
    else:
        row.amount += amount


def change(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Change the row if there is one."""
    row = session.get(models.Plain, key)
    if row is not None:
        row.amount = row.amount * 2 + amount


def express(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Let the database compute the value."""
    row = session.get(models.Plain, key)
    if row is not None:
        row.amount = models.Plain.amount + amount


def delete(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Delete the row with the ORM."""
    row = session.get(models.Plain, key)
    if row is not None:
        session.delete(row)


def delete_past(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Delete the row past the ORM."""
    session.execute(sa.delete(models.Plain.__table__).where(models.Plain.__table__.c.id == key))


def replace(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Delete the row past the ORM and add another with its key."""
    delete_past(session, models, key, amount)
    session.add(models.Plain(id=key))
    session.flush()


def update_past(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Update all rows past the ORM, and read one."""
    table = models.Plain.__table__
    session.execute(sa.update(table).values(amount=table.c.amount + amount))
    row = session.get(models.Plain, key)
    if row is not None:
        row.text = str(row.amount)


def update_by_text(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Update a row by textual SQL on the connection."""
    session.connection().execute(sa.text("UPDATE plain SET amount = amount - 1 WHERE id = :id"), {"id": key})


def update_with_orm(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Update rows by a statement of the ORM."""
    session.execute(sa.update(models.Plain).where(models.Plain.amount > amount).values(text="more"))


def update_unflushed(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Read another row between a change and a statement that goes by it."""
    row, table = session.get(models.Plain, key), models.Plain.__table__
    if row is not None:
        row.amount = amount
        session.get(models.Plain, (key + 1) % ACCOUNTS)
        session.execute(sa.update(table).where(table.c.id == key).values(amount=table.c.amount * 3))


def update_in_bulk(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Update by a bulk operation."""
    if session.get(models.Plain, key) is not None:
        session.bulk_update_mappings(sa.inspect(models.Plain), [{"id": key, "amount": amount}])


def count(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Write what a query finds."""
    total = session.scalar(sa.select(sa.func.coalesce(sa.func.sum(models.Plain.amount), 0)))
    session.merge(models.Plain(id=key, amount=int(total), text="sum"))


def hold_back(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Query without a flush before it."""
    with session.no_autoflush:
        found = session.scalars(sa.select(models.Plain.amount).order_by(models.Plain.id)).all()
        row = session.get(models.Plain, key)
        if row is not None:
            row.amount = sum(found)


def hold_back_after(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Query without a flush, after a change that is to be flushed with its event."""
    express(session, models, key, amount)
    hold_back(session, models, key, amount)


def forget(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Have the session read a row again, or all of them, and forget what was set in it within the event."""
    row = session.get(models.Plain, key)
    if row is not None:
        row.text = "forgotten"
        (session.expire_all if amount % 2 else lambda: session.expire(row))()
        row.amount += amount


def let_go(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Take a row, or all of them, out of the session."""
    row = session.get(models.Plain, key)
    if row is not None:
        row.text = "let go"
        (session.expunge_all if amount % 2 else lambda: session.expunge(row))()
        change(session, models, key, amount)


def refresh(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Read a row again, which forgets what was set in it."""
    row = session.get(models.Plain, key)
    if row is not None:
        row.text = "forgotten"
        session.refresh(row)
        row.amount += amount


def fail_within(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Take a part back."""
    with suppress(PoisonError), session.begin_nested():
        put(session, models, key, amount)
        session.flush()
        raise PoisonError


def price(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Go by a value that the database has rounded."""
    row = session.get(models.Priced, key)
    if row is None:
        session.add(models.Priced(id=key, price=Decimal(amount) / 3))
    else:
        row.price = row.price * 3 + Decimal(amount) / 7


def collect(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Add a row to a collection by its key alone."""
    owner = session.get(models.Owner, key)
    if owner is None:
        session.add(models.Owner(id=key, count=0))
    else:
        session.add(models.Thing(owner_id=key, number=len(owner.things)))
        owner.count += len(owner.things)


def disown(session: orm.Session, models: Models, key: int, amount: int) -> None:
    """Delete an owner, whose things the database deletes."""
    session.execute(sa.delete(models.Owner).where(models.Owner.id == key))


OPERATIONS: Sequence[Operation] = (
    put,
    change,
    express,
    delete,
    delete_past,
    replace,
    update_past,
    update_by_text,
    update_with_orm,
    update_unflushed,
    update_in_bulk,
    count,
    hold_back,
    hold_back_after,
    forget,
    let_go,
    refresh,
    fail_within,
    price,
    collect,
    disown,
)


class Case:
    """A projection whose handler does with each event what the event's amount says."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.models = models = make_models(desk)
        case = self

        class Drawn(ModelProjection):
            @on(Deposited)
            def deposited(self, event: Any, session: orm.Session) -> None:
                number, key = divmod(event.amount, ACCOUNTS)
                OPERATIONS[number % len(OPERATIONS)](session, models, key, event.amount)
                case.handled += 1
                if case.stopping is not None and case.handled >= case.stopping[0]:
                    case.stopping[1].set()

        drawn: Any = Drawn
        drawn.models = (models.Plain, models.Priced, models.Owner, models.Thing)
        desk.register(Drawn)
        self.handled = 0
        self.stopping: tuple[int, threading.Event] | None = None
        """After how many events a run is to be stopped, and by what."""
        self.account_id = desk.open()
        self.consumer = desk.consumer("Drawn")

    def log(self, amounts: Sequence[int]) -> Sequence[Notification]:
        """Store events, and return them."""
        begin = self.desk.head()
        with self.desk.context() as bank:
            account = bank.account(self.account_id)
            for amount in amounts:
                account.deposit(amount)
            bank.save(account)
            self.desk.session.commit()
        with self.desk.context():
            return self.consumer.application.read_log(begin, len(amounts), None, ())

    def rows(self, events: Sequence[Notification], size: int) -> list[Any]:
        """Return the rows after the events were applied in batches of a size."""
        self.empty()
        with self.consumer.application.host.context():
            self.consumer.checkpoint.ensure()
            with self.consumer.application.engine.begin() as connection:
                self.consumer.checkpoint.set_values(connection, position=events[0].id - 1, applied=0)
            claimed = self.consumer.checkpoint.claim(lease=False)
            assert claimed is not None
            applier = Applier(self.consumer)
            for start in range(0, len(events), size):
                page = events[start : start + size]
                claimed = applier.apply(claimed, page, page[-1].id)
        return self.found()

    def found(self) -> list[Any]:
        """Return all rows."""
        with self.desk.context(), self.desk.engine.connect() as connection:
            return [connection.execute(sa.select(t).order_by(*t.primary_key)).all() for t in self.tables()]

    def tables(self) -> list[Any]:
        """The tables, those that others refer to last."""
        return [
            each.__table__ for each in (self.models.Thing, self.models.Owner, self.models.Plain, self.models.Priced)
        ]

    def empty(self) -> None:
        """Delete all rows."""
        with self.desk.context(), self.desk.engine.begin() as connection:
            for table in self.tables():
                connection.execute(sa.delete(table))


@pytest.fixture
def case(desk: Desk) -> Case:
    """A projection on each database."""
    return Case(desk)


AMOUNTS = st.lists(st.integers(0, len(OPERATIONS) * ACCOUNTS - 1), min_size=2, max_size=25)


def test_batch_sizes_cannot_be_observed(case: Case) -> None:
    """One log gives the same rows in batches of one event, of seven and of all, whatever handlers do."""

    @settings(
        max_examples=examples(25),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(AMOUNTS)
    def compare(amounts: list[int]) -> None:
        events = case.log(amounts)
        alone, *others = (case.rows(events, size) for size in SIZES)
        for rows in others:
            assert rows == alone

    compare()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "CREATE TABLE other (id INTEGER)"])
def test_ends_of_transactions_are_refused_before_they_happen(case: Case, size: int, statement: str) -> None:
    """No statement of a handler can commit a position with half of its batch."""
    dialect = case.consumer.application.datastore.dialect
    if statement.startswith("CREATE") and not dialect.commits_implicitly(statement):
        statement = "END"
    events = case.log([0, 1, 2])

    def end(session: orm.Session, models: Models, key: int, amount: int) -> None:
        put(session, models, key, amount)
        if amount == 1:
            session.execute(sa.text(statement))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.projections.test_batches.OPERATIONS", (end,))
        with pytest.raises(EventError) as raised:
            case.rows(events, size)
    assert isinstance(raised.value.__cause__, HandlerError)
    assert "ended the transaction" in str(raised.value.__cause__)
    # Alone, the first event is applied before the second one fails.
    assert len(case.found()[2]) == (1 if size == 1 else 0)
    assert case.desk.row("Drawn").position == events[0].id - (0 if size == 1 else 1)


@pytest.mark.parametrize("operation", [hold_back_after, forget, let_go, refresh])
def test_no_change_of_an_earlier_event_is_forgotten(case: Case, operation: Operation) -> None:
    """What an event has set is stored, even if a later one of its batch has the session forget or read rows."""
    alone, *others = (_after_changes(case, operation, size) for size in SIZES)
    assert others == [alone] * len(others)
    (row,) = alone[2]
    assert row.amount > 3 * ACCOUNTS


def _after_changes(case: Case, operation: Operation, size: int) -> list[Any]:
    """Return the rows after a row was changed by two events and then by an operation, twice."""
    events = case.log([ACCOUNTS * number for number in (1, 2, 3, 4, 5)])
    with pytest.MonkeyPatch.context() as patch:
        operations = (put, put, put, operation, put, operation)
        patch.setattr("tests.projections.test_batches.OPERATIONS", operations)
        return case.rows(events, size)


def without_text(amounts: list[int]) -> list[int]:
    """Leave out what a rebuild refuses."""
    return [each for each in amounts if OPERATIONS[each // ACCOUNTS] is not update_by_text] or [0]


def test_ways_to_the_same_rows(case: Case) -> None:
    """A run, an interrupted run, a rebuild and a continued rebuild give the same rows as single events."""
    consumer = case.consumer
    consumer.projection_class.batch_size = 7
    stop = threading.Event()

    def begin(position: int) -> None:
        case.empty()
        consumer.checkpoint.ensure()
        with consumer.application.engine.begin() as connection:
            values = {"position": position, "applied": 0, "token": None, "last_originator_id": None}
            consumer.checkpoint.set_values(connection, **values, tables_id=None)

    def run(position: int, after: int) -> list[Any]:
        """Run from a position, stopped after some events and then again."""
        begin(position)
        case.stopping = (case.handled + after, stop) if after else None
        for _ in range(2):
            stop.clear()
            Runner(consumer, stop).run(once=True)
            case.stopping = None
        return case.found()

    def rebuild(after: int) -> list[Any]:
        """Rebuild, stopped after some events and then again."""
        case.stopping = (case.handled + after, stop) if after else None
        stop.clear()
        done = Rebuild(consumer, stop).run()
        case.stopping = None
        if done is None:
            done = Rebuild(consumer).run()
            assert done is not None
            assert done.resumed
        return case.found()

    @settings(
        max_examples=examples(8),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(AMOUNTS.map(without_text), st.integers(1, 20))
    def compare(amounts: list[int], after: int) -> None:
        case.log(amounts)
        with case.desk.context():
            events = case.consumer.application.read_log(1, 1000, None, ())
        alone = case.rows(events, 1)
        assert run(0, 0) == alone
        assert run(0, after) == alone
        assert rebuild(0) == alone
        assert rebuild(after) == alone

    compare()


@on_sqlite
def test_an_event_of_a_batch_takes_few_calls(new_desk: MakeDesk) -> None:
    """Beside handler, library and SQLAlchemy, an event of a large batch costs fewer than 24 calls of Python."""
    desk = new_desk()
    desk.balances()
    with desk.context() as bank:
        accounts = [Account("Ada") for _ in range(30)]
        for account in accounts * 20:
            account.deposit(1)
        bank.save(*accounts)
        desk.session.commit()
    # Once for each class, however many events there are.
    assert desk.consumer().fingerprint
    runner = Runner(desk.consumer(), threading.Event())
    runner.pace.limit, runner.pace.seconds = 1000, 1000.0
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("flask_eventsourcing."):
            calls[f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    # What other tests left behind is collected before, and not counted.
    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        runner.run(once=True)
    finally:
        sys.setprofile(before)
        gc.enable()
    assert desk.position() == 30 * 21
    assert calls.total() / (30 * 21) < 24, calls.most_common(40)
