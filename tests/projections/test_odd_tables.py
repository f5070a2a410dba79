"""Tables with whatever a database lets them have: a rebuild makes copies of them, and they are as they were after it.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import postgresql

from flask_eventsourcing.exceptions import MissingRightError, ProjectionHaltedError, RebuildError
from flask_eventsourcing.projections import ModelProjection, on, swap
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.runners import Runner
from tests.projections.desk import Deposited, Desk
from tests.projections.test_catalogs import on_postgres, on_servers, scalar
from tests.projections.test_rebuild import names, rebuild
from tests.projections.test_refused_rows import keep_keys
from tests.projections.test_swapped import execute

on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)
Handler = Callable[[orm.Session, int], object]
"""What is done with the amount of a deposit."""


def model(desk: Desk, name: str, *arguments: Any, table: str | None = None, **attributes: Any) -> Any:
    """Make a read model; arguments are those of its table."""
    base: Any = desk.Model
    attributes = {"id": number(primary_key=True, autoincrement=False), **attributes}
    body = {"__tablename__": table or name.lower(), "__table_args__": arguments, **attributes}
    return type(base)(name, (base,), {key: value for key, value in body.items() if value is not None})


def number(*arguments: Any, **options: Any) -> Any:
    """Make a column of whole numbers."""
    return orm.mapped_column(sa.Integer, *arguments, **options)


def project(desk: Desk, handler: Handler, *models: Any, **attributes: Any) -> None:
    """Register a projection of deposits."""

    class Deposits(ModelProjection):
        name = "Balances"
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            handler(session, event.amount)

    desk.register(type("Deposits", (Deposits,), {"models": models, "name": "Balances", **attributes}))


def adding(model: Any, **values: Any) -> Handler:
    """Return a handler that adds a row with the amount as its id."""
    return lambda session, amount: session.add(model(id=amount, **values))


def rows(desk: Desk, model: Any) -> list[tuple[Any, ...]]:
    """Return the rows of a model, as another program reads them."""
    table = model.__table__
    with desk.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]


def indexes(desk: Desk, table: str) -> set[Any]:
    """Return what the database says of the indexes of a table."""
    found = sa.inspect(desk.engine).get_indexes(table)
    return {(each["name"], each["unique"], tuple(map(str, each["column_names"]))) for each in found}


# ------------------------------------------------------------------------------------------- indexes and constraints


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
def test_several_indexes_of_the_same_columns(desk: Desk) -> None:
    """A table may have several indexes of the same columns, such as partial ones; each keeps its name."""
    entry = model(
        desk,
        "Entry",
        sa.Index("entry_by_amount", "amount"),
        sa.Index("entry_of_much", "amount", postgresql_where=sa.text("amount > 100")),
        sa.Index("entry_backwards", sa.desc("amount")),
        amount=number(index=True),
    )
    project(desk, adding(entry, amount=7), entry)
    desk.open(1, 2)
    assert desk.run_once() == []
    before = indexes(desk, "entry")
    for _ in range(2):
        execute(desk, "UPDATE entry SET amount = 1")
        rebuild(desk)
        assert [row[1] for row in rows(desk, entry)] == [7, 7]
        assert indexes(desk, "entry") == before
    assert "entry__old" in names(desk)


@on_postgres
def test_constraints_that_exclude(desk: Desk) -> None:
    """A table may have an exclusion constraint, whose index has its name."""
    during = orm.mapped_column(postgresql.INT4RANGE(), nullable=False)
    booking = model(desk, "Booking", postgresql.ExcludeConstraint(("during", "&&"), name="alone"), during=during)
    project(desk, lambda s, a: s.add(booking(id=a, during=postgresql.Range(a, a + 1))), booking)
    desk.open(1, 2)
    assert desk.run_once() == []
    for _ in range(2):
        execute(desk, "DELETE FROM booking")
        rebuild(desk)
        assert len(rows(desk, booking)) == 2
        assert scalar(desk, "SELECT conname FROM pg_constraint WHERE contype = 'x'" + _OF.format("booking")) == "alone"


_OF = " AND conrelid = '{}'::regclass"


@on_postgres
@pytest.mark.parametrize("target", ["named", "the object", "by default", "unique", "unique by default"])
def test_upserts_that_name_a_constraint(desk: Desk, target: str) -> None:
    """A handler may name the constraint of its upsert, which has another name in the tables of a rebuild."""
    unique = sa.UniqueConstraint("number", name="once" if target == "unique" else None)
    key = sa.PrimaryKeyConstraint("id", name=None if target == "by default" else "tally_key")
    tally = model(desk, "Tally", key, unique, number=number(), amount=number())
    table: Any = tally.__table__
    constraint = {
        "the object": table.primary_key,
        "by default": "tally_pkey",
        "unique": "once",
        "unique by default": "tally_number_key",
    }.get(target, "tally_key")

    def put(session: orm.Session, amount: int) -> None:
        statement = postgresql.insert(table).values(id=1, number=1, amount=amount)
        changed = {"amount": table.c.amount + statement.excluded.amount}
        session.execute(statement.on_conflict_do_update(constraint=constraint, set_=changed))

    project(desk, put, tally)
    desk.open(1, 2, 4)
    assert desk.run_once() == []
    for _ in range(2):
        execute(desk, "UPDATE tally SET amount = 1")
        rebuild(desk)
        assert rows(desk, tally) == [(1, 1, 7)]


@on_postgres
def test_constraints_that_a_handler_puts_off(desk: Desk) -> None:
    """A handler that defers a constraint does so for its own event, in a batch of any size."""
    entry = model(desk, "Entry", sa.UniqueConstraint("amount", name="once", deferrable=True), amount=number())

    def handle(session: orm.Session, amount: int) -> None:
        if amount == 1:
            session.execute(sa.text("SET CONSTRAINTS ALL DEFERRED"))
        if amount < 3:
            session.add(entry(id=amount, amount=0))
        else:
            row = session.get(entry, 2)
            if row is not None:
                row.amount = 1

    project(desk, handle, entry, on_failure="dead-letter")
    for amount in (1, 2, 3):
        desk.open(amount)
    found = []
    for size in (1, 1000):
        execute(desk, "DELETE FROM entry", "UPDATE bank_projections SET position = 0, token = NULL")
        execute(desk, "DELETE FROM bank_dead_letters")
        runner = Runner(desk.consumer(), threading.Event())
        runner.pace.most = runner.pace.limit = size
        runner.run(once=True)
        found.append((rows(desk, entry), desk.status().dead_letters))
    assert found == [([(1, 0)], 1)] * 2


# ---------------------------------------------------------------------------------------------------------- names


@on_postgres
def test_names_are_measured_as_the_database_does(desk: Desk) -> None:
    """A name that gets too long in bytes is refused before anything is made."""
    entry = model(desk, "Entry", table="ä" * 30)
    project(desk, adding(entry), entry)
    desk.open(1)
    assert desk.run_once() == []
    before = names(desk)
    with pytest.raises(RebuildError, match="too long for a copy with a suffix"):
        rebuild(desk)
    assert names(desk) == before


@pytest.mark.parametrize("suffix", ["__new", "__old"])
def test_a_table_with_the_name_of_a_copy(desk: Desk, suffix: str) -> None:
    """A model whose table has the name of a rebuild's copy is named, and keeps its rows."""
    entry, other = model(desk, "Entry"), model(desk, "Other", table=f"entry{suffix}")
    project(desk, adding(entry), entry)
    desk.open(1)
    assert desk.run_once() == []
    execute(desk, f"INSERT INTO entry{suffix} (id) VALUES (7)")
    cleaning = Rebuild(desk.consumer()).drop_old if suffix == "__old" else Rebuild(desk.consumer()).give_up
    for action in (lambda: rebuild(desk), cleaning):
        with pytest.raises(RebuildError, match=f"'entry{suffix}', as another table is called"):
            action()
    assert rows(desk, other) == [(7,)]


