"""``init-db``, ``check`` and ``status``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..projections.status import Health, ProjectionStatus, status_of
from . import (
    CommandError,
    Output,
    Subject,
    as_table,
    clear_errors,
    missing_tables,
    remedy_of_missing,
    require_tables,
)


def init_db(subject: Subject, output: Output) -> int:
    """Create the missing tables of applications, projections and their models."""
    missing = missing_tables(subject)
    if not missing:
        output.write("All tables are there.")
        return 0
    # In the order of their foreign keys, and only these: not what they may refer to elsewhere.
    metadatas = dict.fromkeys(table.metadata for table in missing)
    for metadata in metadatas:
        metadata.create_all(subject.datastore.engine, [table for table in missing if table.metadata is metadata])
    for table in missing:
        output.write(f"Created table {table.fullname}.")
    return 0


def check(subject: Subject, output: Output) -> int:
    """Check the configuration, the connection, the tables and the logs.

    :raises CommandError: when something is wrong.
    """
    engine = subject.datastore.engine
    output.write(
        f"Database: {engine.url.render_as_string(hide_password=True)} ({engine.dialect.name}, {engine.driver})"
    )
    output.write(f"Commit mode: {subject.commit_mode}")
    missing = missing_tables(subject)
    for owner, table in subject.tables():
        output.write(f"{owner}: table {table.fullname} {'is missing' if table in missing else 'ok'}")
    if missing:
        raise CommandError(f"Tables are missing: {remedy_of_missing(subject)}.")
    with clear_errors():
        # It is also what finds a sequence, or a standby, with which the order would not be safe.
        for name, application in subject.applications().items():
            last = application.recorder.max_notification_id() or 0
            output.write(f"{name}: log ok, last position {last}")
    return 0


def status(subject: Subject, output: Output, *, as_json: bool = False, check: bool = False) -> int:
    """Tell how far each projection is, who runs it, and what is wrong.

    :param check: return 1 unless all are run and nothing was set aside.
    """
    require_tables(subject)
    with clear_errors():
        health = Health(tuple(status_of(consumer) for consumer in subject.consumers()))
    if as_json:
        output.write(json.dumps(health.to_dict(), indent=2))
    elif not health.projections:
        output.write("No projection is registered.")
    else:
        output.write(_table(subject, health.projections))
    return 1 if check and not health.ok else 0


HEADS = ("NAME", "APPLICATION", "STATE", "POSITION", "HEAD", "LAG", "SECONDS", "DEAD", "RUNNER", "SINCE")


def _table(subject: Subject, projections: Sequence[ProjectionStatus]) -> str:
    text = as_table(HEADS, [_row(each) for each in projections])
    notes = [f"{each.name}: {_trouble(subject, each)}" for each in projections if each.error or each.dead_letters]
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


def _trouble(subject: Subject, each: ProjectionStatus) -> str:
    parts = []
    if each.error:
        parts.append(f"{'halted at' if each.state == 'halted' else 'last error:'} {each.error}")
    if each.dead_letters:
        waiting = f", {each.waiting} waiting behind" if each.waiting else ""
        parts.append(f"{each.dead_letters} dead letters{waiting}: see '{subject.program} dead-letters list'")
    return "; ".join(parts)
