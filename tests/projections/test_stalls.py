"""A transaction that stays open holds readers back: they say so, and who it is.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from tests import servers
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Desk
from tests.projections.desk_hosts import make_desk
from tests.servers import ServerFolder

LIMIT = 0.001


@contextmanager
def left_open(desk: Desk) -> Iterator[orm.Session]:
    """Within it, a transaction that has appended an event stays open, and another event is committed after it."""
    with desk.context(), orm.Session(desk.engine) as session:
        with desk.using(session):
            desk.bank.open_account()
            yield session
        session.rollback()


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_transaction_left_open(new_desk: MakeDesk) -> None:
    """Status and health name the process that holds readers back, and fail beyond the limit until it ends."""
    desk = new_desk(EVENTSOURCING_STALL_LIMIT=LIMIT)
    desk.balances()
    with left_open(desk) as session:
        pid = session.scalars(sa.text("SELECT pg_backend_pid()")).one()
        desk.open()
        desk.run_once()
        status = desk.status()
        assert (status.state, status.healthy, status.lag_events) == ("held back", False, 1)
        assert status.head > status.position
        assert status.writer is not None
        assert f"process {pid}" in status.writer
        assert status.writer_seconds is not None
        assert f"pg_terminate_backend({pid})" in str(status.problem)
        result = desk.command("status", "--check")
        assert result.exit_code == 1
        assert f"process {pid}" in result.output
        result = desk.command("check")
        assert result.exit_code == 1
        assert f"process {pid}" in result.output
    desk.run_once()
    assert (desk.status().state, desk.status().writer, desk.status().lag_events) == ("stopped", None, 0)


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_transaction_below_the_limit(desk: Desk) -> None:
    """Below the limit the one that readers wait for is shown, with its age, and nothing fails because of it."""
    desk.balances()
    with left_open(desk):
        desk.open()
        with desk.running():
            status = desk.status()
            result = desk.command("status")
        assert status.problem is None
        assert status.lag_events == 1
        assert status.writer is not None
        assert f"readers wait for {status.writer}" in result.output


def test_nothing_is_held_back(desk: Desk) -> None:
    """Where no event waits for a writer in progress there is no lag, and no writer is named."""
    desk.balances()
    desk.open(1)
    desk.run_once()
    status = desk.status()
    assert (status.head, status.lag_events, status.writer, status.writer_seconds) == (2, 0, None, None)


def test_an_orphaned_prepared_transaction(server_folder: ServerFolder) -> None:
    """A prepared transaction that nobody ends is named, with how to end it."""
    settings = "max_prepared_transactions = 20\n"
    server = server_folder.shared("postgres-two-phases", lambda folder: servers.start_postgres(folder, settings))
    with servers.postgres_database(server.url) as url:
        desk = make_desk(url, EVENTSOURCING_STALL_LIMIT=LIMIT)
        desk.balances()
        with desk.context():
            engine = desk.engine
            with orm.Session(engine, twophase=True) as session, desk.using(session):
                desk.bank.open_account()
                transaction: Any = session.connection().get_transaction()
                xid = transaction.xid
                session.prepare()
                session.invalidate()
        desk.open()
        desk.run_once()
        status = desk.status()
        assert status.state == "held back"
        assert status.writer == f"prepared transaction '{xid}'"
        assert f"ROLLBACK PREPARED '{xid}'" in str(status.problem)
        with pytest.raises(TimeoutError, match="prepared transaction"), desk.context():
            desk.wait_for("Balances", status.head, timeout=0.01)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"ROLLBACK PREPARED '{xid}'")
        desk.run_once()
        assert desk.status().lag_events == 0
        desk.close()
