"""The ``flask eventsourcing`` commands."""

from __future__ import annotations

import click
import sqlalchemy as sa
from flask.cli import AppGroup

from .state import EventSourcingState, current_state

group = AppGroup("eventsourcing", help="Event-sourced applications: their tables, events and projections.")


@group.command("init-db")
def init_db() -> None:
    """Create the missing tables of the event-sourced applications."""
    state = current_state()
    missing = _missing_tables(state)
    for table in missing:
        table.create(state.datastore.engine, checkfirst=True)
        click.echo(f"Created table {table.fullname}.")
    if not missing:
        click.echo("All tables are there.")


@group.command("check")
def check() -> None:
    """Check the configuration, the connection and the tables; exits with 1 if something is missing."""
    state = current_state()
    engine = state.datastore.engine
    click.echo(f"Database: {engine.url.render_as_string(hide_password=True)} ({engine.dialect.name}, {engine.driver})")
    click.echo(f"Commit mode: {state.config.commit}")
    missing = _missing_tables(state)
    for name, models in state.models.items():
        for table in models.tables.values():
            click.echo(f"{name}: table {table.fullname} {'is missing' if table in missing else 'ok'}")
    if missing:
        raise click.ClickException("Tables are missing: run 'flask eventsourcing init-db' or your migrations.")


def _tables(state: EventSourcingState) -> list[sa.Table]:
    return [table for models in state.models.values() for table in models.tables.values()]


def _missing_tables(state: EventSourcingState) -> list[sa.Table]:
    try:
        inspector = sa.inspect(state.datastore.engine)
        return [table for table in _tables(state) if not inspector.has_table(table.name, schema=table.schema)]
    except sa.exc.SQLAlchemyError as error:
        raise click.ClickException(f"The database cannot be reached: {error}") from error
