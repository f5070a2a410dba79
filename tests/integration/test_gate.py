"""The gate of PostgreSQL: while the positions of a large save are drawn the others wait, and for nothing else.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, OperationalError, PersistenceError, StoredEvent
from sqlalchemy.engine.default import DefaultDialect

from flask_eventsourcing.persistence.dialects.event_tables import KnownLog
from flask_eventsourcing.persistence.dialects.postgresql_statements import GATE, SMALL_BLOCK, make_draw
from tests.bank import Site, make_site
from tests.domain import until
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_postgresql

SEQUENCE = "bank_events_notification_id_seq"
PATIENCE = 30


def events(count: int, first: int = 1) -> list[StoredEvent]:
    """Return events of one new aggregate."""
    originator_id = uuid4()
    return [StoredEvent(originator_id, version, "a:b", b"{}") for version in range(first, first + count)]


@contextmanager
def server(url: str, **options: Any) -> Iterator[sa.Connection]:
    """A connection of its own; with ``isolation_level="AUTOCOMMIT"`` it commits each statement."""
    engine = sa.create_engine(url, poolclass=sa.NullPool, **options)
    with engine.connect() as connection:
        yield connection


def holders(connection: sa.Connection) -> list[int]:
    """Return the processes of the server that have the gate of a log in this database."""
    statement = (
        "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database WHERE datname = current_database() "
        "AND locktype = 'advisory' AND objsubid = 2 AND classid = %s AND granted"
    )
    return list(connection.exec_driver_sql(statement, (GATE,)).scalars())


@contextmanager
def closed(url: str) -> Iterator[None]:
    """The gate as one who draws a large block has it."""
    with server(url) as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({GATE}, '{SEQUENCE}'::regclass::oid::int)")
        yield


def recorder_of(site: Site) -> Any:
    """Return the recorder, which commits by itself outside an app context."""
    with site.app.app_context():
        return site.bank.recorder


@on_postgresql
def test_large_save_stops_nobody(site: Site) -> None:
    """Beside small writers and an idle transaction a large save succeeds at once; no writer waits for its commit."""
    stop = threading.Event()
    small: list[int] = []
    failed: list[BaseException] = []

    def write() -> None:
        try:
            while not stop.is_set():
                with site.app.app_context():
                    small.extend(site.bank.recorder.insert_events(events(1)) or ())
                    site.db.session.commit()
        except PersistenceError as error:
            failed.append(error)

    def idle() -> None:
        with site.app.app_context():
            small.extend(site.bank.recorder.insert_events(events(1)) or ())
            stop.wait(PATIENCE)
            site.db.session.commit()

    threads = [threading.Thread(target=each) for each in (idle, write, write, write, write)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(small) > 20)
        with site.app.app_context():
            large = list(site.bank.recorder.insert_events(events(5000)) or ())
            before = len(small)
            until(lambda: len(small) > before + 20)
            site.db.session.commit()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert large == list(range(large[0], large[0] + 5000))
    assert not set(large) & set(small)
    # Not the ten times as many that were lost in tries.
    assert max(small) < len(small) + 4 * 5000


@on_postgresql
@pytest.mark.parametrize("count", [1, 2, SMALL_BLOCK, SMALL_BLOCK + 1])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("in_session", [False, True])
def test_others_wait_while_a_block_is_drawn(site: Site, uri: str, count: int, echo: bool, in_session: bool) -> None:
    """An append of any size waits while the gate is closed, and is stored contiguously."""
    site.opened()
    recorder = recorder_of(site)
    positions: list[int] = []

    def append() -> None:
        if in_session:
            site.elsewhere(lambda: positions.extend(recorder.insert_events(events(count))))
        else:
            positions.extend(recorder.insert_events(events(count)))

    recorder.dialect.engine.echo = echo
    thread = threading.Thread(target=append)
    with closed(uri), server(uri, isolation_level="AUTOCOMMIT") as look:
        thread.start()
        until(lambda: look.exec_driver_sql("SELECT FROM pg_locks WHERE NOT granted").all())
        assert positions == []
    thread.join()
    recorder.dialect.engine.echo = False
    assert [after - before for before, after in pairwise(positions)] == [1] * (count - 1)
    assert site.stored() == (1 + count, 0)
    assert recorder.max_notification_id() == positions[-1]


@on_postgresql
@pytest.mark.parametrize("count", [1, 3, SMALL_BLOCK + 1])
def test_waiting_at_the_gate_ends(new_site: MakeSite, uri: str, count: int) -> None:
    """A writer that waits longer than the lock timeout gets an error, has stored nothing, and can try again."""
    site = new_site(EVENTSOURCING_LOCK_TIMEOUT=0.1)
    site.opened()
    recorder = recorder_of(site)
    with closed(uri), pytest.raises(OperationalError, match="lock timeout"):
        recorder.insert_events(events(count))
    with site.app.app_context():
        with closed(uri), pytest.raises(OperationalError, match="lock timeout"):
            recorder.insert_events(events(count))
        site.db.session.rollback()
        assert site.db.session.scalar(sa.text("SHOW lock_timeout")) == "0"
    recorder.insert_events(events(count))
    assert site.stored() == (1 + count, 0)


@on_postgresql
def test_small_saves_do_not_wait_for_each_other(site: Site, uri: str) -> None:
    """Several writers can pass the open gate at the same time."""
    site.opened()
    recorder = recorder_of(site)
    with server(uri) as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_lock_shared({GATE}, '{SEQUENCE}'::regclass::oid::int)")
        for count in (1, 2, SMALL_BLOCK):
            recorder.insert_events(events(count))
    assert site.stored() == (4 + SMALL_BLOCK, 0)


@on_postgresql
@pytest.mark.parametrize("count", [2, SMALL_BLOCK + 1])
@pytest.mark.parametrize("in_session", [False, True])
def test_a_save_that_is_always_torn_is_refused(site: Site, uri: str, count: int, in_session: bool) -> None:
    """If other programs draw positions without the gate, a save of several events is refused, and none is stored."""
    site.opened()
    recorder = recorder_of(site)
    recorder.insert_events(events(1))
    with server(uri, isolation_level="AUTOCOMMIT") as connection:
        # As if another one drew a position after each of this one.
        connection.exec_driver_sql(f"ALTER SEQUENCE {SEQUENCE} INCREMENT 2")
        if in_session:
            with site.app.app_context():
                with pytest.raises(OperationalError, match=f"{count} events .* bank_events .* version of this package"):
                    recorder.insert_events(events(count))
                site.db.session.rollback()
        else:
            with pytest.raises(OperationalError, match=f"{count} events .* bank_events .* version of this package"):
                recorder.insert_events(events(count))
        connection.exec_driver_sql(f"ALTER SEQUENCE {SEQUENCE} INCREMENT 1")
    assert site.stored() == (2, 0)
    recorder.insert_events(events(count))
    assert site.stored() == (2 + count, 0)


@on_postgresql
def test_gap_in_a_large_save_draws_nothing(site: Site) -> None:
    """A large save that would leave a gap is refused before the gate, without losing a position."""
    recorder = recorder_of(site)
    assert recorder.insert_events(events(1)) == [1]
    with pytest.raises(IntegrityError, match="Version 5 "):
        recorder.insert_events(events(SMALL_BLOCK + 1, first=5))
    with site.app.app_context():
        with pytest.raises(IntegrityError, match="Version 5 "):
            recorder.insert_events(events(SMALL_BLOCK + 1, first=5))
        assert recorder.insert_events(events(1)) == [2]
        site.db.session.commit()


@on_postgresql
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_large_save_that_fails_leaves_no_transaction(uri: str, driver: str) -> None:
    """A large save outside of a session that has a conflict is a conflict, also if the pool rolls nothing back."""
    url = sa.make_url(uri).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}
    if "skip_autocommit_rollback" in signature(DefaultDialect).parameters:
        options["skip_autocommit_rollback"] = True
    site = make_site(url, SQLALCHEMY_ENGINE_OPTIONS=options)
    with site.app.app_context():
        recorder = site.bank.recorder
    saved = events(SMALL_BLOCK + 1)
    recorder.insert_events(saved[:1])
    for refused in (saved, events(SMALL_BLOCK + 1, first=7)):
        with pytest.raises(IntegrityError):
            recorder.insert_events(refused)
    recorder.insert_events(saved[1:])
    assert len(recorder.select_notifications(None, 1000)) == len(saved)
    site.close()


@on_postgresql
def test_table_lock_and_gate(new_site: MakeSite) -> None:
    """With the table's lock, saves of every size are stored in order."""
    site = new_site(EVENTSOURCING_POSTGRES_ORDER="table-lock")
    recorder = recorder_of(site)
    found = [list(recorder.insert_events(events(count))) for count in (1, 2, SMALL_BLOCK + 1, 1)]
    assert [position for each in found for position in each] == list(range(1, SMALL_BLOCK + 6))


