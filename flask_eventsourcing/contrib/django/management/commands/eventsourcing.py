"""``manage.py eventsourcing …``: the commands of ``flask eventsourcing``, by the same names, with the same output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand
from django.core.management.base import CommandError as DjangoCommandError
from django.db import connections
from django.db.migrations.recorder import MigrationRecorder

from flask_eventsourcing.commands import (
    CommandError,
    PlainOutput,
    Subject,
    UsageError,
    aggregates,
    checkpoints,
    letters,
    reports,
    work,
)
from flask_eventsourcing.contrib.django.hosting import site
from flask_eventsourcing.contrib.django.projecting import projections
from flask_eventsourcing.exceptions import ConfigurationError

MIGRATE = "In a Django project, tables are made by migrations: run 'manage.py makemigrations' and 'manage.py migrate'."


def _flag(parser: Any, name: str, text: str, **options: Any) -> None:
    parser.add_argument(name, action="store_true", help=text, **options)


def _application(parser: Any) -> None:
    parser.add_argument("--application", metavar="NAME", help="Where there are several applications.")


def _reason(parser: Any, *, required: bool = False) -> None:
    parser.add_argument("--by", metavar="WHO", help="Who does it; the user of the operating system unless given.")
    parser.add_argument("--reason", metavar="WHY", default="", required=required, help="Why, as the status tells it.")


def _init_db(subject: Subject, output: PlainOutput) -> int:
    """Make the tables that another site had no use for, so that ``migrate --fake-initial`` finds all of them.

    :raises CommandError: where there are none of another site's, or migrations have made some.
    """
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


class Command(BaseCommand):
    """Reads the command line and calls what stands in ``flask_eventsourcing.commands``."""

    help = "Event-sourced applications: their tables, events and projections."
    requires_system_checks = ()

    def add_arguments(self, parser: Any) -> None:
        """Declare the commands and their options."""
        parser.add_argument("--database", metavar="ALIAS", help="Where applications are in several databases.")
        commands = _Group(parser)
        commands.add("init-db", _init_db, "Add the tables that another site has left out; all others are migrations'.")
        commands.add("check", reports.check, "Check the connection, the tables and the logs.")
        self._add_work(commands)
        self._add_letters(commands.group("dead-letters", "Events that projections have set aside."))
        self._add_checkpoints(commands.group("projections", "Checkpoints of projections."))
        reset = commands.group("reactions", "What is done with reactions.").add(
            "reset", checkpoints.reset_reactions, "Have reactions called again, or go on from a position or a time."
        )
        reset.add_argument("name")
        reset.add_argument("--position", type=int, metavar="N", help="Go on with the event behind it.")
        reset.add_argument("--since", metavar="TIME", help="Go on with the first event of a time in ISO format.")
        _reason(reset)
        _flag(reset, "--yes", "Do not ask.")
        identity = commands.add("new-identity", checkpoints.new_identity, "Give the log an identity of its own.")
        _application(identity)
        self._add_aggregates(commands)

    def _add_work(self, commands: _Group) -> None:
        run = commands.add("run", work.run, "Run projections and reactions by their names, or all.")
        run.add_argument("names", nargs="*", metavar="NAME")
        _flag(run, "--all", "Run every projection and every reaction, as without a name.", dest="everything")
        _flag(run, "--once", "End when all have reached the end of the log.")
        run.add_argument("--log-every", type=float, default=work.LOG_EVERY, metavar="SECONDS")
        status = commands.add("status", reports.status, "Tell how far each projection is, and what is wrong.")
        _flag(status, "--json", "Print JSON.", dest="as_json")
        _flag(status, "--check", "Exit with 1 unless all are run and nothing was set aside.")

    def _add_letters(self, group: _Group) -> None:
        listed = group.add("list", letters.list_letters, "List the dead letters by projection.")
        listed.add_argument("--aggregate", metavar="ID", help="Only those of an aggregate.")
        listed.add_argument("--limit", type=int, metavar="N", help="The most that are listed.")
        shown = group.add("show", letters.show_letter, "Show a dead letter with its traceback.")
        shown.add_argument("letter_id", type=int, metavar="ID")
        retried = group.add("retry", letters.retry_letters, "Apply events again, with those that wait behind them.")
        retried.add_argument("ids", nargs="*", type=int, metavar="ID")
        _flag(retried, "--all", "Retry all of them.", dest="everything")
        discarded = group.add("discard", letters.discard_letters, "Give failed events up.")
        discarded.add_argument("ids", nargs="+", type=int, metavar="ID")
        _flag(discarded, "--yes", "Do not ask.")
        for each in (listed, shown, retried, discarded):
            each.add_argument("--projection", metavar="NAME", help="Only those of a projection.")
        for each in (listed, shown):
            _flag(each, "--json", "Print JSON.", dest="as_json")

    def _add_checkpoints(self, group: _Group) -> None:
        listed = group.add("list", checkpoints.list_checkpoints, "List the checkpoints that the database has.")
        _flag(listed, "--json", "Print JSON.", dest="as_json")
        renamed = group.add("rename", checkpoints.rename, "Give what projection OLD has to NEW.")
        renamed.add_argument("old")
        renamed.add_argument("new")
        _application(renamed)
        forgotten = group.add("forget", checkpoints.forget, "Delete what a projection has that is not registered.")
        forgotten.add_argument("name")
        _flag(forgotten, "--yes", "Do not ask.")
        _application(forgotten)
        group.add("accept", checkpoints.accept, "Take log, tables and code as they are now.").add_argument("name")
        for name, command in (("pause", checkpoints.pause), ("resume", checkpoints.resume)):
            changed = group.add(name, command, f"{name.capitalize()} a projection, or its reactions.")
            changed.add_argument("name")
            _reason(changed)
        skipped = group.add("skip", checkpoints.skip, "Set the event aside before which a projection is halted.")
        skipped.add_argument("name")
        skipped.add_argument("position", type=int)
        _reason(skipped, required=True)

    def _add_aggregates(self, commands: _Group) -> None:
        erased = commands.add("erase", aggregates.erase_aggregate, "Erase an aggregate, as a person may ask for.")
        erased.add_argument("aggregate_id")
        _flag(erased, "--redact", "Empty the events, rather than delete their rows.")
        _flag(erased, "--yes", "Do not ask.")
        _application(erased)
        group = commands.group("snapshots", "Snapshots of aggregates.")
        for name, command in (("take", aggregates.take_snapshots), ("drop", aggregates.drop_snapshots)):
            each = group.add(name, command, f"{name.capitalize()} the snapshot of an aggregate, or of all.")
            each.add_argument("aggregate_id", nargs="?")
            _flag(each, "--all", "Of every aggregate.", dest="everything")
            _application(each)

    def handle(self, *_: Any, database: str | None, called: Any, own: Any, **options: Any) -> None:
        """Call a command.

        :raises CommandError: of Django's, when the command fails; with its exit status.
        """
        given = {name: options[name] for name in own}
        if called is work.run:
            given["everything"] = given["everything"] or not given["names"]
        try:
            subject = projections().subject(_alias(database))
            exit_status = called(subject, PlainOutput(self.stdout), **given)
        except (ConfigurationError, UsageError, CommandError) as error:
            status = error.exit_status if isinstance(error, CommandError) else 1
            raise DjangoCommandError(str(error), returncode=status) from error
        if exit_status:
            raise SystemExit(exit_status)


class _Group:
    """Commands within a parser of the command line's."""

    def __init__(self, parser: Any) -> None:
        self._commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(self, name: str, called: Callable[..., int], text: str) -> Any:
        """Add a command, and return its parser."""
        parser = self._commands.add_parser(name, help=text, description=text)
        parser.set_defaults(called=called, own=_Own(parser))
        return parser

    def group(self, name: str, text: str) -> _Group:
        """Add a group of commands."""
        return _Group(self._commands.add_parser(name, help=text, description=text))


class _Own:
    """The names of a command's own options, beside those that every command of Django's has."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._before = {each.dest for each in parser._actions}

    def __iter__(self) -> Any:
        return iter([each.dest for each in self._parser._actions if each.dest not in self._before])


def _alias(given: str | None) -> str:
    aliases = list(site().databases)
    if given is None and len(aliases) == 1:
        return aliases[0]
    if given not in aliases:
        raise UsageError(f"Say in which database: --database {' or --database '.join(aliases)}.")
    return given
