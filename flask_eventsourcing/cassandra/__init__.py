"""The events of an application in Apache Cassandra, usable as the library's ``PERSISTENCE_MODULE``.

The library looks for exactly one concrete factory class here.
"""

from __future__ import annotations

from .connecting import Connection
from .errors import SaveTooLargeError
from .infrastructure import Factory, Lent, lend
from .recording import (
    CassandraAggregateRecorder,
    CassandraApplicationRecorder,
    CassandraProcessRecorder,
    CassandraSnapshotRecorder,
    CassandraTrackingRecorder,
)
from .schema import CassandraSettings

__all__ = [
    "CassandraAggregateRecorder",
    "CassandraApplicationRecorder",
    "CassandraProcessRecorder",
    "CassandraSettings",
    "CassandraSnapshotRecorder",
    "CassandraTrackingRecorder",
    "Connection",
    "Factory",
    "Lent",
    "SaveTooLargeError",
    "lend",
]
