"""The tables that projections need beside the events: how far each is, and what was set aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import mysql

from ..models import POSITION, TEXT_ID

TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
"""MySQL's own has whole seconds, of which a lease has too few."""


class ProjectionMixin:
    """Columns of the table of projections: one row for each, and one more while it is rebuilt.

    ``position`` is that of the last event that was dealt with, ``applied`` counts the events that had a handler. Times
    are in UTC, without a time zone.
    """

    name = orm.mapped_column(TEXT_ID, primary_key=True)
    position = orm.mapped_column(POSITION, nullable=False, default=0)
    applied = orm.mapped_column(POSITION, nullable=False, default=0)
    state = orm.mapped_column(sa.String(20), nullable=False, default="active")
    runner = orm.mapped_column(sa.String(255), nullable=True)
    token = orm.mapped_column(sa.String(32), nullable=True)
    running_since = orm.mapped_column(TIME, nullable=True)
    leased_until = orm.mapped_column(TIME, nullable=True)
    error = orm.mapped_column(sa.Text(), nullable=True)
    failed_position = orm.mapped_column(POSITION, nullable=True)
    fingerprint = orm.mapped_column(sa.String(64), nullable=True)


class DeadLetterMixin:
    """Columns of the table of dead letters, the events that a projection could not apply and those that wait behind.

    A letter without an ``error`` waits for an earlier one of the same aggregate.
    """

    id = orm.mapped_column(POSITION, primary_key=True, autoincrement=True)
    projection = orm.mapped_column(TEXT_ID, nullable=False)
    position = orm.mapped_column(POSITION, nullable=False)
    originator_id = orm.mapped_column(TEXT_ID, nullable=False)
    originator_version = orm.mapped_column(POSITION, nullable=False)
    topic = orm.mapped_column(sa.Text(), nullable=False)
    error = orm.mapped_column(sa.Text(), nullable=True)
    traceback = orm.mapped_column(sa.Text(), nullable=True)
    attempts = orm.mapped_column(sa.Integer(), nullable=False, default=0)
    failed_at = orm.mapped_column(TIME, nullable=True)


@dataclass(frozen=True)
class ProjectionModels:
    """The two record classes of one application's projections."""

    Projection: Any
    DeadLetter: Any

    @property
    def tables(self) -> dict[str, sa.Table]:
        """The tables by their use: ``projections``, ``dead_letters``."""
        return {"projections": self.Projection.__table__, "dead_letters": self.DeadLetter.__table__}


def make_projection_models(
    base: Any, application_name: str, *, schema: str | None = None, bind_key: str | None = None
) -> ProjectionModels:
    """Make the record classes on a declarative base; their tables are named after the application."""
    prefix = application_name.lower()

    def model(suffix: str, mixin: type[Any], table_name: str, *arguments: Any) -> Any:
        options = {} if schema is None else {"schema": schema}
        body: dict[str, Any] = {
            "__tablename__": table_name,
            "__module__": __name__,
            "__table_args__": (*arguments, {"sqlite_autoincrement": bool(arguments), **options}),
        }
        if bind_key is not None:
            body["__bind_key__"] = bind_key
        return type(base)(f"{application_name}{suffix}", (mixin, base), body)

    letters = f"{prefix}_dead_letters"
    key = sa.UniqueConstraint("projection", "position", name=f"{letters}_position_key")
    return ProjectionModels(
        model("Projection", ProjectionMixin, f"{prefix}_projections"),
        model("DeadLetter", DeadLetterMixin, letters, key),
    )
