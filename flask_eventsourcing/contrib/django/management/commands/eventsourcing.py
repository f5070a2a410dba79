"""``manage.py eventsourcing …``: the commands of ``flask eventsourcing``, by the same names, with the same output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand
from django.core.management.base import CommandError as DjangoCommandError
from django.db import connections
from django.db.migrations.recorder import MigrationRecorder

from flask_eventsourcing.applications.apart import EventStore
from flask_eventsourcing.commands import (
    CommandError,
    PlainOutput,
    Subject,
    UsageError,
    clear_errors,
    reports,
    work,
)
from flask_eventsourcing.commands.listing import COMMANDS
from flask_eventsourcing.commands.parsing import add_commands
from flask_eventsourcing.contrib.django.hosting import site
from flask_eventsourcing.contrib.django.projecting import projections
from flask_eventsourcing.exceptions import ConfigurationError

MIGRATE = "In a Django project, tables are made by migrations: run 'manage.py makemigrations' and 'manage.py migrate'."


def _init_db(subject: Subject, output: PlainOutput) -> int:
    """Make the tables that a site on another host has not made, so that ``migrate --fake-initial`` finds all of them.

    :raises CommandError: when there are no tables of another host, or migrations have made some.
    """
    if subject.store is not None:
        return _init_store(subject.store, output)
    (database,) = [each for each in site().databases.values() if each.datastore is subject.datastore]
    connection: Any = connections[database.alias]
    there = set(connection.introspection.table_names())
    applied = {app for app, _ in MigrationRecorder(connection).applied_migrations()}
    found = [
        (records.name, model)
        for records in database.records.values()
        if any(each._meta.db_table in there for each in records.models)
        for model in records.models
        if model._meta.db_table not in there and model._meta.app_label not in applied
    ]
    if not found:
        raise CommandError(MIGRATE)
    with connection.schema_editor() as editor:
        for name, model in found:
            editor.create_model(model)
            output.write(f"{name}: created table {model._meta.db_table}")
    output.write("Run 'manage.py migrate --fake-initial' now.")
    return 0


def _init_store(store: EventStore, output: PlainOutput) -> int:
    """Make the tables of events that are apart. Migrations make the tables of projections."""
    with clear_errors():
        made = store.create_tables()
    for name in made:
        output.write(f"Created table {name}.")
    if not made:
        output.write("All tables are there.")
    return 0


def _run(subject: Subject, output: PlainOutput, *, names: Any, everything: bool, **options: Any) -> int:
    """Run the named projections, or all."""
    return work.run(subject, output, names, everything=everything or not names, **options)


OWN: dict[Callable[..., int], Callable[..., int]] = {reports.init_db: _init_db, work.run: _run}
"""The functions that replace those of the list of commands here."""


class Command(BaseCommand):
    """Reads the command line and calls what stands in ``flask_eventsourcing.commands``."""

    help = COMMANDS.help
    requires_system_checks = ()

    def add_arguments(self, parser: Any) -> None:
        """Declare the commands and their options."""
        parser.add_argument("--database", metavar="ALIAS", help="Where applications are in several databases.")
        add_commands(parser, COMMANDS)

    def handle(self, *_: Any, database: str | None, **options: Any) -> None:
        """Call a command.

        :raises CommandError: of Django's, when the command fails; with its exit status.
        """
        listed = options["listed"]
        called = OWN.get(listed.called, listed.called)
        try:
            given = listed.options(options)
            exit_status = called(projections().subject(_alias(database)), PlainOutput(self.stdout), **given)
        except (ConfigurationError, UsageError, CommandError) as error:
            status = error.exit_status if isinstance(error, CommandError) else 1
            raise DjangoCommandError(str(error), returncode=status) from error
        if exit_status:
            raise SystemExit(exit_status)


def _alias(given: str | None) -> str:
    places = list(dict.fromkeys(each.place for each in site().configured.values()))
    if given is None and len(places) == 1:
        return places[0]
    if given not in places:
        raise UsageError(f"Say in which database: --database {' or --database '.join(places)}.")
    return given
