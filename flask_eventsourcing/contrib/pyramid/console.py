"""The command ``pyramid-eventsourcing INI …``, with the names, options and output of ``flask eventsourcing``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from pyramid.exceptions import ConfigurationExecutionError
from pyramid.paster import get_app, setup_logging

from ...commands import CommandError, PlainOutput, Subject, UsageError
from ...commands.listing import COMMANDS
from ...commands.parsing import add_commands
from ...exceptions import ConfigurationError
from .site_state import CALLED, PROGRAM, EventSourcing, state_of


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
        state = _load(given.ini)
    except (KeyError, IndexError):
        # An error in the user's own code keeps its traceback.
        raise
    except (FileNotFoundError, LookupError, ConfigurationError, ConfigurationExecutionError) as error:
        sys.stderr.write(f"Error: {given.ini} has no application to work on: {_cause(error)}\n")
        return 1
    try:
        options = given.listed.options(vars(given))
        exit_status: int = given.listed.called(subject_of(state), PlainOutput(), **options)
    except UsageError as error:
        parser.error(str(error))
    except CommandError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_status
    finally:
        state.close()
    return exit_status


def _load(ini: str) -> EventSourcing:
    """Return the state of the application of an ini file, whose messages name the commands with that file."""
    called = CALLED.set(f"{PROGRAM} {shlex.quote(ini)}")
    try:
        state = state_of(get_app(ini).registry)
        state.build()
    finally:
        CALLED.reset(called)
    return state


def _cause(error: Exception) -> object:
    """Return the cause of a failed configuration, which Pyramid may have wrapped."""
    return error.evalue if isinstance(error, ConfigurationExecutionError) else error


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        PROGRAM, description="Event-sourced applications of a Pyramid site: their tables, events and projections."
    )
    parser.add_argument("ini", metavar="INI", help="The ini file, with #name for a section of it.")
    add_commands(parser, COMMANDS)
    return parser
