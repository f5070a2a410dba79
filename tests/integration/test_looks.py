"""What is checked before the first append or read, and what the command ``check`` says of it.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from eventsourcing.application import Application
from eventsourcing.persistence import DataError, InternalError, PersistenceError, StoredEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_eventsourcing import (
    MissingRightError,
    MissingTableError,
    UnsafeSequenceError,
    UnsafeSettingError,
    UnsafeTableError,
)
from flask_eventsourcing.exceptions import EventValueError
from flask_eventsourcing.persistence.dialects.looks import LOOK_LASTS
from flask_eventsourcing.persistence.dialects.sqlite import SCHEMA_HOLDS_FOR
from tests.bank import Site, make_site
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files, on_mariadb, on_postgresql, on_sqlite_file
from tests.length import examples

MEGABYTE = 1024 * 1024


def run_check(site: Site) -> tuple[int, str]:
    """Run ``check``, and make sure that it is no traceback."""
    result = site.app.test_cli_runner().invoke(args=["eventsourcing", "check"])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def change(site: Site, *statements: str) -> None:
    """Change the database, past the application."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def event_of(originator_id: Any, state: bytes = b"state", version: int = 1) -> StoredEvent:
    """Make an event."""
    return StoredEvent(originator_id, version, "topic", state)


def refused(site: Site, error: type[Exception], match: str, *, reads: bool = False) -> None:
    """Expect that appends, and perhaps reads, are refused, and that the user's transaction goes on."""
    with site.app.app_context():
        recorder = site.bank.recorder
        site.note()
        with pytest.raises(error, match=match):
            recorder.insert_events([event_of(uuid4())])
        if reads:
            with pytest.raises(error, match=match):
                recorder.select_events(uuid4())
            with pytest.raises(error, match=match):
                recorder.select_notifications(None, 10)
        site.db.session.commit()
    code, output = run_check(site)
    assert code == 1
    assert output.splitlines()[-1].startswith("Error: ")


# ------------------------------------------------------------------------------------------------- tables


def retyped(column: str, kind: str) -> Callable[[sa.Engine], list[str]]:
    """Return what makes the table of events again with another type for a column."""

    def statements(engine: sa.Engine) -> list[str]:
        types = {
            "notification_id": {"postgresql": "BIGSERIAL", "sqlite": "INTEGER"}.get(engine.dialect.name, "BIGINT"),
            "originator_id": {"postgresql": "UUID"}.get(engine.dialect.name, "CHAR(32)"),
            "originator_version": "BIGINT",
            "topic": "TEXT",
            "state": {"postgresql": "BYTEA", "sqlite": "BLOB"}.get(engine.dialect.name, "LONGBLOB"),
        }
        types[column] = kind
        sqlite = engine.dialect.name == "sqlite"
        key = " PRIMARY KEY AUTOINCREMENT" if sqlite else " PRIMARY KEY"
        mysql = engine.dialect.name in ("mysql", "mariadb")
        types["notification_id"] += key + (" AUTO_INCREMENT" if mysql else "")
        columns = ", ".join(f"{name} {each}" for name, each in types.items() if each)
        return ["DROP TABLE bank_events", f"CREATE TABLE bank_events ({columns})"]

    return statements


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("originator_id", "VARCHAR(10000)"),
        ("originator_id", "INTEGER"),
        ("state", "TEXT"),
        ("state", ""),
        ("topic", ""),
        ("originator_version", "TEXT"),
    ],
)
def test_table_that_is_not_as_its_class_has_it(new_site: MakeSite, column: str, kind: str) -> None:
    """A missing column, or one of another type, is refused by name before anything is written or read."""
    site = new_site()
    with site.app.app_context():
        engine = site.db.engine
    if kind.startswith("VARCHAR") and engine.dialect.name != "postgresql":
        kind = "INTEGER"
    change(site, *retyped(column, kind)(engine))
    refused(site, UnsafeTableError, f"bank_events.{column} is", reads=True)
    assert f"bank_events.{column} is" in run_check(site)[1]


