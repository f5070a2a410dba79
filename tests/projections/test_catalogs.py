"""Tables that are more than rows with names: a rebuild finds it in the catalogs, and keeps it or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.exceptions import RebuildError
from flask_eventsourcing.projections import ModelProjection, on
from tests.projections.desk import Created, Deposited, Desk
from tests.projections.test_rebuild import names, rebuild
from tests.projections.test_swapped import execute, spoil

on_postgres = pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
on_servers = pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)


def scalar(desk: Desk, statement: str) -> Any:
    """Ask the database, as another program does."""
    with desk.engine.connect() as connection:
        return connection.exec_driver_sql(statement).scalar_one()


@on_servers
def test_foreign_keys_in_a_circle(desk: Desk) -> None:
    """Tables that refer to each other are named before a rebuild begins, and it has made nothing."""
    base: Any = desk.Model
    last = sa.ForeignKey("item.id", use_alter=True, name="head_last")
    head = {
        "__tablename__": "head",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "last_id": orm.mapped_column(last, nullable=True),
    }
    item = {
        "__tablename__": "item",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "head_id": orm.mapped_column(sa.ForeignKey("head.id"), nullable=False),
    }
    models = (
        desk.Balance,
        *(type(base)(name.title(), (base,), body) for name, body in (("head", head), ("item", item))),
    )
    with desk.engine.begin() as connection:
        # As SQLAlchemy warns of the circle while it makes them.
        for statement in (
            "CREATE TABLE head (id INTEGER PRIMARY KEY, last_id INTEGER)",
            "CREATE TABLE item (id INTEGER PRIMARY KEY, head_id INTEGER NOT NULL REFERENCES head (id))",
        ):
            connection.exec_driver_sql(statement)
        desk.Balance.__table__.create(connection)
    desk.balances(models=models)
    desk.open(1, 2)
    assert desk.run_once() == []
    before = names(desk)
    with pytest.raises(RebuildError, match="foreign keys of tables 'head', 'item' form a cycle"):
        rebuild(desk)
    assert names(desk) == before


@on_postgres
@pytest.mark.parametrize("options", [{}, {"postgresql_partition_by": "HASH (account_id)"}])
def test_a_table_with_partitions(desk: Desk, options: dict[str, str]) -> None:
    """A partitioned table keeps its partitions, whether its model or only a migration has told of them."""
    base: Any = desk.Model
    body = {
        "__tablename__": "parted",
        "__table_args__": options,
        "account_id": orm.mapped_column(sa.Uuid(), primary_key=True),
        "amount": orm.mapped_column(sa.Integer, nullable=False),
    }
    desk.Balance = type(base)("Parted", (base,), body)
    with desk.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE parted (account_id uuid PRIMARY KEY, amount integer NOT NULL) PARTITION BY HASH (account_id)"
        )
        for number in range(2):
            part = f"PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER {number})"
            connection.exec_driver_sql(f"CREATE TABLE parted_{number} {part}")
    desk.balances()
    account_id = desk.open(1, 2)
    assert desk.run_once() == []
    for amount in (3, 4):
        execute(desk, "UPDATE parted SET amount = 1")
        rebuild(desk)
        desk.deposit(account_id, amount)
        assert desk.run_once() == []
    assert desk.amounts() == {account_id: 10}
    assert scalar(desk, "SELECT (SELECT count(*) FROM parted_0) + (SELECT count(*) FROM parted_1)") == 1


@on_postgres
def test_a_table_that_inherits(desk: Desk) -> None:
    """A table that inherits from another is still seen there after a rebuild."""
    desk.balances()
    execute(
        desk,
        "DROP TABLE balance",
        "CREATE TABLE whole (account_id uuid, amount integer NOT NULL)",
        "CREATE TABLE balance (PRIMARY KEY (account_id)) INHERITS (whole)",
    )
    desk.open(1, 2)
    assert desk.run_once() == []
    spoil(desk)
    rebuild(desk)
    assert scalar(desk, "SELECT sum(amount) FROM whole") == 3


@on_postgres
@pytest.mark.parametrize("column", ["balance", "balance[]"])
def test_a_column_of_the_type_of_its_rows(desk: Desk, column: str) -> None:
    """A table with a column of the type of a read model's rows keeps it, rebuild after rebuild."""
    desk.balances()
    execute(desk, f"CREATE TABLE history (rows {column})")
    account_id = desk.open(1, 2)
    assert desk.run_once() == []
    for _ in range(2):
        spoil(desk)
        rebuild(desk)
    assert desk.amounts() == {account_id: 3}
    type_of = "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = 'history'::regclass AND attnum = 1"
    assert scalar(desk, type_of) == column


@on_postgres
def test_a_schema_that_comes_first(desk: Desk) -> None:
    """A rebuilt table stays in the schema in which others read it, although search_path names another one first."""
    desk.balances()
    account_id = desk.open(1, 2)
    assert desk.run_once() == []
    spoil(desk)
    database = scalar(desk, "SELECT quote_ident(current_database())")
    execute(desk, "CREATE SCHEMA tenant", f"ALTER DATABASE {database} SET search_path = tenant, public")
    desk.engine.dispose()
    rebuild(desk)
    assert desk.amounts() == {account_id: 3}
    assert scalar(desk, "SELECT sum(amount) FROM public.balance") == 3


@pytest.mark.parametrize("owner", ["account", "o" * 30])
def test_long_names_of_indexes(desk: Desk, owner: str) -> None:
    """Indexes and keys may have the longest names that the database takes, and several that begin alike."""
    base: Any = desk.Model
    body = {
        "__tablename__": "lengthy",
        "id": orm.mapped_column(sa.Uuid(), primary_key=True),
        "amount": orm.mapped_column(sa.Integer, nullable=False),
        "owner": orm.mapped_column(owner * 2, sa.Integer, nullable=False, default=0, index=True),
        "__table_args__": (
            sa.Index("by_" + "x" * 59 + "1", "amount"),
            sa.Index("by_" + "x" * 59 + "2", "amount", "id"),
            sa.UniqueConstraint("amount", "id", name="u" * 60 + "1"),
            sa.UniqueConstraint("id", "amount", name="u" * 60 + "2"),
        ),
    }
    long = type(base)("Long", (base,), body)

    class Longs(ModelProjection):
        name = "Balances"
        models = (long,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(long(id=event.originator_id, amount=0))

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            session.get_one(long, event.originator_id).amount += event.amount

    desk.register(Longs)
    desk.open(1, 2)
    assert desk.run_once() == []
    before = {index["name"] for index in sa.inspect(desk.engine).get_indexes("lengthy")}
    assert len(before) >= 3
    for _ in range(2):
        execute(desk, "UPDATE lengthy SET amount = 1")
        rebuild(desk)
        assert scalar(desk, "SELECT amount FROM lengthy") == 3
    assert {index["name"] for index in sa.inspect(desk.engine).get_indexes("lengthy")} == before
