"""``projections`` and ``new-identity``: what is to be done with checkpoints that do not fit, and with clones."""

from __future__ import annotations

import json
from dataclasses import asdict

from ..projections import upkeep
from ..projections.consumers import ProjectedApplication
from . import CommandError, Output, Subject, UsageError, as_table, clear_errors, named, require_tables

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
    """Give what one projection has to another: position, reactions, dead letters.

    :raises CommandError: when that cannot be.
    """
    require_tables(subject)
    with clear_errors():
        for name in upkeep.rename(_find(subject, application), old, new):
            output.write(f"{name} is {new + name.removeprefix(old)} now.")
    return 0


def forget(subject: Subject, output: Output, name: str, *, application: str | None = None, yes: bool = False) -> int:
    """Delete what a projection has that is not registered any more.

    :raises CommandError: when that cannot be.
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
    """Take log, tables and code of a projection, or of its reactions, as they are now.

    :raises CommandError: when there is none.
    """
    require_tables(subject)
    found = named(subject.consumers(), name)
    chosen = [consumer for consumer in found if consumer.name == name] or found
    with clear_errors():
        for consumer in chosen:
            upkeep.accept(consumer)
            output.write(f"{consumer.name} goes on with its log, tables and code as they are now.")
    return 0


def new_identity(subject: Subject, output: Output, *, application: str | None = None) -> int:
    """Give the log of a clone an identity of its own, so that keys of reactions are others than the original's.

    :raises CommandError: when that cannot be.
    """
    require_tables(subject)
    with clear_errors():
        for each in _applications(subject):
            if application in (None, each.name):
                output.write(f"{each.name}: the log has the identity {upkeep.give_identity(each)} now.")
    return 0


def _applications(subject: Subject) -> list[ProjectedApplication]:
    found = list(subject.projections.applications.values())
    if not found:
        raise CommandError("No projection is registered: decorate a class with @es.projection(of=…).")
    return found


def _find(subject: Subject, name: str | None) -> ProjectedApplication:
    found = [each for each in _applications(subject) if name in (None, each.name)]
    if len(found) != 1:
        names = ", ".join(each.name for each in _applications(subject))
        raise UsageError(f"Say the application with --application: {names}.")
    return found[0]
