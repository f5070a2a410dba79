"""Flask-Migrate finds, creates and then leaves alone the three tables."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.integration.marks import on_a_file_first, on_files

ROOT = Path(__file__).parents[2]
PLUGIN = "flask_eventsourcing.contrib.alembic"
APP = """
import os
from eventsourcing.application import Application
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from flask_eventsourcing import EventSourcing

class Bank(Application): pass

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["TEST_URI"]
app.config.from_prefixed_env()
db = SQLAlchemy(app)
es = EventSourcing(app, db=db, application=Bank)
migrate = Migrate(app, db)
"""
COMMANDS = """
import sys
from bank import app

for command in sys.argv[1:]:
    result = app.test_cli_runner().invoke(args=command.split(), catch_exceptions=False)
    print(result.output)
    if result.exit_code:
        sys.exit(result.exit_code)
"""
TABLES = {"bank_events", "bank_snapshots", "bank_tracking"}


def flask(folder: Path, uri: str, *commands: str, **environment: str) -> str:
    """Run commands of the app in a folder, one after another in one process, and return what they print."""
    return python(folder, uri, COMMANDS, *commands, **environment)


def python(folder: Path, uri: str, code: str, *arguments: str, **environment: str) -> str:
    """Run a program beside the app and return what it prints."""
    env = {**os.environ, "TEST_URI": uri, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an app in it."""
    found = {point.value for point in entry_points(group="alembic.plugins")}
    assert PLUGIN in found, "install the package: pip install -e ."
    (tmp_path / "bank.py").write_text(APP)
    return tmp_path


def inspect(uri: str, schema: str | None = None) -> set[str]:
    """Return the tables of a database."""
    engine = sa.create_engine(uri, poolclass=sa.NullPool)
    return set(sa.inspect(engine).get_table_names(schema=schema)) - {"alembic_version"}


@on_files
def test_autogenerate_creates_the_tables_and_then_finds_nothing(uri: str, folder: Path) -> None:
    """The first autogenerate creates the three tables, runs as it was generated, and the second finds nothing."""
    flask(folder, uri, "db init", "db migrate -m first")
    versions = folder / "migrations" / "versions"
    (generated,) = versions.glob("*_first.py")
    text = generated.read_text()
    assert text.count("op.create_table(") == 3
    assert inspect(uri) == set()
    flask(folder, uri, "db upgrade")
    assert inspect(uri) == TABLES
    assert "No changes in schema detected" in flask(folder, uri, "db migrate -m second")
    assert list(versions.glob("*.py")) == [generated]
    # After a migrate in the same process, Flask-Migrate has nothing to check.
    flask(folder, uri, "eventsourcing check", "db check", "db downgrade base")
    assert inspect(uri) == set()


@on_a_file_first
def test_tables_of_init_db_need_no_migration(uri: str, folder: Path) -> None:
    """Tables that ``flask eventsourcing init-db`` created are those that the migration would create."""
    output = flask(folder, uri, "db init", "eventsourcing init-db", "db migrate -m first")
    assert "No changes in schema detected" in output


@on_a_file_first
def test_text_ids_settle_too(uri: str, folder: Path) -> None:
    """With text ids, too, the second autogenerate finds nothing."""
    text_ids = {"FLASK_EVENTSOURCING_ORIGINATOR_ID_TYPE": '"text"'}
    output = flask(folder, uri, "db init", "db migrate -m first", "db upgrade", "db migrate -m second", **text_ids)
    assert inspect(uri) == TABLES
    assert "No changes in schema detected" in output


@on_a_file_first
def test_tables_of_rebuilds_are_left_alone(uri: str, folder: Path) -> None:
    """Autogenerate does not drop tables that a rebuild has replaced or is building."""
    flask(folder, uri, "db init", "eventsourcing init-db")
    engine = sa.create_engine(uri, poolclass=sa.NullPool)
    with engine.begin() as connection:
        for suffix in ("__old", "__new", "__trial0a1b"):
            connection.exec_driver_sql(f"CREATE TABLE bank_events{suffix} (id INTEGER PRIMARY KEY)")
            connection.exec_driver_sql(f"CREATE INDEX by_id{suffix} ON bank_events{suffix} (id)")
        connection.exec_driver_sql("CREATE TABLE somebody__old (id INTEGER PRIMARY KEY)")
    flask(folder, uri, "db migrate -m first")
    (generated,) = (folder / "migrations" / "versions").glob("*_first.py")
    text = generated.read_text()
    assert "op.drop_table('somebody__old')" in text
    assert "bank_events" not in text


@on_a_file_first
def test_columns_of_metadata_are_added_to_a_table_with_events(uri: str, folder: Path) -> None:
    """Autogenerate adds the columns to a table from before, with nothing else, and its events stay what they are."""
    flask(folder, uri, "db init", "eventsourcing init-db")
    engine = sa.create_engine(uri, poolclass=sa.NullPool)
    columns = {"bank_events": ["event_id", "recorded_at", "metadata", "correlation_id"]}
    columns["bank_snapshots"] = ["event_id", "metadata"]
    with engine.begin() as connection:
        for table, names in columns.items():
            for name in names:
                connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")
    save = (
        "from uuid import uuid4; from eventsourcing.persistence import StoredEvent; from bank import app, db, es\n"
        "with app.app_context(), es.event_metadata(a='1'):\n"
        "    es.application.recorder.insert_events([StoredEvent(uuid4(), 1, 'topic', b'')]); db.session.commit()"
    )
    python(folder, uri, save)
    indexed = {"FLASK_EVENTSOURCING_CORRELATION_INDEX": "true"}
    flask(folder, uri, "db migrate -m first", **indexed)
    (generated,) = (folder / "migrations" / "versions").glob("*_first.py")
    text = generated.read_text().partition("def downgrade")[0]
    assert (text.count(".add_column("), text.count(".create_index("), text.count(".alter_column(")) == (6, 1, 0)
    assert "drop" not in text
    assert "is missing" not in flask(folder, uri, "db upgrade", "db check", "eventsourcing check", **indexed)
    python(folder, uri, save)
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT notification_id, correlation_id FROM bank_events").all()
        assert [row[0] for row in found] == [1, 2]
        assert [row[1] is None for row in found] == [True, False]
        if engine.dialect.name == "sqlite":
            sql = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'bank_events'").scalar_one()
            assert "AUTOINCREMENT" in sql
