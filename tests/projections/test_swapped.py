"""What a rebuild asks the database: what the live tables have stays, and nobody else's table is touched.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.exceptions import ConfigurationError, ProjectionBusyError, ProjectionHaltedError, RebuildError
from flask_eventsourcing.persistence.dialects.swapping import Part
from flask_eventsourcing.projections import ModelProjection, on, swap
from flask_eventsourcing.projections.rebuilding import Rebuild, Rebuilt, leftovers
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Created, Deposited, Desk
from tests.projections.test_rebuild import names, rebuild, repeating

INDEX = "CREATE INDEX balance_by_amount ON balance (amount)"
VIEW = "CREATE VIEW totals AS SELECT sum(amount) AS total FROM balance"
EXTRAS = {
    "sqlite": [
        "CREATE INDEX balance_by_sign ON balance (amount > 0)",
        "CREATE INDEX balance_by_much ON balance (amount) WHERE amount > 100",
        INDEX,
        VIEW,
    ],
    "postgresql": [
        "CREATE INDEX balance_by_much ON balance (amount) WHERE amount > 100",
        INDEX,
        "COMMENT ON TABLE balance IS 'what accounts hold'",
        "COMMENT ON COLUMN balance.amount IS 'in cents'",
        "GRANT SELECT ON balance TO PUBLIC",
        "GRANT UPDATE (amount) ON balance TO PUBLIC",
        "ALTER TABLE balance ADD CONSTRAINT never_much CHECK (amount < 1000000)",
        "ALTER TABLE balance ALTER amount SET DEFAULT 7",
        "ALTER TABLE balance ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY mine ON balance USING (amount > 0)",
        "CREATE STATISTICS balance_statistics (dependencies) ON account_id, amount FROM balance",
        "CREATE FUNCTION all_balances() RETURNS SETOF balance LANGUAGE sql AS 'SELECT * FROM balance'",
        "ALTER TABLE balance SET (fillfactor = 50)",
        VIEW,
    ],
    "mysql": [
        INDEX,
        "ALTER TABLE balance COMMENT 'what accounts hold'",
        "ALTER TABLE balance MODIFY amount INTEGER NOT NULL DEFAULT 7 COMMENT 'in cents'",
        "ALTER TABLE balance ADD CONSTRAINT never_much CHECK (amount < 1000000)",
        VIEW,
    ],
}
TRIGGERS = {
    "sqlite": ["CREATE TRIGGER tell AFTER INSERT ON balance BEGIN SELECT 1; END"],
    "postgresql": [
        "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER tell AFTER INSERT ON balance FOR EACH ROW EXECUTE FUNCTION tell()",
    ],
    "mysql": ["CREATE TRIGGER tell AFTER INSERT ON balance FOR EACH ROW SET @told = 1"],
}


def engine_of(desk: Desk) -> sa.Engine:
    """Return the engine of a desk."""
    return desk.consumer().application.engine


def execute(desk: Desk, *statements: str) -> None:
    """Execute statements, as a migration does."""
    with engine_of(desk).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def parts(desk: Desk) -> Collection[Part]:
    """Return what the table of balances has."""
    (table,) = desk.consumer().tables
    dialect = desk.consumer().application.datastore.dialect
    with engine_of(desk).connect() as connection:
        return dialect.parts_of(connection, table, table.name)


def spoil(desk: Desk) -> None:
    """Give the read model wrong rows."""
    execute(desk, "UPDATE balance SET amount = 1")


def test_what_the_live_tables_have_stays(desk: Desk) -> None:
    """Indexes of migrations, views, grants, policies, comments, defaults and constraints outlive a rebuild."""
    desk.balances()
    first, second = desk.open(1, 2), desk.open(10)
    desk.run_once()
    for statement in EXTRAS[engine_of(desk).dialect.name]:
        execute(desk, statement)
        spoil(desk)
        before = parts(desk)
        rebuild(desk)
        assert parts(desk) == before, statement
        assert desk.amounts() == {first: 3, second: 10}, statement
        assert "balance__new" not in names(desk)
    desk.deposit(first, 4)
    desk.run_once()
    with engine_of(desk).connect() as connection:
        assert connection.scalar(sa.text("SELECT total FROM totals")) == 17


def test_names_of_constraints_stay(desk: Desk) -> None:
    """Keys and foreign keys keep their names after one rebuild, and after two."""
    base: Any = desk.Model
    entry = {
        "__tablename__": "entry",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "account_id": orm.mapped_column(sa.ForeignKey("balance.account_id"), nullable=False),
        "other_id": orm.mapped_column(sa.ForeignKey("balance.account_id", name="entry_to_other"), nullable=True),
        "number": orm.mapped_column(sa.Integer, unique=True),
        "__table_args__": (sa.CheckConstraint("number > 0", name="positive"),),
    }
    entry_model = type(base)("Entry", (base,), entry)
    desk.balances(models=(desk.Balance, entry_model))
    account_id = desk.open(1, 2)
    desk.run_once()
    table = desk.consumer().tables[1]
    dialect = desk.consumer().application.datastore.dialect

    def found() -> Collection[Part]:
        with engine_of(desk).connect() as connection:
            return dialect.parts_of(connection, table, table.name)

    before = found()
    assert len(before) > 3
    for _ in range(2):
        spoil(desk)
        rebuild(desk)
        assert found() == before
        assert desk.amounts() == {account_id: 3}


def test_a_trigger_is_named_before_it_begins(desk: Desk) -> None:
    """A trigger would be lost, or act on replaced rows: the rebuild refuses, and has made nothing."""
    desk.balances()
    desk.open(1, 2)
    desk.run_once()
    execute(desk, *TRIGGERS[engine_of(desk).dialect.name])
    spoil(desk)
    before = names(desk)
    with pytest.raises(RebuildError, match=r"Table 'balance' has trigger tell, which"):
        rebuild(desk)
    assert set(desk.amounts().values()) == {1}
    assert names(desk) == before
    assert not leftovers(desk.consumer())


def test_a_foreign_key_that_only_the_database_knows(desk: Desk) -> None:
    """A table that no model knows refers to one of the projection: the rebuild refuses, and names it."""
    desk.balances()
    desk.open(1, 2)
    desk.run_once()
    (table,) = desk.consumer().tables
    kind = table.c.account_id.type.compile(engine_of(desk).dialect)
    execute(desk, f"CREATE TABLE note (account_id {kind}, FOREIGN KEY (account_id) REFERENCES balance (account_id))")
    with pytest.raises(RebuildError, match="Table 'note' has a foreign key to 'balance'"):
        rebuild(desk)
    assert "balance__new" not in names(desk)


def test_a_column_that_is_missing_is_named(desk: Desk) -> None:
    """Tables that would lose something, and lack a column of the model, need a migration first."""
    desk.balances()
    desk.open(1, 2)
    desk.run_once()
    execute(desk, INDEX)
    desk.Balance.__table__.append_column(sa.Column("currency", sa.String(3), nullable=True))
    with pytest.raises(RebuildError, match=r"lose index balance_by_amount of table 'balance'.*balance\.currency"):
        rebuild(desk)


def test_generated_keys_go_on(desk: Desk) -> None:
    """Where rows are replaced, no key is generated twice afterwards."""
    desk.listing(name="Balances")
    account_id = desk.open(1, 2)
    desk.run_once()
    execute(desk, "CREATE INDEX seen_by_text ON seen (text)", "DELETE FROM seen")
    for number in range(1, 4):
        assert rebuild(desk).rows["seen"][1] == 2 + number
        desk.deposit(account_id, 3)
        assert desk.run_once() == []
    with desk.context():
        texts = desk.session.scalars(sa.select(desk.Seen.text).order_by(desk.Seen.id)).all()
    assert texts == ["Created", *["Deposited"] * 5]


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_identity_and_computed_columns(desk: Desk) -> None:
    """Columns whose values the database generates are rebuilt too, and generate further values."""
    base: Any = desk.Model
    body = {
        "__tablename__": "line",
        "id": orm.mapped_column(sa.Integer, sa.Identity(always=True), primary_key=True),
        "amount": orm.mapped_column(sa.Integer, nullable=False),
        "double": orm.mapped_column(sa.Integer, sa.Computed("amount * 2", persisted=True)),
    }
    line = type(base)("Line", (base,), body)

    class Lines(ModelProjection):
        name = "Balances"
        models = (line,)

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            session.add(line(amount=event.amount))

    desk.register(Lines)
    account_id = desk.open(1, 2)
    desk.run_once()
    for statement in ("SELECT 1", "CREATE INDEX line_by_double ON line (double)"):
        execute(desk, statement, "UPDATE line SET amount = 7")
        rebuild(desk)
        desk.deposit(account_id, 3)
        assert desk.run_once() == []
    with desk.context():
        rows = desk.session.execute(sa.select(line.id, line.amount, line.double).order_by(line.id)).all()
    assert [tuple(row) for row in rows] == [(1, 1, 2), (2, 2, 4), (3, 3, 6), (4, 3, 6)]


def test_computed_columns_are_no_fault(desk: Desk) -> None:
    """``check`` finds columns whose values the database computes, on every database."""
    base: Any = desk.Model
    body = {
        "__tablename__": "line",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "amount": orm.mapped_column(sa.Integer),
        "double": orm.mapped_column(sa.Integer, sa.Computed("amount * 2", persisted=True)),
    }

    class Lines(ModelProjection):
        name = "Balances"
        models = (type(base)("Line", (base,), body),)

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            pass

    desk.register(Lines)
    done = desk.command("check")
    assert (done.exit_code, "table line ok" in done.output) == (0, True)


@pytest.mark.parametrize("inline", [False, True])
def test_readers_see_old_rows_until_they_are_replaced(desk: Desk, inline: bool) -> None:
    """Where rows are replaced, no reader sees an empty table, and no event is missed."""
    desk.balances(inline=inline)
    ids = [desk.open(1) for _ in range(10)]
    desk.run_once()
    execute(desk, INDEX)
    seen: list[int] = []

    def read() -> None:
        with desk.context():
            seen.append(desk.session.execute(sa.select(sa.func.count()).select_from(desk.Balance)).scalar_one())

    def deposit() -> None:
        with desk.context():
            desk.retry(lambda: desk.bank.deposit(ids[0], 1), 10)

    with repeating(read, deposit):
        for _ in range(3):
            rebuild(desk)
    desk.run_once()
    assert set(seen) == {10}
    with desk.context() as bank:
        assert desk.amounts()[ids[0]] == bank.account(ids[0]).balance


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_holder_of_the_tables_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that keeps the table locked is named with its number, and the rebuild can be continued."""
    desk.balances()
    account_id = desk.open(1, 2)
    desk.run_once()
    monkeypatch.setattr(swap, "TRIES", 2)
    monkeypatch.setattr(swap, "PATIENCE", 1)
    query = "SELECT pg_backend_pid()" if engine_of(desk).dialect.name == "postgresql" else "SELECT connection_id()"
    with engine_of(desk).connect() as reader:
        number = reader.exec_driver_sql(query).scalar_one()
        assert reader.scalar(sa.select(sa.func.count()).select_from(desk.Balance)) == 1
        with pytest.raises(RebuildError, match=rf"in use by .*\b{number}\b.*since.* is kept"):
            rebuild(desk)
    assert rebuild(desk).resumed
    assert desk.amounts() == {account_id: 3}