ODD = ("order", 'a "quote", (x) `tick` %s %(s)s', "a.b", "Col:on äöü")


@pytest.mark.filterwarnings("ignore:WARNING. SQL-parsed foreign key constraint")
@pytest.mark.parametrize("name", ODD)
def test_names_that_need_quotes(desk: Desk, name: str) -> None:
    """Tables and columns may be called as the database lets them be, with indexes, keys and replaced rows too."""
    table, column = f"{name}s", f"{name} value"
    entry = model(
        desk, "Entry", table=table, amount=orm.mapped_column(column, sa.Integer, index=True, key="amount"), up=None
    )
    line = model(desk, "Line", table=f"{table} line", entry_id=number(sa.ForeignKey(entry.__table__.c.id)))

    def handle(session: orm.Session, amount: int) -> None:
        session.add_all([entry(id=amount, amount=1), line(id=amount, entry_id=amount)])
        session.flush()
        session.execute(sa.update(entry).values(amount=entry.amount + 1))
        other = orm.aliased(entry)
        session.execute(sa.update(line).where(sa.exists().where(other.id == line.entry_id)).values(entry_id=1))

    project(desk, handle, entry, line)
    desk.open(1, 2)
    assert desk.run_once() == []
    expected = [(1, 3), (2, 2)], [(1, 1), (2, 1)]
    quote = desk.engine.dialect.identifier_preparer.quote
    with desk.engine.begin() as connection:
        # As their rows are replaced then.
        index = f"CREATE INDEX further ON {quote(table)} ({quote(column)})"
    for statement in (None, index):
        if statement is not None:
            execute(desk, statement)
        with desk.engine.begin() as connection:
            connection.execute(sa.update(entry.__table__).values({"amount": 9}))
        rebuild(desk)
        assert (rows(desk, entry), rows(desk, line)) == expected
    Rebuild(desk.consumer()).drop_old()


