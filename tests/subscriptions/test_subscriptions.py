"""Subscriptions on each database: where they begin, what they leave out, how they end, and what they survive."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import Notification, StoredEvent, Subscription
from sqlalchemy import orm

from flask_eventsourcing.models import make_models
from flask_eventsourcing.persistence import Datastore, DialectOptions, SQLAlchemyApplicationRecorder, recorders
from tests.servers import ServerFolder, forget_killed_connections, restart_postgres, start_postgres

PATIENCE = 20
ALL = ["sqlite", "postgres_url", "psycopg2", "polling", "mariadb_url"]
REMOTE = ["postgres_url", "psycopg2", "polling", "mariadb_url"]
KILL = {
    "postgresql": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT concat('KILL ', id) FROM information_schema.processlist "
    "WHERE db = database() AND id <> connection_id()",
}


@contextmanager
def recorder_on(url: str, *, notify: bool = True) -> Iterator[SQLAlchemyApplicationRecorder]:
    """A recorder on fresh tables of a database."""
    engine = sa.create_engine(url, pool_pre_ping=True)
    base = orm.declarative_base()
    models = make_models(base, "Followed")
    base.metadata.create_all(engine)
    datastore = Datastore(engine, DialectOptions(postgres_notify=notify))
    yield SQLAlchemyApplicationRecorder(
        datastore, models.tables["events"], "Followed", tracking_table=models.tables["tracking"]
    )
    engine.dispose()
    forget_killed_connections()


@pytest.fixture
def recorder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLAlchemyApplicationRecorder]:
    """A recorder on the database that the test's parameter names."""
    kind: str = request.param
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path}/followed.db"
    else:
        url = request.getfixturevalue("mariadb_url" if kind == "mariadb_url" else "postgres_url")
    if kind == "psycopg2":
        url = url.replace("+psycopg", "+psycopg2")
    with recorder_on(url, notify=kind != "polling") as made:
        yield made


class Follower:
    """A thread that follows a subscription, and what it has seen."""

    def __init__(self, subscription: Subscription[SQLAlchemyApplicationRecorder]) -> None:
        self.subscription = subscription
        self.seen: list[Notification] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        for notification in self.subscription:
            with self._news:
                self.seen.append(notification)
                self._news.notify_all()

    def wait_for(self, count: int) -> list[int]:
        """Return the positions that were seen, once there are *count* of them."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.seen) >= count, PATIENCE), f"saw only {len(self.seen)}"
            return [notification.id for notification in self.seen]

    def stop(self) -> None:
        """Stop the subscription from outside, and see that the thread ends."""
        self.subscription.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@contextmanager
def following(recorder: SQLAlchemyApplicationRecorder, **options: object) -> Iterator[Follower]:
    """A follower of a recorder's log, stopped at the end."""
    with recorder.subscribe(**options) as subscription:  # type: ignore[arg-type]
        follower = Follower(subscription)  # type: ignore[arg-type]
        try:
            yield follower
        finally:
            follower.stop()


def record(recorder: SQLAlchemyApplicationRecorder, count: int, topic: str = "t:Happened") -> list[int]:
    """Record events, one at a time, and return their positions."""
    positions: list[int] = []
    for _ in range(count):
        positions.extend(recorder.insert_events([StoredEvent(uuid4(), 1, topic, b"{}")]) or ())
    return positions


@pytest.mark.parametrize("recorder", ALL, indirect=True)
def test_old_and_new_events_are_seen_once_and_in_order(recorder: SQLAlchemyApplicationRecorder) -> None:
    """A subscription yields what was recorded before it and then what is recorded while it waits."""
    before = record(recorder, 3)
    with following(recorder) as follower:
        assert follower.wait_for(3) == before
        assert follower.wait_for(0) + record(recorder, 5) == follower.wait_for(8)


@pytest.mark.parametrize("recorder", ALL, indirect=True)
def test_a_subscription_begins_after_a_position(recorder: SQLAlchemyApplicationRecorder) -> None:
    """With ``gt`` a subscription leaves out everything up to that position."""
    positions = record(recorder, 5)
    with following(recorder, gt=positions[2]) as follower:
        assert follower.wait_for(2) == positions[3:]