# ------------------------------------------------------------------------------------- nobody keeps the gate


def interrupted_draw(url: str, how: str) -> None:
    """Draw a block that is much too large, and end that in the midst of it."""
    with server(url, isolation_level="AUTOCOMMIT") as look, server(url) as connection:
        log = KnownLog(0, SEQUENCE, None, {})
        caught: list[BaseException] = []

        def draw() -> None:
            try:
                if how == "statement_timeout":
                    connection.exec_driver_sql("SET LOCAL statement_timeout = 300")
                connection.exec_driver_sql(make_draw(log, 2_000_000_000, PATIENCE))
            except sa.exc.DBAPIError as error:
                caught.append(error)
                with suppress(sa.exc.DBAPIError):
                    connection.rollback()

        thread = threading.Thread(target=draw)
        thread.start()
        until(lambda: holders(look))
        if how != "statement_timeout":
            look.exec_driver_sql(f"SELECT {how}(%s)", (holders(look)[0],))
        thread.join()
        assert caught
        until(lambda: holders(look) == [])


@on_postgresql
@pytest.mark.parametrize("how", ["statement_timeout", "pg_cancel_backend", "pg_terminate_backend"])
def test_gate_is_open_after_a_draw_that_was_ended(site: Site, uri: str, how: str) -> None:
    """If drawing a block of positions is interrupted in any way, the gate is open at once, and appends go on."""
    site.opened()
    recorder = recorder_of(site)
    interrupted_draw(uri, how)
    for count in (1, 2, SMALL_BLOCK + 1):
        recorder.insert_events(events(count))
    assert site.stored() == (5 + SMALL_BLOCK, 0)


