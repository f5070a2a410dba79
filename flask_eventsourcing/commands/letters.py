"""``dead-letters``: commands for events that projections could not apply, and those that wait behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import indent
from typing import Any, NamedTuple

from ..persistence.dialects.event_values import printable
from ..projections.consumers import Consumer
from ..projections.dead_letters import DeadLetter
from ..projections.upkeep.repair import Outcome, discard, retry
from . import CommandError, Output, Subject, TextTable, UsageError, clear_errors, counted, named, require_tables

HEADS = ("ID", "PROJECTION", "POSITION", "EVENT", "AGGREGATE", "VERSION", "TRIES", "ERROR")


class Found(NamedTuple):
    """A letter and its consumer."""

    consumer: Consumer
    letter: DeadLetter

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict for JSON."""
        values = {"application": self.consumer.application.name, **self.letter._asdict()}
        failed_at = self.letter.failed_at
        values["failed_at"] = None if failed_at is None else f"{failed_at.isoformat()}+00:00"
        return values


def list_letters(
    subject: Subject,
    output: Output,
    *,
    projection: str | None = None,
    aggregate: str | None = None,
    limit: int | None = None,
    as_json: bool = False,
) -> int:
    """List the dead letters by projection, in the order of the log; they are printed while they are read.

    :param aggregate: only those of the aggregate with this id.
    :param limit: the most that are listed.
    """
    consumers = _consumers(subject, projection)
    pages = _pages(consumers, aggregate, limit)
    if as_json:
        _write_json(output, pages)
        return 0
    table, shown = TextTable(HEADS), 0
    for page in pages:
        output.write(table.add([_row(each.letter) for each in page]))
        shown += len(page)
    if shown and shown == limit:
        with clear_errors():
            total = sum(_count(consumer, aggregate) for consumer in consumers)
        if total > shown:
            output.write(f"{shown:,} of {counted(total, 'dead letter')}.")
    if not shown:
        output.write("There are no dead letters.")
    return 0


def _pages(consumers: Sequence[Consumer], aggregate: str | None, limit: int | None) -> Iterator[list[Found]]:
    for consumer in consumers:
        if limit == 0:
            return
        letters, engine = consumer.application.dead_letters, consumer.application.engine
        with clear_errors():
            for page in letters.pages(engine, consumer.name, originator_id=aggregate, limit=limit):
                yield [Found(consumer, each) for each in page]
                limit = None if limit is None else limit - len(page)


def _count(consumer: Consumer, aggregate: str | None = None) -> int:
    with consumer.application.engine.connect() as connection:
        return sum(consumer.application.dead_letters.count(connection, consumer.name, aggregate))


def _write_json(output: Output, pages: Iterator[list[Found]]) -> None:
    """Print a list whose members are printed as they are read."""
    before = "["
    for each in chain.from_iterable(pages):
        output.write(before)
        # The next member writes the end of the line, after a comma.
        text = indent(json.dumps(each.to_dict(), indent=2), "  ")
        last, before = text.rpartition("\n")[0], "  },"
        output.write(last)
    output.write("[]" if before == "[" else "  }\n]")


def _row(letter: DeadLetter) -> list[str]:
    return [
        str(letter.id),
        letter.projection,
        str(letter.position),
        _event(letter),
        printable(letter.originator_id),
        str(letter.originator_version),
        str(letter.attempts),
        letter.error if letter.error is not None else "(waits for the one before it)",
    ]


def show_letter(
    subject: Subject, output: Output, letter_id: int, *, projection: str | None = None, as_json: bool = False
) -> int:
    """Show a dead letter with its traceback, and what was recorded of its event beside the state."""
    (consumer,) = owners_of(subject, [letter_id], projection)
    found = Found(consumer, _read(consumer, letter_id))
    values = {**found.to_dict(), **_recorded(found)}
    if as_json:
        output.write(json.dumps(values, indent=2))
        return 0
    for key, value in values.items():
        if key != "traceback" and value is not None:
            text = json.dumps(value, sort_keys=True) if key == "metadata" else str(value)
            output.write(f"{key.replace('_', ' ')}: {printable(text)}")
    if found.letter.error is None:
        output.write("It waits for an earlier event of the same aggregate, which failed.")
    else:
        lines = (found.letter.traceback or "").expandtabs().rstrip().splitlines()
        # The text of an error may come from a request.
        output.write("\n".join(["", *map(printable, lines)]))
    return 0


