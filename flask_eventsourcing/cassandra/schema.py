"""The settings for a cluster, and the tables of an application in it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

IdType = Literal["uuid", "text"]


@dataclass(frozen=True)
class CassandraSettings:
    """The addresses of the nodes, and the options of a session."""

    contact_points: tuple[str, ...]
    keyspace: str
    replication: int | Mapping[str, int] | None = None
    """Copies of each row: a number, or a number for each data centre. Only the creation of the keyspace needs it."""
    port: int = 9042
    local_dc: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = None
    consistency: str = "LOCAL_QUORUM"
    serial_consistency: str = "LOCAL_SERIAL"
    patience: float = 10.0
    """Seconds for which a save tries again while nodes do not answer, or other writers are first."""


LOG = """CREATE TABLE IF NOT EXISTS {name}_log (
    bucket bigint,
    position bigint,
    row_id uuid,
    size int,
    last_event bigint,
    appends frozen<list<frozen<tuple<uuid, int, timestamp, map<text, text>, text, bigint>>>>,
    versions frozen<list<frozen<tuple<{id_type}, bigint>>>>,
    events frozen<list<frozen<tuple<text, blob, uuid>>>>,
    indexed boolean,
    PRIMARY KEY (bucket, position)
)"""
"""The truth. A row holds one append or several; ``appends`` has of each its id, how many events it has, when it was
saved, its metadata, and the position of an upstream application. ``versions`` and ``events`` have one item for each
event; the first is apart, as writers read no states. ``indexed`` is the only column that is written later."""

EVENTS = """CREATE TABLE IF NOT EXISTS {name}_events (
    originator_id {id_type},
    originator_version bigint,
    notification_id bigint,
    topic text,
    state blob,
    event_id uuid,
    recorded_at timestamp,
    metadata frozen<map<text, text>>,
    correlation_id text,
    PRIMARY KEY (originator_id, originator_version)
)"""
"""The events of each aggregate, derived from the log."""

TRACKING = """CREATE TABLE IF NOT EXISTS {name}_tracking (
    application_name text PRIMARY KEY,
    notification_id bigint
)"""
"""How far upstream applications were processed, derived from the log."""

SNAPSHOTS = """CREATE TABLE IF NOT EXISTS {name}_snapshots (
    originator_id {id_type},
    originator_version bigint,
    topic text,
    state blob,
    PRIMARY KEY (originator_id, originator_version)
)"""

STATE = """CREATE TABLE IF NOT EXISTS {name}_state (
    id text PRIMARY KEY,
    horizon bigint,
    last_event bigint
)"""
"""The horizon: every row of the log below it is indexed. ``last_event`` is the position of the last event below it."""

TABLES: Mapping[str, str] = {
    "log": LOG,
    "events": EVENTS,
    "tracking": TRACKING,
    "snapshots": SNAPSHOTS,
    "state": STATE,
}


def quote(name: str) -> str:
    """Return a name quoted for CQL, so that upper and lower case differ."""
    return '"{}"'.format(name.replace('"', '""'))


def table(settings: CassandraSettings, prefix: str, purpose: str) -> str:
    """Return the full name of one of an application's tables, quoted."""
    return f"{quote(settings.keyspace)}.{quote(f'{prefix}_{purpose}')}"


def statements(settings: CassandraSettings, prefix: str, *, id_type: IdType = "uuid") -> list[str]:
    """Return the statements that make the keyspace and the tables of an application.

    :param prefix: the application's name in lower case.
    :param id_type: the type of the aggregates' ids.
    """
    found = []
    if settings.replication is not None:
        found.append(
            f"CREATE KEYSPACE IF NOT EXISTS {quote(settings.keyspace)} WITH replication = "
            f"{_replication(settings.replication)}"
        )
    for purpose, statement in TABLES.items():
        full = table(settings, prefix, purpose)
        found.append(statement.replace("{name}_" + purpose, full).replace("{id_type}", id_type))
    return found


def _replication(replication: int | Mapping[str, int]) -> str:
    strategy: dict[str, str | int]
    if isinstance(replication, int):
        strategy = {"class": "SimpleStrategy", "replication_factor": replication}
    else:
        strategy = {"class": "NetworkTopologyStrategy", **replication}
    return json.dumps(strategy).replace('"', "'")
