"""The list of all commands, with their parameters and help, for each front that reads a command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..metadata.values import is_storable
from ..persistence.dialects.event_values import LARGEST
from . import UsageError, aggregates, checkpoints, letters, reports, work

NOTES = ("by", "reason")
"""Parameters that may be any text. Characters that no database takes are stored as escapes."""


@dataclass(frozen=True)
class Parameter:
    """An argument, or an option, whose name begins with dashes.

    :param name: its name on the command line.
    :param help: the help of an option.
    :param dest: the parameter of the function; by default made of the name.
    :param kind: its type; ``bool`` is a flag.
    :param metavar: the word for its value in the help. If an argument takes several values, it ends with three dots.
    :param required: whether it must be given.
    :param least: the least number. A ``float`` must be greater.
    """

    name: str
    help: str = ""
    dest: str = ""
    kind: type = str
    metavar: str | None = None
    default: Any = None
    required: bool = False
    least: int | None = None

    @property
    def is_option(self) -> bool:
        """Whether it has a name on the command line."""
        return self.name.startswith("-")

    @property
    def many(self) -> bool:
        """Whether an argument takes several."""
        return self.metavar is not None and self.metavar.endswith("...")

    @property
    def single(self) -> str:
        """The word for one value of an argument."""
        return (self.metavar or self.name.upper()).removesuffix("...")

    @property
    def destination(self) -> str:
        """The parameter of the function."""
        return self.dest or self.name.lstrip("-").replace("-", "_")

    def check(self, value: Any) -> None:
        """Check a value that was read from the command line.

        :raises UsageError: for a value that no database takes.
        """
        shown = self.name if self.is_option else self.single
        if isinstance(value, tuple | list):
            for each in value:
                self.check(each)
        elif isinstance(value, str) and not (self.destination in NOTES or is_storable(value)):
            raise UsageError(f"{shown} is no text in the encoding of the command line.")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise UsageError(f"{shown} is a number up to {LARGEST}; {value} is beyond it.")
        elif isinstance(value, float) and math.isnan(value):
            raise UsageError(f"{shown} is a number; found nan.")


@dataclass(frozen=True)
class Command:
    """A command.

    :param called: with a subject, an output, and the parameters by name; returns the exit status.
    """

    name: str
    called: Callable[..., int]
    help: str
    parameters: Sequence[Parameter] = ()

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for its function, among all that were read from the command line.

        :raises UsageError: for a value that no database takes.
        """
        found = {each.destination: given[each.destination] for each in self.parameters}
        for each in self.parameters:
            each.check(found[each.destination])
        return found


@dataclass(frozen=True)
class Group:
    """Commands whose names begin with the same word."""

    name: str
    help: str
    commands: Sequence[Command | Group]

    def paths(self) -> Iterator[tuple[str, Command]]:
        """Iterate over all commands, each with the words by which it is called."""
        for each in self.commands:
            if isinstance(each, Command):
                yield each.name, each
            else:
                yield from ((f"{each.name} {words}", command) for words, command in each.paths())


def _argument(name: str, **options: Any) -> Parameter:
    return Parameter(name, required=True, **options)


def _flag(name: str, text: str, dest: str = "") -> Parameter:
    return Parameter(name, text, dest, bool, default=False)


NAME = _argument("name")
YES = _flag("--yes", "Do not ask.")
AS_JSON = _flag("--json", "Print JSON.", "as_json")
APPLICATION = Parameter("--application", "The application; needed only if there are several.", metavar="NAME")
OF_PROJECTION = Parameter("--projection", "Only those of this projection.", metavar="NAME")
BY = Parameter("--by", "The operator; by default the user of the operating system.", metavar="WHO")
REASON = Parameter("--reason", "The reason, which 'status' shows.", metavar="WHY", default="")
EVERY = _flag("--all", "Do it for every aggregate.", "everything")
AGGREGATE = Parameter("aggregate_id")

RUN = """Run projections and reactions by their names.

NAME is a projection, which runs with its reactions, or only its reactions, such as Balances:reactions. One process at a
time runs each of them; others stand by and take over. SIGTERM and Ctrl-C finish the batch in progress."""
REBUILD = """Build new tables of projection NAME beside the live ones, and replace these with them.

Readers and the live projection continue meanwhile. A rebuild that was stopped or killed continues where it was. In a
Django project the rows are written again in one transaction instead, and the live projection waits."""
ERASE = """Erase the events, snapshots and dead letters of an aggregate, for example on a person's request.

A last event without content stays in the log. It tells projections of the erasure, and reserves the id."""

_DEAD_LETTERS = Group(
    "dead-letters",
    "Events that projections have set aside, and those that wait behind them.",
    (
        Command(
            "list",
            letters.list_letters,
            "List the dead letters by projection, in the order of the log.",
            (
                OF_PROJECTION,
                Parameter("--aggregate", "Only those of this aggregate.", metavar="ID"),
                Parameter("--limit", "List at most N.", kind=int, metavar="N", least=1),
                AS_JSON,
            ),
        ),
        Command(
            "show",
            letters.show_letter,
            "Show a dead letter with its traceback.",
            (_argument("letter_id", metavar="ID", kind=int), OF_PROJECTION, AS_JSON),
        ),
        Command(
            "retry",
            letters.retry_letters,
            "Apply failed events again, and then those that wait behind them; exit with 1 if one fails again.",
            (
                Parameter("ids", metavar="ID...", kind=int),
                _flag("--all", "Retry all of them.", "everything"),
                OF_PROJECTION,
            ),
        ),
        Command(
            "discard",
            letters.discard_letters,
            "Give failed events up, and apply those that wait behind them; exit with 1 if one of these fails.",
            (_argument("ids", metavar="ID...", kind=int), YES, OF_PROJECTION),
        ),
    ),
)