def _recorded(found: Found) -> dict[str, Any]:
    """Return what was recorded beside the letter's event, for JSON; nothing if the log no longer has the event."""
    application, position = found.consumer.application, found.letter.position
    with clear_errors(), application.engine.connect() as connection:
        recorded = application.log.find_recorded([position], connection).get(position)
    if recorded is None:
        return {}
    return {
        "event_id": None if recorded.event_id is None else str(recorded.event_id),
        "recorded_at": None if recorded.time is None else recorded.time.isoformat(),
        "metadata": dict(recorded.metadata) or None,
    }


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
    told = _Told(output)
    if ids:
        owners = owners_of(subject, ids, projection)
        with clear_errors():
            for consumer, own in owners.items():
                retry(consumer, own, tell=told)
        return told.status
    consumers = _consumers(subject, projection)
    with clear_errors():
        for consumer in consumers:
            retry(consumer, tell=told)
    if not told.number:
        output.write("There are no dead letters.")
    return told.status


def discard_letters(
    subject: Subject, output: Output, ids: Sequence[int], *, yes: bool = False, projection: str | None = None
) -> int:
    """Discard failed events, and apply those that wait behind them; returns 1 if one of these fails.

    :param yes: do not ask.
    """
    owners = owners_of(subject, ids, projection)
    for consumer, own in owners.items():
        for letter_id in own:
            output.write(f"{letter_id}: {_described(_read(consumer, letter_id))}")
    if not yes and not output.confirm("The read model will never have these events. Discard them?"):
        return 1
    told = _Told(output)
    with clear_errors():
        for consumer, own in owners.items():
            for letter_id in own:
                discard(consumer, letter_id, tell=told)
    return told.status


class _Told:
    """Prints the outcome of each letter, and notes whether one has failed."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.number = 0
        self.status = 0

    def __call__(self, outcome: Outcome, letter: DeadLetter) -> None:
        error = f": {letter.error}" if outcome == "failed" else ""
        self._output.write(f"{letter.id} {outcome}: {_described(letter)}{error}")
        self.number += 1
        if outcome == "failed":
            self.status = 1


def _described(letter: DeadLetter) -> str:
    aggregate = f"{letter.originator_id} version {letter.originator_version}"
    return f"{letter.projection}, event {letter.position} ({_event(letter)} {aggregate})"


def _event(letter: DeadLetter) -> str:
    return printable(letter.topic.partition(":")[2] or letter.topic)


def _consumers(subject: Subject, projection: str | None) -> Sequence[Consumer]:
    require_tables(subject)
    consumers = subject.consumers()
    return consumers if projection is None else named(consumers, projection)


def owners_of(subject: Subject, ids: Sequence[int], projection: str | None = None) -> dict[Consumer, list[int]]:
    """Return the dead letters with these ids by their consumers.

    :raises CommandError: when there is no such letter, or several applications have one.
    """
    wanted = list(dict.fromkeys(ids))
    owners: dict[int, list[Consumer]] = {letter_id: [] for letter_id in wanted}
    with clear_errors():
        for consumer in _consumers(subject, projection):
            letters = consumer.application.dead_letters
            with consumer.application.engine.connect() as connection:
                for letter_id in letters.find(connection, [consumer.name], wanted):
                    owners[letter_id].append(consumer)
    found: dict[Consumer, list[int]] = {}
    for letter_id, consumers in owners.items():
        if not consumers:
            raise CommandError(f"There is no dead letter {letter_id}: see {subject.command('dead-letters list')}.")
        if len(consumers) > 1:
            names = " or ".join(each.name for each in consumers)
            raise CommandError(f"Several applications have a dead letter {letter_id}: add --projection {names}.")
        found.setdefault(consumers[0], []).append(letter_id)
    return found


def _read(consumer: Consumer, letter_id: int) -> DeadLetter:
    with clear_errors(), consumer.application.engine.connect() as connection:
        found = consumer.application.dead_letters.select(connection, [consumer.name], ids=[letter_id])
    if not found:
        raise CommandError(f"Dead letter {letter_id} was just retried or discarded.")
    return found[0]
