"""``init-db`` and ``check``."""

from __future__ import annotations

import click
from flask.cli import with_appcontext

from ..state import current_state
from .common import clear_errors, missing_tables, tables


@click.command("init-db")
@with_appcontext
def init_db() -> None:
    """Create the missing tables of applications, projections and their models."""
    state = current_state()
    missing = missing_tables(state)
    if not missing:
        click.echo("All tables are there.")
        return
    # In the order of their foreign keys, and only these: not what they may refer to elsewhere.
    metadatas = dict.fromkeys(table.metadata for table in missing)
    for metadata in metadatas:
        metadata.create_all(state.datastore.engine, [table for table in missing if table.metadata is metadata])
    for table in missing:
        click.echo(f"Created table {table.fullname}.")


@click.command("check")
@with_appcontext
def check() -> None:
    """Check the configuration, the connection, the tables and the logs; exits with 1 if something is wrong."""
    state = current_state()
    engine = state.datastore.engine
    click.echo(f"Database: {engine.url.render_as_string(hide_password=True)} ({engine.dialect.name}, {engine.driver})")
    click.echo(f"Commit mode: {state.config.commit}")
    missing = missing_tables(state)
    for owner, table in tables(state):
        click.echo(f"{owner}: table {table.fullname} {'is missing' if table in missing else 'ok'}")
    if missing:
        raise click.ClickException("Tables are missing: run 'flask eventsourcing init-db' or your migrations.")
    with clear_errors():
        # It is also what finds a sequence on PostgreSQL, or a standby, with which the order would not be safe.
        for application_class, application in state.applications.items():
            last = application.recorder.max_notification_id() or 0
            click.echo(f"{application_class.name}: log ok, last position {last}")
