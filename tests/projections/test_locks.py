"""One runner at a time: locks of the server, leases, taking over, and the fence behind them.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.commands.work import warn_of_connections
from flask_eventsourcing.persistence.dialects import locks as locks_of_dialects
from flask_eventsourcing.persistence.dialects.session_locks import KEY
from flask_eventsourcing.projections import ModelProjection, checkpoint, on, reaction, runners
from flask_eventsourcing.projections.applying import Applier
from flask_eventsourcing.projections.checkpoint import FencedError
from flask_eventsourcing.projections.workers import Worker
from tests.domain import PATIENCE, until
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Created, Deposited, Desk
from tests.projections.desk_hosts import make_desk
from tests.servers import ServerFolder, forget_killed_connections, start_postgres

on_servers = pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
locks = pytest.mark.parametrize("lock", ["database", "lease"])


@pytest.fixture
def desks(new_desk: MakeDesk, lock: str, monkeypatch: pytest.MonkeyPatch) -> list[Desk]:
    """Two apps on one database, as in two processes."""
    monkeypatch.setattr(runners, "STANDBY_PAUSE", 0.05)
    monkeypatch.setattr(checkpoint, "BEAT", 0.2)
    made = [new_desk(EVENTSOURCING_PROJECTION_LOCK=lock) for _ in range(2)]
    for desk in made:
        desk.balances()
    return made


def states(*workers: Worker) -> set[str]:
    """What the runners of workers are doing."""
    return {runner.progress.state for worker in workers for runner in worker.runners}


@locks
def test_one_runs_the_other_stands_by_and_takes_over(desks: list[Desk]) -> None:
    """Of two workers one applies the events; when it ends the other goes on, and each event is applied once."""
    one, two = desks
    account_id = one.open(*[1] * 50)
    with two.running() as second:
        with one.running() as first:
            until(lambda: one.position() == 51)
            until(lambda: states(first, second) == {"up to date", "standing by"})
            assert one.status().state == "running"
            assert one.status().runner is not None
            assert one.status().since is not None
            one.deposit(account_id, *[1] * 50)
            until(lambda: one.position() == 101)
        until(lambda: states(second) == {"up to date"})
        one.deposit(account_id, 1)
        until(lambda: one.position() == 102)
    assert one.amounts() == {account_id: 101}
    assert one.status().state == "stopped"


@locks
def test_a_runner_whose_claim_was_lost_applies_nothing(desks: list[Desk]) -> None:
    """A runner that has lost its claim applies no events."""
    one, _ = desks
    one.open(1, 2)
    consumer = one.consumer()
    consumer.checkpoint.ensure()
    with one.context():
        old = consumer.checkpoint.claim(lease=False)
        new = consumer.checkpoint.claim(lease=False)
        assert old is not None
        assert new is not None
        page = consumer.application.read_log(0, 10, None, ())
        applier = Applier(consumer)
        with pytest.raises(FencedError):
            applier.apply(old, page, 3)
        assert one.amounts() == {}
        moved = applier.apply(new, page, 3)
        # Nor does it apply the same events again.
        for stale in (new, moved._replace(token=old.token)):
            with pytest.raises(FencedError):
                applier.apply(stale, page, 3)
        with pytest.raises(FencedError):
            consumer.checkpoint.halt(old, 3, "x")
        with pytest.raises(FencedError):
            consumer.checkpoint.renew(old)
    assert list(one.amounts().values()) == [3]


@locks
def test_a_taken_lock_cannot_be_taken_again(desks: list[Desk]) -> None:
    """A lock that is taken cannot be taken again, is seen from elsewhere, and is free again after its release."""
    one, two = desks
    one.consumer().checkpoint.ensure()
    mine, other = one.consumer().lock(), two.consumer().lock()

    def held() -> bool:
        row = two.row()
        with two.consumer().application.engine.connect() as connection:
            return other.is_held(connection, row.leased_until)

    assert not held()
    assert mine.acquire()
    claimed = one.consumer().checkpoint.claim(lease=mine.leased)
    assert claimed is not None
    assert held()
    assert not (other.acquire() and two.consumer().checkpoint.claim(lease=other.leased))
    one.consumer().checkpoint.release(claimed)
    mine.release()
    assert not held()
    assert other.acquire()
    other.release()


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wrong_clock_does_not_matter_to_a_lease(
    new_desk: MakeDesk, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """A lease that a process with a wrong clock has is seen as valid elsewhere, and such a process takes none early."""
    one, two = (new_desk(EVENTSOURCING_PROJECTION_LOCK="lease") for _ in range(2))
    for desk in (one, two):
        desk.balances()
    mine, other = (desk.consumer().checkpoint for desk in (one, two))
    mine.ensure()
    now = locks_of_dialects.utc_now
    with monkeypatch.context() as wrong:
        for module in (checkpoint, locks_of_dialects):
            wrong.setattr(module, "utc_now", lambda: now() + timedelta(hours=hours))
        claimed = mine.claim(lease=True)
        assert claimed is not None
        mine.renew(claimed)
    assert two.status().state == "running"
    assert other.claim(lease=True) is None
    mine.release(claimed)
    held = other.claim(lease=True)
    assert held is not None
    with monkeypatch.context() as wrong:
        for module in (checkpoint, locks_of_dialects):
            wrong.setattr(module, "utc_now", lambda: now() + timedelta(hours=hours))
        assert mine.claim(lease=True) is None
        assert one.status().state == "running"
    other.release(held)


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_machine_that_is_gone_loses_its_locks(desk: Desk) -> None:
    """PostgreSQL is told to look every few seconds whether the machine of a worker is still there."""
    desk.balances()
    told: list[str] = []
    lock, other = desk.consumer().lock(), desk.consumer().of_kind("rebuild").lock()

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        told.append(statement)

    sa.event.listen(desk.engine, "before_cursor_execute", note)
    assert lock.acquire()
    assert other.acquire()
    sa.event.remove(desk.engine, "before_cursor_execute", note)
    lock.release()
    other.release()
    assert ["keepalives_idle', '2'" in each for each in told] == [True, False, False]


def end_locks(desk: Desk, consumer_name: str = "Balances") -> int:
    """End the connections that hold locks, from the server; return how many."""
    engine = desk.engine
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            return len(connection.execute(sa.text(query)).all())
        name: Any = desk.consumer(consumer_name).lock()
        holder = connection.scalar(sa.text("SELECT IS_USED_LOCK(:name)"), name.parameters())
        if holder is not None:
            connection.exec_driver_sql(f"KILL {int(holder)}")
        return int(holder is not None)


@on_servers
@pytest.mark.parametrize("lock", ["database"])
def test_a_lost_lock_is_noticed_although_nothing_happens(
    desks: list[Desk], lock: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When the connection with the lock ends, the runner takes it again or leaves it to another; no event is lost."""
    one, two = desks
    caplog.set_level(logging.CRITICAL, logger="flask_eventsourcing")
    account_id = one.open(1)
    with one.running():
        until(lambda: one.position() == 2)
        before = one.row().token
        assert end_locks(one) == 1
        until(lambda: one.row().token not in (None, before) and one.status().state == "running")
        with two.running():
            assert end_locks(one) == 1
            one.deposit(account_id, *[1] * 20)
            until(lambda: one.position() == 22)
    assert one.amounts() == {account_id: 21}
    forget_killed_connections()


