"""What counts as a try of an event: what its handler has done, and not what has happened to the database."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.projections import ModelProjection, on, pages
from tests.integration.marks import on_postgresql
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Created, Desk, until


def failing(desk: Desk, way: Any, **attributes: Any) -> list[int]:
    """Register a projection whose handler fails in a way, and return where it counts its calls."""
    calls: list[int] = []

    class Failing(ModelProjection):
        models = (desk.Seen,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            calls.append(1)
            way(session)

    desk.register(type("Failing", (Failing,), attributes))
    return calls


def lose_connection(session: orm.Session) -> None:
    """Close the driver's connection, as a server does when a handler takes too long."""
    connection = session.connection()
    connection.invalidate()
    session.execute(sa.select(1))


def wait_for_pool(session: orm.Session) -> None:
    """Ask for what another connection of a pool of one has."""
    with session.get_bind().engine.connect():
        pass


def test_a_handler_that_loses_its_connection_halts(desk: Desk) -> None:
    """A handler that ends its connection at each try is not taken for an outage: the projection halts and says why."""
    calls = failing(desk, lose_connection, retries=1)
    desk.open()
    (error,) = desk.run_once()
    assert len(calls) == 2
    assert "Failing is halted before position 1" in str(error)
    status = desk.status("Failing")
    assert status.state == "halted"
    assert status.error


def test_a_handler_that_needs_a_second_connection_halts(new_desk: MakeDesk, uri: str) -> None:
    """With a pool of one connection, a handler that asks for another one halts its projection with the reason."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    desk = new_desk(SQLALCHEMY_ENGINE_OPTIONS=options)
    calls = failing(desk, wait_for_pool, retries=1)
    desk.open()
    (error,) = desk.run_once()
    assert len(calls) == 2
    assert "QueuePool limit" in str(error)


def test_a_batch_that_takes_too_long_ends_early(desk: Desk) -> None:
    """Events that are slow after fast ones are committed after a moment, and none is left out or applied twice."""
    slow = [False]

    class Slow(ModelProjection):
        models = (desk.Seen,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            if slow[0]:
                time.sleep(0.05)
            session.add(desk.Seen(account_id=str(event.originator_id), version=1, text=""))

    desk.register(Slow)
    for _ in range(40):
        desk.open()
    assert not desk.run_once()
    slow[0] = True
    for _ in range(40):
        desk.open()
    with desk.running("Slow") as worker:
        until(lambda: desk.position("Slow") > 40)
        worker.stop()
        until(lambda: desk.row("Slow").token is None)
    assert 40 < desk.position("Slow") < 80
    slow[0] = False
    assert not desk.run_once()
    with desk.app.app_context():
        seen = desk.db.session.scalars(sa.select(desk.Seen.account_id)).all()
    assert len(seen) == len(set(seen)) == 80
    assert desk.row("Slow").applied == 80


@on_postgresql
def test_a_server_that_takes_no_changes_is_waited_for(desk: Desk) -> None:
    """After a failover to a server that is read-only for a while, the worker is there when it takes changes again."""
    desk.balances()
    desk.open(1)
    engine = desk.consumer().application.engine
    name = engine.url.database
    admin = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def switch(value: str) -> None:
        with admin.connect() as connection:
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {value}')
            others = "pid <> pg_backend_pid() AND datname = current_database()"
            connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")

    switch("on")
    try:
        with desk.running() as worker:
            (runner,) = worker.runners
            until(lambda: runner.progress.state == "unreachable")
            switch("off")
            until(lambda: desk.position() == 2)
    finally:
        switch("off")


def test_a_page_has_a_limit_of_bytes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large events are read few at a time, so that a batch of them does not fill the memory, and all are applied."""
    monkeypatch.setattr(pages, "MOST_BYTES", 2000)
    sizes: list[int] = []
    read = pages.LogPages.read

    def noting(self: pages.LogPages, after: int, limit: int, stop: int) -> pages.Page:
        page = read(self, after, limit, stop)
        sizes.append(len(page.events))
        return page

    monkeypatch.setattr(pages.LogPages, "read", noting)
    desk.balances()
    account_id = desk.open(*[1] * 150)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 150}
    assert max(sizes) < pages.FEW
