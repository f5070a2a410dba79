"""``flask eventsourcing init-db`` and ``check``.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tests.bank import Site, make_app, make_site
from tests.domain import Bank, Shop
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_postgresql


def run(site: Site, command: str) -> tuple[int, str]:
    """Run a command and return its exit code and what it prints."""
    result = site.app.test_cli_runner().invoke(args=["eventsourcing", command])
    return result.exit_code, result.output


def test_init_db_creates_what_is_missing(new_site: MakeSite) -> None:
    """``init-db`` creates the tables of every application and nothing else; after it the application works."""
    site = new_site(Bank, Shop, create=False)
    code, output = run(site, "init-db")
    assert code == 0
    for name in ("bank_events", "bank_snapshots", "bank_tracking", "shop_events"):
        assert f"Created table {name}." in output
    with site.app.app_context():
        assert "note" not in sa.inspect(site.db.engine).get_table_names()
        site.bank.open_account()
        site.db.session.commit()


def test_init_db_keeps_what_is_there(site: Site) -> None:
    """``init-db`` leaves existing tables and their events alone, and creates one that is missing."""
    site.opened()
    assert run(site, "init-db") == (0, "All tables are there.\n")
    with site.app.app_context(), site.db.engine.begin() as connection:
        site.es.models[Bank].tables["tracking"].drop(connection)
    assert run(site, "init-db") == (0, "Created table bank_tracking.\n")
    assert site.stored() == (1, 0)


def test_check_of_a_good_app(new_site: MakeSite) -> None:
    """``check`` tells the database, the mode, each table and each log, and exits with 0; no password is shown."""
    site = new_site(EVENTSOURCING_COMMIT="request")
    site.opened()
    code, output = run(site, "check")
    assert code == 0
    assert "Commit mode: request" in output
    assert "Bank: table bank_events ok" in output
    assert "Bank: log ok, last position 1" in output
    assert "is missing" not in output


@on_postgresql
def test_check_of_a_log_that_is_not_safe(site: Site) -> None:
    """``check`` names a sequence with which readers could miss events, and exits with 1."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        connection.execute(sa.text("ALTER SEQUENCE bank_events_notification_id_seq CACHE 20"))
    code, output = run(site, "check")
    assert code == 1
    assert "Error: Sequence public.bank_events_notification_id_seq has CACHE 20" in output


def test_check_names_what_is_missing(new_site: MakeSite) -> None:
    """``check`` names the missing tables and what to run, and exits with 1."""
    site = new_site(create=False)
    code, output = run(site, "check")
    assert code == 1
    assert "Bank: table bank_snapshots is missing" in output
    assert "flask eventsourcing init-db" in output


@pytest.mark.parametrize("command", ["check", "init-db"])
def test_database_that_cannot_be_reached(command: str) -> None:
    """A database that does not answer is one line and an exit code, not a traceback; the password is not shown."""
    site = make_site("postgresql+psycopg://ada:secret@127.0.0.1:1/bank?connect_timeout=2", create=False)
    code, output = run(site, command)
    assert code == 1
    assert "The database cannot be reached" in output
    assert "secret" not in output
    site.close()


def test_command_without_the_extension() -> None:
    """An app without the extension has no such command."""
    result = make_app("sqlite://").test_cli_runner().invoke(args=["eventsourcing", "check"])
    assert result.exit_code == 2