_PROJECTIONS = Group(
    "projections",
    "The checkpoints of projections, including those that are not registered.",
    (
        Command("list", checkpoints.list_checkpoints, "List the checkpoints that the database has.", (AS_JSON,)),
        Command(
            "rename",
            checkpoints.rename,
            "Give NEW what projection OLD has: its position, that of its reactions, its dead letters.",
            (_argument("old"), _argument("new"), APPLICATION),
        ),
        Command(
            "forget",
            checkpoints.forget,
            "Delete the checkpoints and dead letters of projection NAME, which is not registered any more.",
            (NAME, YES, APPLICATION),
        ),
        Command(
            "accept",
            checkpoints.accept,
            "Accept log, tables and code of NAME as they are now, although its checkpoint does not fit them.",
            (NAME,),
        ),
        Command(
            "pause",
            checkpoints.pause,
            "Keep every worker from running NAME, a projection or its reactions, until it is resumed.",
            (NAME, BY, REASON),
        ),
        Command(
            "resume",
            checkpoints.resume,
            "Let NAME continue if it is paused, or try its event again if it has halted.",
            (NAME, BY, REASON),
        ),
        Command(
            "skip",
            checkpoints.skip,
            "Set aside the event at POSITION, at which NAME has halted. It becomes a dead letter, and NAME continues.",
            (
                NAME,
                _argument("position", kind=int, least=1),
                replace(REASON, help="The reason, which the dead letter keeps.", default=None, required=True),
                BY,
            ),
        ),
    ),
)

_REACTIONS = Group(
    "reactions",
    "Work on reactions.",
    (
        Command(
            "reset",
            checkpoints.reset_reactions,
            "Move the reactions of projection NAME to a position or a time, from which they are called again.",
            (
                NAME,
                Parameter("--position", "Continue with the event after this position.", kind=int, metavar="N", least=0),
                Parameter(
                    "--since",
                    "Continue with the first event since a time in ISO format, in UTC unless it has an offset.",
                    metavar="TIME",
                ),
                BY,
                REASON,
                YES,
            ),
        ),
    ),
)

_SNAPSHOTS = Group(
    "snapshots",
    "Snapshots of aggregates.",
    (
        Command(
            "take",
            aggregates.take_snapshots,
            "Take a snapshot of an aggregate from its events, ignoring older snapshots; exit with 1 if one fails.",
            (AGGREGATE, EVERY, APPLICATION),
        ),
        Command(
            "drop",
            aggregates.drop_snapshots,
            "Delete the snapshots of an aggregate, except those that it cannot be read without.",
            (AGGREGATE, EVERY, APPLICATION),
        ),
    ),
)

COMMANDS = Group(
    "eventsourcing",
    "Event-sourced applications: their tables, events and projections.",
    (
        Command(
            "init-db",
            reports.init_db,
            "Create the missing tables of applications, projections and their models.",
        ),
        Command(
            "check",
            reports.check,
            "Check the configuration, the connection, the tables and the logs; exit with 1 if something is wrong.",
        ),
        Command(
            "run",
            work.run,
            RUN,
            (
                Parameter("names", metavar="NAME..."),
                _flag("--all", "Run every projection and every reaction.", "everything"),
                _flag("--once", "End when all have reached the end of the log."),
                Parameter(
                    "--log-every",
                    "Log a line for each of them at this interval.",
                    kind=float,
                    default=work.LOG_EVERY,
                    metavar="SECONDS",
                    least=0,
                ),
            ),
        ),
        Command(
            "status",
            reports.status,
            "Show how far each projection is, which process runs it, and what is wrong.",
            (AS_JSON, _flag("--check", "Exit with 1 unless a worker runs each of them and nothing was set aside.")),
        ),
        Command(
            "rebuild",
            work.rebuild_or_clean,
            REBUILD,
            (
                NAME,
                _flag("--dry-run", "Show how many events there are and how long it would take."),
                _flag("--drop-old", "Drop the replaced tables afterwards; otherwise they are kept."),
                _flag("--restart", "Begin again, even if an earlier rebuild can be continued."),
                _flag("--clean", "Only drop the tables that earlier rebuilds have replaced."),
                _flag("--give-up", "Only drop what an unfinished rebuild has made."),
                _flag("--offline", "Let all writers wait, where the database allows no other way."),
            ),
        ),
        _DEAD_LETTERS,
        _PROJECTIONS,
        _REACTIONS,
        Command(
            "new-identity",
            checkpoints.new_identity,
            "Give the log an identity of its own, after a database was cloned; never after a restore in place.",
            (APPLICATION,),
        ),
        Command(
            "erase",
            aggregates.erase_aggregate,
            ERASE,
            (
                _argument("aggregate_id"),
                _flag("--redact", "Empty the events instead of deleting their rows."),
                YES,
                APPLICATION,
            ),
        ),
        _SNAPSHOTS,
    ),
)
"""All commands."""
