"""The command ``pyramid-eventsourcing INI …``, with the names, options and output of ``flask eventsourcing``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pyramid.exceptions import ConfigurationExecutionError
from pyramid.paster import get_app, setup_logging

from ...commands import CommandError, PlainOutput, Subject, UsageError, aggregates, checkpoints, letters, reports, work
from ...exceptions import ConfigurationError
from .ini_settings import PROGRAM
from .site_state import EventSourcing, state_of

Command = Callable[[argparse.Namespace], Callable[[Subject, PlainOutput], int]]


def subject_of(state: EventSourcing) -> Subject:
    """Return what commands work on in a Pyramid application."""
    hosts = state.hosts
    models = {of.name: host.models[of] for of, host in hosts.items()}
    tables = [(name, table) for name, each in models.items() for table in each.tables.values()]
    first = state.host
    elsewhere = {
        table: host.datastore.engine
        for of, host in hosts.items()
        if host.datastore.engine is not first.datastore.engine
        for table in host.models[of].tables.values()
    }
    return Subject(
        commit_mode="explicit",
        datastore=first.datastore,
        application_tables=tables,
        applications=lambda: {of.name: application for of, application in state.applications.items()},
        projections=state.projections,
        elsewhere=elsewhere,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status.

    :param arguments: those of the command line, unless given.
    """
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        setup_logging(given.ini)
        state = state_of(get_app(given.ini).registry)
        state.build()
    except (KeyError, IndexError):
        # What is wrong in the user's own code keeps its traceback.
        raise
    except (FileNotFoundError, LookupError, ConfigurationError, ConfigurationExecutionError) as error:
        sys.stderr.write(f"Error: {given.ini} has no application to work on: {_cause(error)}\n")
        return 1
    try:
        exit_status: int = given.command(given)(subject_of(state), PlainOutput())
    except UsageError as error:
        parser.error(str(error))
    except CommandError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_status
    finally:
        state.close()
    return exit_status


def _cause(error: Exception) -> object:
    """Return what made a configuration fail, where Pyramid has wrapped it."""
    return error.evalue if isinstance(error, ConfigurationExecutionError) else error


def make_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        PROGRAM, description="Event-sourced applications of a Pyramid site: their tables, events and projections."
    )
    parser.add_argument("ini", metavar="INI", help="The ini file, with #name for a section of it.")
    group = parser.add_subparsers(metavar="COMMAND", required=True)
    _add(group, "init-db", "Create the missing tables.", lambda _: reports.init_db)
    _add(group, "check", "Check the configuration, the connection, the tables and the logs.", lambda _: reports.check)
    _add_work(group)
    _add_letters(_subgroup(group, "dead-letters", "Events that projections have set aside."))
    _add_projections(_subgroup(group, "projections", "Checkpoints of projections."))
    _add_reactions(_subgroup(group, "reactions", "What is done with reactions."))
    _add_aggregates(group)
    return parser


def _subgroup(group: Any, name: str, text: str) -> Any:
    return group.add_parser(name, help=text, description=text).add_subparsers(metavar="COMMAND", required=True)


def _add(group: Any, name: str, text: str, command: Command, *options: tuple[Any, ...]) -> None:
    """Add a command.

    :param options: each with its names, and at the end its arguments as a mapping.
    """
    parser = group.add_parser(name, help=text, description=text)
    for *names, arguments in options:
        parser.add_argument(*names, **arguments)
    parser.set_defaults(command=command)


def _flag(*names: str, dest: str | None = None, text: str) -> tuple[Any, ...]:
    return (*names, {"action": "store_true", "help": text, **({"dest": dest} if dest else {})})


