"""Engines with a ``creator``, a function of the user's that connects, in processes that fork.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flask_eventsourcing import ConfigurationError
from tests.bank import Site, make_site
from tests.unit.test_lifecycle_fork import fork_in_c, in_child


@pytest.fixture
def file_site(tmp_path: Path) -> Iterator[Site]:
    """A site on a SQLite file that a function opens, and that was used before."""
    path = str(tmp_path / "bank.db")
    made = make_site(
        f"sqlite:///{path}",
        SQLALCHEMY_ENGINE_OPTIONS={"creator": lambda: sqlite3.connect(path, timeout=20, check_same_thread=False)},
    )
    made.opened()
    yield made
    made.close()


def test_file_that_is_idle_can_be_used(file_site: Site) -> None:
    """Connections that are idle at a fork are closed before it, and the child connects with the function."""
    assert in_child(file_site.opened_or_refused) == "opened"
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(file_site.opened_or_refused() != "opened")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert file_site.stored()[0] == 3


@pytest.mark.parametrize("what", ["transaction", "read", "driver", "fork in C"])
def test_file_that_is_open_is_refused(file_site: Site, tmp_path: Path, what: str) -> None:
    """A child that inherits the open file is refused, as where SQLAlchemy connects, and the parent can go on."""
    with file_site.app.app_context(), closing(sqlite3.connect(tmp_path / "bank.db")) as driver:
        if what == "transaction":
            file_site.bank.open_account()
        elif what == "read":
            file_site.db.session.scalar(sa.text("SELECT count(*) FROM bank_events"))
        elif what == "driver":
            driver.execute("SELECT count(*) FROM bank_events").fetchall()
        fork = fork_in_c if what == "fork in C" else os.fork
        assert "was open when this process was forked" in in_child(file_site.opened_or_refused, fork=fork)
        file_site.db.session.commit()
    assert file_site.stored()[0] == 1 + (what == "transaction")


def test_file_behind_an_address_in_memory_is_refused(tmp_path: Path) -> None:
    """An address that names no file would have every process use one connection to it."""
    path = str(tmp_path / "bank.db")
    site = make_site("sqlite://", create=False, SQLALCHEMY_ENGINE_OPTIONS={"creator": lambda: sqlite3.connect(path)})
    with site.app.app_context(), pytest.raises(ConfigurationError, match=f"make the address 'sqlite:///{path}'"):
        site.db.session.scalar(sa.text("SELECT 1"))
    site.close()


@pytest.fixture
def connect(postgres_url: str) -> Callable[[], Any]:
    """A function that connects to PostgreSQL."""
    psycopg = pytest.importorskip("psycopg")
    address = sa.make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)
    return lambda: psycopg.connect(address)


def test_server_is_connected_to_by_each_process(postgres_url: str, connect: Callable[[], Any]) -> None:
    """A child connects with the function, also if connections were in use, and the parent's transaction goes on."""
    site = make_site(postgres_url, SQLALCHEMY_ENGINE_OPTIONS={"creator": connect})
    site.opened()
    for fork in (os.fork, fork_in_c):
        with site.app.app_context():
            site.bank.open_account()
            assert in_child(site.opened_or_refused, fork=fork) == "opened"
            site.db.session.commit()
    assert site.stored()[0] == 5
    site.close()


@pytest.mark.parametrize("poolclass", [sa.NullPool, sa.StaticPool, None])
def test_connection_of_the_parents_is_refused(postgres_url: str, connect: Callable[[], Any], poolclass: Any) -> None:
    """A function that returns a connection from before the fork, as a pool of the driver's does, is refused in a child.

    Two processes on one connection would read each other's answers.
    """
    kept = [connect()]
    # As a pool of the driver's has it.
    close, kept[0].close = kept[0].close, lambda: None
    options = {"creator": lambda: kept[0]} | ({} if poolclass is None else {"poolclass": poolclass})
    site = make_site(postgres_url, SQLALCHEMY_ENGINE_OPTIONS=options)
    site.opened()

    def child() -> list[str]:
        found = [site.opened_or_refused()]
        kept[0] = connect()
        return [*found, site.opened_or_refused()]

    refused, then = in_child(child)
    assert "was made before this process was forked" in refused
    assert then == "opened"
    site.opened()
    assert site.stored()[0] == 3
    site.close()
    close()
