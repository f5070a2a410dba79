"""``dead-letters``: the events that projections could not apply, and those that wait behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ..projections.consumers import Consumer
from ..projections.dead_letters import DeadLetter
from ..projections.repair import Repair, discard, retry
from . import CommandError, Output, Subject, UsageError, as_table, clear_errors, named, require_tables

HEADS = ("ID", "PROJECTION", "POSITION", "EVENT", "AGGREGATE", "VERSION", "TRIES", "ERROR")


class Found(NamedTuple):
    """A letter and whose it is."""

    consumer: Consumer
    letter: DeadLetter

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        values = {"application": self.consumer.application.name, **self.letter._asdict()}
        failed_at = self.letter.failed_at
        values["failed_at"] = None if failed_at is None else f"{failed_at.isoformat()}+00:00"
        return values


def list_letters(subject: Subject, output: Output, *, projection: str | None = None, as_json: bool = False) -> int:
    """List the dead letters, in the order of the log."""
    found = find(subject, projection)
    if as_json:
        output.write(json.dumps([each.to_dict() for each in found], indent=2))
    elif not found:
        output.write("There are no dead letters.")
    else:
        output.write(as_table(HEADS, [_row(each.letter) for each in found]))
    return 0


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


def show_letter(
    subject: Subject, output: Output, letter_id: int, *, projection: str | None = None, as_json: bool = False
) -> int:
    """Show a dead letter with its traceback."""
    (found,) = with_ids(subject, [letter_id], projection)
    if as_json:
        output.write(json.dumps(found.to_dict(), indent=2))
        return 0
    for key, value in found.to_dict().items():
        if key != "traceback" and value is not None:
            output.write(f"{key.replace('_', ' ')}: {value}")
    if found.letter.error is None:
        output.write("It waits for an earlier event of the same aggregate, which failed.")
    else:
        output.write(f"\n{found.letter.traceback}".rstrip())
    return 0


def retry_letters(
    subject: Subject,
    output: Output,
    ids: Sequence[int] = (),
    *,
    everything: bool = False,
    projection: str | None = None,
) -> int:
    """Apply events again, in order, with those that wait behind them; returns 1 if one fails again."""
    if bool(ids) == everything:
        raise UsageError("Give the ids of dead letters, or --all.")
    found = find(subject, projection) if everything else with_ids(subject, ids, projection)
    if not found:
        output.write("There are no dead letters.")
    results = []
    with clear_errors():
        for consumer, letters in _by_consumer(found):
            results.append(retry(consumer, [letter.id for letter in letters]))
            _tell(output, results[-1])
    return _status(results)


def discard_letters(
    subject: Subject, output: Output, ids: Sequence[int], *, yes: bool = False, projection: str | None = None
) -> int:
    """Give failed events up, and apply those that wait behind them; returns 1 if one of these fails.

    :param yes: do not ask.
    """
    found = with_ids(subject, ids, projection)
    for _, letter in found:
        output.write(f"{letter.id}: {_described(letter)}")
    if not yes and not output.confirm("The read model will never have these events. Discard them?"):
        return 1
    results = []
    with clear_errors():
        for consumer, letters in _by_consumer(found):
            for letter in letters:
                results.append(discard(consumer, letter.id))
                _tell(output, results[-1])
    return _status(results)


def _by_consumer(found: Sequence[Found]) -> list[tuple[Consumer, list[DeadLetter]]]:
    return [(consumer, [each.letter for each in letters]) for consumer, letters in groupby(found, lambda f: f.consumer)]


def _tell(output: Output, result: Repair) -> None:
    for what, letters in (("discarded", result.discarded), ("applied", result.applied), ("failed", result.failed)):
        for letter in letters:
            error = f": {letter.error}" if what == "failed" else ""
            output.write(f"{letter.id} {what}: {_described(letter)}{error}")


def _status(results: Sequence[Repair]) -> int:
    return 1 if any(result.failed for result in results) else 0


def _described(letter: DeadLetter) -> str:
    aggregate = f"{letter.originator_id} version {letter.originator_version}"
    return f"{letter.projection}, event {letter.position} ({_event(letter)} {aggregate})"


def _event(letter: DeadLetter) -> str:
    return letter.topic.partition(":")[2] or letter.topic


def find(subject: Subject, projection: str | None = None, ids: Sequence[int] | None = None) -> list[Found]:
    """Return dead letters in the order of the log."""
    require_tables(subject)
    consumers = subject.consumers()
    if projection is not None:
        consumers = named(consumers, projection)
    found: list[Found] = []
    with clear_errors():
        for consumer in consumers:
            letters = consumer.application.dead_letters
            with consumer.application.engine.connect() as connection:
                found += [Found(consumer, each) for each in letters.select(connection, [consumer.name], ids=ids)]
    return found


def with_ids(subject: Subject, ids: Sequence[int], projection: str | None = None) -> list[Found]:
    """Return the dead letters with these ids.

    :raises CommandError: when there is no such letter, or several applications have one.
    """
    found = find(subject, projection, ids)
    for letter_id in dict.fromkeys(ids):
        owners = [each.consumer.name for each in found if each.letter.id == letter_id]
        if not owners:
            raise CommandError(f"There is no dead letter {letter_id}: see '{subject.program} dead-letters list'.")
        if len(owners) > 1:
            raise CommandError(
                f"Several applications have a dead letter {letter_id}: say --projection {' or '.join(owners)}."
            )
    return found
