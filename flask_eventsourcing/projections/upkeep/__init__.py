"""What operators do with checkpoints: rename, forget, accept, pause, resume, skip and reset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...exceptions import CheckpointError
from ..checkpoint import ACTIVE, HALTED, PAUSED, SWAPPING, Checkpoint, CheckpointRow, FencedError
from ..consumers import SUFFIXES, Consumer, ProjectedApplication
from ..consumers.belonging import Belonging
from ..consumers.inline import find_not_applied
from ..dead_letters import event_name, note_of
from ..definitions import NAMES, is_name
from ..definitions.fingerprints import accept as accept_fingerprint
from ..runners import stopped_message

LONGEST_NAME = 255
"""Characters of the name of the operator who changed something."""
LOOK_BACK = 1000
"""How many positions back an event may have a later timestamp, because the writers before it took long to commit."""


FEW = 10
"""How many events are read at first to find one that has a timestamp."""


@dataclass(frozen=True)
class Entry:
    """A row of the table of checkpoints; an orphan belongs to a projection that is not registered here."""

    name: str
    application: str
    position: int
    state: str
    orphan: bool


def entries(application: ProjectedApplication) -> list[Entry]:
    """Return what the table of projections has."""
    c = application.models.tables["projections"].c
    with application.engine.connect() as connection:
        rows = connection.execute(sa.select(c.name, c.position, c.state).order_by(c.name)).all()
    return [
        Entry(name, application.name, position, state, application.is_orphan(name)) for name, position, state in rows
    ]


def rename(application: ProjectedApplication, old: str, new: str) -> list[str]:
    """Rename the checkpoints, dead letters and ranges of a projection. Return their old names.

    :raises CheckpointError: when there are none, another has some, a process runs it, or no projection can have the
        new name.
    """
    suffix = next((each for each in SUFFIXES.values() if each and old.endswith(each)), "")
    if not is_name(new.removesuffix(suffix)):
        raise CheckpointError(f"The new name of a projection must be {NAMES}; found {new!r}.")
    with application.engine.begin() as connection:
        found = _lock_all(application, connection, old)
        for checkpoint in _all_of(application, new):
            row = checkpoint.read(connection)
            if row is not None and row.position:
                raise CheckpointError(
                    f"{checkpoint.name} has a checkpoint of its own, at position {row.position}: forget one of the two."
                )
            checkpoint.remove(connection)
        for name in found:
            to = new + name.removeprefix(old)
            for column in _names(application):
                connection.execute(sa.update(column.table).where(column == name).values({column.name: to}))
    return found


def forget(application: ProjectedApplication, name: str) -> list[str]:
    """Delete the checkpoints, dead letters and ranges of a projection. Return their names.

    :raises CheckpointError: when there are none, it is registered, or a process runs it.
    """
    if not application.is_orphan(name):
        raise CheckpointError(f"{name} is registered, and would begin at the start of the log: rebuild it instead.")
    with application.engine.begin() as connection:
        found = _lock_all(application, connection, name)
        for each in found:
            for column in _names(application):
                connection.execute(sa.delete(column.table).where(column == each))
    return found


def _names(application: ProjectedApplication) -> Iterator[sa.Column[str]]:
    tables = application.models.tables
    yield tables["projections"].c.name
    yield tables["dead_letters"].c.projection
    yield tables["inline_ranges"].c.projection


def _all_of(application: ProjectedApplication, name: str) -> list[Checkpoint]:
    return [application.checkpoint(name + suffix) for suffix in SUFFIXES.values()]


def _lock_all(application: ProjectedApplication, connection: Connection, name: str) -> list[str]:
    """Return the names of a projection's rows, which are locked."""
    found = []
    for checkpoint in _all_of(application, name):
        row = checkpoint.read(connection)
        if row is None:
            continue
        row = checkpoint.lock(connection)
        if row.token is not None and application.runner_lock(row.name).is_held(connection, row.leased_until):
            raise CheckpointError(f"{row.name} is run by {row.runner}: stop that first.")
        found.append(row.name)
    if not found:
        raise CheckpointError(f"There is no checkpoint of {name!r}: see {application.command('projections list')}.")
    return found


