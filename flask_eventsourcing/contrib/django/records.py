"""The record classes of the project's applications, by the names of the applications."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from ...exceptions import ConfigurationError
from ...models import ProjectionModels, make_models, make_projection_models
from .own_records import mirrored


@dataclass(frozen=True, eq=False)
class Mirror:
    """The tables of one application, for SQLAlchemy."""

    tables: Mapping[str, sa.Table]
    """By their use: ``events``, ``snapshots``, ``tracking``."""
    projections: ProjectionModels
    """The record classes for projections."""

    def all(self) -> list[sa.Table]:
        """Return every table."""
        return [*self.tables.values(), *self.projections.tables.values()]


@dataclass(frozen=True, eq=False)
class Records:
    """The record classes of one application, which are models of Django's."""

    name: str
    StoredEvent: Any
    Snapshot: Any
    Tracking: Any
    Projection: Any
    DeadLetter: Any
    InlineRange: Any
    mirror: Mirror
    """The same for SQLAlchemy."""

    @property
    def module(self) -> str:
        """Where they were declared."""
        found: str = self.Projection.__module__
        return found

    @property
    def models(self) -> tuple[Any, ...]:
        """Django's models."""
        found = self.StoredEvent, self.Snapshot, self.Tracking, self.Projection, self.DeadLetter, self.InlineRange
        return tuple(each for each in found if each is not None)

    @property
    def has_events(self) -> bool:
        """Whether there are record classes for the events. There are none if the events are apart."""
        return self.StoredEvent is not None


_records: dict[str, Records] = {}
_modules: dict[str, str] = {}
"""Where the record classes of each application were declared."""


def add_records(
    name: str, module: str, models: Mapping[str, Any], own: Mapping[str, Any], *, text_ids: bool, events: bool = True
) -> Records:
    """Note the record classes of an application.

    :param models: Django's.
    :param own: the user's own, by the keyword arguments of ``make_models``.
    :param events: whether there are record classes for events.
    :raises ConfigurationError: when another module has declared record classes for that name.
    """
    known = _modules.get(name)
    if known not in (None, module):
        raise ConfigurationError(
            f"event_models(…, {name!r}) was called in {known} and in {module}: call it in one module only, as an "
            "application has one table of events."
        )
    base: Any = orm.declarative_base()
    given = {key: mirrored(base, model) for key, model in own.items()}
    tables: Mapping[str, sa.Table] = {}
    if events:
        tables = make_models(base, name, originator_id_type="text" if text_ids else "uuid", **given).tables
    mirror = Mirror(tables, make_projection_models(base, name))
    made = _records[name] = Records(name, **models, mirror=mirror)
    _modules[name] = module
    return made


def records_of(name: str, *, projected: bool = False) -> Records:
    """Return the record classes of an application.

    :param projected: whether the record classes of its projections are enough.
    :raises ConfigurationError: when there are none.
    """
    if name not in _records and projected:
        raise ConfigurationError(
            f"The projections of {name!r} have no tables: write {name}Records = projection_models(__name__, {name!r}) "
            "in the models.py of an app, with 'from flask_eventsourcing.contrib.django.models import "
            "projection_models'."
        )
    if name not in _records or not (projected or _records[name].has_events):
        raise ConfigurationError(
            f"Application {name!r} has no tables: write {name}Records = event_models(__name__, {name!r}) in the "
            "models.py of an app, with 'from flask_eventsourcing.contrib.django.models import event_models'."
        )
    return _records[name]


def all_records() -> Mapping[str, Records]:
    """Return the record classes of all applications."""
    return dict(_records)
