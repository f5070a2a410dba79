"""The recorders' own statements use SQLAlchemy's pools, listeners and errors.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from eventsourcing import persistence
from eventsourcing.persistence import Notification, StoredEvent
from hypothesis import given
from hypothesis import strategies as st

from flask_eventsourcing import MissingTableError
from flask_eventsourcing.persistence.dialects.calls import ask_on
from flask_eventsourcing.persistence.tables import UUIDType
from tests.bank import Site, make_site
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_mariadb, on_postgresql
from tests.servers import ServerFolder, forget_killed_connections, restart_postgres, start_postgres

PATIENCE = 0.3
"""Seconds after which a statement that waits is interrupted."""


class LateError(Exception):
    """As a task queue raises in a signal handler when a job takes too long."""


class Gone(BaseException):
    """As ``gevent.Timeout`` is."""


@contextmanager
def raising(kind: type[BaseException]) -> Iterator[None]:
    """Raise an exception in the middle of what is done in a ``with`` block."""

    def stop(number: int, frame: Any) -> None:
        raise kind

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Another program has the events' table for itself."""
    lock = "LOCK TABLES bank_events WRITE" if "mysql" in uri else "LOCK TABLE bank_events IN ACCESS EXCLUSIVE MODE"
    engine = sa.create_engine(uri)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(lock)
            yield
            connection.rollback()
            connection.invalidate()
    finally:
        engine.dispose()


def read(site: Site) -> Any:
    """Read an aggregate."""
    return site.bank.balance(UUID(int=1))


def save(site: Site) -> Any:
    """Save one."""
    return site.bank.open_account()


def look(site: Site) -> Any:
    """Make a query of the app's own."""
    return site.db.session.execute(sa.text("SELECT count(*) FROM bank_events"))


@pytest.mark.parametrize("work", [read, save, look])
@pytest.mark.parametrize("kind", [LateError, Gone])
@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_an_exception_in_the_middle_of_a_statement(
    new_site: MakeSite, uri: str, kind: type[BaseException], work: Callable[[Site], Any]
) -> None:
    """If a signal handler raises while a statement runs, only that request fails, and the pool loses no place."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS=options)
    account_id = site.opened()
    with locked(uri), site.app.app_context(), pytest.raises(kind), raising(kind):
        work(site)
    assert site.balance(account_id) == 0
    site.opened()
    assert site.stored() == (2, 0)


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
@on_mariadb
def test_an_exception_in_the_middle_of_a_question_to_the_driver(uri: str, driver: str) -> None:
    """The same if the driver is asked something of which SQLAlchemy does not know, as what became of a transaction."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}
    url = sa.make_url(uri).set(drivername=f"mysql+{driver}").render_as_string(hide_password=False)
    site = make_site(url, SQLALCHEMY_ENGINE_OPTIONS=options)
    account_id = site.opened()

    def ask() -> None:
        site.bank.deposit(account_id)
        ask_on(site.db.session.connection(), f"SELECT sleep({2 * PATIENCE})")

    with site.app.app_context(), pytest.raises(Gone), raising(Gone):
        site.es.transactional(ask)()
    assert site.balance(account_id) == 0
    site.opened()
    assert site.stored() == (2, 0)
    site.close()


def test_a_restart_of_the_server_costs_one_request(server_folder: ServerFolder) -> None:
    """After a restart of the server one request fails, and not one for each connection of the pool."""
    with server_folder.private("restarted", start_postgres) as server:
        site = make_site(server.url)
        try:
            site.opened()
            with site.app.app_context():
                engine = site.db.engine
            connections = [engine.connect() for _ in range(5)]
            for connection in connections:
                connection.close()
            restart_postgres(server)
            failures = 0
            for _ in range(10):
                try:
                    site.opened()
                except persistence.PersistenceError:
                    failures += 1
            assert failures == 1
            assert site.stored() == (10, 0)
        finally:
            site.close()
            forget_killed_connections()


@on_postgresql
def test_a_listener_that_tells_what_a_lost_connection_is(site: Site) -> None:
    """A ``handle_error`` listener hears of the recorders' errors, and what it says of the connection holds."""
    heard: list[str] = []

    def fail_over(context: Any) -> None:
        heard.append(context.statement)
        context.is_disconnect = True

    with site.app.app_context():
        engine = site.db.engine
        site.opened()
        # The tables were looked at; nobody looks again before a statement fails.
        site.db.drop_all()
        sa.event.listen(engine, "handle_error", fail_over)
        server = site.db.session.scalar(sa.text("SELECT pg_backend_pid()"))
        with pytest.raises(MissingTableError):
            site.bank.balance(UUID(int=1))
        site.db.session.rollback()
        assert "bank_events" in heard[0]
        assert site.db.session.scalar(sa.text("SELECT pg_backend_pid()")) != server
        sa.event.remove(engine, "handle_error", fail_over)


@on_postgresql
def test_an_error_while_rows_are_fetched(site: Site) -> None:
    """Listeners hear of an error that comes while rows are fetched, and it is raised as the library's."""
    heard: list[BaseException] = []

    def listen(context: Any) -> None:
        heard.append(context.original_exception)

    with site.app.app_context():
        dialect, engine = site.bank.recorder.dialect, site.db.engine  # type: ignore[attr-defined]
        sa.event.listen(engine, "handle_error", listen)
        with pytest.raises(persistence.DataError):
            # Later than Python's last year.
            dialect.fetch(site.db.session.connection(), "SELECT 'infinity'::timestamp")
        sa.event.remove(engine, "handle_error", listen)
    assert isinstance(heard[0], psycopg.DataError)