@pytest.mark.parametrize("leased", [False, True])
def test_a_second_operator_is_told(new_desk: MakeDesk, leased: bool) -> None:
    """While one rebuilds, a second rebuild is told so and touches nothing, on each database and with leases."""
    desk = new_desk(EVENTSOURCING_PROJECTION_LOCK="lease") if leased else new_desk()
    desk.balances(batch_size=1)
    account_id = desk.open(*range(1, 6))
    desk.run_once()
    begun, go_on = threading.Event(), threading.Event()
    results: list[Rebuilt | None] = []

    class Slow(Rebuild):
        def _catch_up(self) -> bool:
            begun.set()
            go_on.wait(30)
            return super()._catch_up()

    first = Slow(desk.consumer())
    thread = threading.Thread(target=lambda: results.append(first.run()))
    thread.start()
    try:
        assert begun.wait(30)
        for action in (lambda: Rebuild(desk.consumer()).run(restart=True), Rebuild(desk.consumer()).give_up):
            with pytest.raises(ProjectionBusyError, match="Another process rebuilds Balances"):
                action()
    finally:
        go_on.set()
        thread.join(60)
    assert [None if each is None else each.events for each in results] == [6]
    assert desk.amounts() == {account_id: 15}


def test_two_dry_runs(desk: Desk) -> None:
    """Two dry runs at the same time do not see each other, and leave nothing."""
    desk.balances()
    desk.open(*range(1, 30))
    before = names(desk)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(Rebuild(desk.consumer()).estimate().events)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [30, 30]
    assert names(desk) == before