@on_sqlite
@pytest.mark.parametrize("name", ["entry (x)", "(x) entry"])
def test_views_of_names_that_need_quotes(desk: Desk, name: str) -> None:
    """A view of a table with whatever name reads the new rows after a rebuild."""
    entry = model(desk, "Entry", table=name)
    project(desk, adding(entry), entry)
    desk.open(1, 2)
    assert desk.run_once() == []
    execute(desk, f'CREATE VIEW seen_entries AS SELECT id FROM "{name}"')
    for _ in range(2):
        execute(desk, f'DELETE FROM "{name}"')
        rebuild(desk)
        assert scalar(desk, "SELECT count(*) FROM seen_entries") == 2


@on_servers
def test_names_that_differ_by_case(desk: Desk) -> None:
    """Two tables of a projection may differ by case only, where the database tells them apart."""
    small, large = model(desk, "Small", table="entry"), model(desk, "Large", table="Entry", amount=number(index=True))
    project(desk, lambda s, a: s.add_all([small(id=a), large(id=a, amount=a)]), small, large)
    desk.open(1, 2)
    assert desk.run_once() == []
    for _ in range(2):
        with desk.engine.begin() as connection:
            connection.execute(sa.delete(small.__table__))
        rebuild(desk)
        assert rows(desk, small) == [(1,), (2,)]
        assert rows(desk, large) == [(1, 1), (2, 2)]


# ------------------------------------------------------------------------------------------------- columns of any kind


def test_columns_of_any_kind(desk: Desk) -> None:
    """Enumerations, JSON, defaults of the server, times, and keys of several columns are the same after a rebuild."""
    entry = model(
        desk,
        "Entry",
        part=orm.mapped_column(sa.String(10), primary_key=True),
        kind=orm.mapped_column(sa.Enum("low", "high", name="entry_kind"), nullable=False),
        other=orm.mapped_column(sa.Enum("a", "b", name="entry_other", native_enum=False, create_constraint=True)),
        body=orm.mapped_column(sa.JSON()),
        flag=orm.mapped_column(sa.Boolean(create_constraint=True, name="entry_flag")),
        given=number(server_default="5", nullable=False),
        day=orm.mapped_column(sa.DateTime(timezone=True), server_default=sa.func.now()),
        price=orm.mapped_column(sa.Numeric(10, 2)),
        data=orm.mapped_column(sa.LargeBinary(20)),
    )
    values = {"part": "x", "kind": "low", "other": "b", "body": {"a": [1, None]}, "flag": True, "data": b"\0\1"}
    project(desk, adding(entry, **values, price=3), entry)
    desk.open(1, 2)
    assert desk.run_once() == []
    before = [row[:7] for row in rows(desk, entry)]
    columns = str(sa.inspect(desk.engine).get_columns("entry"))
    for statement in ("SELECT 1", "CREATE INDEX entry_by_price ON entry (price)"):
        execute(desk, statement, "UPDATE entry SET given = 9")
        rebuild(desk)
        assert [row[:7] for row in rows(desk, entry)] == before
        assert str(sa.inspect(desk.engine).get_columns("entry")) == columns