@pytest.mark.parametrize("recorder", ["sqlite", "postgres_url", "mariadb_url"], indirect=True)
def test_a_page_of_a_subscription_is_bounded_in_bytes(
    recorder: SQLAlchemyApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription never reads more large events at once than fit into a page, not even at its beginning."""
    monkeypatch.setattr(recorders, "PAGE_BYTES", 1)
    positions, sizes, read_log = record(recorder, 8), set[int](), recorder.read_log

    def read(*arguments: Any, **options: Any) -> Sequence[Notification]:
        page = read_log(*arguments, **options)
        sizes.add(len(page))
        return page

    monkeypatch.setattr(recorder, "read_log", read)
    with following(recorder) as follower:
        assert follower.wait_for(8) == positions
    assert sizes <= {0, 1}


@pytest.mark.parametrize("recorder", ALL, indirect=True)
def test_a_subscription_leaves_other_topics_out(recorder: SQLAlchemyApplicationRecorder) -> None:
    """With ``topics`` a subscription yields the events of these topics only."""
    record(recorder, 2, "t:Other")
    with following(recorder, topics=["t:Wanted"]) as follower:
        wanted = record(recorder, 1, "t:Wanted")
        record(recorder, 2, "t:Other")
        wanted += record(recorder, 1, "t:Wanted")
        assert follower.wait_for(2) == wanted


@pytest.mark.parametrize("recorder", ALL, indirect=True)
def test_a_waiting_subscription_is_stopped_from_another_thread(recorder: SQLAlchemyApplicationRecorder) -> None:
    """``stop()`` ends the iteration of a thread that waits for events, and stopping again does nothing."""
    with following(recorder) as follower:
        follower.wait_for(0)
        follower.stop()
        follower.stop()
    assert follower.seen == []


@pytest.mark.parametrize("recorder", REMOTE, indirect=True)
def test_a_subscription_survives_lost_connections(recorder: SQLAlchemyApplicationRecorder) -> None:
    """When the server ends its connections, a subscription continues where it was."""
    engine = recorder.datastore.engine
    with following(recorder) as follower:
        first = record(recorder, 3)
        assert follower.wait_for(3) == first
        with sa.create_engine(engine.url, poolclass=sa.pool.NullPool).connect() as connection:
            results = connection.exec_driver_sql(KILL[engine.dialect.name]).scalars().all()
            for command in results:
                if isinstance(command, str):
                    connection.exec_driver_sql(command)
        second = record(recorder, 3)
        assert follower.wait_for(6) == first + second


@pytest.mark.parametrize("recorder", REMOTE, indirect=True)
def test_a_subscription_survives_a_connection_lost_at_any_statement(recorder: SQLAlchemyApplicationRecorder) -> None:
    """Whichever statement of a reader that is behind finds its connection gone, nothing is missed, and nothing ends."""
    engine = recorder.datastore.engine
    recorder.insert_events([StoredEvent(uuid4(), 1, "topic", b"state") for _ in range(30)])
    other = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    met: set[str] = set()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def lose(connection: sa.Connection, cursor: object, statement: str, *_: object) -> None:
        if "followed_events" in statement and statement not in met:
            met.add(statement)
            with other.connect() as killer:
                for kill in killer.exec_driver_sql(KILL[engine.dialect.name]).scalars().all():
                    if isinstance(kill, str):
                        killer.exec_driver_sql(kill)

    with recorder.subscribe(gt=None) as subscription:
        assert [next(subscription).id for _ in range(30)] == list(range(1, 31))
    assert any("length(" in statement for statement in met)


def test_a_subscription_survives_a_restart_of_the_server(server_folder: ServerFolder) -> None:
    """When the database server restarts, a subscription continues where it was."""
    with (
        server_folder.private("restarted", start_postgres) as server,
        recorder_on(server.url) as recorder,
        following(recorder) as follower,
    ):
        first = record(recorder, 3)
        assert follower.wait_for(3) == first
        restart_postgres(server)
        second = record(recorder, 3)
        assert follower.wait_for(6) == first + second