def test_a_dry_run_names_the_event_that_would_halt_it(desk: Desk) -> None:
    """A dry run says in one sentence which event cannot be applied; of those that are set aside, how many."""
    desk.balances()
    desk.open(1, 13, 3)
    desk.poison = {13}
    before = names(desk)
    with pytest.raises(RebuildError, match=r"would halt before position 3: .*Deposited.*cannot digest 13"):
        Rebuild(desk.consumer()).estimate()
    desk.balances(on_failure="dead-letter")
    estimate = Rebuild(desk.consumer()).estimate()
    assert (estimate.events, estimate.tried, estimate.failed) == (4, 4, 2)
    assert names(desk) == before


def _count(desk: Desk, session: orm.Session, how: str) -> None:
    """Write a table that is not among the models, in one of several ways."""
    if how == "ORM":
        session.add(desk.Seen(account_id="1", version=1, text="counted"))
    elif how == "Core":
        session.execute(sa.insert(desk.Seen).values(account_id="1", version=1, text="counted"))
    else:
        session.execute(sa.text("INSERT INTO seen (account_id, version, text) VALUES ('1', 1, 'counted')"))


@pytest.mark.parametrize("how", ["ORM", "Core", "text"])
def test_no_other_table_is_written(desk: Desk, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A rebuild refuses to write a table that is not among the models; a live run warns once."""

    class Undeclared(ModelProjection):
        name = "Balances"
        models = (desk.Balance,)
        retries = 0

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))
            _count(desk, session, how)

    desk.register(Undeclared)
    for _ in range(3):
        desk.open()
    with caplog.at_level(logging.WARNING):
        desk.run_once()
    told = [record for record in caplog.records if "writes table 'seen'" in record.getMessage()]
    assert len(told) == 1
    with pytest.raises(ProjectionHaltedError, match="writes table 'seen', which is not among the projection's models"):
        rebuild(desk)
    with desk.context():
        assert desk.session.scalar(sa.select(sa.func.count()).select_from(desk.Seen)) == 3


def test_what_is_refused_is_not_set_aside(desk: Desk) -> None:
    """A rebuild halts where its handlers cannot be rebuilt, even if the class sets events aside that fail."""

    class Undeclared(ModelProjection):
        name = "Balances"
        models = (desk.Balance,)
        on_failure = "dead-letter"
        retries = 0

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))
            _count(desk, session, "Core")

    desk.register(Undeclared)
    account_id = desk.open()
    desk.run_once()
    with pytest.raises(ProjectionHaltedError, match="writes table 'seen'"):
        rebuild(desk)
    assert desk.amounts() == {account_id: 0}


@pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)
def test_two_projections_of_one_table(desk: Desk) -> None:
    """A table belongs to one projection: a second one is refused, and both are named."""
    desk.balances()

    class Others(ModelProjection):
        models = (desk.Balance,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            return

    with pytest.raises(ConfigurationError, match=r"'Balances' of Bank and 'Others' of Bank both have table 'balance'"):
        desk.register(Others)
    assert [consumer.name for consumer in desk.projections] == ["Balances"]
    desk.balances()


def test_an_unfinished_rebuild_is_given_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of a stopped rebuild are listed, and are dropped when the rebuild is given up."""
    desk.balances(batch_size=2)
    desk.open(*range(1, 12))
    desk.run_once()
    before = names(desk)
    stopped = Rebuild(desk.consumer())
    monkeypatch.setattr(stopped.runner.pace, "adapt", lambda *args: stopped.stop.set())
    assert stopped.run() is None
    left = leftovers(desk.consumer())
    assert (left.replaced, left.unfinished) == ([], ["balance__new"])
    assert left.position
    assert Rebuild(desk.consumer()).give_up() == ["balance__new"]
    assert names(desk) == before
    assert not leftovers(desk.consumer())
    rebuild(desk)
    assert leftovers(desk.consumer()).replaced == ["balance__old"]


@pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)
def test_a_killed_operator_keeps_nobody_out_for_long(desk: Desk) -> None:
    """Where there is a lease, a rebuild whose process is gone can be taken up after some seconds."""
    desk.balances()
    desk.open(1)
    gone = desk.consumer().application.checkpoint("Balances:rebuilding")
    gone.ensure()
    assert gone.claim(lease=True) is not None
    started = time.monotonic()
    rebuild(desk)
    assert time.monotonic() - started < 10
    assert gone.read() is None