def accept(consumer: Consumer) -> None:
    """Accept the present log, tables and code of a consumer; one that is ahead goes on from the end of the log."""
    checkpoint = consumer.checkpoint
    checkpoint.ensure(consumer.start())
    mark = consumer.application.high_water_mark()
    belonging = Belonging(consumer)
    with consumer.application.engine.begin() as connection:
        row = checkpoint.lock(connection)
        mismatch = belonging.find_mismatch_of_log(connection, row)
        mismatch = mismatch or find_not_applied(consumer, connection, row, mark)
        position = mark if mismatch is not None else row.position
        values = {
            "position": position,
            "state": PAUSED if row.state == PAUSED else ACTIVE,
            "error": None,
            "failed_position": None,
            "earlier_fingerprints": accept_fingerprint(row.earlier_fingerprints, consumer.fingerprint),
            **dict.fromkeys(("log_id", "last_originator_id", "last_originator_version", "last_event_id", "tables_id")),
            **dict.fromkeys(("topics", "topics_position", "token", "leased_until")),
        }
        checkpoint.set_values(connection, **values)


def give_identity(application: ProjectedApplication) -> int:
    """Give the log of a cloned database a new identity, also in its checkpoints, and return it.

    :raises CheckpointError: when the host has no table for it.
    """
    c = application.models.tables["projections"].c
    with application.engine.begin() as connection:
        old, made = application.log.give_identity(connection)
        connection.execute(sa.update(c.name.table).where(c.log_id == old).values(log_id=made))
    return made


# ------------------------------------------------------------------------------------------------- pauses and skips


def pause(consumer: Consumer, *, by: str, reason: str = "") -> None:
    """Keep every worker from running a consumer until it is resumed, also after restarts.

    It waits for a batch in progress; nothing is applied after that. A reaction in progress is finished.

    :param by: the operator who asks for it, as ``status`` shows it.
    :param reason: why.
    :raises CheckpointError: when it is inline, or its rebuild is swapping tables.
    :raises CheckpointMismatchError: for reactions without a checkpoint, if there is a checkpoint of an unknown
        projection.
    """
    _refuse_inline(consumer)
    _ensure(consumer)
    with consumer.application.engine.begin() as connection:
        _refuse_swapping(consumer.checkpoint.lock(connection))
        consumer.checkpoint.set_values(connection, state=PAUSED, **_noted(by, reason))


def resume(consumer: Consumer, *, by: str, reason: str = "") -> None:
    """Let a paused consumer go on, or a halted one try again.

    A halted one tries the event again at which it has halted: correct its handler first.

    :param by: the operator who asks for it, as ``status`` shows it.
    :param reason: why.
    :raises CheckpointError: when it is neither.
    """
    _refuse_inline(consumer)
    with consumer.application.engine.begin() as connection:
        row = _locked(consumer, connection)
        if row.state not in (PAUSED, HALTED):
            raise CheckpointError(f"{row.name} is neither paused nor halted.")
        consumer.checkpoint.set_values(connection, state=ACTIVE, claim=0, **_noted(by, reason))


def skip(consumer: Consumer, position: int, *, by: str, reason: str) -> str:
    """Set aside the event at which a consumer has halted, so that it goes on after it. Return the event's name.

    The event becomes a dead letter that notes who skipped it, and why. Later events of the same aggregate wait behind
    it until it is retried or discarded.

    :param position: the event's position, as ``status`` shows it.
    :param by: the operator who asks for it.
    :param reason: why.
    :raises CheckpointError: when it has not halted at this event, or there are earlier events that it handles now.
    :raises CheckpointMismatchError: when the consumer does not fit its log or its tables.
    """
    _refuse_inline(consumer)
    application, letters = consumer.application, consumer.application.dead_letters
    _check_halted(consumer, consumer.checkpoint.read(), position)
    found = application.read_log(position - 1, 1, position, ())
    if not found:
        raise CheckpointError(f"Event {position} is not in the log any more: resume {consumer.name} instead.")
    name = event_name(found[0])
    with application.engine.begin() as connection:
        row = _check_halted(consumer, _locked(consumer, connection), position)
        mismatch = Belonging(consumer).find_mismatch(connection, row)
        if mismatch is not None:
            raise mismatch.error
        others = consumer.count_events(connection, row.position, position - 1)
        if others:
            raise CheckpointError(
                f"{consumer.name} now has handlers for events ({others}) between its position {row.position} and "
                f"{position}, and skipping would pass them over: run it again first."
            )
        error = (row.error or "").removeprefix(f"{name}: ") or "It was skipped."
        noted = _noted(by, reason)
        letters.add_skipped(connection, consumer.name, found[0], error, noted["changed_by"], noted["reason"])
        moved = {"position": position, "state": ACTIVE, "error": None, "failed_position": None}
        consumer.checkpoint.set_values(connection, **moved, **noted, **consumer.last_event(connection, position, found))
    return name