KEYLESS = {
    "sqlite": (
        "DROP TABLE bank_events",
        "CREATE TABLE bank_events (notification_id INTEGER PRIMARY KEY AUTOINCREMENT, originator_id CHAR(32))",
        "ALTER TABLE bank_events ADD COLUMN originator_version BIGINT",
        "ALTER TABLE bank_events ADD COLUMN topic TEXT",
        "ALTER TABLE bank_events ADD COLUMN state BLOB",
        "CREATE UNIQUE INDEX some ON bank_events (originator_id, originator_version) WHERE originator_version > 5",
    ),
    "postgresql": (
        "ALTER TABLE bank_events DROP CONSTRAINT bank_events_originator_key",
        "ALTER TABLE bank_events ADD UNIQUE (originator_version, originator_id) DEFERRABLE",
        "CREATE UNIQUE INDEX ON bank_events (originator_id, notification_id) INCLUDE (originator_version)",
    ),
    "mysql": ("ALTER TABLE bank_events DROP INDEX bank_events_originator_key",),
}


@on_files
def test_table_that_has_lost_its_key(new_site: MakeSite) -> None:
    """Without the unique key of versions appends are refused, before two writers can store the same version."""
    site = new_site()
    with site.app.app_context():
        name = site.db.engine.dialect.name
    change(site, *KEYLESS["mysql" if name == "mariadb" else name])
    refused(site, UnsafeTableError, r"bank_events has no key UNIQUE \(originator_id, originator_version\)")
    change(site, "CREATE UNIQUE INDEX again ON bank_events (originator_version, originator_id)")
    site.opened()
    assert run_check(site)[0] == 0


def test_missing_table_leaves_the_transaction(new_site: MakeSite) -> None:
    """A missing table is named, and what the transaction has done before is committed."""
    site = new_site()
    change(site, "DROP TABLE bank_events")
    with site.app.app_context():
        site.note()
        with pytest.raises(MissingTableError, match="bank_events"):
            site.bank.open_account()
        site.db.session.commit()
        assert len(site.db.session.scalars(sa.select(site.Note)).all()) == 1


def test_table_is_looked_at_again_after_an_error(new_site: MakeSite) -> None:
    """A table that was dropped and created with other columns is checked again, and refused."""
    site = new_site()
    site.opened()
    change(site, "DROP TABLE bank_events")
    with site.app.app_context():
        with pytest.raises(Exception, match="bank_events"):
            site.bank.open_account()
        site.db.session.rollback()
        statements = retyped("state", "TEXT")(site.db.engine)[1:]
    change(site, *statements)
    refused(site, UnsafeTableError, "bank_events.state is")


@pytest.mark.parametrize("optional", ["event_id", "recorded_at", "metadata", "correlation_id"])
def test_column_of_metadata_that_is_missing_is_refused(new_site: MakeSite, optional: str) -> None:
    """A column that is in the model and not in the database is named, with the remedy, by ``save()`` and ``check``."""
    site = new_site()
    change(site, f"ALTER TABLE bank_events DROP COLUMN {optional}")
    refused(site, UnsafeTableError, f"bank_events.{optional} is missing: let a migration add it")
    code, output = run_check(site)
    assert code == 1
    assert f"bank_events.{optional} is missing" in output


