"""The settings for a Cassandra cluster and for the tables of an application in it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CassandraSettings:
    """The addresses of the nodes, and the options of a session."""

    contact_points: tuple[str, ...]
    keyspace: str
    replication: int | Mapping[str, int] | None = None
    """Copies of each row: a number, or one for each data centre. Needed to make the keyspace only."""
    port: int = 9042
    local_dc: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = None
    consistency: str = "LOCAL_QUORUM"
    serial_consistency: str = "LOCAL_SERIAL"
    patience: float = 10.0
    """Seconds for which a save goes on while nodes do not answer, or others are first."""
