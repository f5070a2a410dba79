"""Event sourcing for Flask applications that keep their data with Flask-SQLAlchemy."""

from __future__ import annotations

from .exceptions import (
    AbortedTransactionError,
    ConfigurationError,
    FlaskEventSourcingError,
    MissingTableError,
    NotInitializedError,
    RollbackOnlyError,
    StandbyError,
    UncommittedEventsError,
    UnsafeSequenceError,
    WriteTimeoutError,
)
from .extension import EventSourcing
from .models import Models, SnapshotMixin, StoredEventMixin, TrackingMixin, UUIDType
from .signals import events_discarded, events_recorded
from .state import current_application

__version__ = "0.1.0"

__all__ = [
    "AbortedTransactionError",
    "ConfigurationError",
    "EventSourcing",
    "FlaskEventSourcingError",
    "MissingTableError",
    "Models",
    "NotInitializedError",
    "RollbackOnlyError",
    "SnapshotMixin",
    "StandbyError",
    "StoredEventMixin",
    "TrackingMixin",
    "UUIDType",
    "UncommittedEventsError",
    "UnsafeSequenceError",
    "WriteTimeoutError",
    "__version__",
    "current_application",
    "events_discarded",
    "events_recorded",
]