def test_table_of_the_library_needs_no_column_more(new_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    """A table that has none of the columns of metadata works, with one warning, and ``check`` names it."""
    site = new_site()
    for optional in ("event_id", "recorded_at", "metadata", "correlation_id"):
        change(site, f"ALTER TABLE bank_events DROP COLUMN {optional}")
    site.opened()
    site.opened()
    assert len([record for record in caplog.records if "none of the columns" in record.getMessage()]) == 1
    code, output = run_check(site)
    assert code == 0, output
    assert "bank_events.event_id is missing" in output


def saved_after_a_look(site: Site) -> int:
    """Let a process look at its tables as after an error, save, and return how many events have an id."""
    time.sleep(2 * SCHEMA_HOLDS_FOR)
    with site.app.app_context():
        recorder: Any = site.bank.recorder
        recorder.dialect.forget_looks(site.db.session.connection())
        site.bank.open_account()
        site.db.session.commit()
        names = {column["name"] for column in sa.inspect(site.db.engine).get_columns("bank_events")}
        if "event_id" not in names:
            return 0
        return len(site.db.session.execute(sa.text("SELECT 1 FROM bank_events WHERE event_id IS NOT NULL")).all())


@pytest.mark.parametrize("seed", range(2))
@on_files
def test_columns_are_added_one_by_one(new_site: MakeSite, seed: int) -> None:
    """A process saves while a migration adds the columns, and fills them when all are there."""
    site = new_site()
    names = ["event_id", "recorded_at", "metadata", "correlation_id"]
    change(site, *(f"ALTER TABLE bank_events DROP COLUMN {name}" for name in names))
    assert saved_after_a_look(site) == 0
    random.Random(seed).shuffle(names)
    with site.app.app_context():
        types = {name: site.es.StoredEvent.__table__.c[name].type.compile(site.db.engine.dialect) for name in names}
    for number, name in enumerate(names, 1):
        change(site, f"ALTER TABLE bank_events ADD COLUMN {name} {types[name]}")
        if number == 2:
            # A process that finds them so cannot know that more will come.
            refused(new_site(create=False), UnsafeTableError, "is missing: let a migration add it")
        assert saved_after_a_look(site) == (1 if number == len(names) else 0)
    change(site, f"ALTER TABLE bank_events DROP COLUMN {names[0]}")
    time.sleep(max(SCHEMA_HOLDS_FOR, LOOK_LASTS))
    with site.app.app_context(), pytest.raises(PersistenceError):
        site.bank.open_account()
    with site.app.app_context(), pytest.raises(UnsafeTableError, match=f"bank_events.{names[0]} is missing"):
        site.bank.open_account()


# ------------------------------------------------------------------------------------------- positions


def lose_autoincrement(site: Site) -> None:
    """Let Alembic make the table again, as a change of a column does."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("bank_events", recreate="always") as batch:
            batch.add_column(sa.Column("booked_at", sa.DateTime()))


@pytest.mark.parametrize("used", [True, False])
@on_sqlite_file
def test_lost_autoincrement_is_refused(new_site: MakeSite, used: bool) -> None:
    """A table that a migration made again without AUTOINCREMENT is refused, by processes that run, too."""
    site = new_site()
    site.opened()
    other = site if used else new_site()
    lose_autoincrement(site)
    # For so long nobody looks again.
    time.sleep(SCHEMA_HOLDS_FOR)
    refused(other, UnsafeSequenceError, "AUTOINCREMENT.*sqlite_autoincrement")
    with other.app.app_context():
        assert len(other.bank.recorder.select_notifications(None, 10)) == 1
    with site.app.app_context(), site.db.engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        options = {"sqlite_autoincrement": True}
        with operations.batch_alter_table("bank_events", recreate="always", table_kwargs=options):
            pass
    other.opened()
    assert run_check(other)[0] == 0


def insert_past(site: Site, position: int) -> None:
    """Insert an event as an import does that gives positions of its own."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        values = {"originator_id": uuid4(), "originator_version": 1, "notification_id": position}
        connection.execute(sa.insert(site.es.StoredEvent).values(topic="t", state=b"", **values))


@on_postgresql
def test_sequence_behind_its_table(new_site: MakeSite) -> None:
    """A sequence that is behind its table is not a conflict: appends are refused with the statement that sets it."""
    site = new_site()
    insert_past(site, 40)
    refused(site, UnsafeSequenceError, r"behind position 40 of table bank_events.*setval\('public.*', 40\)")
    change(site, "SELECT setval('bank_events_notification_id_seq', 40)")
    site.opened()
    assert "last position 41" in run_check(site)[1]


@on_postgresql
def test_table_that_a_crash_would_empty(new_site: MakeSite) -> None:
    """``check`` names a log that the server does not keep over a crash; a test may use one, so nothing is refused."""
    site = new_site()
    change(site, "ALTER TABLE bank_events SET UNLOGGED")
    site.opened()
    code, output = run_check(site)
    assert code == 1
    assert "ALTER TABLE bank_events SET LOGGED" in output


@on_postgresql
def test_connection_that_may_only_read(new_site: MakeSite) -> None:
    """With ``default_transaction_read_only`` events can be read, and ``check`` says that none can be saved."""
    site = new_site()
    account_id = site.opened()
    reader = new_site(
        create=False,
        SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"options": "-c default_transaction_read_only=on"}},
    )
    assert reader.balance(account_id) == 0
    with pytest.raises(InternalError, match="read-only transaction"):
        reader.opened()
    code, output = run_check(reader)
    assert code == 1
    assert "may only read here" in output


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_position_given_twice_is_no_conflict(new_site: MakeSite) -> None:
    """If a sequence or counter falls behind later, the error says so, and ``check`` names the remedy."""
    site = new_site()
    site.opened()
    insert_past(site, 2)
    insert_past(site, 5)
    with site.app.app_context():
        with pytest.raises(UnsafeSequenceError, match="given twice"):
            site.bank.open_account()
        site.db.session.rollback()
    code, output = run_check(site)
    assert code == 1
    assert "behind position 5" in output