@on_postgres
def test_columns_of_postgresql(desk: Desk) -> None:
    """Arrays, ranges and sequences, also one that the table owns, are the same after a rebuild."""
    sequence = sa.Sequence("entry_numbers", start=10, metadata=desk.Model.metadata)
    entry = model(
        desk,
        "Entry",
        id=number(sequence, primary_key=True, server_default=sequence.next_value()),
        many=orm.mapped_column(postgresql.ARRAY(sa.Text())),
        body=orm.mapped_column(postgresql.JSONB()),
        span=orm.mapped_column(postgresql.TSRANGE()),
        serial=orm.mapped_column(sa.BigInteger, sa.Identity(start=5)),
    )
    project(desk, lambda s, a: s.add(entry(many=["a", str(a)], body={"a": a})), entry)
    account_id = desk.open(1, 2)
    assert desk.run_once() == []
    seen = {row[0] for row in rows(desk, entry)}
    for statement in ("SELECT 1", "ALTER SEQUENCE entry_numbers OWNED BY entry.id", "SELECT 1"):
        execute(desk, statement, "UPDATE entry SET body = NULL")
        rebuild(desk)
        found = rows(desk, entry)
        assert [row[2]["a"] for row in found] == list(range(1, len(found) + 1))
        desk.deposit(account_id, len(found) + 1)
        assert desk.run_once() == []
        seen |= {row[0] for row in rows(desk, entry)}
        Rebuild(desk.consumer()).drop_old()
    assert len({row[4] for row in rows(desk, entry)}) == 5


@pytest.mark.parametrize("uri", ["postgresql", "sqlite-file"], indirect=True)
def test_what_only_the_database_knows_of_columns(desk: Desk) -> None:
    """A column that a migration has given a collation, or another way of storage, has it after a rebuild."""
    project(desk, adding(entry := model(desk, "Entry", text=orm.mapped_column(sa.Text())), text="b"), entry)
    statements = [
        'ALTER TABLE entry ALTER text TYPE text COLLATE "C"',
        "ALTER TABLE entry ALTER text SET STORAGE EXTERNAL",
    ]
    column = "attrelid = 'entry'::regclass AND attname = 'text'"
    query = f"SELECT attcollation::regcollation || attstorage FROM pg_attribute WHERE {column}"
    if desk.engine.dialect.name == "sqlite":
        statements = [
            "DROP TABLE entry",
            "CREATE TABLE entry (id INTEGER NOT NULL PRIMARY KEY, text TEXT COLLATE NOCASE) STRICT",
        ]
        query = "SELECT sql FROM sqlite_master WHERE name = 'entry'"
    execute(desk, *statements)
    desk.open(1)
    assert desk.run_once() == []
    before = scalar(desk, query)
    for _ in range(2):
        execute(desk, "UPDATE entry SET text = 'c'")
        rebuild(desk)
        assert rows(desk, entry) == [(1, "b")]
        assert scalar(desk, query) == before


# ----------------------------------------------------------------------------------------------------- foreign keys


def referring(desk: Desk, **options: Any) -> Any:
    """Make a model whose rows refer to each other."""
    return model(desk, "Node", up=number(sa.ForeignKey("node.id", **options)))


@pytest.mark.parametrize("ondelete", ["RESTRICT", "CASCADE"])
def test_rows_that_refer_to_each_other(desk: Desk, ondelete: str | None) -> None:
    """Rows of a table that refers to itself are rebuilt in both ways, in whatever order they are."""
    keep_keys(desk)
    node = referring(desk, ondelete=ondelete)

    def handle(session: orm.Session, amount: int) -> None:
        session.add(node(id=10 - amount, up=None if amount == 1 else 11 - amount))

    project(desk, handle, node)
    desk.open(1, 2, 3)
    assert desk.run_once() == []
    expected = [(7, 8), (8, 9), (9, None)]
    for statement in ("SELECT 1", "CREATE INDEX node_up ON node (up, id)"):
        execute(desk, statement, "UPDATE node SET up = 7 WHERE id = 9")
        rebuild(desk)
        assert rows(desk, node) == expected


