"""A use of every public name that the bank does without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_type
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import IntegrityError, Notification, OperationalError, Tracking
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import flask_eventsourcing
from flask_eventsourcing import (
    AbortedTransactionError,
    AggregateErased,
    AggregateErasedError,
    CommitInsideUnitError,
    CommitOutcomeUnknownError,
    ConfigurationError,
    ConstraintError,
    EventMetadataError,
    EventRedacted,
    EventValueError,
    FlaskEventSourcingError,
    IdentifierTypeError,
    InheritedDatabaseError,
    MissingRightError,
    MissingTableError,
    Models,
    NotInitializedError,
    OldSnapshotError,
    RollbackOnlyError,
    SharedAggregateError,
    SnapshotMixin,
    SpanningTransactionError,
    StandbyError,
    StoredEventMixin,
    TrackingMixin,
    UncommittedEventsError,
    UnreadableEventError,
    UnsafeSequenceError,
    UnsafeSettingError,
    UnsafeTableError,
    UUIDType,
    WriteTimeoutError,
    events_discarded,
    events_recorded,
)
from flask_eventsourcing.host import PlainHost
from flask_eventsourcing.lifecycle import ApplicationSlot, close_application, get_application, init_application
from flask_eventsourcing.models import event_table_arguments, make_models
from flask_eventsourcing.persistence import (
    Datastore,
    DCBFactory,
    Description,
    Dialect,
    DialectOptions,
    Factory,
    JoinedUnit,
    SQLAlchemyAggregateRecorder,
    SQLAlchemyApplicationRecorder,
    SQLAlchemyProcessRecorder,
    SQLAlchemyTrackingRecorder,
)
from flask_eventsourcing.projections import ModelProjection, on

from .bank import Bank

ERRORS: list[type[FlaskEventSourcingError]] = [
    AbortedTransactionError,
    AggregateErasedError,
    CommitInsideUnitError,
    CommitOutcomeUnknownError,
    ConfigurationError,
    ConstraintError,
    EventMetadataError,
    EventValueError,
    IdentifierTypeError,
    InheritedDatabaseError,
    MissingRightError,
    MissingTableError,
    NotInitializedError,
    OldSnapshotError,
    RollbackOnlyError,
    SharedAggregateError,
    SpanningTransactionError,
    StandbyError,
    UncommittedEventsError,
    UnreadableEventError,
    UnsafeSequenceError,
    UnsafeSettingError,
    UnsafeTableError,
    WriteTimeoutError,
]
OUTAGES: list[type[OperationalError]] = [AbortedTransactionError, StandbyError, WriteTimeoutError]


class Base(DeclarativeBase):
    """The base of the models of a program without Flask."""


class Entry(StoredEventMixin, Base):
    """A record class with arguments of its own."""

    __tablename__ = "entry"
    __table_args__ = event_table_arguments("entry", comment="the log")
    writer: Mapped[UUID | None] = mapped_column(UUIDType())


class Shot(SnapshotMixin, Base):
    """A record class of snapshots."""

    __tablename__ = "shot"


class Mark(TrackingMixin, Base):
    """A record class of positions."""

    __tablename__ = "mark"


class Erasures(ModelProjection):
    """A projection that obeys erasures."""

    @on(AggregateErased, EventRedacted)
    def erased(self, event: AggregateErased | EventRedacted, session: Session) -> None:
        """Forget."""
        session.flush()

    @on(Aggregate.Event, Aggregate.Created, AggregateErased, EventRedacted, Tracking)
    def many(self, event: object, session: Session) -> None:
        """More than four classes are not checked, and taken all the same."""


def received(sender: object, application: Application[UUID], notifications: tuple[Notification, ...]) -> None:
    """Receive a signal."""


def signals() -> None:
    """Connect a receiver."""
    events_recorded.connect(received)
    events_discarded.connect(received)


def plain(engine: sa.Engine) -> None:
    """Use a program without Flask."""
    models = make_models(Base, Bank.name, stored_event_model=Entry, snapshot_model=Shot, tracking_model=Mark)
    assert_type(models, Models)
    assert_type(models.tables, Mapping[str, sa.Table])
    host = PlainHost(sessionmaker(engine), {Bank: models})
    with host.transaction() as session:
        assert_type(session, Session)
        host[Bank].open_account("Ada")
    with host.session():
        assert_type(host.retry(lambda: host[Bank].open_account("Bob"), 3), UUID)
    host.close()


def lifecycle() -> None:
    """Use the single application of a process."""
    assert_type(init_application(Bank, env={"A": "b"}), Bank)
    bank: Bank = get_application()
    try:
        bank.save()
    except IntegrityError:
        close_application()
    with ApplicationSlot(Bank) as slot:
        assert_type(slot.get(), Bank)
        assert_type(slot.constructed, bool)


def recorders(datastore: Datastore, table: sa.Table, env: dict[str, str]) -> None:
    """Use the recorders and what makes them."""
    assert_type(datastore.dialect, Dialect)
    descriptions: list[Description] = []
    print(descriptions)
    options = DialectOptions(lock_timeout=1.0)
    unit: JoinedUnit | None = datastore.unit()
    print(options, unit, flask_eventsourcing.__version__)
    print(SQLAlchemyApplicationRecorder(datastore, table).select_notifications(None, 10))
    kinds: list[type[SQLAlchemyAggregateRecorder]] = [SQLAlchemyApplicationRecorder, SQLAlchemyProcessRecorder]
    print(kinds, SQLAlchemyTrackingRecorder(datastore, table).max_tracking_id("Shop"))
    factories = [Factory(env), DCBFactory]
    print(factories)
