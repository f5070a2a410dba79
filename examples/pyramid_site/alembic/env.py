"""Runs the migrations on the database of the ini file; it imports the models, and no settings."""

from __future__ import annotations

from alembic import context
from sqlalchemy import engine_from_config

from examples.pyramid_site.models import Base

section = context.config.get_section(context.config.config_ini_section) or {}


def run() -> None:
    """Run the migrations, or print their SQL with ``--sql``."""
    if context.is_offline_mode():
        context.configure(url=section["sqlalchemy.url"], target_metadata=Base.metadata, literal_binds=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    engine = engine_from_config(section, prefix="sqlalchemy.")
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


run()
