"""The ``flask eventsourcing`` commands: click's front of what stands in ``commands``, for every host.

They work on the current Flask app, or on the ``Subject`` that a program on another host calls them with:
``group(obj=subject)``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec

import click
from flask.cli import with_appcontext

from ..commands import Bar, CommandError, Output, Subject, UsageError, aggregates, checkpoints, letters, reports, work
from ..web.state import PROGRAM, current_state

P = ParamSpec("P")


def _given() -> Subject | None:
    return click.get_current_context().find_object(Subject)


group: click.Group = click.Group(
    "eventsourcing", help="Event-sourced applications: their tables, events and projections."
)


class ClickOutput:
    """Prints, asks and shows progress as click does."""

    def write(self, text: str) -> None:
        """Print lines."""
        click.echo(text)

    def confirm(self, question: str) -> bool:
        """Ask; no aborts the command."""
        return click.confirm(question, abort=True)

    def bar(self, length: int, label: str) -> Bar | None:
        """Show a bar where standard error is a terminal."""
        return ClickBar(length, label) if sys.stderr.isatty() else None


class ClickBar:
    """A progress bar of click's, on standard error."""

    def __init__(self, length: int, label: str) -> None:
        self._note = ""
        self._bar: Any = click.progressbar(
            length=length, label=label, show_percent=True, item_show_func=lambda _: self._note, file=sys.stderr
        )
        self._bar.__enter__()

    def move(self, position: int, length: int, note: str) -> None:
        """Show that so many of so many are done."""
        self._note = note
        self._bar.length = length
        if position > self._bar.pos:
            self._bar.update(position - self._bar.pos)

    def finish(self) -> None:
        """End its line."""
        self._bar.render_finish()


def subject() -> Subject:
    """Return what commands were called with to work on, or the current app."""
    given = _given()
    if given is not None:
        return given
    state = current_state()
    return Subject(
        commit_mode=state.config.commit,
        datastore=state.datastore if state.apart is None else None,
        application_tables=[(name, table) for name, models in state.models.items() for table in models.tables.values()],
        applications=lambda: {cls.name: application for cls, application in state.applications.items()},
        projections=state.projections,
        elsewhere=state.elsewhere(),
        store=None if state.apart is None else state.apart.store,
        program=PROGRAM,
    )


def call(command: Callable[Concatenate[Subject, Output, P], int], *arguments: P.args, **options: P.kwargs) -> None:
    """Call a command on what there is to work on, and end with its exit status."""

    def called() -> int:
        return command(subject(), ClickOutput(), *arguments, **options)

    try:
        exit_status = called() if _given() is not None else with_appcontext(called)()
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    except CommandError as error:
        raise click.ClickException(str(error)) from error
    if exit_status:
        raise click.exceptions.Exit(exit_status)


@group.command("init-db")
def init_db() -> None:
    """Create the missing tables of applications, projections and their models."""
    call(reports.init_db)


@group.command("check")
def check() -> None:
    """Check the configuration, the connection, the tables and the logs; exits with 1 if something is wrong."""
    call(reports.check)


@group.command("run")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Run every projection and every reaction.")
@click.option("--once", is_flag=True, help="End when all have reached the end of the log.")
@click.option(
    "--log-every",
    type=click.FloatRange(min=0, min_open=True),
    default=work.LOG_EVERY,
    show_default=True,
    metavar="SECONDS",
    help="How often a line is logged for each of them.",
)
def run(names: Sequence[str], everything: bool, once: bool, log_every: float) -> None:
    """Run projections and reactions by their names.

    NAME is a projection, which is run with its reactions, or only its reactions, as Balances:reactions. One process
    at a time runs each; others stand by and take over. SIGTERM and Ctrl-C finish the batch in progress.
    """
    call(work.run, names, everything=everything, once=once, log_every=log_every)


@group.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--check", is_flag=True, help="Exit with 1 unless all are run and nothing was set aside.")
def status(as_json: bool, check: bool) -> None:
    """Tell how far each projection is, who runs it, and what is wrong."""
    call(reports.status, as_json=as_json, check=check)


