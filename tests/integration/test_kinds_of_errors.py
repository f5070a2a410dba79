"""A conflict is a conflict: the keys of the tables, serialisation failures, deadlocks; every other error is its own.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import DatabaseError, IntegrityError, StoredEvent, Tracking

from flask_eventsourcing.exceptions import ConstraintError, MissingTableError
from flask_eventsourcing.persistence.dialects import hide_values
from tests.bank import Site, make_site
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_mariadb

SECRET = "4711-secret"


@contextmanager
def refused(site: Site, ddl: str, error: type[Exception]) -> Iterator[None]:
    """Change the table of events, and expect an error that tells no values."""
    with site.app.app_context():
        with site.db.engine.begin() as connection:
            if site.db.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA writable_schema = ON")
            connection.exec_driver_sql(ddl)
            if site.db.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA writable_schema = RESET")
        with pytest.raises(error) as raised:
            yield
        assert not isinstance(raised.value, IntegrityError)
        assert "Another writer" not in str(raised.value)
        assert SECRET not in str(raised.value)
        assert not site.bank.recorder.dialect.is_conflict(raised.value)  # type: ignore[attr-defined]
        site.db.session.rollback()


def save(site: Site, *topics: str, originator_id: UUID | None = None) -> None:
    """Save events of one aggregate with these topics."""
    originator_id = originator_id or uuid4()
    site.bank.recorder.insert_events(
        [StoredEvent(originator_id, version, topic, SECRET.encode()) for version, topic in enumerate(topics, 1)]
    )


@pytest.mark.parametrize("watched", [True, False])
def test_unique_constraint_of_ones_own_is_no_conflict(site: Site, watched: bool) -> None:
    """A violation of a user's UNIQUE on the table of events is not a conflict."""
    with site.app.app_context():
        mysql = site.db.engine.dialect.name in ("mysql", "mariadb")
        site.db.engine.echo = watched
    with refused(site, f"CREATE UNIQUE INDEX own ON bank_events (topic{'(50)' if mysql else ''})", ConstraintError):
        save(site, SECRET, SECRET)


def test_not_null_of_ones_own_is_no_conflict(new_site: MakeSite) -> None:
    """A violation of a NOT NULL in the table of events is not a conflict."""
    site = new_site(EVENTSOURCING_METADATA=False)
    changes = {
        # The only way there: the text of the table itself, which connections read again.
        "sqlite": "UPDATE sqlite_master SET sql = replace(sql, 'correlation_id VARCHAR(128)', "
        "'correlation_id VARCHAR(128) NOT NULL') WHERE name = 'bank_events'",
        "postgresql": "ALTER TABLE bank_events ALTER correlation_id SET NOT NULL",
        "mysql": "ALTER TABLE bank_events MODIFY correlation_id VARCHAR(128) NOT NULL",
    }
    with site.app.app_context():
        name = site.db.engine.dialect.name.replace("mariadb", "mysql")
    with refused(site, changes[name], DatabaseError):
        save(site, "one")


def test_trigger_is_no_conflict(site: Site) -> None:
    """An error that a trigger raises is not a conflict."""
    name = site.app.config["SQLALCHEMY_DATABASE_URI"].split(":")[0].split("+")[0]
    ddl = {
        "sqlite": "CREATE TRIGGER no BEFORE INSERT ON bank_events BEGIN SELECT RAISE(ABORT, 'no'); END",
        "postgresql": "ALTER TABLE bank_events ADD CONSTRAINT no CHECK (topic = 'two')",
    }.get(name, "ALTER TABLE bank_events ADD CONSTRAINT no CHECK (topic = 'two')")
    with refused(site, ddl, DatabaseError):
        save(site, "one")


@pytest.mark.parametrize("watched", [True, False])
def test_keys_of_events_are_conflicts(site: Site, watched: bool) -> None:
    """The same version twice is a conflict that may be run again; its message has no values of rows."""
    account_id = site.opened()
    with site.app.app_context():
        site.db.engine.echo = watched
        with pytest.raises(IntegrityError, match="Another writer was first") as raised:
            save(site, "one", originator_id=account_id)
        site.db.engine.echo = False
        assert site.bank.recorder.dialect.is_conflict(raised.value)  # type: ignore[attr-defined]
        assert str(account_id) not in str(raised.value)
        assert account_id.hex not in str(raised.value)
        site.db.session.rollback()


@pytest.mark.parametrize("language", ["de_DE", "ja_JP", "hu_HU", "fr_FR", "ru_RU"])
@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
@on_mariadb
def test_errors_are_known_in_every_language_of_the_server(uri: str, driver: str, language: str) -> None:
    """A server that speaks another language has the same conflicts, and its messages have no values of rows either."""
    url = sa.make_url(uri).set(drivername=f"mysql+{driver}").render_as_string(hide_password=False)
    options = {"connect_args": {"init_command": f"SET lc_messages = '{language}'"}}
    site = make_site(url, SQLALCHEMY_ENGINE_OPTIONS=options)
    account_id = site.opened()
    with site.app.app_context():
        with pytest.raises(IntegrityError, match="Another writer was first") as raised:
            save(site, "one", originator_id=account_id)
        assert site.bank.recorder.dialect.is_conflict(raised.value)  # type: ignore[attr-defined]
        site.db.session.rollback()
        site.db.session.add_all([site.Note(text=SECRET), site.Note(text=SECRET)])
        with pytest.raises(sa.exc.IntegrityError) as own:
            site.db.session.flush()
        hide_values(own.value)
        assert not any(hidden in f"{raised.value} {own.value}" for hidden in (str(account_id), account_id.hex, SECRET))
        site.db.session.rollback()
        site.db.drop_all()
        with pytest.raises(MissingTableError, match="bank_"):
            site.bank.open_account()
        site.db.session.rollback()
    site.close()


def test_position_that_was_processed_is_the_librarys_error_and_not_run_again(site: Site) -> None:
    """A position at or below the recorded one is the library's ``IntegrityError``, but no reason to run it again."""
    with site.app.app_context():
        recorder: Any = site.bank.factory.tracking_recorder()
        recorder.insert_tracking(Tracking("upstream", 5))
        with pytest.raises(IntegrityError) as raised:
            recorder.insert_tracking(Tracking("upstream", 5))
        assert not recorder.dialect.is_conflict(raised.value)
        site.db.session.rollback()


def test_transaction_that_is_over_is_told_by_the_driver(site: Site) -> None:
    """The end of a transaction is noticed from the driver or the server, by whatever statement it ended."""
    with site.app.app_context():
        dialect: Any = site.bank.recorder.dialect  # type: ignore[attr-defined]
        site.bank.open_account()
        connection = site.db.session.connection()
        assert not dialect.is_over(connection)
        connection.connection.cursor().execute("ROLLBACK")
        assert dialect.is_over(connection)
        site.db.session.rollback()
        site.bank.open_account()
        assert not dialect.is_over(site.db.session.connection())
        site.db.session.execute(sa.text("SELECT 1"))
        assert not dialect.is_over(site.db.session.connection())
        site.db.session.rollback()