# ------------------------------------------------------------------------------------ settings of PostgreSQL


@contextmanager
def with_options(uri: str, driver: str, options: str) -> Iterator[Site]:
    """Make a site whose connections have settings of their own."""
    url = sa.make_url(uri).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    site = make_site(url, SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"options": options}})
    try:
        yield site
    finally:
        site.close()


def save_bytes(site: Site, count: int) -> None:
    """Save events whose states have every byte, and read them again."""
    state, account_id = bytes(range(256)), uuid4()
    with site.app.app_context():
        events = [event_of(account_id, state, version) for version in range(1, count + 1)]
        site.bank.recorder.insert_events(events)
        assert [each.state for each in site.bank.recorder.select_events(account_id)] == [state] * count
        site.db.session.commit()


@on_postgresql
def test_strings_that_do_not_conform(uri: str) -> None:
    """With ``standard_conforming_strings`` off, states are stored as they are, or refused if a driver changes them."""
    options = "-c standard_conforming_strings=off"
    with with_options(uri, "psycopg", options) as site:
        refused(site, UnsafeSettingError, "standard_conforming_strings.*-c standard_conforming_strings=on")
        with site.app.app_context():
            assert site.bank.recorder.select_notifications(None, 10) == []
    with with_options(uri, "psycopg2", options) as site:
        for count in (1, 3, 150):
            save_bytes(site, count)


@on_postgresql
def test_types_whose_names_are_quoted(uri: str) -> None:
    """A server that quotes every name has the same types."""
    with with_options(uri, "psycopg", "-c quote_all_identifiers=on") as site:
        save_bytes(site, 3)
        assert run_check(site)[0] == 0


# --------------------------------------------------------------------------------------- settings of MariaDB


NOTE = "CREATE TABLE note (id INTEGER NOT NULL AUTO_INCREMENT PRIMARY KEY, text VARCHAR(50)) ENGINE=InnoDB"


def create(site: Site) -> None:
    """Make the tables; not every engine can have the key of a user's own."""
    with site.app.app_context():
        for models in site.es.models.values():
            for table in models.tables.values():
                table.create(site.db.engine)
        if site.db.engine.dialect.name in ("mysql", "mariadb"):
            change(site, NOTE)


@contextmanager
def with_session(uri: str, statement: str, *classes: Any) -> Iterator[Site]:
    """Make a site whose connections begin with a statement."""
    options = {"connect_args": {"init_command": statement}}
    site = make_site(uri, *classes, create=False, SQLALCHEMY_ENGINE_OPTIONS=options)
    create(site)
    try:
        yield site
    finally:
        site.close()