@on_postgresql
def test_cursors_that_put_parameters_into_the_statement(new_site: MakeSite) -> None:
    """Aggregates and the log are written and read with psycopg's ``ClientCursor`` too."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"cursor_factory": psycopg.ClientCursor}})
    with site.app.app_context():
        account_id = site.bank.open_account()
        for _ in range(3):
            site.bank.deposit(account_id)
        account = site.bank.account(account_id)
        for _ in range(30):
            account.deposit(1)
        site.bank.save(account)
        site.db.session.commit()
        assert site.bank.balance(account_id) == 33
        assert [each.id for each in site.bank.recorder.select_notifications(None, 100)] == list(range(1, 35))


@on_postgresql
def test_prepared_statements_that_get_lost(new_site: MakeSite) -> None:
    """Where a pooler mixes up prepared statements, the error says what to set."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0})
    with site.app.app_context():
        for number in range(20):
            # As another client of the pooler has left it.
            site.db.session.execute(sa.text(f"PREPARE _pg3_{number} AS SELECT 1"))
        with pytest.raises(persistence.ProgrammingError, match="prepare_threshold"):
            any(site.bank.balance(UUID(int=1)) for _ in range(10))
        site.db.session.rollback()


def append_all_ways(site: Site) -> None:
    """Save one event, some, and more than are drawn beside others."""
    with site.app.app_context():
        for count in (1, 3, 101):
            account_id = uuid4()
            saved = [StoredEvent(account_id, version, "topic", b"") for version in range(1, count + 1)]
            site.bank.recorder.insert_events(saved)
            assert site.bank.recorder.select_events(account_id) == saved
            site.db.session.commit()
            with pytest.raises(persistence.IntegrityError) as raised:
                site.bank.recorder.insert_events(saved)
            assert site.bank.recorder.dialect.is_conflict(raised.value)  # type: ignore[attr-defined]
            site.db.session.rollback()


SEQUENCE = "bank_events_notification_id_seq"
IDENTITY = (
    f"DROP SEQUENCE {SEQUENCE} CASCADE",
    "ALTER TABLE bank_events ALTER notification_id ADD GENERATED ALWAYS AS IDENTITY",
)
PARTITIONED = "LIKE template INCLUDING DEFAULTS, UNIQUE (originator_id, originator_version)"
PARTITIONS = (
    "ALTER TABLE bank_events RENAME TO template",
    f"CREATE TABLE bank_events ({PARTITIONED}) PARTITION BY HASH (originator_id)",
    "CREATE TABLE part0 PARTITION OF bank_events FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
    "CREATE TABLE part1 PARTITION OF bank_events FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    f"ALTER SEQUENCE {SEQUENCE} OWNED BY bank_events.notification_id",
    "DROP TABLE template",
)


@on_postgresql
@pytest.mark.parametrize("migration", [IDENTITY, PARTITIONS], ids=["identity", "partitions"])
def test_a_table_that_a_migration_has_made_another_way(site: Site, migration: tuple[str, ...]) -> None:
    """Positions may be an identity column, the table may have partitions, and a conflict is a conflict there, too."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        for statement in migration:
            connection.exec_driver_sql(statement)
    append_all_ways(site)


@on_postgresql
def test_a_migration_of_a_column_costs_one_read(site: Site, uri: str) -> None:
    """After a column has got another type, one read fails, as in an outage; prepared statements are prepared again."""
    account_id = site.opened(5)
    with site.app.app_context():
        recorder = site.bank.recorder

    def read_often() -> None:
        # psycopg prepares a statement that it has run five times.
        for _ in range(7):
            assert len(recorder.select_events(account_id)) == 2

    read_often()
    migration = sa.create_engine(uri)
    with migration.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE bank_events ALTER topic TYPE varchar(1000)")
    migration.dispose()
    with pytest.raises(persistence.OperationalError, match="cached plan"):
        read_often()
    read_often()


def test_own_statements_can_be_told_from_others(site: Site) -> None:
    """A listener tells the recorders' statements from others by their execution option."""
    own: list[str] = []

    def listen(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if context.execution_options.get("flask_eventsourcing"):
            own.append(statement)

    with site.app.app_context():
        engine = site.db.engine
        sa.event.listen(engine, "before_cursor_execute", listen)
        site.note()
        site.db.session.flush()
        assert not own
        site.bank.open_account()
        assert any("bank_events" in each for each in own)
        site.db.session.rollback()
        sa.event.remove(engine, "before_cursor_execute", listen)


def test_events_are_the_librarys(site: Site) -> None:
    """Events that are read can be compared, hashed, copied and replaced like those of the library's constructors."""
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id)
        site.bank.open_account("Bob")
        site.db.session.commit()
        recorder = site.bank.recorder
        found = [*recorder.select_notifications(None, 10), *recorder.select_events(account_id)]
    assert [type(each) for each in found] == [Notification] * 3 + [StoredEvent] * 2
    for each in found:
        made = type(each)(**{field.name: getattr(each, field.name) for field in dataclasses.fields(each)})
        assert each == made == copy.deepcopy(each)
        assert (hash(each), repr(each)) == (hash(made), repr(made))
        assert dataclasses.replace(each, topic="other") == dataclasses.replace(made, topic="other")


@given(st.uuids(), st.sampled_from([str, lambda each: each.hex, lambda each: each.hex.upper(), lambda each: each]))
def test_every_spelling_of_an_id_is_read(value: UUID, spelling: Callable[[UUID], Any]) -> None:
    """A UUID is read from each of its spellings, and equals one of its class."""
    decode = UUIDType().result_processor(sa.create_mock_engine("sqlite://", print).dialect, None)
    found = decode(spelling(value))
    assert (found, hash(found), repr(found)) == (value, hash(value), repr(value))
    assert copy.deepcopy(found) == value
