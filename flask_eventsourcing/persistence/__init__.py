"""Recorders of the ``eventsourcing`` library on SQLAlchemy, usable as its ``PERSISTENCE_MODULE``.

The library looks for exactly one concrete factory class here.
"""

from __future__ import annotations

from .datastore import Datastore, JoinedUnit
from .describing import Description
from .dialects import Dialect, DialectOptions
from .factory import DCBFactory
from .factory import SQLAlchemyFactory as Factory
from .recorders import (
    SQLAlchemyAggregateRecorder,
    SQLAlchemyApplicationRecorder,
    SQLAlchemyProcessRecorder,
    SQLAlchemyTrackingRecorder,
)

__all__ = [
    "DCBFactory",
    "Datastore",
    "Description",
    "Dialect",
    "DialectOptions",
    "Factory",
    "JoinedUnit",
    "SQLAlchemyAggregateRecorder",
    "SQLAlchemyApplicationRecorder",
    "SQLAlchemyProcessRecorder",
    "SQLAlchemyTrackingRecorder",
]
