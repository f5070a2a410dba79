"""Sessions that commit in two phases: events are followed through both, and no signal is sent in doubt.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing import CommitInsideUnitError, StaleAggregateError, events_discarded, events_recorded
from tests import servers
from tests.bank import Site, make_site
from tests.domain import Account
from tests.servers import ServerFolder

SETTINGS = "max_prepared_transactions = 20\n"


@pytest.fixture(params=["postgresql", "mariadb"])
def two(request: pytest.FixtureRequest, server_folder: ServerFolder) -> Iterator[Site]:
    """A site on a server that prepares transactions."""
    if request.param == "mariadb":
        site = make_site(request.getfixturevalue("mariadb_url"))
        yield site
        site.close()
        return
    server = server_folder.shared("postgres-two-phases", lambda folder: servers.start_postgres(folder, SETTINGS))
    with servers.postgres_database(server.url) as url:
        site = make_site(url)
        yield site
        site.close()


@contextmanager
def lent(site: Site) -> Iterator[orm.Session]:
    """Within it, a session that commits in two phases is the current one."""
    with site.app.app_context(), orm.Session(site.db.engine, twophase=True) as session, site.es.using(session):
        yield session


@contextmanager
def heard() -> Iterator[list[str]]:
    """Note which signals are sent."""
    found: list[str] = []

    def recorded(sender: object, **_: Any) -> None:
        found.append("recorded")

    def discarded(sender: object, **_: Any) -> None:
        found.append("discarded")

    with events_recorded.connected_to(recorded), events_discarded.connected_to(discarded):
        yield found


def decide(site: Site, xid: str, how: str) -> None:
    """Commit or roll back what was prepared, as an operator would."""
    is_xa = site.db.engine.dialect.name == "mysql"
    statement = f"XA {how} '{xid}'" if is_xa else f"{how} PREPARED '{xid}'"
    engine = site.db.engine.execution_options(isolation_level="AUTOCOMMIT")
    deadline = time.monotonic() + 20
    while True:
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)
            return
        except sa.exc.DBAPIError:
            # The server may not have noticed yet that the connection is gone.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_events_and_rows_are_committed_in_two_phases(two: Site) -> None:
    """Such a session stores events and rows, and the signal comes after the second phase."""
    with heard() as found, lent(two) as session:
        two.bank.open_account()
        session.add(two.Note(text="note"))
        session.prepare()
        assert found == []
        session.commit()
        assert found == ["recorded"]
    assert two.stored() == (1, 1)


def test_prepared_transaction_is_rolled_back(two: Site) -> None:
    """A rollback after the first phase takes everything away, and its objects are refused."""
    account = Account("Ada")
    with heard() as found, lent(two) as session:
        two.bank.save(account)
        session.prepare()
        session.rollback()
        with pytest.raises(StaleAggregateError):
            two.bank.save(account)
    assert found == []
    assert two.stored() == (0, 0)


@pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
def test_nothing_is_said_of_what_is_in_doubt(two: Site, how: str) -> None:
    """If the connection is lost between the phases, no signal is sent, and the objects are refused."""
    account = Account("Ada")
    with heard() as found:
        with lent(two) as session:
            two.bank.save(account)
            transaction: Any = session.connection().get_transaction()
            session.prepare()
            session.invalidate()
            with pytest.raises(StaleAggregateError):
                two.bank.save(account)
        assert found == []
    with two.app.app_context():
        decide(two, transaction.xid, how)
    assert two.stored() == (int(how == "COMMIT"), 0)


def test_nobody_else_prepares_inside_a_unit(two: Site) -> None:
    """Only the unit may run the first phase, and it commits in two phases."""
    with lent(two) as session:
        with two.es.transaction():
            two.bank.open_account()

        def unit() -> None:
            with two.es.transaction():
                two.bank.open_account()
                session.prepare()

        with pytest.raises(CommitInsideUnitError):
            unit()
    assert two.stored() == (1, 0)
