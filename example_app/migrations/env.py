"""Runs the migrations on the database of the current Flask app; ``flask db`` calls this."""

from __future__ import annotations

import logging
from logging.config import fileConfig
from typing import TYPE_CHECKING, Any

from alembic import context
from flask import current_app

if TYPE_CHECKING:
    from collections.abc import Iterable

    from alembic.operations.ops import MigrationScript
    from alembic.runtime.migration import MigrationContext

config = context.config
if config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)
migrate = current_app.extensions["migrate"]


def skip_empty(migration: MigrationContext, revision: Iterable[str | None], directives: list[MigrationScript]) -> None:
    """Write no migration when the models and the tables agree."""
    operations = directives[0].upgrade_ops if directives else None
    if getattr(config.cmd_opts, "autogenerate", False) and operations is not None and operations.is_empty():
        directives[:] = []
        logging.getLogger("alembic.env").info("No changes in schema detected.")


def run_migrations() -> None:
    """Run the migrations, or print their SQL with ``--sql``."""
    options: dict[str, Any] = {"target_metadata": migrate.db.metadata, "process_revision_directives": skip_empty}
    options.update(migrate.configure_args)
    if context.is_offline_mode():
        url = migrate.db.engine.url.render_as_string(hide_password=False)
        context.configure(url=url, literal_binds=True, **options)
        with context.begin_transaction():
            context.run_migrations()
        return
    with migrate.db.engine.connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()


run_migrations()
