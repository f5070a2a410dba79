"""Poison that looks like an outage, outages that look like poison, and batches that end in time.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.exceptions import RebuildError
from flask_eventsourcing.persistence import recorders
from flask_eventsourcing.projections import ModelProjection, on
from flask_eventsourcing.projections.applying.pages import LogPages
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.runners import Runner
from flask_eventsourcing.projections.upkeep.repair import retry
from tests.domain import until
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Deposited, Desk
from tests.servers import forget_killed_connections

KILLS = {
    "postgresql": "SELECT pg_terminate_backend(pg_backend_pid())",
    "mysql": "KILL CONNECTION_ID()",
    "mariadb": "KILL CONNECTION_ID()",
}
POOL_OF_ONE = {"poolclass": sa.pool.QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2}


def lose_connection(desk: Desk, session: orm.Session) -> None:
    """End the connection of a session, where the database is a server; elsewhere, wait for a lock of its own."""
    statement = KILLS.get(desk.engine.dialect.name)
    if statement is None:
        write_on_another_connection(desk, session)
        return
    session.execute(sa.text(statement))
    session.execute(sa.text("SELECT 1"))


def write_on_another_connection(desk: Desk, session: orm.Session) -> None:
    """Change a row that the session has changed, which it keeps locked."""
    session.execute(sa.update(desk.Balance).values(amount=desk.Balance.amount + 1))
    with desk.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL lock_timeout = '100ms'")
        elif connection.dialect.name != "sqlite":
            connection.exec_driver_sql("SET innodb_lock_wait_timeout = 1")
        connection.execute(sa.update(desk.Balance).values(amount=1))


def take_second_connection(desk: Desk, session: orm.Session) -> None:
    """Ask for a connection of the pool beside that of the session."""
    with desk.engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))


def follow(desk: Desk, does: Any, tries: list[int], **attributes: Any) -> None:
    """Register a projection that counts deposits, and does something with that of 13."""

    class Following(ModelProjection):
        models = (desk.Balance,)
        retries = 1

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            row = session.get(desk.Balance, event.originator_id)
            if row is None:
                row = desk.Balance(account_id=event.originator_id, amount=0)
                session.add(row)
                session.flush()
            row.amount += event.amount
            if event.amount == 13:
                tries.append(event.originator_version)
                does(desk, session)

    desk.register(type("Following", (Following,), attributes))


@pytest.mark.parametrize("does", [lose_connection, write_on_another_connection, take_second_connection])
def test_a_handler_that_loses_its_connection_halts_its_projection(new_desk: MakeDesk, does: Any) -> None:
    """If the database answers, a lost connection or a timeout of a lock or the pool counts as a failed try."""
    options = POOL_OF_ONE if does is take_second_connection else {}
    desk = new_desk(SQLALCHEMY_ENGINE_OPTIONS=options, EVENTSOURCING_LOCK_TIMEOUT=1)
    tries: list[int] = []
    follow(desk, does, tries)
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    desk.deposit(account_id, 13, 4)
    (error,) = desk.run_once()
    assert "is halted before position 4" in str(error)
    status = desk.status("Following")
    assert (status.state, status.failed_position) == ("halted", 4)
    assert status.error
    assert tries[-2:] == [4, 4]
    assert desk.amounts() == {account_id: 3}
    forget_killed_connections()


def test_what_an_operator_does_with_such_an_event(new_desk: MakeDesk) -> None:
    """A dead letter whose handler loses its connection has failed again, and a dry run names the event."""
    desk = new_desk(EVENTSOURCING_LOCK_TIMEOUT=1)
    tries: list[int] = []
    follow(desk, lose_connection, tries, on_failure="dead-letter")
    account_id = desk.open(1, 13, 4)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 1}
    consumer = desk.consumer("Following")
    repair = retry(consumer)
    assert [letter.position for letter in repair.failed] == [3]
    assert repair.failed[0].attempts == 3
    with pytest.raises(RebuildError, match="would halt before position 3"):
        Rebuild(consumer).estimate()
    forget_killed_connections()


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_a_connection_that_was_lost_once_is_no_fault_of_a_handler(desk: Desk) -> None:
    """An event whose handler ran during an outage is applied after it, and leaves no failed try."""
    tries: list[int] = []

    def lose_once(desk: Desk, session: orm.Session) -> None:
        # The first is that of the whole batch.
        if len(tries) < 3:
            lose_connection(desk, session)

    follow(desk, lose_once, tries)
    account_id = desk.open(1, 13, 4)
    assert not desk.run_once()
    assert desk.status("Following").error is None
    assert desk.amounts() == {account_id: 18}
    forget_killed_connections()


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_server_that_only_reads_is_waited_for(desk: Desk) -> None:
    """After a failover to a server that is not writable yet, a worker goes on as soon as it is."""
    desk.balances()
    account_id = desk.open(1)
    with desk.context():
        name = desk.engine.url.database
        admin = sa.create_engine(desk.engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def fail_over(setting: str) -> None:
        with admin.connect() as connection:
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {setting}')
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )

    with desk.running() as worker:
        until(lambda: desk.position() == 2)
        fail_over("on")
        until(lambda: worker.runners[0].progress.state == "unreachable")
        with admin.connect() as connection:
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
        until(lambda: worker.runners[0].progress.state == "up to date")
    assert desk.amounts() == {account_id: 1}
    forget_killed_connections()


FULL = {
    "postgresql": "DO $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left' USING ERRCODE = '53100'; END $$",
    "mysql": "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1021, MESSAGE_TEXT = 'Disk full'",
}


@pytest.mark.parametrize("on_failure", ["halt", "dead-letter"])
def test_a_full_disk_is_waited_for(desk: Desk, on_failure: Any) -> None:
    """No event is set aside because the disk is full, nor halts its projection: a worker goes on once it is not."""
    full = threading.Event()

    class Growing(ModelProjection):
        models = (desk.Seen,)
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            fill_disk(session, full=full.is_set())
            id_ = str(event.originator_id)
            session.add_all(desk.Seen(account_id=id_, version=each, text="x" * 50) for each in range(200))

    desk.register(type("Growing", (Growing,), {"on_failure": on_failure}))
    full.set()
    desk.open(1, 2)
    with desk.running() as worker:
        until(lambda: worker.runners[0].progress.state == "unreachable")
        full.clear()
        until(lambda: desk.position("Growing") == 3)
    status = desk.status("Growing")
    assert (status.dead_letters, status.error) == (0, None)
    with desk.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(desk.Seen)) == 400


def fill_disk(session: orm.Session, *, full: bool) -> None:
    """Have the database of a session say that the disk is full, or have room again."""
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages if full else 10**6}")
    elif full:
        session.execute(sa.text(FULL["postgresql" if connection.dialect.name == "postgresql" else "mysql"]))


def test_a_pool_of_one_connection_is_enough_for_a_rebuild(new_desk: MakeDesk) -> None:
    """A rebuild, a continued rebuild and a dry run need only one connection of the pool."""
    desk = new_desk(SQLALCHEMY_ENGINE_OPTIONS=POOL_OF_ONE)
    desk.balances()
    account_id = desk.open(1, 2, 3)
    assert not desk.run_once()
    for _ in range(2):
        assert Rebuild(desk.consumer()).estimate().events == 4
        rebuilt = Rebuild(desk.consumer()).run()
        assert rebuilt is not None
        assert rebuilt.position == 4
    assert desk.amounts() == {account_id: 6}


def test_a_batch_ends_when_its_time_is_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of slow events is committed in parts, so its locks are held for a short time."""
    desk.balances()
    account_id = desk.open(*range(1, 41))
    consumer = desk.consumer()
    runner = Runner(consumer, threading.Event())
    runner.pace.limit, runner.pace.seconds = 16, 0.0
    moved: list[int] = []
    original = type(consumer.application.datastore.dialect).update_and_notify

    def note(self: Any, connection: Any, table: Any, change: Any, message: str, values: dict[str, Any]) -> int:
        moved.append(values["of_position"])
        return original(self, connection, table, change, message, values)

    monkeypatch.setattr(type(consumer.application.datastore.dialect), "update_and_notify", note)
    runner.run(once=True)
    # Taken for sixteen, and given back to the first.
    assert moved[:2] == [16, 1]
    row = desk.row()
    assert (row.position, row.applied, row.last_originator_version) == (41, 41, 41)
    assert desk.amounts() == {account_id: sum(range(1, 41))}
    assert runner.progress.events == 41