@group.command("rebuild")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Say how many events there are and how long it would take.")
@click.option("--drop-old", is_flag=True, help="Drop the replaced tables afterwards; otherwise they are kept.")
@click.option("--restart", is_flag=True, help="Begin again, even if an earlier rebuild can be taken up.")
@click.option("--clean", is_flag=True, help="Only drop the tables that earlier rebuilds have replaced.")
@click.option("--give-up", is_flag=True, help="Only drop what an unfinished rebuild has made.")
def rebuild(name: str, dry_run: bool, drop_old: bool, restart: bool, clean: bool, give_up: bool) -> None:
    """Build new tables of projection NAME beside the live ones, and put them in their place.

    Readers and the live projection go on meanwhile. A rebuild that was stopped or killed goes on where it was.
    """
    if sum((dry_run, clean, give_up, drop_old or restart)) > 1:
        raise click.UsageError("Give one of --dry-run, --clean and --give-up, without --drop-old and --restart.")
    if clean or give_up:
        call(work.clean, name, give_up=give_up)
    else:
        call(work.rebuild, name, dry_run=dry_run, drop_old=drop_old, restart=restart)


# ------------------------------------------------------------------------------------------------------- dead letters

dead_letters: click.Group = click.Group(
    "dead-letters", help="Events that projections have set aside, and those that wait behind them."
)
group.add_command(dead_letters)

_of_projection = click.option("--projection", metavar="NAME", help="Only those of a projection.")
_as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dead_letters.command("list")
@_of_projection
@click.option("--aggregate", metavar="ID", help="Only those of an aggregate.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The most that are listed.")
@_as_json_option
def list_letters(projection: str | None, aggregate: str | None, limit: int | None, as_json: bool) -> None:
    """List the dead letters by projection, in the order of the log."""
    call(letters.list_letters, projection=projection, aggregate=aggregate, limit=limit, as_json=as_json)


@dead_letters.command("show")
@click.argument("letter_id", metavar="ID", type=int)
@_of_projection
@_as_json_option
def show_letter(letter_id: int, projection: str | None, as_json: bool) -> None:
    """Show a dead letter with its traceback."""
    call(letters.show_letter, letter_id, projection=projection, as_json=as_json)


@dead_letters.command("retry")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=int)
@click.option("--all", "everything", is_flag=True, help="Retry all of them.")
@_of_projection
def retry_letters(ids: Sequence[int], everything: bool, projection: str | None) -> None:
    """Apply events again, in order, with those that wait behind them; exits with 1 if one fails again."""
    call(letters.retry_letters, ids, everything=everything, projection=projection)


