"""``projections``, ``reactions`` and ``new-identity``: commands for checkpoints, and for clones of a database."""

from __future__ import annotations

import getpass
import json
from dataclasses import asdict
from datetime import UTC, datetime

from ..projections import upkeep
from ..projections.consumers import SUFFIXES, Consumer, ProjectedApplication
from . import (
    CommandError,
    Output,
    Subject,
    UsageError,
    as_table,
    clear_errors,
    counted,
    named,
    qualified,
    registered,
    require_tables,
)

HEADS = ("NAME", "APPLICATION", "STATE", "POSITION", "")


def list_checkpoints(subject: Subject, output: Output, *, as_json: bool = False) -> int:
    """List the checkpoints that the database has, also those of projections that are not registered."""
    require_tables(subject)
    with clear_errors():
        found = [entry for application in _applications(subject) for entry in upkeep.entries(application)]
    if as_json:
        output.write(json.dumps([asdict(entry) for entry in found], indent=2))
    elif not found:
        output.write("There is no checkpoint yet.")
    else:
        rows = [(e.name, e.application, e.state, str(e.position), "not registered" if e.orphan else "") for e in found]
        output.write(as_table(HEADS, rows))
    return 0


def rename(subject: Subject, output: Output, old: str, new: str, *, application: str | None = None) -> int:
    """Rename a projection in its checkpoints and dead letters.

    :raises CommandError: when it cannot be done.
    """
    require_tables(subject)
    with clear_errors():
        for name in upkeep.rename(_find(subject, application), old, new):
            output.write(f"{name} is {new + name.removeprefix(old)} now.")
    return 0


def forget(subject: Subject, output: Output, name: str, *, application: str | None = None, yes: bool = False) -> int:
    """Delete the checkpoints and dead letters of a projection that is no longer registered.

    :raises CommandError: when it cannot be done.
    """
    require_tables(subject)
    found = _find(subject, application)
    if not yes and not output.confirm(f"Delete the checkpoints and dead letters of {name}?"):
        return 1
    with clear_errors():
        for each in upkeep.forget(found, name):
            output.write(f"Forgot {each}.")
    return 0


def accept(subject: Subject, output: Output, name: str) -> int:
    """Accept the present log, tables and code of a projection, or of its reactions.

    :raises CommandError: when there is none.
    """
    for consumer in _called(subject, name):
        with clear_errors():
            upkeep.accept(consumer)
        output.write(f"{consumer.name} goes on with its log, tables and code as they are now.")
    return 0


def pause(subject: Subject, output: Output, name: str, *, by: str | None = None, reason: str = "") -> int:
    """Keep every worker from running a projection, or its reactions, until it is resumed.

    :param by: the operator, by default the user of the operating system.
    :raises CommandError: when it cannot be done.
    """
    for consumer in _called(subject, name):
        with clear_errors():
            upkeep.pause(consumer, by=by or _user(), reason=reason)
        resumed = f"{subject.command(f'projections resume {consumer.name}')} lets it go on."
        output.write(f"{consumer.name} is paused. {resumed}")
    return 0


def resume(subject: Subject, output: Output, name: str, *, by: str | None = None, reason: str = "") -> int:
    """Let a projection, or its reactions, go on after a pause, or try again after it has halted.

    :raises CommandError: when it cannot be done.
    """
    for consumer in _called(subject, name):
        with clear_errors():
            upkeep.resume(consumer, by=by or _user(), reason=reason)
        output.write(f"{consumer.name} goes on as soon as a worker runs it.")
    return 0


def skip(subject: Subject, output: Output, name: str, position: int, *, reason: str, by: str | None = None) -> int:
    """Set aside the event at which a projection has halted, with the operator and the reason.

    :raises CommandError: when it has not halted at this event.
    """
    if not reason.strip():
        raise UsageError("Give the reason with --reason: the dead letter shows why the event was skipped.")
    for consumer in _called(subject, name):
        with clear_errors():
            event = upkeep.skip(consumer, position, by=by or _user(), reason=reason)
        output.write(f"{consumer.name} goes on after {event}, which is a dead letter now.")
    return 0


def reset_reactions(
    subject: Subject,
    output: Output,
    name: str,
    *,
    position: int | None = None,
    since: str | None = None,
    by: str | None = None,
    reason: str = "",
    yes: bool = False,
) -> int:
    """Let reactions go on after a position, or with the events since a time.

    :param yes: do not ask.
    :raises CommandError: when it cannot be done.
    """
    if (position is None) == (since is None):
        raise UsageError("Give --position or --since.")
    require_tables(subject)
    found = [each for each in named(subject.consumers(), name) if each.kind == "reactions"]
    if not found:
        raise CommandError(f"{name} has no reactions.")
    consumer = found[0]
    with clear_errors():
        to = position if position is not None else upkeep.position_before(consumer.application, _moment(since or ""))
        question = _question(consumer, to)
    if not yes and not output.confirm(question):
        return 1
    with clear_errors():
        upkeep.reset_reactions(consumer, to, by=by or _user(), reason=reason)
    output.write(f"{consumer.name} goes on after position {to}.")
    return 0


def _question(consumer: Consumer, to: int) -> str:
    row = consumer.checkpoint.read()
    now = consumer.start() if row is None else row.position
    with consumer.application.engine.connect() as connection:
        number = consumer.count_events(connection, min(now, to), max(now, to))
    what = "called again for" if to < now else "never called for"
    return f"{consumer.name} is at position {now}. Have it {what} {counted(number, 'event')} up to {max(now, to)}?"


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        example = "2026-11-24T10:00:00+00:00"
        raise UsageError(f"--since takes a time in ISO format, as {example}; found {text!r}.") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        # The user of a container may have no name.
        return "unknown"


def _called(subject: Subject, name: str) -> list[Consumer]:
    """Return the consumer with exactly this name, which may be a rebuild."""
    require_tables(subject)
    base = name.removesuffix(SUFFIXES["rebuild"])
    if base != name:
        return [each.of_kind("rebuild") for each in named(subject.consumers(), base) if each.kind == "projection"]
    found = named(subject.consumers(), name)
    return [each for each in found if name in (each.name, qualified(each))] or found


def new_identity(subject: Subject, output: Output, *, application: str | None = None) -> int:
    """Give the log of a cloned database a new identity, so its reactions have other keys than the original's.

    :raises CommandError: when it cannot be done.
    """
    require_tables(subject)
    found = _applications(subject) if application is None else [_find(subject, application)]
    with clear_errors():
        for each in found:
            output.write(f"{each.name}: the log has the identity {upkeep.give_identity(each)} now.")
    return 0


def _applications(subject: Subject) -> list[ProjectedApplication]:
    found = list(subject.projections.applications.values())
    if not found:
        raise CommandError(registered([]))
    return found


def _find(subject: Subject, name: str | None) -> ProjectedApplication:
    found = [each for each in _applications(subject) if name in (None, each.name)]
    if len(found) != 1:
        names = ", ".join(each.name for each in _applications(subject))
        raise UsageError(f"Choose the application with --application: {names}.")
    return found[0]
