"""A large table of events gets the columns of metadata while writers write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.integration.test_migrate import APP, ROOT, flask

PROCESSES, THREADS = 2, 4
LOCK_TIMEOUT = 20
"""Seconds; a writer who would wait longer gets an error, which the test finds."""
COLUMNS = {
    "bank_events": ["event_id", "recorded_at", "metadata", "correlation_id"],
    "bank_snapshots": ["event_id", "metadata"],
}
SETTINGS = {
    "FLASK_EVENTSOURCING_LOCK_TIMEOUT": str(LOCK_TIMEOUT),
    "FLASK_EVENTSOURCING_CORRELATION_INDEX": "true",
}
FILL = {
    "sqlite": (
        "INSERT INTO bank_events (originator_id, originator_version, topic, state) "
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows) "
        "SELECT printf('%032x', i), 1, 'topic', zeroblob(100) FROM n"
    ),
    "postgresql": (
        "INSERT INTO bank_events (originator_id, originator_version, topic, state) "
        "SELECT CAST(lpad(to_hex(i), 32, '0') AS uuid), 1, 'topic', CAST(repeat('0', 100) AS bytea) "
        "FROM generate_series(1, :rows) AS i"
    ),
    "mysql": (
        "INSERT INTO bank_events (notification_id, originator_id, originator_version, topic, state) "
        "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < :rows) "
        "SELECT i, LPAD(HEX(i), 32, '0'), 1, 'topic', REPEAT('0', 100) FROM n"
    ),
}
WRITER = f"""
import sys, threading
from uuid import uuid4
from eventsourcing.persistence import StoredEvent
from bank import app, db, es

stopped, told, failed = threading.Event(), [], []

# With MariaDB, a change of the table may be a deadlock for a writer, which is a conflict.
@es.retry_on_conflict(times=10)
def save(account, version):
    es.application.recorder.insert_events([StoredEvent(account, version, "topic", b"state")])

def write():
    while not stopped.is_set():
        with app.app_context():
            account = uuid4()
            try:
                for version in (1, 2):
                    save(account, version)
                    told.append((account.hex, version))
            except Exception as error:
                failed.append(repr(error))

threads = [threading.Thread(target=write) for _ in range({THREADS})]
for each in threads:
    each.start()
while len(told) < 20 and not failed:
    stopped.wait(0.01)
print("ready", flush=True)
sys.stdin.read()
stopped.set()
for each in threads:
    each.join()
for error in failed:
    print("failed", error)
for account, version in told:
    print(account, version)
"""


@contextmanager
def writing(folder: Path, uri: str) -> Iterator[list[str]]:
    """Have writers at work, and at the end the lines that they have printed."""
    env = {**os.environ, **SETTINGS, "TEST_URI": uri, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    lines: list[str] = []
    try:
        lines += [each.stdout.readline().strip() for each in started if each.stdout is not None]
        yield lines
    finally:
        for each in started:
            output, errors = each.communicate()
            lines += output.splitlines()
            if each.returncode:
                lines.append(f"failed {errors}")


def columns_come(database: str, url: str, folder: Path, rows: int) -> None:
    """Migrate a table with so many rows while writers write."""
    (folder / "bank.py").write_text(APP)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    flask(folder, url, "db init", "eventsourcing init-db")
    with engine.begin() as connection:
        for table, names in COLUMNS.items():
            for name in names:
                connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")
        if database == "mysql":
            connection.exec_driver_sql(f"SET max_recursive_iterations = {rows + 1}")
        connection.execute(sa.text(FILL[database]), {"rows": rows})
    flask(folder, url, "db migrate -m metadata", **SETTINGS)
    if database == "postgresql":
        options = {"options": f"-c lock_timeout={LOCK_TIMEOUT}s"}
        url = sa.make_url(url).update_query_dict(options).render_as_string(hide_password=False)
    with writing(folder, url) as lines:
        flask(folder, url, "db upgrade", **SETTINGS)
    assert lines[:PROCESSES] == ["ready"] * PROCESSES
    assert [line for line in lines if line.startswith("failed")] == []
    told = {tuple(line.split()) for line in lines[PROCESSES:]}
    flask(folder, url, "db check", **SETTINGS)
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            f"SELECT originator_id, originator_version FROM bank_events WHERE notification_id > {rows}"
        ).all()
        stored = {(str(account).replace("-", ""), str(version)) for account, version in found}
        assert told <= stored
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM bank_events").scalar() == rows + len(stored)
    with writing(folder, url):
        pass
    with engine.connect() as connection:
        statement = f"SELECT COUNT(*) FROM bank_events WHERE notification_id > {rows} AND correlation_id IS NOT NULL"
        assert connection.exec_driver_sql(statement).scalar()


DATABASES = pytest.mark.parametrize("database", ["sqlite", "postgresql", "mysql"])


def url_of(database: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the address of an empty database."""
    if database == "sqlite":
        return f"sqlite:///{folder / 'bank.db'}"
    url: str = request.getfixturevalue("mariadb_url" if database == "mysql" else "postgres_url")
    return url


@DATABASES
def test_columns_come_under_writers(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Writers go on while a generated migration adds columns and an index: none fails, and nothing is lost."""
    columns_come(database, url_of(database, request, tmp_path), tmp_path, 10_000)


@pytest.mark.torture
@DATABASES
def test_a_million_rows(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same holds for a table of a million rows."""
    columns_come(database, url_of(database, request, tmp_path), tmp_path, 1_000_000)
