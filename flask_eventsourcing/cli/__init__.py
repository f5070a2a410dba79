"""The ``flask eventsourcing`` commands: the click side of ``commands``, for every host.

They work on the current Flask app, or on the ``Subject`` of a program on another host: ``group(obj=subject)``.
"""

from __future__ import annotations

import sys
from typing import Any

import click
from flask.cli import with_appcontext

from ..commands import Bar, CommandError, Subject, UsageError, encodable, has_terminal
from ..commands.listing import COMMANDS, Command, Group, Parameter
from ..web.state import PROGRAM, current_state


def _given() -> Subject | None:
    return click.get_current_context().find_object(Subject)


class ClickOutput:
    """Prints, asks and shows progress as click does."""

    def write(self, text: str) -> None:
        """Print lines."""
        click.echo(encodable(text, sys.stdout))

    def confirm(self, question: str) -> bool:
        """Ask, and abort the command if the answer is no."""
        return click.confirm(encodable(question, sys.stdout), abort=True)

    def bar(self, length: int, label: str) -> Bar | None:
        """Show a bar where standard error is a terminal."""
        return ClickBar(length, label) if has_terminal() else None


class ClickBar:
    """A progress bar of click's, on standard error."""

    def __init__(self, length: int, label: str) -> None:
        self._note = ""
        self._bar: Any = click.progressbar(
            length=length, label=label, show_percent=True, item_show_func=lambda _: self._note, file=sys.stderr
        )
        self._bar.__enter__()

    def move(self, position: int, length: int, note: str) -> None:
        """Show how far the work is: *position* of *length*."""
        self._note = note
        self._bar.length = length
        if position > self._bar.pos:
            self._bar.update(position - self._bar.pos)

    def finish(self) -> None:
        """End its line."""
        self._bar.render_finish()


def subject() -> Subject:
    """Return the subject with which the commands were called, or that of the current app."""
    given = _given()
    if given is not None:
        return given
    state = current_state()
    return Subject(
        commit_mode=state.config.commit,
        datastore=state.tables_datastore,
        application_tables=[(name, table) for name, models in state.models.items() for table in models.tables.values()],
        applications=lambda: {cls.name: application for cls, application in state.applications.items()},
        projections=state.projections,
        elsewhere=state.elsewhere(),
        store=None if state.apart is None else state.apart.store,
        program=PROGRAM,
    )


def call(listed: Command, options: dict[str, Any]) -> None:
    """Call a command on the subject, and end with its exit status."""

    def called() -> int:
        given = listed.options(options)
        return listed.called(subject(), ClickOutput(), **given)

    try:
        exit_status = called() if _given() is not None else with_appcontext(called)()
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    except CommandError as error:
        raise click.ClickException(str(error)) from error
    if exit_status:
        raise click.exceptions.Exit(exit_status)


def _made(listed: Command | Group) -> click.Command:
    """Make click's command, or group, of one in the list."""
    if isinstance(listed, Group):
        made = click.Group(listed.name, help=listed.help)
        for each in listed.commands:
            made.add_command(_made(each))
        return made
    parameters = [_parameter(each) for each in listed.parameters]
    return click.Command(
        listed.name, callback=lambda **options: call(listed, options), params=parameters, help=listed.help
    )


def _kind(parameter: Parameter) -> Any:
    if parameter.least is None:
        return parameter.kind
    if parameter.kind is float:
        return click.FloatRange(min=parameter.least, min_open=True)
    return click.IntRange(min=parameter.least)


def _parameter(parameter: Parameter) -> click.Parameter:
    if parameter.is_option:
        return _option(parameter)
    shown = parameter.metavar
    if parameter.many and not parameter.required:
        shown = f"[{parameter.single}]..."
    return click.Argument(
        [parameter.destination],
        metavar=shown,
        type=_kind(parameter),
        required=parameter.required,
        nargs=-1 if parameter.many else 1,
    )


def _option(parameter: Parameter) -> click.Option:
    names = [parameter.name, parameter.destination]
    if parameter.kind is bool:
        return click.Option(names, is_flag=True, help=parameter.help)
    return click.Option(
        names,
        type=_kind(parameter),
        # If the option is required, click would take a default of None as given.
        **({} if parameter.default is None else {"default": parameter.default}),
        show_default=parameter.kind is float,
        metavar=parameter.metavar,
        required=parameter.required,
        help=parameter.help,
    )


group: click.Group = click.Group(COMMANDS.name, help=COMMANDS.help)
for _each in COMMANDS.commands:
    group.add_command(_made(_each))