@on_sqlite
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables")
def test_tables_that_refer_to_each_other(desk: Desk) -> None:
    """On SQLite, tables may refer to each other in a circle: a rebuild renames them, or replaces their rows."""
    keep_keys(desk)
    later: Any = {"deferrable": True, "initially": "DEFERRED"}
    head = model(desk, "Head", last=number(sa.ForeignKey("item.id", name="head_last", use_alter=True)))
    item = model(desk, "Item", head=number(sa.ForeignKey("head.id", **later)))

    def handle(session: orm.Session, amount: int) -> None:
        session.add(item(id=amount, head=amount))
        session.flush()
        session.add(head(id=amount, last=amount))

    project(desk, handle, head, item)
    desk.open(1, 2)
    assert desk.run_once() == []
    for statement in ("SELECT 1", "CREATE INDEX item_head ON item (head)"):
        execute(desk, statement, "UPDATE head SET last = 1")
        rebuild(desk)
        assert (rows(desk, head), rows(desk, item)) == ([(1, 1), (2, 2)], [(1, 1), (2, 2)])
    Rebuild(desk.consumer()).drop_old()


@pytest.mark.parametrize("later", ["", " DEFERRABLE INITIALLY DEFERRED"])
def test_rows_that_a_key_of_the_live_table_refuses(desk: Desk, later: str) -> None:
    """Where rows do not fit into live tables, as only these have a key, the rebuild says so, and nothing is changed."""
    if later and desk.engine.dialect.name == "mysql":
        later = ""
    keep_keys(desk)
    entry = model(desk, "Entry", amount=number())
    wanted = [1]
    project(desk, lambda s, a: s.add(entry(id=a, amount=wanted[0])), entry)
    execute(
        desk,
        "CREATE TABLE kind (id INTEGER NOT NULL PRIMARY KEY)",
        "INSERT INTO kind (id) VALUES (1)",
        "DROP TABLE entry",
    )
    key = f"FOREIGN KEY (amount) REFERENCES kind (id){later}"
    execute(desk, f"CREATE TABLE entry (id INTEGER NOT NULL PRIMARY KEY, amount INTEGER, {key})")
    desk.open(1, 2)
    assert desk.run_once() == []
    wanted[0] = 2
    with pytest.raises(RebuildError, match="The rows of Balances do not fit into the live tables"):
        rebuild(desk)
    assert rows(desk, entry) == [(1, 1), (2, 1)]
    execute(desk, "INSERT INTO kind (id) VALUES (2)")
    rebuild(desk)
    assert rows(desk, entry) == [(1, 2), (2, 2)]


def test_many_to_many(desk: Desk) -> None:
    """The table between two models of a projection is the projection's too, although it has no model."""
    base: Any = desk.Model
    between = sa.Table(
        "between",
        base.metadata,
        sa.Column("left_id", sa.ForeignKey("left_side.id"), primary_key=True),
        sa.Column("right_id", sa.ForeignKey("right_side.id"), primary_key=True),
    )
    left = model(desk, "Left", table="left_side", rights=orm.relationship("Right", secondary=between))
    right = model(desk, "Right", table="right_side")
    project(desk, lambda s, a: s.add(left(id=a, rights=[right(id=a), right(id=-a)])), left, right)
    desk.open(1, 2)
    assert desk.run_once() == []
    for _ in range(2):
        with desk.engine.begin() as connection:
            connection.execute(sa.delete(between))
        rebuild(desk)
        with desk.engine.connect() as connection:
            assert len(connection.execute(sa.select(between)).all()) == 4


def test_models_that_extend_others(desk: Desk) -> None:
    """A model may extend another one in a table of its own, and a rebuild gives the same rows."""
    kind = orm.mapped_column(sa.String(10), nullable=False)
    mapped = {"polymorphic_on": "kind", "polymorphic_identity": "base"}
    base = model(desk, "Thing", kind=kind, amount=number(), __mapper_args__=mapped)
    body = {
        "__tablename__": "special",
        "id": number(sa.ForeignKey("thing.id"), primary_key=True),
        "more": number(),
        "__mapper_args__": {"polymorphic_identity": "special"},
    }
    special = type(desk.Model)("Special", (base,), body)

    def handle(session: orm.Session, amount: int) -> None:
        row = session.get(base, amount % 3)
        if row is None:
            session.add((special if amount % 2 else base)(id=amount % 3, amount=0))
        else:
            row.amount += amount
            if isinstance(row, special):
                row.more = (row.more or 0) + row.amount

    project(desk, handle, special, base)
    desk.open(*range(1, 12))
    assert desk.run_once() == []
    found = rows(desk, special), rows(desk, base)
    for _ in range(2):
        rebuild(desk)
        assert (rows(desk, special), rows(desk, base)) == found


# ------------------------------------------------------------------------------------------------------- what goes on