@pytest.mark.parametrize("lock", ["lease"])
def test_a_lease_that_is_not_renewed_ends(desks: list[Desk], lock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a runner has vanished, another takes over when its lease has ended."""
    monkeypatch.setattr(checkpoint, "LEASE", 1.0)
    one, two = desks
    account_id = one.open(1)
    one.consumer().checkpoint.ensure()
    vanished = one.consumer().checkpoint.claim(lease=True)
    assert vanished is not None
    assert one.status().state == "running"
    with two.running():
        until(lambda: two.position() == 2)
    assert two.amounts() == {account_id: 1}


@locks
def test_once_while_another_runs(desks: list[Desk], lock: str) -> None:
    """A run with ``--once`` beside a running worker ends when the worker has reached the head."""
    one, two = desks
    account_id = one.open(*[1] * 20)
    with one.running():
        assert not two.run_once()
        assert two.position() == 21
    assert two.amounts() == {account_id: 20}


@locks
def test_status_before_the_first_run(desks: list[Desk], lock: str) -> None:
    """Before the first run a projection is stopped, at the beginning, and as old as its first event."""
    one, _ = desks
    assert (one.status().lag_events, one.status().lag_seconds) == (0, 0.0)
    one.open(1, 2)
    status = one.status()
    assert (status.state, status.position, status.head, status.lag_events) == ("stopped", 0, 3, 3)
    assert status.lag_seconds is not None
    assert status.lag_seconds > 0
    assert (status.runner, status.since, status.error, status.healthy) == (None, None, None, False)
    values = status.to_dict()
    assert values["name"] == "Balances"
    assert values["since"] is None
    with one.running():
        until(lambda: one.status().state == "running" and not one.status().lag_events)
        running = one.status()
        assert running.healthy
        assert running.to_dict()["since"] == (running.since and running.since.isoformat())


def test_the_lock_is_the_databases_own(new_desk: MakeDesk) -> None:
    """PostgreSQL and MariaDB use server locks unless a lease is configured; SQLite uses a lease."""

    def found(desk: Desk) -> str:
        return type(desk.consumer().lock()).__name__

    plain, leased = new_desk(), new_desk(EVENTSOURCING_PROJECTION_LOCK="lease")
    for desk in (plain, leased):
        desk.balances()
    expected = {"postgresql": "AdvisoryLock", "mysql": "NamedLock", "sqlite": "Lease"}
    assert found(plain) == expected[plain.consumer().application.engine.dialect.name]
    assert found(leased) == "Lease"


def add_reactions(desk: Desk, number: int) -> list[str]:
    """Register projections that have reactions only, and return the names of their consumers."""

    for n in range(number):

        def told(self: Any, event: Any, key: str) -> None:
            """Do nothing."""

        desk.register(type(f"Told{n}", (ModelProjection,), {"told": reaction(Deposited)(told)}))
    return [f"Told{n}:reactions" for n in range(number)]


def lock_holders(desk: Desk, names: list[str]) -> set[int]:
    """Ask the server which connections hold the locks of consumers; 0 for none."""
    engine = desk.consumer().application.engine
    found = set()
    with engine.connect() as connection:
        for name in names:
            lock: Any = desk.consumer(name).lock()
            query = "SELECT IS_USED_LOCK(:name)"
            if engine.dialect.name == "postgresql":
                query = (
                    "SELECT max(pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted "
                    "AND classid::bigint = hashtext(:namespace)::bigint & 4294967295 "
                    f"AND objid::bigint = {KEY}::bigint & 4294967295"
                )
            found.add(int(connection.scalar(sa.text(query), lock.parameters()) or 0))
    return found


@on_servers
def test_a_worker_has_one_connection_for_all_claims(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """However many projections a worker runs, one connection has their locks; when it is lost, all go on."""
    caplog.set_level(logging.CRITICAL, logger="flask_eventsourcing")
    desk.balances()
    names = ["Balances", *add_reactions(desk, 5)]
    account_id = desk.open(1)
    with desk.running():
        until(lambda: {desk.position(name) for name in names} == {2})
        before = lock_holders(desk, names)
        assert len(before) == 1
        assert before != {0}
        assert end_locks(desk)
        until(lambda: len(lock_holders(desk, names)) == 1 and not lock_holders(desk, names) & {0, *before})
        desk.deposit(account_id, 2)
        until(lambda: {desk.position(name) for name in names} == {3})
    # A server process takes a moment to end.
    until(lambda: lock_holders(desk, names) == {0})
    assert desk.amounts() == {account_id: 3}
    forget_killed_connections()


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_worker_listens_on_one_connection(desk: Desk) -> None:
    """However many projections a worker runs, it listens for news once, for all of them, and no more at its end."""
    desk.balances()
    names = ["Balances", *add_reactions(desk, 5)]
    account_id = desk.open(1)

    def listening() -> int:
        with desk.consumer().application.engine.connect() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            return int(connection.scalar(sa.text(query)) or 0)

    with desk.running():
        until(lambda: {desk.position(name) for name in names} == {2})
        until(lambda: listening() == 1)
        desk.deposit(account_id, 2)
        until(lambda: {desk.position(name) for name in names} == {3})
        assert listening() == 1
    until(lambda: listening() == 0)


def test_two_locks_of_one_process_exclude_each_other(desk: Desk) -> None:
    """Although they share a connection, of two runners in a process that want one projection only one gets it."""
    desk.balances()
    desk.open(1)
    consumer = desk.consumer()
    consumer.checkpoint.ensure()
    one, two = consumer.lock(), consumer.lock()
    assert one.acquire()
    claimed = consumer.checkpoint.claim(lease=one.leased)
    assert claimed is not None
    assert not (two.acquire() and consumer.checkpoint.claim(lease=two.leased))
    two.release()
    one.check()
    assert one.acquire()
    consumer.checkpoint.release(claimed)
    one.release()
    assert two.acquire()
    two.release()


def many_projections(desk: Desk, count: int) -> list[str]:
    """Register projections with a table and a reaction each, and return the names of all consumers."""
    names = []
    for number in range(count):
        table = f"amounts_{number}"
        columns = {
            "__tablename__": table,
            "account_id": orm.mapped_column(sa.Uuid(), primary_key=True),
            "amount": orm.mapped_column(sa.Integer, nullable=False),
        }
        base: Any = desk.Model
        desk.projection(_adding(f"Amounts{number}", type(base)(f"Amount{number}", (base,), columns), desk))
        names += [f"Amounts{number}", f"Amounts{number}:reactions"]
    with desk.context():
        desk.create_all()
    return names


def _adding(name: str, model: Any, desk: Desk) -> type[ModelProjection]:
    class Amounts(ModelProjection):
        models = (model,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(model(account_id=event.originator_id, amount=0))

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            session.get_one(model, event.originator_id).amount += event.amount

        @reaction(Deposited)
        def told(self, event: Any, key: str) -> None:
            desk.calls.append((event.originator_id, event.originator_version, key))

    return type(name, (Amounts,), {})


@pytest.mark.long
def test_eighty_projections_on_a_small_server(server_folder: ServerFolder, caplog: pytest.LogCaptureFixture) -> None:
    """A server with 30 connections is enough for a worker with 80 projections and their reactions, and for the web."""
    with server_folder.private(
        "postgres-30", lambda folder: start_postgres(folder, "max_connections = 30\n")
    ) as server:
        desk = make_desk(server.url)
        names = many_projections(desk, 80)
        account_id = desk.open(1, 2)
        with desk.running():
            desk.deposit(account_id, 3, 4)
            until(lambda: all(desk.position(name) == 5 for name in names), "one of them", 6 * PATIENCE)
        assert len(desk.calls) == 80 * 4
        assert not [record for record in caplog.records if "too many clients" in record.getMessage()]
        with caplog.at_level(logging.WARNING):
            warn_of_connections([desk.consumer(name) for name in names[:10]])
            assert "connections" not in caplog.text
            engines = {"SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": 40}}
            greedy = make_desk(server.url, **engines)
            many_projections(greedy, 30)
            warn_of_connections([greedy.consumer(f"Amounts{number}") for number in range(30)])
            assert "The worker may need 52 connections, 50 of them of its pool" in caplog.text
        greedy.close()
        desk.close()


def test_check_finds_a_pooler(postgres_url: str, pgbouncer_url: str) -> None:
    """Where a proxy shares connections among clients, check says that locks need to be leases."""
    for url, lock, faults in (
        (postgres_url, "database", 0),
        (pgbouncer_url, "database", 1),
        (pgbouncer_url, "lease", 0),
    ):
        options = {"connect_args": {"prepare_threshold": None}}
        desk = make_desk(url, EVENTSOURCING_PROJECTION_LOCK=lock, SQLALCHEMY_ENGINE_OPTIONS=options)
        desk.balances()
        result = desk.command("check")
        assert result.exit_code == faults, result.output
        assert ("EVENTSOURCING_PROJECTION_LOCK to 'lease'" in result.output) == bool(faults)
        desk.close()