@dead_letters.command("discard")
@click.argument("ids", metavar="ID...", nargs=-1, type=int, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@_of_projection
def discard_letters(ids: Sequence[int], yes: bool, projection: str | None) -> None:
    """Give failed events up, and apply those that wait behind them; exits with 1 if one of these fails."""
    call(letters.discard_letters, ids, yes=yes, projection=projection)


# -------------------------------------------------------------------------------------------------------- checkpoints

projections: click.Group = click.Group(
    "projections", help="Checkpoints of projections, also of those that are not registered."
)
group.add_command(projections)

_of_application = click.option("--application", metavar="NAME", help="Where there are several applications.")


@projections.command("list")
@_as_json_option
def list_checkpoints(as_json: bool) -> None:
    """List the checkpoints that the database has."""
    call(checkpoints.list_checkpoints, as_json=as_json)


@projections.command("rename")
@click.argument("old")
@click.argument("new")
@_of_application
def rename(old: str, new: str, application: str | None) -> None:
    """Give what projection OLD has to NEW: its position, that of its reactions, its dead letters."""
    call(checkpoints.rename, old, new, application=application)


@projections.command("forget")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_of_application
def forget(name: str, yes: bool, application: str | None) -> None:
    """Delete the checkpoints and dead letters of projection NAME, which is not registered any more."""
    call(checkpoints.forget, name, application=application, yes=yes)


@projections.command("accept")
@click.argument("name")
def accept(name: str) -> None:
    """Take the log, the tables and the code of NAME as they are now, though its checkpoint does not fit them."""
    call(checkpoints.accept, name)


_by_option = click.option("--by", metavar="WHO", help="Who does it; the user of the operating system unless given.")
_reason_option = click.option("--reason", metavar="WHY", default="", help="Why, as the status tells it.")


@projections.command("pause")
@click.argument("name")
@_by_option
@_reason_option
def pause(name: str, by: str | None, reason: str) -> None:
    """Keep every worker from running NAME, a projection or its reactions, until it is resumed."""
    call(checkpoints.pause, name, by=by, reason=reason)


@projections.command("resume")
@click.argument("name")
@_by_option
@_reason_option
def resume(name: str, by: str | None, reason: str) -> None:
    """Let NAME go on that is paused, or try again what it has halted at."""
    call(checkpoints.resume, name, by=by, reason=reason)


@projections.command("skip")
@click.argument("name")
@click.argument("position", type=click.IntRange(min=1))
@click.option("--reason", metavar="WHY", required=True, help="Why, as the dead letter tells it.")
@_by_option
def skip(name: str, position: int, reason: str, by: str | None) -> None:
    """Set the event at POSITION aside, before which NAME is halted: it is a dead letter then, and NAME goes on."""
    call(checkpoints.skip, name, position, by=by, reason=reason)


reactions: click.Group = click.Group("reactions", help="What is done with reactions.")
group.add_command(reactions)


@reactions.command("reset")
@click.argument("name")
@click.option("--position", type=click.IntRange(min=0), metavar="N", help="Go on with the event behind it.")
@click.option("--since", metavar="TIME", help="Go on with the first event of a time in ISO format, UTC unless it says.")
@_by_option
@_reason_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset_reactions(name: str, position: int | None, since: str | None, by: str | None, reason: str, yes: bool) -> None:
    """Have the reactions of projection NAME called again from a position or a time on, or go on from there."""
    options: dict[str, Any] = {"position": position, "since": since, "by": by, "reason": reason, "yes": yes}
    call(checkpoints.reset_reactions, name, **options)


@group.command("new-identity")
@_of_application
def new_identity(application: str | None) -> None:
    """Give the log an identity of its own, after a database was cloned; never after a restore in place."""
    call(checkpoints.new_identity, application=application)


# --------------------------------------------------------------------------------------------------------- aggregates


@group.command("erase")
@click.argument("aggregate_id")
@click.option("--redact", is_flag=True, help="Empty the events, rather than delete their rows.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_of_application
def erase(aggregate_id: str, redact: bool, yes: bool, application: str | None) -> None:
    """Erase the events, snapshots and dead letters of an aggregate, as a person may ask for.

    A last event without content stays in the log: it tells projections, and keeps the id from being used again.
    """
    call(aggregates.erase_aggregate, aggregate_id, application=application, redact=redact, yes=yes)


snapshots: click.Group = click.Group("snapshots", help="Snapshots of aggregates.")
group.add_command(snapshots)

_all_aggregates = click.option("--all", "everything", is_flag=True, help="Of every aggregate.")


@snapshots.command("take")
@click.argument("aggregate_id", required=False)
@_all_aggregates
@_of_application
def take_snapshots(aggregate_id: str | None, everything: bool, application: str | None) -> None:
    """Take a snapshot of an aggregate from its events, whatever older snapshots say; exits with 1 if one fails."""
    call(aggregates.take_snapshots, aggregate_id, everything=everything, application=application)


@snapshots.command("drop")
@click.argument("aggregate_id", required=False)
@_all_aggregates
@_of_application
def drop_snapshots(aggregate_id: str | None, everything: bool, application: str | None) -> None:
    """Delete the snapshots of an aggregate, but for those without which it could not be read any more."""
    call(aggregates.drop_snapshots, aggregate_id, everything=everything, application=application)
