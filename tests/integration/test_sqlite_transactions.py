"""Transactions on SQLite belong to a connection, whichever threads use it, also where all share the driver's one."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import orm
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import StaticPool

from flask_eventsourcing import WriteTimeoutError
from flask_eventsourcing.persistence import DialectOptions
from flask_eventsourcing.persistence.dialects.sqlite import SQLiteDialect
from tests.domain import in_thread, in_threads
from tests.integration.sqlite_steps import KINDS, Model, Stage, Step, insert, numbers, sqlite_database, stored
from tests.length import examples

THREADS, CONNECTIONS = 3, 3
STEPS = st.lists(
    st.builds(
        Step,
        # Mostly what makes transactions; the others are seldom of interest.
        kind=st.sampled_from((*KINDS, "insert", "insert", "read", "commit")),
        connection=st.integers(0, CONNECTIONS - 1),
        thread=st.integers(0, THREADS - 1),
        own=st.booleans(),
    ),
    min_size=3,
    max_size=20,
)
SETTINGS = settings(max_examples=examples(60), deadline=None, database=None)
DATABASES = pytest.mark.parametrize("kind", ["file", "memory"])


def take_steps(steps: list[Step], path: Path | None) -> None:
    """Take steps one after the other, and compare each answer, and what is stored in the end, with the model."""
    model = Model(in_memory=path is None)
    with sqlite_database(path, timeout=0.02) as dialect:
        stage = Stage(dialect, CONNECTIONS, THREADS)
        try:
            for number, step in enumerate(steps):
                expected = model.expected(step, number)
                assert stage.take(step, number) == expected, (number, step, model)
        finally:
            stage.close()
        assert stored(dialect.engine) == model.committed


@SETTINGS
@given(STEPS)
def test_steps_in_memory(steps: list[Step]) -> None:
    """In memory, what was committed is stored, nothing else is, and no thread ends another's transaction."""
    take_steps(steps, None)


@SETTINGS
@given(STEPS)
def test_steps_on_a_file(steps: list[Step]) -> None:
    """The same holds on a file, where reads do not wait."""
    with TemporaryDirectory() as folder:
        take_steps(steps, Path(folder) / "numbers.db")


