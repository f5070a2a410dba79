"""``manage.py sync_followers``, with the options and the output that eventsourcing-django has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from django.core.exceptions import (
    EmptyResultSet,
    FieldDoesNotExist,
    FieldError,
    MultipleObjectsReturned,
    ObjectDoesNotExist,
)
from django.core.management.base import BaseCommand, CommandError
from django.db import Error, transaction
from eventsourcing.domain import EventSourcingError
from eventsourcing.persistence import PersistenceError

from flask_eventsourcing.contrib.django.followers import find_runner, sync_follower
from flask_eventsourcing.contrib.django.hosting import site
from flask_eventsourcing.exceptions import ConfigurationError

FAILURES = (
    EmptyResultSet,
    Error,
    EventSourcingError,
    FieldDoesNotExist,
    FieldError,
    MultipleObjectsReturned,
    ObjectDoesNotExist,
    PersistenceError,
)
"""The errors that make one follower fail, while the others go on."""


class _DryRunError(Exception):
    """Rolls back."""


class Command(BaseCommand):
    """Brings followers up to date; exits with 1 when one of them fails."""

    help = "Synchronize follower apps with unseen events from their leader apps."
    verbosity = 1
    is_dry_run = False

    def add_arguments(self, parser: Any) -> None:
        """Declare the options."""
        parser.add_argument("args", metavar="follower", nargs="*", help="The followers to synchronize; all, if none.")
        text = "Process all unseen events of the selected followers, and roll back all changes at the end."
        parser.add_argument("-n", "--dry-run", action="store_true", help=text)

    def handle(self, *followers: str, verbosity: int, dry_run: bool, **_: Any) -> None:
        """Process the events that each follower has not seen.

        :raises CommandError: when there is no such follower, or no runner.
        """
        self.verbosity, self.is_dry_run = verbosity, dry_run
        try:
            runner = find_runner()
        except ConfigurationError as error:
            raise CommandError(str(error)) from error
        if not runner.is_started:
            runner.start()
        known = runner.system.followers
        selected = _selected(known, followers)
        self._print_header(len(selected), len(selected) == len(known))
        failed: list[str] = []
        # Events that an exception rolls back do not count as lost.
        with suppress(_DryRunError), ExitStack() as blocks:
            for using in {site().configured[name].alias for name in selected} if dry_run else ():
                blocks.enter_context(transaction.atomic(using=using))
            failed = [name for name in selected if not self._sync(runner, selected, name)]
            if dry_run:
                raise _DryRunError
        if failed:
            if verbosity == 1:
                self.stderr.write(
                    "There were errors during synchronisation, please re-run with a higher verbosity level (try: "
                    "`--verbosity 2`)."
                )
            raise SystemExit(1)

    def _sync(self, runner: Any, selected: Sequence[str], name: str) -> bool:
        position, count = selected.index(name) + 1, len(selected)
        self._print(f"[{position:{len(str(count))}d}/{count}] Synchronizing {name}...", " ")
        system = runner.system
        try:
            follower = runner.get(system.get_app_cls(name))
            counts = sync_follower(follower, system.follows[name], site().configured[name].alias)
        except FAILURES as error:
            self._print_failure(error)
            return False
        self._print_success(counts)
        return True

    def _print(self, text: str, ending: str | None = None) -> None:
        if self.verbosity:
            self.stdout.write(text, ending=ending)

    def _print_header(self, count: int, is_complete: bool) -> None:
        if self.is_dry_run:
            text = "Dry-run mode, the events will be processed but the changes will be rolled back."
            self._print(self.style.WARNING(text))
        what = "All followers" if is_complete else f"{count} follower{'' if count == 1 else 's'}"
        self._print(self.style.MIGRATE_HEADING(f"{what} selected for synchronization."))

    def _print_success(self, counts: Mapping[str, int]) -> None:
        self._print(self.style.WARNING("OK (dry-run)") if self.is_dry_run else self.style.SUCCESS("OK"))
        if self.verbosity > 1:
            for leader, count in counts.items():
                self._print(f"\t {count} event{'' if count == 1 else 's'} from {leader} processed")

    def _print_failure(self, error: Exception) -> None:
        self._print(self.style.WARNING("FAILED (dry-run)") if self.is_dry_run else self.style.ERROR("FAILED"))
        if self.verbosity > 1:
            self.stderr.write(f"\tCaught a {type(error).__name__}{f': {error}' if str(error) else '.'}")


def _selected(known: Sequence[str], requested: Iterable[str]) -> Sequence[str]:
    wanted = list(dict.fromkeys(requested))
    unknown = [each for each in wanted if each not in known]
    if unknown:
        raise CommandError(
            f"Unknown followers selected: {', '.join(unknown)}. The known followers are: {', '.join(known)}."
        )
    return wanted or list(known)
