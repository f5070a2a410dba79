"""``dead-letters``: the events that projections could not apply, and those that wait behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import click
from flask.cli import AppGroup

from ..projections.consumers import Consumer
from ..projections.dead_letters import DeadLetter, DeadLetters
from ..projections.repair import Repair, discard, retry
from ..state import EventSourcingState, current_state
from .common import as_table, clear_errors, named, require_tables

dead_letters = AppGroup("dead-letters", help="Events that projections have set aside, and those that wait behind them.")

of_projection = click.option("--projection", metavar="NAME", help="Only those of a projection.")
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Found(NamedTuple):
    """A letter and whose it is."""

    consumer: Consumer
    letter: DeadLetter

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        values = {"application": self.consumer.host.application_name, **self.letter._asdict()}
        failed_at = self.letter.failed_at
        values["failed_at"] = None if failed_at is None else f"{failed_at.isoformat()}+00:00"
        return values


@dead_letters.command("list")
@of_projection
@as_json_option
def list_letters(projection: str | None, as_json: bool) -> None:
    """List the dead letters, in the order of the log."""
    found = find(current_state(), projection)
    if as_json:
        click.echo(json.dumps([each.to_dict() for each in found], indent=2))
    elif not found:
        click.echo("There are no dead letters.")
    else:
        heads = ("ID", "PROJECTION", "POSITION", "EVENT", "AGGREGATE", "VERSION", "TRIES", "ERROR")
        click.echo(as_table(heads, [_row(each.letter) for each in found]))


def _row(letter: DeadLetter) -> list[str]:
    return [
        str(letter.id),
        letter.projection,
        str(letter.position),
        _event(letter),
        letter.originator_id,
        str(letter.originator_version),
        str(letter.attempts),
        letter.error if letter.error is not None else "(waits for the one before it)",
    ]


@dead_letters.command("show")
@click.argument("letter_id", metavar="ID", type=int)
@of_projection
@as_json_option
def show_letter(letter_id: int, projection: str | None, as_json: bool) -> None:
    """Show a dead letter with its traceback."""
    (found,) = with_ids(current_state(), [letter_id], projection)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    for key, value in found.to_dict().items():
        if key != "traceback" and value is not None:
            click.echo(f"{key.replace('_', ' ')}: {value}")
    if found.letter.error is None:
        click.echo("It waits for an earlier event of the same aggregate, which failed.")
    else:
        click.echo(f"\n{found.letter.traceback}".rstrip())


@dead_letters.command("retry")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=int)
@click.option("--all", "everything", is_flag=True, help="Retry all of them.")
@of_projection
def retry_letters(ids: Sequence[int], everything: bool, projection: str | None) -> None:
    """Apply events again, in order, with those that wait behind them; exits with 1 if one fails again."""
    if bool(ids) == everything:
        raise click.UsageError("Give the ids of dead letters, or --all.")
    state = current_state()
    found = find(state, projection) if everything else with_ids(state, ids, projection)
    if not found:
        click.echo("There are no dead letters.")
    results = []
    with clear_errors():
        for consumer, letters in _by_consumer(found):
            results.append(retry(consumer, [letter.id for letter in letters]))
            _tell(results[-1])
    if any(result.failed for result in results):
        raise click.exceptions.Exit(1)


@dead_letters.command("discard")
@click.argument("ids", metavar="ID...", nargs=-1, type=int, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@of_projection
def discard_letters(ids: Sequence[int], yes: bool, projection: str | None) -> None:
    """Give failed events up, and apply those that wait behind them; exits with 1 if one of these fails."""
    found = with_ids(current_state(), ids, projection)
    for _, letter in found:
        click.echo(f"{letter.id}: {_described(letter)}")
    if not yes:
        click.confirm("The read model will never have these events. Discard them?", abort=True)
    results = []
    with clear_errors():
        for consumer, letters in _by_consumer(found):
            for letter in letters:
                results.append(discard(consumer, letter.id))
                _tell(results[-1])
    if any(result.failed for result in results):
        raise click.exceptions.Exit(1)


def _by_consumer(found: Sequence[Found]) -> list[tuple[Consumer, list[DeadLetter]]]:
    return [(consumer, [each.letter for each in letters]) for consumer, letters in groupby(found, lambda f: f.consumer)]


def _tell(result: Repair) -> None:
    for what, letters in (("discarded", result.discarded), ("applied", result.applied), ("failed", result.failed)):
        for letter in letters:
            error = f": {letter.error}" if what == "failed" else ""
            click.echo(f"{letter.id} {what}: {_described(letter)}{error}")


def _described(letter: DeadLetter) -> str:
    aggregate = f"{letter.originator_id} version {letter.originator_version}"
    return f"{letter.projection}, event {letter.position} ({_event(letter)} {aggregate})"


def _event(letter: DeadLetter) -> str:
    return letter.topic.partition(":")[2] or letter.topic


def find(state: EventSourcingState, projection: str | None = None, ids: Sequence[int] | None = None) -> list[Found]:
    """Return dead letters in the order of the log."""
    require_tables(state)
    consumers = list(state.projections)
    if projection is not None:
        consumers = named(consumers, projection)
    found: list[Found] = []
    with clear_errors():
        for consumer in consumers:
            letters = DeadLetters(consumer.host.models.tables["dead_letters"])
            with consumer.host.engine.connect() as connection:
                found += [Found(consumer, each) for each in letters.select(connection, [consumer.name], ids=ids)]
    return found


def with_ids(state: EventSourcingState, ids: Sequence[int], projection: str | None = None) -> list[Found]:
    """Return the dead letters with these ids.

    :raises click.ClickException: when there is no such letter, or several applications have one.
    """
    found = find(state, projection, ids)
    for letter_id in dict.fromkeys(ids):
        owners = [each.consumer.name for each in found if each.letter.id == letter_id]
        if not owners:
            raise click.ClickException(
                f"There is no dead letter {letter_id}: see 'flask eventsourcing dead-letters list'."
            )
        if len(owners) > 1:
            raise click.ClickException(
                f"Several applications have a dead letter {letter_id}: say --projection {' or '.join(owners)}."
            )
    return found