def test_an_empty_log(desk: Desk) -> None:
    """A rebuild of a projection whose log has no event ends with no rows."""
    entry = model(desk, "Entry")
    project(desk, adding(entry), entry)
    for _ in range(2):
        assert rebuild(desk).rows == {"entry": (0, 0)}
    desk.open(1)
    assert desk.run_once() == []
    assert rows(desk, entry) == [(1,)]


def test_a_migration_while_tables_are_built(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that a migration adds while the tables are built is not lost with the swap: the rebuild says so."""
    entry = model(desk, "Entry")
    project(desk, adding(entry), entry)
    desk.open(1)
    assert desk.run_once() == []
    built = Rebuild._catch_up

    def migrate(self: Rebuild) -> bool:
        done = built(self)
        execute(desk, "ALTER TABLE entry ADD COLUMN further INTEGER", "UPDATE entry SET further = 7")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Rebuild, "_catch_up", migrate)
        with pytest.raises(RebuildError, match=r"'entry'.*while its copy was built"):
            rebuild(desk)
    assert scalar(desk, "SELECT further FROM entry") == 7
    assert not rebuild(desk).resumed


def test_a_migration_before_tables_are_built(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A column that a migration has added before its code came is named where a rebuild makes tables without it."""
    entry = model(desk, "Entry")
    project(desk, adding(entry), entry)
    desk.open(1)
    assert desk.run_once() == []
    rebuild(desk)
    assert "not in its models" not in caplog.text
    execute(desk, "ALTER TABLE entry ADD COLUMN further INTEGER", "UPDATE entry SET further = 7")
    rebuild(desk)
    assert caplog.text.count("not in its models, and the new tables will be without them: entry.further") == 1
    assert scalar(desk, "SELECT further FROM entry__old") == 7


@on_postgres
def test_the_planner_knows_the_new_tables(desk: Desk) -> None:
    """Right after a swap the planner has statistics of the new tables, as it had of the replaced ones."""
    entry = model(desk, "Entry", amount=number(index=True))
    project(desk, adding(entry, amount=3), entry)
    desk.open(*range(1, 30))
    assert desk.run_once() == []
    execute(desk, "ANALYZE entry")
    rebuild(desk)
    assert scalar(desk, "SELECT count(*) FROM pg_stats WHERE tablename = 'entry'") == 2
    assert scalar(desk, "SELECT reltuples::int FROM pg_class WHERE oid = 'entry'::regclass") == 29


@on_servers
@pytest.mark.parametrize("replaced", [False, True])
def test_a_statement_that_takes_too_long(desk: Desk, replaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server limits the time of statements, the error says so, and the new tables are kept."""
    entry = model(desk, "Entry")
    project(desk, adding(entry), entry)
    desk.open(*range(1, 4))
    assert desk.run_once() == []
    if replaced:
        execute(desk, "CREATE INDEX entry_again ON entry (id)")
    dialect = desk.consumer().application.datastore.dialect
    name = "copy_rows" if replaced else "swap_tables"
    original = getattr(type(dialect), name)
    is_postgres = desk.engine.dialect.name == "postgresql"

    def slow(self: Any, connection: sa.Connection, *args: Any, **kwargs: Any) -> None:
        if not replaced or not args[2:]:
            limit = "SET LOCAL statement_timeout = 100" if is_postgres else "SET max_statement_time = 0.1"
            connection.exec_driver_sql(limit)
            connection.exec_driver_sql("SELECT pg_sleep(2)" if is_postgres else "SELECT sleep(2) FROM entry")
        original(self, connection, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(dialect), name, slow)
        with pytest.raises(RebuildError, match=r"took longer than a setting of the server allows.*was built is kept"):
            rebuild(desk)
    assert rebuild(desk).resumed
    assert len(rows(desk, entry)) == 3


def unknown(values: Sequence[Any]) -> str:
    """Join values for a message."""
    return ", ".join(map(str, values))


def test_a_log_of_unknown_classes_only(desk: Desk) -> None:
    """A log with nothing but events of classes that are gone halts a rebuild, which names the class."""
    entry = model(desk, "Entry")
    project(desk, adding(entry), entry)
    desk.open()
    with desk.engine.begin() as connection:
        connection.execute(sa.update(desk.events_table).values(topic="gone.module:Gone"))
    with pytest.raises(ProjectionHaltedError, match=r"gone\.module:Gone"):
        rebuild(desk)


# ------------------------------------------------------------------------------------------------ how handlers name it


def test_a_table_that_is_written_down(desk: Desk) -> None:
    """A handler may name its table by ``table()``: a rebuild writes and reads the new one."""
    entry = model(desk, "Entry", amount=number())
    written = sa.table("entry", sa.column("id"), sa.column("amount"))

    def handle(session: orm.Session, amount: int) -> None:
        total = session.scalar(sa.select(sa.func.coalesce(sa.func.sum(written.c.amount), 0)))
        session.execute(sa.insert(written).values(id=amount, amount=amount + int(total or 0)))
        session.execute(sa.update(written).where(written.c.id == 1).values(amount=written.c.amount + 1))

    project(desk, handle, entry)
    desk.open(1, 2, 3)
    assert desk.run_once() == []
    expected = rows(desk, entry)
    execute(desk, "UPDATE entry SET amount = 100")
    rebuild(desk)
    assert rows(desk, entry) == expected


READS: dict[str, Callable[[orm.Session, Any], Any]] = {
    "a statement": lambda session, entry: session.execute(sa.text("SELECT sum(amount) FROM entry")),
    "of the ORM": lambda session, entry: session.scalars(
        sa.select(entry).from_statement(sa.text("SELECT * FROM entry"))
    ).all(),
    "a part": lambda session, entry: session.execute(
        sa.select(sa.text("1")).where(sa.text("EXISTS (SELECT 1 FROM entry)"))
    ),
    "a column": lambda session, entry: session.scalar(sa.select(sa.literal_column("(SELECT count(*) FROM entry)"))),
    "in capitals": lambda session, entry: session.execute(sa.text(f"SELECT sum(amount) FROM {in_capitals(session)}")),
    "in a list": lambda session, entry: session.connection().exec_driver_sql("SELECT 1 FROM other o, entry").all(),
    "a source": lambda session, entry: session.scalars(sa.select(sa.text("1")).select_from(sa.text("entry"))).all(),
    "of the driver": lambda session, entry: session.connection().exec_driver_sql("SELECT count(*) FROM entry").all(),
}


def in_capitals(session: orm.Session) -> str:
    """Return the table's name in capitals, but for MariaDB, which tells tables apart by case."""
    return "entry" if session.get_bind().dialect.name == "mysql" else "ENTRY"


@pytest.mark.parametrize("how", READS)
def test_textual_sql_that_reads(desk: Desk, how: str) -> None:
    """A handler that reads its table by textual SQL would read the live one in a rebuild: it halts there."""
    entry = model(desk, "Entry", amount=number())

    def handle(session: orm.Session, amount: int) -> None:
        READS[how](session, entry)
        session.add(entry(id=amount))

    project(desk, handle, entry)
    execute(desk, "CREATE TABLE other (id INTEGER)")
    desk.open(1)
    assert desk.run_once() == []
    with pytest.raises(ProjectionHaltedError, match=r"(?i)names table 'entry' in textual SQL"):
        rebuild(desk)


@pytest.mark.parametrize("how", ["a table", "textual SQL"])
def test_views_that_are_read(desk: Desk, how: str) -> None:
    """A handler that reads its table through a view would read the live rows in a rebuild: it halts there."""
    entry = model(desk, "Entry", amount=number())
    view = sa.table("larger", sa.column("id"))
    query = sa.select(sa.func.count()).select_from(view) if how == "a table" else sa.text("SELECT count(*) FROM larger")
    project(desk, lambda s, a: s.add(entry(id=a, amount=s.scalar(query))), entry)
    execute(desk, "CREATE VIEW large AS SELECT id FROM entry WHERE id > 1")
    execute(desk, "CREATE VIEW larger AS SELECT id FROM large WHERE id > 2")
    desk.open(1, 2, 3, 4, 5)
    assert desk.run_once() == []
    before = rows(desk, entry)
    with pytest.raises(ProjectionHaltedError, match="'larger'"):
        rebuild(desk)
    assert rows(desk, entry) == before == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]


def test_textual_sql_that_names_a_column(desk: Desk) -> None:
    """A part of a statement in textual SQL may name a column that is called as the table."""
    entry = model(desk, "Entry", entry=number(default=1))
    query = sa.select(entry).where(sa.text("entry > 0")).order_by(sa.text("entry"))
    project(desk, lambda s, a: s.add(entry(id=a + len(s.scalars(query).all()))), entry)
    desk.open(1)
    assert desk.run_once() == []
    rebuild(desk)
    assert len(rows(desk, entry)) == 1


@pytest.mark.parametrize("name", ["ä" * 100, "a %s {x} 'q' \"d\" `b` \\ / é"])
def test_names_of_projections(desk: Desk, name: str) -> None:
    """A projection may have any name of up to 100 characters: it runs, and is rebuilt by its name."""
    entry = model(desk, "Entry")
    project(desk, adding(entry), entry, name=name)
    desk.open(1, 2)
    assert desk.run_once() == []
    assert rows(desk, entry) == [(1,), (2,)]
    assert desk.status(name).lag_events == 0
    result = desk.command("rebuild", name)
    assert result.exit_code == 0, result.output
    assert desk.command("projections", "pause", name).exit_code == 0
    assert desk.command("projections", "resume", name).exit_code == 0
    desk.open(3)
    assert desk.run_once() == []
    assert len(rows(desk, entry)) == 3


@on_postgres
@pytest.mark.long
def test_a_process_that_is_frozen_in_the_swap(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is frozen with the tables locked keeps readers out for some seconds only, and swaps again."""
    entry = model(desk, "Entry")
    project(desk, adding(entry), entry)
    desk.open(1, 2)
    assert desk.run_once() == []
    hand_over, calls = swap.hand_over, list[int]()

    def frozen(*arguments: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            time.sleep(8)
        hand_over(*arguments)

    monkeypatch.setattr(swap, "PATIENCE", 1)
    monkeypatch.setattr(swap, "hand_over", frozen)
    execute(desk, "DELETE FROM entry")
    rebuild(desk)
    assert calls == [0, 1]
    assert rows(desk, entry) == [(1,), (2,)]


# ------------------------------------------------------------------------------------- what the rest of a database has

BESIDE = {
    "a default elsewhere": (
        ["CREATE TABLE other (id integer DEFAULT nextval('entry_number_seq'))"],
        "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = 'other'::regclass",
    ),
    "a view of its sequence": (
        ["CREATE VIEW numbers AS SELECT last_value FROM entry_number_seq"],
        "SELECT definition FROM pg_views WHERE viewname = 'numbers'",
    ),
    "an order": (
        ["CLUSTER entry USING entry_pkey"],
        "SELECT indisclustered FROM pg_index WHERE indrelid = 'entry'::regclass",
    ),
    "a limit of statistics": (
        ["ALTER TABLE entry ALTER amount SET STATISTICS 500"],
        "SELECT attstattarget FROM pg_attribute WHERE attrelid = 'entry'::regclass AND attname = 'amount'",
    ),
    "a right that was taken away": (
        ["ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC"],
        "SELECT count(*) FROM pg_class, aclexplode(relacl) AS x WHERE oid = 'entry'::regclass AND x.grantee = 0",
    ),
}


@on_postgres
@pytest.mark.parametrize("what", BESIDE)
def test_what_a_database_has_beside_rows(desk: Desk, what: str) -> None:
    """A sequence that others use, an order of rows, and who may not read a table, are the same after rebuilds."""
    entry = model(desk, "Entry", id=None, number=number(primary_key=True), amount=number())
    project(desk, lambda session, amount: session.add(entry(amount=amount)), entry)
    desk.open(1, 2)
    assert desk.run_once() == []
    statements, query = BESIDE[what]
    execute(desk, *statements)
    before = scalar(desk, query)
    for _ in range(2):
        execute(desk, "UPDATE entry SET amount = 9")
        rebuild(desk)
        assert sorted(row[1] for row in rows(desk, entry)) == [1, 2]
        assert scalar(desk, query) == before


@on_postgres
def test_a_role_that_may_create_no_table(desk: Desk) -> None:
    """A rebuild by a role that may not create tables says which right it lacks, and nothing is changed."""
    desk.balances()
    account_id = desk.open(1, 2)
    assert desk.run_once() == []
    role = f"clerk_{token_hex(4)}"
    execute(
        desk,
        f"CREATE ROLE {role}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {role}",
    )
    engine = desk.engine
    engine.dispose()

    def become(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET ROLE {role}")
        connection.commit()

    sa.event.listen(engine, "connect", become)
    try:
        with desk.context(), pytest.raises(MissingRightError, match="permission denied for schema public: grant what"):
            Rebuild(desk.consumer()).run()
        assert desk.amounts() == {account_id: 3}
    finally:
        sa.event.remove(engine, "connect", become)
        engine.dispose()
        execute(desk, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
