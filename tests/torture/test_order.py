"""No reader of the log skips an event, and the test that says so is known to notice when one does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from eventsourcing.persistence import StoredEvent

from tests.torture.log_under_load import Observations, under_load
from tests.torture.writing_hosts import HOSTS

DATABASES = ["postgres_url", "mariadb_url"]


def check(observed: Observations) -> None:
    """Check that nothing was skipped, doubled, disordered or torn, and that enough was going on."""
    assert observed.skipped() == {}
    assert observed.disorder() == []
    assert observed.torn() == []
    assert observed.surprises == []
    assert min(observed.counts[what] for what in ("committed", "rolled back", "conflict")) > 0
    assert len(observed.stored) > observed.counts["committed"]


def without_protection(recorder: Any) -> None:
    """Read without a high-water mark on PostgreSQL, and let the database draw the positions on MariaDB."""
    dialect = recorder.dialect
    dialect.high_water_mark = lambda *args, **kwargs: None
    if dialect.engine.dialect.name == "mysql":

        def append(connection: Any, table: Any, events: Sequence[StoredEvent], beside: Any) -> list[int]:
            statement = dialect.insert_statement(table)
            return [int(dialect.modify(connection, statement, table.row(event)).lastrowid) for event in events]

        dialect.append = append


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("database", DATABASES)
def test_nothing_is_skipped(database: str, host: str, request: pytest.FixtureRequest) -> None:
    """Readers see every stored event once and in order while writers pause, collide, roll back and are killed."""
    # Writers on MariaDB take turns, so shorter pauses and more time let as much happen.
    pause, seconds = (0.02, 6) if database == "postgres_url" else (0.004, 10)
    with under_load(request.getfixturevalue(database), seconds=seconds, longest_pause=pause, host=host) as load:
        check(load.run())
        assert load.observations.counts["kills"] > 0


def test_nothing_is_skipped_behind_pgbouncer(pgbouncer_url: str) -> None:
    """The same holds behind a PgBouncer in transaction mode, where each transaction may get another connection."""
    options = {"connect_args": {"prepare_threshold": None}}
    with under_load(pgbouncer_url, seconds=6, engine_options=options, kills=False) as load:
        check(load.run())


@pytest.mark.torture
@pytest.mark.parametrize("database", DATABASES)
def test_nothing_is_skipped_in_a_minute(database: str, request: pytest.FixtureRequest) -> None:
    """The same holds for a minute."""
    with under_load(request.getfixturevalue(database), seconds=60) as load:
        check(load.run())


@pytest.mark.long
@pytest.mark.parametrize("database", DATABASES)
def test_the_load_finds_skips_without_protection(database: str, request: pytest.FixtureRequest) -> None:
    """With the protection switched off the same load makes readers skip events, so its silence means something."""
    with under_load(request.getfixturevalue(database), seconds=4, unprotected=without_protection) as load:
        assert load.run().skipped()