def test_a_worker_that_is_stopped_ends_its_batch_after_the_event(desk: Desk) -> None:
    """A worker that is told to stop commits what it has applied, and does not go on to the end of the batch."""
    stop = threading.Event()

    def stop_now(desk: Desk, session: orm.Session) -> None:
        stop.set()

    follow(desk, stop_now, [])
    account_id = desk.open(1, 2, 13, 4, 5, 6)
    runner = Runner(desk.consumer("Following"), stop)
    runner.pace.limit = 16
    runner.run()
    assert (desk.position("Following"), desk.amounts()) == (4, {account_id: 16})
    assert not desk.run_once()
    assert (desk.position("Following"), desk.amounts()) == (7, {account_id: 31})


def test_a_page_of_the_log_is_bounded_in_bytes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are read in pages by the size of their states, at least one at a time, and none is left out."""
    desk.balances()
    account_id = desk.open(*range(1, 31))
    with desk.context() as bank:
        sizes = [len(each.state) for each in bank.recorder.select_notifications(None, 100)]
        monkeypatch.setattr(recorders, "PAGE_BYTES", sum(sizes[:5]))
        page = LogPages(desk.consumer(), None).read(0, 100, 31)
        assert ([each.id for each in page.events], page.position, page.full) == ([1, 2, 3, 4, 5], 5, True)
        monkeypatch.setattr(recorders, "PAGE_BYTES", 1)
        assert len(LogPages(desk.consumer(), None).read(7, 100, 31).events) == 1
        assert len(LogPages(desk.consumer(), None).read(7, 4, 31).events) == 1
        with bank.recorder.subscribe(gt=0) as subscription:
            assert [next(subscription).id for _ in range(31)] == list(range(1, 32))
    assert not desk.run_once()
    assert desk.amounts() == {account_id: sum(range(1, 31))}


def test_a_few_large_events_are_bounded_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two events that are too large together are not read together, though no large one was met before."""
    desk.balances()
    desk.open(*range(1, 31))
    with desk.context():
        pages = LogPages(desk.consumer(), None)
        assert len(pages.read(0, 4, 31).events) == 4
        monkeypatch.setattr(recorders, "PAGE_BYTES", 1)
        assert len(pages.read(4, 4, 31).events) == 1
        assert len(pages.read(5, 2, 31).events) == 1
        # The one statement at the end of the log reads the next event, however large, and small ones after it.
        assert pages.look_ahead(29, 1000) == 30
        assert [each.id for each in pages.read(29, 1000, 30).events] == [30]
        with desk.engine.begin() as connection:
            connection.execute(sa.delete(desk.events_table).where(desk.events_table.c.notification_id == 30))
        assert pages.look_ahead(29, 1000) is None
        monkeypatch.setattr(recorders, "PAGE_BYTES", 2**20)
        assert len(pages.read(6, 2, 31).events) == 2


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_a_statement_of_the_worker_that_takes_too_long_is_no_fault_of_an_event(desk: Desk) -> None:
    """Where the server ends statements that wait for a lock, the worker goes on after that, and blames no event."""
    desk.balances(on_failure="dead-letter", retries=0)
    account_id = desk.open(1)
    is_postgresql = desk.engine.dialect.name == "postgresql"
    limit = "SET statement_timeout = 300" if is_postgresql else "SET max_statement_time = 0.3"

    def set_limit(driver: Any, _: Any) -> None:
        with driver.cursor() as cursor:
            cursor.execute(limit)
        driver.commit()

    sa.event.listen(desk.engine, "connect", set_limit)
    desk.engine.dispose()
    table = desk.consumer().checkpoint.table
    other = sa.create_engine(desk.engine.url)
    with desk.running() as worker:
        until(lambda: desk.position() == 2)
        with other.begin() as connection:
            connection.execute(sa.select(table).where(table.c.name == "Balances").with_for_update())
            desk.deposit(account_id, 2)
            until(lambda: worker.runners[0].progress.state == "unreachable")
        until(lambda: desk.position() == 3)
    assert worker.errors == []
    assert desk.amounts() == {account_id: 3}
    assert desk.status().dead_letters == 0
    other.dispose()
