"""``manage.py import_eventsourcing_django``: take over what eventsourcing-django has stored."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from flask_eventsourcing.contrib.django.imports import import_eventsourcing_django
from flask_eventsourcing.exceptions import FlaskEventSourcingError


class Command(BaseCommand):
    """Takes the tables over, and prints a line for each application."""

    help = "Take over the tables stored_events, snapshots and notification_tracking of eventsourcing-django."
    requires_system_checks = ()

    def add_arguments(self, parser: Any) -> None:
        """Declare the options."""
        parser.add_argument("applications", nargs="*", metavar="APPLICATION", help="By default all in the tables.")
        parser.add_argument("--database", metavar="ALIAS", default="default", help="Where the tables are.")
        parser.add_argument("-n", "--dry-run", action="store_true", help="Take over, check, and roll back.")

    def handle(self, *_: Any, applications: list[str], database: str, dry_run: bool, **__: Any) -> None:
        """Take them over.

        :raises CommandError: when one of the applications cannot be taken over; those before it are.
        """
        try:
            for each in import_eventsourcing_django(*applications, using=database, dry_run=dry_run):
                how = "would be taken over" if dry_run else "are there already" if each.was_there else "taken over"
                self.stdout.write(
                    f"{each.application}: {each.events} events up to position {each.position}, {each.snapshots} "
                    f"snapshots, positions of {each.tracking} applications: {how}, each compared and read."
                )
        except FlaskEventSourcingError as error:
            raise CommandError(str(error)) from error
