"""Makes the record classes of an application and of its projections, for the user's own models module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from eventsourcing.application import Application

from ...exceptions import ConfigurationError
from ...models import (
    CheckpointMixin,
    DeadLetterMixin,
    InlineRangeMixin,
    Models,
    ProjectionModels,
    SnapshotMixin,
    StoredEventMixin,
    TrackingMixin,
    index_correlation,
    make_models,
    make_projection_models,
)


@dataclass(frozen=True)
class EventModels:
    """The record classes of an application and of its projections, on the declarative base in use.

    Query them as any model: ``dbsession.scalars(select(events.StoredEvent))``.
    """

    events: Models
    projections: ProjectionModels

    @property
    def StoredEvent(self) -> type[StoredEventMixin]:  # noqa: N802
        """The record class of events. Query it, and let ``save()`` write it."""
        return self.events.StoredEvent

    @property
    def Snapshot(self) -> type[SnapshotMixin]:  # noqa: N802
        """The record class of snapshots. It has no rows unless snapshots are taken."""
        return self.events.Snapshot

    @property
    def Tracking(self) -> type[TrackingMixin]:  # noqa: N802
        """The record class of positions in other applications' logs. It has rows if the application follows some."""
        return self.events.Tracking

    @property
    def Projection(self) -> type[CheckpointMixin]:  # noqa: N802
        """The record class of the positions of projections. ``status`` shows them, with the states."""
        return self.projections.Projection

    @property
    def DeadLetter(self) -> type[DeadLetterMixin]:  # noqa: N802
        """The record class of events that projections have set aside. Retry or discard them with the commands."""
        return self.projections.DeadLetter

    @property
    def InlineRange(self) -> type[InlineRangeMixin]:  # noqa: N802
        """The record class of the positions that inline projections have applied. No query of yours needs it."""
        return self.projections.InlineRange

    @property
    def tables(self) -> dict[str, sa.Table]:
        """The tables by their use, such as ``events`` and ``projections``. Migrations look them up by these names."""
        return {**self.events.tables, **self.projections.tables}


def event_models(
    base: Any,
    application_name: str,
    *,
    originator_id_type: Literal["uuid", "text"] = "uuid",
    schema: str | None = None,
    correlation_index: bool = False,
    stored_event_model: Any = None,
) -> EventModels:
    """Make the record classes of an application, and of its projections, on a declarative base.

    Call it in the module of your models. Then the tables depend on no setting, and Alembic's ``env.py`` sees them,
    although it imports only the base.

    :param base: the declarative base.
    :param application_name: the name of the application class, after which the tables are named.
    :param originator_id_type: whether the ids of aggregates are UUIDs or text.
    :param schema: the schema of the tables, if the database has schemas.
    :param correlation_index: whether the column ``correlation_id`` has an index.
    :param stored_event_model: a record class of your own, made with ``StoredEventMixin`` on the same base.
    :raises ConfigurationError: when a table name is taken, or a given record class lacks something.

    .. versionchanged:: 0.1.0 The argument *stored_event_model* was added.
    """
    events = make_models(
        base,
        application_name,
        originator_id_type=originator_id_type,
        schema=schema,
        stored_event_model=stored_event_model,
    )
    if correlation_index:
        index_correlation(events)
    return EventModels(events, make_projection_models(base, application_name, schema=schema))


def check_models_of(application: Any, by_class: Mapping[Any, Any]) -> None:
    """Check applications and their models.

    :raises ConfigurationError: when one cannot be used.
    """
    if application not in by_class:
        raise ConfigurationError(f"models has no entry for {application!r}: add event_models(Base, …) for it.")
    for each, own in by_class.items():
        if not (isinstance(each, type) and issubclass(each, Application)):
            raise ConfigurationError(f"{each!r} is no application class, a subclass of {Application.__qualname__}.")
        if not isinstance(own, EventModels):
            raise ConfigurationError(
                f"The models of {each.__name__} are {own!r}: make them with event_models(Base, {each.name!r}) in the "
                "module of your models."
            )
