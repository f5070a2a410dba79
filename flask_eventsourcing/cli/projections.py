"""``run`` and ``status``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
from flask.cli import with_appcontext

from ..projections.consumers import Consumer
from ..projections.registry import BoundProjections
from ..projections.status import Health, ProjectionStatus, status_of
from ..state import current_state
from . import working
from .common import as_table, clear_errors, named, registered, require_tables


@click.command("run")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Run every projection and every reaction.")
@click.option("--once", is_flag=True, help="End when all have reached the end of the log.")
@click.option(
    "--log-every",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How often a line is logged for each of them.",
)
@with_appcontext
def run(names: Sequence[str], everything: bool, once: bool, log_every: float) -> None:
    """Run projections and reactions by their names.

    NAME is a projection, which is run with its reactions, or only its reactions, as Balances:reactions. One process
    at a time runs each; others stand by and take over. SIGTERM and Ctrl-C finish the batch in progress.
    """
    state = current_state()
    consumers = chosen(state.projections, names, everything)
    working.work(state, consumers, once=once, log_every=log_every)


def chosen(projections: BoundProjections, names: Sequence[str], everything: bool) -> list[Consumer]:
    """Return what is to be run.

    :raises click.ClickException: when that cannot be known or cannot be run.
    """
    known, runnable = list(projections), projections.runnable()
    if names and everything:
        raise click.UsageError("Give names or --all, not both.")
    if not known:
        raise click.ClickException(registered(known))
    if names:
        # Each once, in the order of their registration.
        found = {consumer for name in names for consumer in _runnable(known, name)}
        return [consumer for consumer in known if consumer in found]
    if not runnable:
        raise click.ClickException("There is nothing to run: all projections are inline, they run within save().")
    if everything or len({consumer.projection_class for consumer in runnable}) == 1:
        return runnable
    raise click.UsageError(f"Say which projections to run, or --all. {registered(runnable)}")


def _runnable(known: Sequence[Consumer], name: str) -> list[Consumer]:
    found = named(known, name)
    runnable = [c for c in found if c.kind == "reactions" or not c.projection_class.inline]
    if not runnable:
        raise click.ClickException(
            f"Projection {name!r} is inline: it runs within save(), in the same transaction, and needs no worker."
        )
    return runnable


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--check", is_flag=True, help="Exit with 1 unless all are run and nothing was set aside.")
@with_appcontext
def status(as_json: bool, check: bool) -> None:
    """Tell how far each projection is, who runs it, and what is wrong."""
    state = current_state()
    require_tables(state)
    with clear_errors():
        health = Health(tuple(status_of(consumer) for consumer in state.projections))
    if as_json:
        click.echo(json.dumps(health.to_dict(), indent=2))
    elif not health.projections:
        click.echo("No projection is registered.")
    else:
        click.echo(_table(health.projections))
    if check and not health.ok:
        raise click.exceptions.Exit(1)


HEADS = ("NAME", "APPLICATION", "STATE", "POSITION", "HEAD", "LAG", "SECONDS", "DEAD", "RUNNER", "SINCE")


def _table(projections: Sequence[ProjectionStatus]) -> str:
    text = as_table(HEADS, [_row(each) for each in projections])
    notes = [f"{each.name}: {_trouble(each)}" for each in projections if each.error or each.dead_letters]
    return "\n".join([text, "", *notes] if notes else [text])


def _row(each: ProjectionStatus) -> list[str]:
    return [
        each.name,
        each.application,
        each.state,
        str(each.position),
        str(each.head),
        str(each.lag_events),
        "-" if each.lag_seconds is None else f"{each.lag_seconds:.1f}",
        str(each.dead_letters),
        each.runner or "-",
        "-" if each.since is None else each.since.isoformat(sep=" ", timespec="seconds"),
    ]


def _trouble(each: ProjectionStatus) -> str:
    parts = []
    if each.error:
        parts.append(f"{'halted at' if each.state == 'halted' else 'last error:'} {each.error}")
    if each.dead_letters:
        waiting = f", {each.waiting} waiting behind" if each.waiting else ""
        parts.append(f"{each.dead_letters} dead letters{waiting}: see 'flask eventsourcing dead-letters list'")
    return "; ".join(parts)