@on_mariadb
def test_mode_of_oracle(uri: str) -> None:
    """A session that takes Oracle's grammar stores and reads events like any other."""
    with with_session(uri, "SET sql_mode = 'ORACLE,STRICT_TRANS_TABLES'") as site, site.app.app_context():
        account_id = site.bank.open_account()
        site.bank.deposit(account_id)
        site.db.session.commit()
        assert site.bank.balance(account_id) == 1
        assert site.bank.recorder.max_notification_id() == 2


@on_mariadb
def test_mode_that_cuts_is_refused(uri: str) -> None:
    """Outside strict mode, where the server truncates ids, appends are refused with the remedy, reads are not."""
    with with_session(uri, "SET sql_mode = ''") as site:
        refused(site, UnsafeSettingError, "sql_mode is not strict.*STRICT_TRANS_TABLES")
        with site.app.app_context():
            assert site.bank.recorder.select_notifications(None, 10) == []


@on_mariadb
def test_dirty_reads_are_refused(uri: str) -> None:
    """With READ UNCOMMITTED a reader would see events that are rolled back."""
    with with_session(uri, "SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED") as site:
        refused(site, UnsafeSettingError, "READ UNCOMMITTED", reads=True)


@on_mariadb
def test_reads_that_are_cut_are_refused(uri: str) -> None:
    """With ``sql_select_limit`` a stream would be read without its end, so reads and appends are refused."""
    with with_session(uri, "SET sql_select_limit = 100") as site:
        refused(site, UnsafeSettingError, "sql_select_limit is 100.*DEFAULT", reads=True)
    site = make_site(uri, create=False)
    assert site.balance(site.opened(5)) == 5
    site.close()


@on_mariadb
def test_engine_that_keeps_what_was_rolled_back(uri: str) -> None:
    """Tables are made with InnoDB, whatever the server's default; one with another engine is refused."""
    with with_session(uri, "SET default_storage_engine = 'Aria'") as site:
        with site.app.app_context():
            site.bank.open_account()
            site.db.session.rollback()
        assert site.stored()[0] == 0
        for table in ("bank_events", "bank_tracking", "bank_snapshots"):
            change(site, f"ALTER TABLE {table} ENGINE = Aria")
            with site.app.app_context():
                site.db.engine.dispose()
                site.bank.recorder.dialect.looked_at.clear()  # type: ignore[attr-defined]
            refused(site, UnsafeTableError, f"Table {table} has the engine Aria.*ENGINE=InnoDB")
            change(site, f"ALTER TABLE {table} ENGINE = InnoDB")


@on_mariadb
@pytest.mark.parametrize("size", [200_000, 7_500_000])
def test_large_saves(new_site: MakeSite, size: int) -> None:
    """A save is divided into statements that are not too long for the server, whatever the events' sizes."""
    site = new_site()
    count = 20 * MEGABYTE // size
    with site.app.app_context():
        originator_id = uuid4()
        events = [event_of(originator_id, b"\0" * size, version) for version in range(1, count + 1)]
        site.bank.recorder.insert_events(events)
        site.db.session.commit()
        assert site.bank.recorder.select_events(originator_id) == events


@on_mariadb
def test_event_that_no_statement_holds(new_site: MakeSite) -> None:
    """An event that is longer than a statement may be is refused by name, and the transaction can be used further."""
    site = new_site()
    with site.app.app_context():
        site.note()
        with pytest.raises(DataError, match="max_allowed_packet of 16,777,216 bytes"):
            site.bank.recorder.insert_events([event_of(uuid4(), b"x" * 17 * MEGABYTE)])
        site.db.session.commit()
    assert site.stored() == (0, 1)