@pytest.mark.parametrize("how", ["statement_timeout", "pg_cancel_backend", "pg_terminate_backend"])
def test_no_other_client_of_pgbouncer_has_the_gate(postgres_url: str, pgbouncer_url: str, how: str) -> None:
    """The same holds behind a pooler that gives the connection to another client."""
    options = {"connect_args": {"prepare_threshold": None}}
    site = make_site(pgbouncer_url, SQLALCHEMY_ENGINE_OPTIONS=options)
    try:
        site.opened()
        recorder = recorder_of(site)
        interrupted_draw(pgbouncer_url, how)
        for count in (1, 2, SMALL_BLOCK + 1):
            recorder.insert_events(events(count))
        assert site.stored() == (5 + SMALL_BLOCK, 0)
        with server(postgres_url) as look:
            assert holders(look) == []
    finally:
        site.close()


@pytest.mark.parametrize("bounced", [False, True])
def test_appends_that_are_cancelled_keep_nothing(
    request: pytest.FixtureRequest, postgres_url: str, bounced: bool
) -> None:
    """Of many appends that are cancelled at random moments, none leaves the gate closed."""
    url = request.getfixturevalue("pgbouncer_url") if bounced else postgres_url
    site = make_site(url, SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"prepare_threshold": None if bounced else 5}})
    stop = threading.Event()
    cancelled: list[int] = []
    recorder = recorder_of(site)

    def write(number: int) -> None:
        chance = random.Random(number)
        while not stop.is_set():
            try:
                recorder.insert_events(events(chance.choice([1, 1, 3, SMALL_BLOCK + 1, 2000])))
            except PersistenceError:
                cancelled.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    statement = (
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND state = 'active' AND query NOT LIKE 'CREATE%%' ORDER BY random() LIMIT 1"
    )
    chance = random.Random(7)
    with server(postgres_url, isolation_level="AUTOCOMMIT") as killer:
        deadline = time.monotonic() + PATIENCE
        while len(cancelled) < 15 and time.monotonic() < deadline:
            killer.exec_driver_sql(statement, ())
            time.sleep(chance.uniform(0, 0.002))
        stop.set()
        for thread in threads:
            thread.join()
        assert holders(killer) == []
    assert len(cancelled) >= 15
    for count in (1, 2, SMALL_BLOCK + 1):
        recorder.insert_events(events(count))
    site.close()