def _check_halted(consumer: Consumer, row: CheckpointRow | None, position: int) -> CheckpointRow:
    if row is not None and row.state == HALTED and row.failed_position == position:
        return row
    state = "it is not halted"
    if row is not None and row.state in (HALTED, PAUSED):
        state = stopped_message(consumer, row)
    text = f"{consumer.name} has not halted before position {position}, and you can only skip the event that halted it"
    raise CheckpointError(f"{text}: {state}.")


def reset_reactions(consumer: Consumer, position: int, *, by: str, reason: str = "") -> None:
    """Let reactions go on after a position: events after it are handled again, and events before it may be skipped.

    Dead letters of events after the position are deleted, as these events are handled again. Running reactions go on
    from the position; paused ones stay paused.

    :param consumer: the reactions of a projection.
    :param position: the position, from 0 (the beginning of the log) to the log's end.
    :param by: the operator who asks for it.
    :param reason: why.
    :raises CheckpointError: when there is no such position in the log, or the consumer is not one of reactions.
    """
    if consumer.kind != "reactions":
        raise CheckpointError(f"{consumer.name} has models: only reactions are reset; rebuild it instead.")
    mark = consumer.application.high_water_mark()
    if not 0 <= position <= mark:
        raise CheckpointError(f"Reactions go on from a position of the log, which is 0 to {mark}; found {position}.")
    consumer.checkpoint.ensure(consumer.start())
    with consumer.application.engine.begin() as connection:
        row = _locked(consumer, connection)
        consumer.application.dead_letters.remove_all(connection, consumer.name, position)
        moved = {"position": position, "error": None, "failed_position": None, **_noted(by, reason)}
        moved |= consumer.last_event(connection, position, ())
        consumer.checkpoint.set_values(connection, state=PAUSED if row.state == PAUSED else ACTIVE, **moved)


def position_before(application: ProjectedApplication, moment: datetime) -> int:
    """Return the position before the first event of a time or later, by the events' timestamps.

    Timestamps increase with positions, except for slow writers, so some earlier events are checked too.

    :param moment: with a time zone.
    :raises CheckpointError: when events have no timestamps.
    """
    low = 0
    high = mark = application.high_water_mark()
    if mark and _first_time(application, 0, mark) is None:
        raise CheckpointError(f"No event of {application.name} has a timestamp: give a position.")
    while low < high:
        middle = (low + high) // 2
        found = _first_time(application, middle, high)
        if found is None or found[1] >= moment:
            high = middle
        else:
            low = found[0]
    while True:
        times = _times(application, max(0, low - LOOK_BACK), low, LOOK_BACK)
        first = next((position for position, time in times if time >= moment), None)
        if first is None:
            return low
        low = first - 1


def _first_time(application: ProjectedApplication, after: int, stop: int) -> tuple[int, datetime] | None:
    """Return the position and the timestamp of the first event after a position that has a timestamp."""
    return next(_times(application, after, stop, FEW), None)


def _times(application: ProjectedApplication, after: int, stop: int, limit: int) -> Iterator[tuple[int, datetime]]:
    """Return the positions and timestamps between two positions, for as many events as fit into memory at once."""
    while after < stop:
        page, after = application.log.page(after, limit, stop, ())
        for each in page:
            if (time := application.time_of(each)) is not None:
                yield each.id, time


def _refuse_inline(consumer: Consumer) -> None:
    if consumer.kind == "projection" and consumer.projection_class.inline:
        raise CheckpointError(f"{consumer.name} is inline: it runs within save(), where it cannot be stopped.")


def _refuse_swapping(row: CheckpointRow) -> None:
    if row.state == SWAPPING:
        raise CheckpointError(f"A rebuild of {row.name} is about to end: try again in a moment.")


def _ensure(consumer: Consumer) -> None:
    """Create the row, unless a worker would refuse to."""
    if consumer.checkpoint.read() is not None:
        return
    with consumer.application.engine.connect() as connection:
        mismatch = Belonging(consumer).find_orphan(connection)
    if mismatch is not None:
        raise mismatch.error
    consumer.checkpoint.ensure(consumer.start())


def _locked(consumer: Consumer, connection: Connection) -> CheckpointRow:
    try:
        row = consumer.checkpoint.lock(connection)
    except FencedError:
        raise CheckpointError(f"{consumer.name} has no checkpoint yet: it never ran.") from None
    _refuse_swapping(row)
    return row


def _noted(by: str, reason: str) -> dict[str, Any]:
    return {"changed_by": note_of(by, LONGEST_NAME), "reason": note_of(reason) or None}