@DATABASES
def test_transactions_that_change_threads_wait_for_each_other(kind: str, tmp_path: Path) -> None:
    """Transactions that write in one thread and end in another queue, and each is stored whole or not at all."""
    path = tmp_path / "numbers.db" if kind == "file" else None
    wanted: list[int] = []

    def client(engine: Engine, client: int) -> None:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            for count in range(15):
                number = (client * 100 + count) * 2
                with engine.connect() as connection:
                    one.submit(insert, connection, number).result(30)
                    assert number in other.submit(numbers, connection).result(30)
                    other.submit(insert, connection, number + 1).result(30)
                    if random.random() < 0.3:
                        one.submit(connection.rollback).result(30)
                    else:
                        one.submit(connection.commit).result(30)
                        wanted.extend((number, number + 1))

    with sqlite_database(path, timeout=30) as dialect:
        in_threads([lambda number=number: client(dialect.engine, number) for number in range(6)])  # type: ignore[misc]
        found = stored(dialect.engine)
    assert sorted(found) == sorted(wanted)
    # Those of one transaction stand together.
    assert [second - first for first, second in zip(found[::2], found[1::2], strict=True)] == [1] * (len(found) // 2)


@pytest.fixture
def memory() -> Iterator[Engine]:
    """A database in memory."""
    with sqlite_database(None, timeout=0.05) as dialect:
        yield dialect.engine


@pytest.mark.filterwarnings("ignore:Double checkin attempted")  # SQLAlchemy's StaticPool, at such a pace
def test_errors_of_threads_are_their_own() -> None:
    """An error in one thread causes no other error, in no thread, and none is swallowed."""

    def fails(connection: Connection) -> None:
        with pytest.raises(sa.exc.OperationalError, match="no such table: missing"):
            connection.exec_driver_sql("SELECT 1 FROM missing")

    def violates(connection: Connection) -> None:
        with pytest.raises(sa.exc.IntegrityError, match=r"UNIQUE constraint failed: number\.id"):
            connection.exec_driver_sql("INSERT INTO number (id, value) VALUES (1, 1)")
        connection.rollback()

    def reads(connection: Connection) -> None:
        assert numbers(connection) == [1] * 50

    def client(engine: Engine, act: Callable[[Connection], None]) -> None:
        for _ in range(60):
            with engine.connect() as connection:
                act(connection)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with sqlite_database(None, timeout=30) as dialect:
            engine = dialect.engine
            with engine.begin() as connection:
                for _ in range(50):
                    insert(connection, 1)
            in_threads([partial(client, engine, act) for act in (fails, violates, reads) * 2])
    finally:
        sys.setswitchinterval(before)


def test_reading_through_a_second_connection(memory: Engine) -> None:
    """In the thread of an open transaction, a second connection sees it, and its end does not end it."""
    with orm.Session(memory) as session:
        session.execute(sa.text("INSERT INTO number (value) VALUES (1)"))
        for end in ("close", "rollback", "commit"):
            with memory.connect() as second:
                assert numbers(second) == [1]
                getattr(second, end)()
        in_thread(lambda: memory.connect().close())
        session.rollback()
    assert stored(memory) == []


@pytest.mark.parametrize("statement", ["INSERT INTO number (value) VALUES (2)", "CREATE TABLE a (b)", "COMMIT"])
def test_writing_through_a_second_connection(memory: Engine, statement: str) -> None:
    """It is refused at once where it would join the first one's transaction, and the first can go on and commit."""
    with memory.connect() as first, memory.connect() as second:
        insert(first, 1)
        with pytest.raises(WriteTimeoutError, match="in another session: commit or roll it back before"):
            second.exec_driver_sql(statement)
        second.commit()
        insert(first, 3)
        first.rollback()
    assert stored(memory) == []


def test_rollback_in_another_thread(memory: Engine) -> None:
    """A transaction that is rolled back in another thread is not committed by a later one."""
    with orm.Session(memory) as session:
        session.execute(sa.text("INSERT INTO number (value) VALUES (1)"))
        in_thread(session.rollback)
    with memory.begin() as connection:
        insert(connection, 2)
    assert stored(memory) == [2]


@DATABASES
@pytest.mark.parametrize("thread", ["same", "other"])
def test_savepoints_of_one_connection(kind: str, thread: str, tmp_path: Path) -> None:
    """A rollback to a savepoint, also in another thread, undoes what was written since, and no more."""
    path = tmp_path / "numbers.db" if kind == "file" else None
    with sqlite_database(path, timeout=1) as dialect, dialect.engine.connect() as connection:
        insert(connection, 1)
        savepoint = connection.begin_nested()
        insert(connection, 2)
        if thread == "same":
            savepoint.rollback()
        else:
            in_thread(savepoint.rollback)
        connection.commit()
        assert stored(dialect.engine) == [1]


def test_autocommit_of_one_connection(memory: Engine) -> None:
    """AUTOCOMMIT is one connection's own: it neither commits what another has written nor makes it commit at once."""
    eager = memory.connect().execution_options(isolation_level="AUTOCOMMIT")
    with memory.connect() as plain:
        insert(plain, 1)
        plain.rollback()
        insert(eager, 2)
        eager.rollback()
        insert(plain, 3)
        with memory.execution_options(isolation_level="AUTOCOMMIT").connect() as second:
            assert numbers(second) == [2, 3]
        raw = memory.raw_connection()
        raw.cursor().execute("INSERT INTO number (value) VALUES (5)")
        raw.rollback()
        raw.close()
        eager.close()
        plain.rollback()
        insert(plain, 4)
        plain.commit()
    assert stored(memory) == [2, 4]


def test_autocommit_of_the_engine() -> None:
    """An engine in AUTOCOMMIT commits each statement, but for a connection that asks for transactions."""
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, isolation_level="AUTOCOMMIT")
    SQLiteDialect(engine, DialectOptions(lock_timeout=0.05)).prepare_engine()
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE number (id INTEGER PRIMARY KEY, value INTEGER)")
        insert(connection, 1)
    with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
        insert(connection, 2)
        connection.rollback()
        insert(connection, 3)
        connection.commit()
    assert stored(engine) == [1, 3]
    engine.dispose()


