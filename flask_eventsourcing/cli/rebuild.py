"""``rebuild``."""

from __future__ import annotations

import threading

import click
from flask.cli import with_appcontext

from ..projections.rebuilding import Rebuild, Rebuilt
from ..state import EventSourcingState, current_state
from .common import clear_errors, named, require_tables
from .reporting import Reporter
from .working import Signals, shown_log, watch

TICK = 0.2
LOG_EVERY = 60.0


@click.command("rebuild")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Say how many events there are and how long it would take.")
@click.option("--drop-old", is_flag=True, help="Drop the replaced tables afterwards; otherwise they are kept.")
@click.option("--restart", is_flag=True, help="Begin anew, even if an earlier rebuild can be taken up.")
@with_appcontext
def rebuild(name: str, dry_run: bool, drop_old: bool, restart: bool) -> None:
    """Build the tables of projection NAME anew beside the live ones, and put them in their place.

    Readers and the live projection go on meanwhile. A rebuild that was stopped or killed goes on where it was.
    """
    state = current_state()
    stopping = threading.Event()
    with clear_errors():
        building = _find(state, name, stopping)
        if dry_run:
            estimate = building.estimate()
            click.echo(f"{estimate.events:,} events, about {_duration(estimate.seconds)}. Nothing was changed.")
            return
        done = _run(building, stopping, restart)
    if done is None:
        raise click.ClickException("Stopped before its end: the live tables are as they were; run it again to go on.")
    for table, (before, after) in done.rows.items():
        click.echo(f"{table}: {after:,} rows, {before:,} before.")
    resumed = ", taken up from an earlier run" if done.resumed else ""
    click.echo(
        f"Rebuilt up to position {done.position} ({done.events:,} events in {_duration(done.seconds)}{resumed})."
    )
    if drop_old:
        with clear_errors():
            for table in building.drop_old():
                click.echo(f"Dropped table {table}.")


def _find(state: EventSourcingState, name: str, stopping: threading.Event) -> Rebuild:
    require_tables(state)
    found = named(list(state.projections), name)[0]
    if name.endswith(":reactions"):
        raise click.ClickException("Reactions are never called again: only the models of a projection are rebuilt.")
    return Rebuild(found, stopping)


def _run(building: Rebuild, stopping: threading.Event, restart: bool) -> Rebuilt | None:
    """Run it in a thread, as the main thread is the one that signals interrupt."""
    results: list[Rebuilt | None] = []
    errors: list[Exception] = []

    def build() -> None:
        try:
            results.append(building.run(restart=restart))
        except Exception as error:  # noqa: BLE001
            # Raised below, in the main thread.
            errors.append(error)

    thread = threading.Thread(target=build, name=f"rebuild {building.live.name}")
    signals = Signals()
    with shown_log(), signals.handled():
        reporter = Reporter([building.runner], LOG_EVERY)
        thread.start()
        try:
            while thread.is_alive():
                watch(signals, stopping, reporter)
                thread.join(TICK)
        finally:
            stopping.set()
            thread.join()
            reporter.finish_bar()
    if errors:
        raise errors[0]
    return results[0]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