@on_mariadb
@pytest.mark.parametrize(("rest", "stored"), [(1_200, 0), (3_400, 1)])
def test_event_that_a_statement_just_holds(new_site: MakeSite, rest: int, stored: int) -> None:
    """An event that leaves little room in a statement is stored, or refused before it is sent."""
    site = new_site()
    site.opened()
    with site.app.app_context(), nullcontext() if stored else pytest.raises(DataError, match="max_allowed_packet"):
        site.bank.recorder.insert_events([event_of(uuid4(), b"x" * ((16 * MEGABYTE - rest) // 2))])
        site.db.session.commit()
    assert site.stored() == (1 + stored, 0)


# --------------------------------------------------------------------------------------------------- rights


@on_postgresql
@pytest.mark.parametrize(
    ("right", "on", "match"),
    [
        ("INSERT", "bank_events", "lacks INSERT on table bank_events: GRANT INSERT ON bank_events TO"),
        ("SELECT", "bank_snapshots", "lacks SELECT on table bank_snapshots"),
        (
            "USAGE",
            "SEQUENCE bank_events_notification_id_seq",
            "lacks USAGE on sequence.*GRANT USAGE, SELECT ON SEQUENCE",
        ),
        ("SELECT", "SEQUENCE bank_events_notification_id_seq", "lacks SELECT on sequence"),
    ],
)
def test_missing_right_is_named(new_site: MakeSite, uri: str, right: str, on: str, match: str) -> None:
    """A right that the role lacks is named with the GRANT, before the transaction would end; ``check`` does so, too."""
    owner = new_site()
    role = f"web_{uuid4().hex}"
    change(
        owner,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT USAGE ON SCHEMA public TO {role}",
        f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {role}",
    )
    web = make_site(sa.make_url(uri).set(username=role).render_as_string(hide_password=False), create=False)
    try:
        web.opened()
        assert run_check(web)[0] == 0
        change(owner, f"REVOKE {right} ON {on} FROM {role}")
        with web.app.app_context():
            web.db.engine.dispose()
            web.bank.recorder.dialect.forget_looks(web.db.session.connection())  # type: ignore[attr-defined]
        refused(web, MissingRightError, match)
    finally:
        web.close()
        change(owner, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


# ---------------------------------------------------------------------------------- what is accepted can be read


class Texts(Application[str]):
    """An application whose ids are texts."""


@pytest.fixture
def site_of_texts(request: pytest.FixtureRequest, uri: str) -> Iterator[Site]:
    """A site whose ids are texts, on MariaDB with each default engine."""
    arguments: dict[str, Any] = {"init_command": request.param} if request.param else {}
    options = {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": arguments}} if arguments else {}
    site = make_site(uri, Texts, create=False, **options)
    create(site)
    yield site
    site.close()


IDS = st.text(st.sampled_from("aAé ß-🙂"), min_size=1, max_size=6) | st.integers(1, 300).map(lambda n: "x" * n)
STATES = st.binary(max_size=40) | st.integers(0, 3 * MEGABYTE).map(lambda n: b"\0'\\" * (n // 3))


BOTH = [("sqlite-file", ""), ("sqlite-memory", ""), ("postgresql", ""), ("mariadb", "")]
BOTH.append(("mariadb", "SET default_storage_engine = 'Aria'"))


@pytest.mark.parametrize(("uri", "site_of_texts"), BOTH, indirect=True)
@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(IDS, min_size=1, max_size=6, unique=True), data=st.data())
def test_what_is_accepted_is_read_back_equal(site_of_texts: Site, ids: list[str], data: st.DataObject) -> None:
    """Each event that is accepted is read back equal through recorder, ORM and log; two ids are never one."""
    site = site_of_texts
    with site.app.app_context():
        recorder: Any = site.es[Texts].recorder
        prefix = uuid4().hex[:8]
        stored = []
        for each in ids:
            event = event_of(prefix + each, data.draw(STATES))
            try:
                recorder.insert_events([event])
                site.db.session.commit()
                stored.append(event)
            except (DataError, EventValueError):
                assert len(each) > 240
                site.db.session.rollback()
        model: Any = site.es.models[Texts].StoredEvent
        log = {n.originator_id: n.state for n in recorder.select_notifications(None, 100_000)}
        for event in stored:
            assert recorder.select_events(event.originator_id) == [event]
            rows = site.db.session.scalars(sa.select(model).where(model.originator_id == event.originator_id)).all()
            assert [(row.originator_id, row.state) for row in rows] == [(event.originator_id, event.state)]
            assert log[event.originator_id] == event.state
        site.db.session.rollback()
