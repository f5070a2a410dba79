"""Record classes: mixins for your own, and functions that make the default ones on a declarative base.

The record classes of events are made in ``persistence.tables``, those of projections here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime  # noqa: F401  # named in type comments
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from .persistence.dialects import ExactText, keep_transactions, table_options
from .persistence.dialects.swapping import LEFT
from .persistence.tables import (
    POSITION_TYPE,
    TEXT_ID,
    TIME,
    MetadataType,
    Models,
    OnTable,
    SnapshotMixin,
    StoredEventMixin,
    TableNames,
    TrackingMixin,
    UUIDType,
    check_models,
    event_table_arguments,
    index_correlation,
    make_models,
    table_of,
)

__all__ = [
    "CheckpointMixin",
    "DeadLetterMixin",
    "ExactText",
    "InlineRangeMixin",
    "MetadataType",
    "Models",
    "ProjectionModels",
    "SnapshotMixin",
    "StoredEventMixin",
    "TableNames",
    "TrackingMixin",
    "UUIDType",
    "check_models",
    "event_table_arguments",
    "index_correlation",
    "is_of_rebuild",
    "make_models",
    "make_projection_models",
]


class CheckpointMixin(OnTable):
    """Columns of the table of projections: one row for each projection, and one more while it is rebuilt.

    ``position`` is that of the last event that was handled or skipped, ``applied`` counts the events that had a
    handler. Times are in UTC, without a time zone. ``docs/models.md`` says what the nullable columns are for.
    """

    name = orm.mapped_column(TEXT_ID, primary_key=True)  # type: orm.Mapped[str]
    position = orm.mapped_column(POSITION_TYPE, nullable=False, default=0)  # type: orm.Mapped[int]
    applied = orm.mapped_column(POSITION_TYPE, nullable=False, default=0)  # type: orm.Mapped[int]
    state = orm.mapped_column(sa.String(20), nullable=False, default="active")  # type: orm.Mapped[str]
    runner = orm.mapped_column(sa.String(255), nullable=True)  # type: orm.Mapped[str | None]
    token = orm.mapped_column(sa.String(32), nullable=True)  # type: orm.Mapped[str | None]
    claim = orm.mapped_column(POSITION_TYPE, nullable=True)  # type: orm.Mapped[int | None]
    running_since = orm.mapped_column(TIME, nullable=True)  # type: orm.Mapped[datetime | None]
    leased_until = orm.mapped_column(TIME, nullable=True)  # type: orm.Mapped[datetime | None]
    error = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]
    failed_position = orm.mapped_column(POSITION_TYPE, nullable=True)  # type: orm.Mapped[int | None]
    fingerprint = orm.mapped_column(sa.String(64), nullable=True)  # type: orm.Mapped[str | None]
    earlier_fingerprints = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]
    log_id = orm.mapped_column(POSITION_TYPE, nullable=True)  # type: orm.Mapped[int | None]
    last_originator_id = orm.mapped_column(TEXT_ID, nullable=True)  # type: orm.Mapped[str | None]
    last_originator_version = orm.mapped_column(POSITION_TYPE, nullable=True)  # type: orm.Mapped[int | None]
    last_event_id = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]
    tables_id = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]
    topics = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]
    topics_position = orm.mapped_column(POSITION_TYPE, nullable=True)  # type: orm.Mapped[int | None]
    changed_by = orm.mapped_column(sa.String(255), nullable=True)  # type: orm.Mapped[str | None]
    reason = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]


class DeadLetterMixin(OnTable):
    """Columns of the table of dead letters: events that a projection could not apply, and those that wait behind them.

    A letter without an ``error`` waits for an earlier one of the same aggregate.
    """

    id = orm.mapped_column(POSITION_TYPE, primary_key=True, autoincrement=True)  # type: orm.Mapped[int]
    projection = orm.mapped_column(TEXT_ID, nullable=False)  # type: orm.Mapped[str]
    position = orm.mapped_column(POSITION_TYPE, nullable=False)  # type: orm.Mapped[int]
    originator_id = orm.mapped_column(TEXT_ID, nullable=False)  # type: orm.Mapped[str]
    originator_version = orm.mapped_column(POSITION_TYPE, nullable=False)  # type: orm.Mapped[int]
    topic = orm.mapped_column(sa.Text(), nullable=False)  # type: orm.Mapped[str]
    error = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]
    traceback = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]
    attempts = orm.mapped_column(sa.Integer(), nullable=False, default=0)  # type: orm.Mapped[int]
    failed_at = orm.mapped_column(TIME, nullable=True)  # type: orm.Mapped[datetime | None]
    changed_by = orm.mapped_column(sa.String(255), nullable=True)  # type: orm.Mapped[str | None]
    reason = orm.mapped_column(sa.Text(), nullable=True)  # type: orm.Mapped[str | None]


class InlineRangeMixin(OnTable):
    """Columns of the table of positions that inline projections have applied: a row for each append, merged later."""

    id = orm.mapped_column(POSITION_TYPE, primary_key=True, autoincrement=True)  # type: orm.Mapped[int]
    projection = orm.mapped_column(TEXT_ID, nullable=False)  # type: orm.Mapped[str]
    first_position = orm.mapped_column(POSITION_TYPE, nullable=False)  # type: orm.Mapped[int]
    last_position = orm.mapped_column(POSITION_TYPE, nullable=False)  # type: orm.Mapped[int]


@dataclass(frozen=True)
class ProjectionModels:
    """The three record classes of one application's projections."""

    Projection: type[CheckpointMixin]
    DeadLetter: type[DeadLetterMixin]
    InlineRange: type[InlineRangeMixin]

    @property
    def tables(self) -> dict[str, sa.Table]:
        """The tables by their use: ``projections``, ``dead_letters``, ``inline_ranges``."""
        return {
            "projections": table_of(self.Projection),
            "dead_letters": table_of(self.DeadLetter),
            "inline_ranges": table_of(self.InlineRange),
        }


def make_projection_models(
    base: Any, application_name: str, *, schema: str | None = None, bind_key: str | None = None
) -> ProjectionModels:
    """Make the record classes of an application's projections on a declarative base.

    The tables are named after the application: ``bank_projections``, ``bank_dead_letters`` and ``bank_inline_ranges``.
    """
    prefix = application_name.lower()
    options = {} if schema is None else {"schema": schema}

    def model(suffix: str, mixin: type[Any], table_name: str, *arguments: Any, **own: Any) -> Any:
        body: dict[str, Any] = {
            "__tablename__": table_name,
            "__module__": __name__,
            "__table_args__": (*arguments, {**own, **options}),
        }
        if bind_key is not None:
            body["__bind_key__"] = bind_key
        return type(base)(f"{application_name}{suffix}", (mixin, base), body)

    letters = f"{prefix}_dead_letters"
    key = sa.UniqueConstraint("projection", "position", name=f"{letters}_position_key")
    models = ProjectionModels(
        model("Projection", CheckpointMixin, f"{prefix}_projections"),
        model("DeadLetter", DeadLetterMixin, letters, key, **table_options()),
        model("InlineRange", InlineRangeMixin, f"{prefix}_inline_ranges", **table_options()),
    )
    keep_transactions(models.tables.values())
    return models


def is_of_rebuild(name: str, live: Collection[str]) -> bool:
    """Whether a table, by its name, was made by a rebuild beside one of some live tables."""
    match = LEFT.fullmatch(name)
    return match is not None and match["live"] in live
