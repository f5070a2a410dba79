"""Inline projections: handlers that run within ``save()``, in its transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eventsourcing.persistence import IntegrityError, StoredEvent
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ..exceptions import HandlerError
from ..persistence import SessionScope
from ..session import UnitOfWork
from .consumers import ProjectionHost
from .definitions import ModelProjection
from .shadow import MYSQL

ENDED = (
    "A handler of an inline projection ended the transaction: it must not call session.commit() or "
    "session.rollback(), as its models are committed with the events."
)


def install(host: ProjectionHost, projection_classes: Sequence[type[ModelProjection]]) -> None:
    """Have the recorder call the inline ones among some projections after each append."""
    projections = [cls() for cls in projection_classes if cls.inline and cls.handlers]

    def apply(connection: Connection, scope: SessionScope | None, events: Sequence[StoredEvent]) -> None:
        if isinstance(scope, UnitOfWork):
            try:
                _refuse_old_snapshot(host, projections, connection)
                with scope.hold(ENDED):
                    _apply(host, projections, scope.session, events)
            except BaseException:
                # Whoever catches the error must not commit the events without their read models.
                scope.refuse("An inline projection failed")
                raise
            return
        # Outside an application context the recorder has a transaction of its own, which the session only joins.
        _refuse_old_snapshot(host, projections, connection)
        with orm.Session(bind=connection) as session:
            session.begin()
            _apply(host, projections, session, events)

    if host.binding.datastore is not None:
        host.binding.datastore.after_append[host.application_name] = apply


def _apply(
    host: ProjectionHost, projections: Sequence[ModelProjection], session: orm.Session, events: Sequence[StoredEvent]
) -> None:
    domain_events: list[Any] = [host.mapper.to_domain_event(event) for event in events]
    begun = session.get_transaction()
    _forget_rows(session, projections)
    for projection in projections:
        for event in domain_events:
            handler = projection.handlers.find(type(event))
            if handler is not None:
                handler(projection, event, session)
            if session.get_transaction() is not begun:
                raise HandlerError(ENDED)
    session.flush()


def _forget_rows(session: orm.Session, projections: Sequence[ModelProjection]) -> None:
    """Have handlers read rows anew: what the session has loaded may be older than the aggregate's last event."""
    models = tuple(model for projection in projections for model in projection.models)
    if models:
        for row in list(session.identity_map.values()):
            if isinstance(row, models) and not session.is_modified(row):
                session.expire(row)


def _refuse_old_snapshot(host: ProjectionHost, projections: Sequence[ModelProjection], connection: Connection) -> None:
    """Let a transaction try again whose snapshot is older than the end of a rebuild.

    MySQL would show it the new tables as they were while they were being built. A locking read sees what is committed.

    :raises IntegrityError: when a rebuild has ended since the transaction began to read.
    """
    if host.engine.dialect.name not in MYSQL:
        return
    for projection in projections:
        control = host.control(projection.name)
        if control.read(connection) != control.read(connection, latest=True):
            raise IntegrityError(f"Projection {projection.name} was rebuilt since this transaction began: try again.")