def _from(lowest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        number = int(text)
        if number < lowest:
            raise ValueError
        return number

    return whole_number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise ValueError
    return seconds


JSON = _flag("--json", dest="as_json", text="Print JSON.")
YES = _flag("--yes", text="Do not ask.")
ALL = _flag("--all", dest="everything", text="All of them.")
NAME = ("name", {"metavar": "NAME"})
APPLICATION = ("--application", {"metavar": "NAME", "help": "Where there are several applications."})
BY = ("--by", {"metavar": "WHO", "help": "Who does it; the user of the operating system unless given."})
REASON = ("--reason", {"metavar": "WHY", "default": "", "help": "Why, as the status tells it."})
OF_PROJECTION = ("--projection", {"metavar": "NAME", "help": "Only those of a projection."})


def _add_work(group: Any) -> None:
    log_every = {"type": _seconds, "default": work.LOG_EVERY, "metavar": "SECONDS", "help": "How often it is logged."}
    _add(
        group,
        "run",
        "Run projections and reactions by their names.",
        lambda g: partial(work.run, names=g.names, everything=g.everything, once=g.once, log_every=g.log_every),
        ("names", {"nargs": "*", "metavar": "NAME"}),
        ALL,
        _flag("--once", text="End when all have reached the end of the log."),
        ("--log-every", log_every),
    )
    _add(
        group,
        "status",
        "Tell how far each projection is, who runs it, and what is wrong.",
        lambda g: partial(reports.status, as_json=g.as_json, check=g.check),
        JSON,
        _flag("--check", text="Exit with 1 unless all are run and nothing was set aside."),
    )
    _add(
        group,
        "rebuild",
        "Build new tables of projection NAME beside the live ones, and put them in their place.",
        _rebuild,
        NAME,
        _flag("--dry-run", text="Say how many events there are and how long it would take."),
        _flag("--drop-old", text="Drop the replaced tables afterwards; otherwise they are kept."),
        _flag("--restart", text="Begin again, even if an earlier rebuild can be taken up."),
        _flag("--clean", text="Only drop the tables that earlier rebuilds have replaced."),
        _flag("--give-up", text="Only drop what an unfinished rebuild has made."),
    )


def _rebuild(given: argparse.Namespace) -> Callable[[Subject, PlainOutput], int]:
    if sum((given.dry_run, given.clean, given.give_up, given.drop_old or given.restart)) > 1:
        raise UsageError("Give one of --dry-run, --clean and --give-up, without --drop-old and --restart.")
    if given.clean or given.give_up:
        return partial(work.clean, name=given.name, give_up=given.give_up)
    how = {"dry_run": given.dry_run, "drop_old": given.drop_old, "restart": given.restart}
    return partial(work.rebuild, name=given.name, **how)


def _add_letters(group: Any) -> None:
    _add(
        group,
        "list",
        "List the dead letters by projection, in the order of the log.",
        lambda g: partial(
            letters.list_letters, projection=g.projection, aggregate=g.aggregate, limit=g.limit, as_json=g.as_json
        ),
        OF_PROJECTION,
        ("--aggregate", {"metavar": "ID", "help": "Only those of an aggregate."}),
        ("--limit", {"type": _from(1), "metavar": "N", "help": "The most that are listed."}),
        JSON,
    )
    _add(
        group,
        "show",
        "Show a dead letter with its traceback.",
        lambda g: partial(letters.show_letter, letter_id=g.id, projection=g.projection, as_json=g.as_json),
        ("id", {"type": int, "metavar": "ID"}),
        OF_PROJECTION,
        JSON,
    )
    _add(
        group,
        "retry",
        "Apply events again, in order, with those that wait behind them.",
        lambda g: partial(letters.retry_letters, ids=g.ids, everything=g.everything, projection=g.projection),
        ("ids", {"type": int, "nargs": "*", "metavar": "ID"}),
        ALL,
        OF_PROJECTION,
    )
    _add(
        group,
        "discard",
        "Give failed events up, and apply those that wait behind them.",
        lambda g: partial(letters.discard_letters, ids=g.ids, yes=g.yes, projection=g.projection),
        ("ids", {"type": int, "nargs": "+", "metavar": "ID"}),
        YES,
        OF_PROJECTION,
    )


def _add_projections(group: Any) -> None:
    _add(
        group,
        "list",
        "List the checkpoints that the database has.",
        lambda g: partial(checkpoints.list_checkpoints, as_json=g.as_json),
        JSON,
    )
    _add(
        group,
        "rename",
        "Give what projection OLD has to NEW: its position, that of its reactions, its dead letters.",
        lambda g: partial(checkpoints.rename, old=g.old, new=g.new, application=g.application),
        ("old", {"metavar": "OLD"}),
        ("new", {"metavar": "NEW"}),
        APPLICATION,
    )
    _add(
        group,
        "forget",
        "Delete the checkpoints and dead letters of projection NAME, which is not registered any more.",
        lambda g: partial(checkpoints.forget, name=g.name, application=g.application, yes=g.yes),
        NAME,
        YES,
        APPLICATION,
    )
    _add(
        group,
        "accept",
        "Take the log, the tables and the code of NAME as they are now.",
        lambda g: partial(checkpoints.accept, name=g.name),
        NAME,
    )
    _add_turns(group)


def _add_turns(group: Any) -> None:
    for name, text, command in (
        ("pause", "Keep every worker from running NAME until it is resumed.", checkpoints.pause),
        ("resume", "Let NAME go on that is paused, or try again what it has halted at.", checkpoints.resume),
    ):
        _add(group, name, text, partial(_by, command), NAME, BY, REASON)
    _add(
        group,
        "skip",
        "Set the event at POSITION aside, before which NAME is halted.",
        lambda g: partial(checkpoints.skip, name=g.name, position=g.position, by=g.by, reason=g.reason),
        NAME,
        ("position", {"type": _from(1), "metavar": "POSITION"}),
        ("--reason", {"metavar": "WHY", "required": True, "help": "Why, as the dead letter tells it."}),
        BY,
    )


def _by(command: Callable[..., int], given: argparse.Namespace) -> Callable[[Subject, PlainOutput], int]:
    return partial(command, name=given.name, by=given.by, reason=given.reason)


def _add_reactions(group: Any) -> None:
    _add(
        group,
        "reset",
        "Have the reactions of projection NAME called again from a position or a time on.",
        lambda g: partial(
            checkpoints.reset_reactions,
            name=g.name,
            position=g.position,
            since=g.since,
            by=g.by,
            reason=g.reason,
            yes=g.yes,
        ),
        NAME,
        ("--position", {"type": _from(0), "metavar": "N", "help": "Go on with the event behind it."}),
        ("--since", {"metavar": "TIME", "help": "Go on with the first event of a time in ISO format."}),
        BY,
        REASON,
        YES,
    )


def _add_aggregates(group: Any) -> None:
    _add(
        group,
        "new-identity",
        "Give the log an identity of its own, after a database was cloned; never after a restore in place.",
        lambda g: partial(checkpoints.new_identity, application=g.application),
        APPLICATION,
    )
    _add(
        group,
        "erase",
        "Erase the events, snapshots and dead letters of an aggregate, as a person may ask for.",
        lambda g: partial(
            aggregates.erase_aggregate, aggregate_id=g.id, application=g.application, redact=g.redact, yes=g.yes
        ),
        ("id", {"metavar": "AGGREGATE_ID"}),
        _flag("--redact", text="Empty the events, rather than delete their rows."),
        YES,
        APPLICATION,
    )
    snapshots = _subgroup(group, "snapshots", "Snapshots of aggregates.")
    for name, text, command in (
        ("take", "Take a snapshot of an aggregate from its events.", aggregates.take_snapshots),
        ("drop", "Delete the snapshots of an aggregate that it can be read without.", aggregates.drop_snapshots),
    ):
        aggregate = ("id", {"nargs": "?", "metavar": "AGGREGATE_ID"})
        _add(snapshots, name, text, partial(_snapshots, command), aggregate, ALL, APPLICATION)


def _snapshots(command: Callable[..., int], given: argparse.Namespace) -> Callable[[Subject, PlainOutput], int]:
    return partial(command, aggregate_id=given.id, everything=given.everything, application=given.application)