def test_raw_connection(memory: Engine) -> None:
    """The driver's own connection commits and rolls back what it writes while no transaction is open."""
    for number, end in enumerate(("commit", "rollback", "close", "commit")):
        raw = memory.raw_connection()
        raw.cursor().execute("INSERT INTO number (value) VALUES (?)", (number,))
        getattr(raw, end)()
        raw.close()
    assert stored(memory) == [0, 3]
    with memory.connect() as connection:
        # The same with the driver's cursor of a connection, which both joins and begins its transaction.
        for number, end in ((4, "commit"), (5, "rollback")):
            connection.connection.cursor().execute("INSERT INTO number (value) VALUES (?)", (number,))
            insert(connection, number + 10)
            getattr(connection, end)()
            connection.begin()
            connection.connection.cursor().execute("INSERT INTO number (value) VALUES (?)", (number + 20,))
            getattr(connection, end)()
    assert stored(memory) == [0, 3, 4, 14, 24]


def test_raw_connection_does_not_end_a_transaction(memory: Engine) -> None:
    """The driver's own connection gets an error when it commits another's transaction, and does not roll it back."""
    with memory.connect() as connection:
        insert(connection, 1)
        raw = memory.raw_connection()
        raw.rollback()
        with pytest.raises(WriteTimeoutError, match="in another session"):
            raw.commit()
        with pytest.raises(WriteTimeoutError, match="another thread"):
            in_thread(raw.commit)
        raw.close()
        connection.commit()
    assert stored(memory) == [1]


@pytest.mark.parametrize("own", [True, False])
def test_invalidated_connection(memory: Engine, own: bool) -> None:
    """Invalidating a connection closes the database in memory, for all; no thread waits for its transaction then."""
    first, second = memory.connect(), memory.connect()
    insert(first, 1)
    (first if own else second).invalidate()
    with memory.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE number (id INTEGER PRIMARY KEY, value INTEGER)")
        insert(connection, 2)
    if not own:
        with pytest.raises(sa.exc.ProgrammingError, match="closed"):
            first.commit()
        first.invalidate()
    first.close()
    second.close()


def test_listener_that_refuses_a_commit(memory: Engine) -> None:
    """A commit that another listener refuses commits nothing, also after another connection's rollback."""

    def refuse(connection: Connection) -> None:
        raise ValueError("refused")

    sa.event.listen(memory, "commit", refuse)
    with memory.connect() as connection:
        insert(connection, 1)
        with pytest.raises(ValueError, match="refused"):
            connection.commit()
        memory.connect().close()
        # SQLAlchemy calls the driver no more, and leaves it to the pool.
        connection.rollback()
    sa.event.remove(memory, "commit", refuse)
    with memory.begin() as other:
        insert(other, 2)
    assert stored(memory) == [2]
    assert connection.closed


@DATABASES
def test_engine_with_options(kind: str, tmp_path: Path) -> None:
    """An engine and those made of it by ``execution_options()`` are prepared once, whichever is first."""
    url = f"sqlite:///{tmp_path / 'numbers.db'}" if kind == "file" else "sqlite://"
    engine = sa.create_engine(url, poolclass=StaticPool)
    derived = engine.execution_options(a=1).execution_options(b=2)
    for each in (derived, engine, derived):
        SQLiteDialect(each, DialectOptions()).prepare_engine()
    for each in (engine, derived):
        assert len(list(each.dispatch.before_cursor_execute)) == 1
        assert len(list(each.dispatch.after_cursor_execute)) == (0 if kind == "file" else 1)
    engine.dispose()


def test_content_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in an in-memory database when it is prepared stays there, and transactions belong to connections."""
    engine = sa.create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE number (id INTEGER PRIMARY KEY, value INTEGER)")
        insert(connection, 1)
        before = connection.connection.driver_connection
    SQLiteDialect(engine, DialectOptions(lock_timeout=0.05)).prepare_engine()
    assert stored(engine) == [1]
    with engine.connect() as first, engine.connect() as second:
        assert first.connection.driver_connection is not before
        insert(first, 2)
        assert numbers(second) == [1, 2]
        second.rollback()
        first.commit()
    assert stored(engine) == [1, 2]
    with pytest.raises(Exception, match="closed"):
        before.cursor()  # type: ignore[union-attr]
    engine.dispose()
