"""What an operator does with checkpoints: gives them another name, forgets them, accepts what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..exceptions import CheckpointError
from ..persistence.dialects.base import IDENTITY, new_identity
from .belonging import Belonging
from .checkpoint import ACTIVE, Checkpoint
from .consumers import SUFFIXES, Consumer, ProjectedApplication
from .fingerprints import accept as accept_fingerprint
from .inline import find_not_applied


@dataclass(frozen=True)
class Entry:
    """A checkpoint as the table has it; an orphan is one of a projection that is not registered here."""

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
    """Give the checkpoints, dead letters and ranges of one projection to another; returns the names they had.

    :raises CheckpointError: when there are none, another has some, or a process runs it.
    """
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
    """Delete the checkpoints, dead letters and ranges of a projection; returns the names they had.

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
        raise CheckpointError(f"There is no checkpoint of {name!r}: see 'flask eventsourcing projections list'.")
    return found


def accept(consumer: Consumer) -> None:
    """Take log, tables and code of a consumer as they are now; one that is ahead goes on from the end of the log."""
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
            "state": ACTIVE,
            "error": None,
            "failed_position": None,
            "earlier_fingerprints": accept_fingerprint(row.earlier_fingerprints, consumer.fingerprint),
            **dict.fromkeys(("log_id", "last_originator_id", "last_originator_version", "tables_id")),
            **dict.fromkeys(("topics", "topics_position", "token", "leased_until")),
        }
        checkpoint.set_values(connection, **values)


def give_identity(application: ProjectedApplication) -> int:
    """Give a log an identity of its own, as that of a database's clone needs, and return it; checkpoints follow.

    :raises CheckpointError: when the host has no table for it.
    """
    tracking = application.tracking_table
    if tracking is None:
        raise CheckpointError(f"{application.name} has no tracking table, where the identity is kept.")
    made = int(new_identity()["notification_id"])
    c = application.models.tables["projections"].c
    with application.engine.begin() as connection:
        old = application.datastore.dialect.log_identity(connection, tracking)
        change = sa.update(tracking).where(tracking.c.application_name == IDENTITY)
        connection.execute(change.values(notification_id=made))
        connection.execute(sa.update(c.name.table).where(c.log_id == old).values(log_id=made))
    return made
