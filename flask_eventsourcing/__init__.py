"""Event sourcing for Flask applications that keep their data with Flask-SQLAlchemy.

A name is imported when a program asks for it (PEP 562), so that the modules below the Flask side work without Flask.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .applications.erasure import AggregateErased, EventRedacted
    from .exceptions import (
        AbortedTransactionError,
        AggregateErasedError,
        CommitInsideUnitError,
        CommitOutcomeUnknownError,
        ConfigurationError,
        ConstraintError,
        EventMetadataError,
        EventValueError,
        FlaskEventSourcingError,
        IdentifierTypeError,
        InheritedDatabaseError,
        MissingRightError,
        MissingTableError,
        NotInitializedError,
        OldSnapshotError,
        RollbackOnlyError,
        SharedAggregateError,
        SpanningTransactionError,
        StaleAggregateError,
        StandbyError,
        UncommittedEventsError,
        UnreadableEventError,
        UnsafeSequenceError,
        UnsafeSettingError,
        UnsafeTableError,
        WriteTimeoutError,
    )
    from .extension import EventSourcing
    from .models import Models, SnapshotMixin, StoredEventMixin, TrackingMixin, UUIDType
    from .signals import events_discarded, events_recorded
    from .web.state import current_application

__version__ = "0.1.0"

__all__ = [
    "AbortedTransactionError",
    "AggregateErased",
    "AggregateErasedError",
    "CommitInsideUnitError",
    "CommitOutcomeUnknownError",
    "ConfigurationError",
    "ConstraintError",
    "EventMetadataError",
    "EventRedacted",
    "EventSourcing",
    "EventValueError",
    "FlaskEventSourcingError",
    "IdentifierTypeError",
    "InheritedDatabaseError",
    "MissingRightError",
    "MissingTableError",
    "Models",
    "NotInitializedError",
    "OldSnapshotError",
    "RollbackOnlyError",
    "SharedAggregateError",
    "SnapshotMixin",
    "SpanningTransactionError",
    "StaleAggregateError",
    "StandbyError",
    "StoredEventMixin",
    "TrackingMixin",
    "UUIDType",
    "UncommittedEventsError",
    "UnreadableEventError",
    "UnsafeSequenceError",
    "UnsafeSettingError",
    "UnsafeTableError",
    "WriteTimeoutError",
    "__version__",
    "current_application",
    "events_discarded",
    "events_recorded",
]

_MODULES = {
    "AggregateErased": "applications.erasure",
    "EventRedacted": "applications.erasure",
    "EventSourcing": "extension",
    "Models": "models",
    "SnapshotMixin": "models",
    "StoredEventMixin": "models",
    "TrackingMixin": "models",
    "UUIDType": "models",
    "current_application": "web.state",
    "events_discarded": "signals",
    "events_recorded": "signals",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES.get(name, 'exceptions')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
