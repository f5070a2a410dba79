"""The infrastructure factory, with which this package is a ``PERSISTENCE_MODULE`` of the library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4
from weakref import WeakValueDictionary

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    InfrastructureFactory,
    InfrastructureFactoryError,
    ProcessRecorder,
)
from eventsourcing.utils import Environment, EnvType, resolve_topic, strtobool

from ..config import checked
from ..exceptions import ConfigurationError
from ..metadata import Collector, Metadata
from .connecting import Connection
from .inspecting import Schema
from .recording import (
    CassandraAggregateRecorder,
    CassandraApplicationRecorder,
    CassandraProcessRecorder,
    CassandraSnapshotRecorder,
    CassandraTrackingRecorder,
    Log,
    OnRecorded,
)
from .schema import CassandraSettings


@dataclass(frozen=True, eq=False)
class Lent:
    """The connection and the functions that a host shares with the factories of its applications."""

    connection: Connection
    metadata: Callable[[], Metadata] | None = None
    """Returns the current metadata. None if no metadata are stored."""
    on_recorded: OnRecorded | None = None
    """Called after each save."""


_lent: WeakValueDictionary[str, Lent] = WeakValueDictionary()


def lend(lent: Lent) -> str:
    """Return the value of ``FLASK_EVENTSOURCING_CASSANDRA`` by which factories find this; the host must keep it."""
    token = uuid4().hex
    _lent[token] = lent
    return token


def _accepted(key: str, value: Any) -> Any:
    """Return a value of the environment, if the host's setting of the same name accepts it.

    :raises InfrastructureFactoryError: when the setting does not accept it.
    """
    try:
        return checked(key.lower(), value, key)
    except ConfigurationError as error:
        raise InfrastructureFactoryError(str(error)) from None


class Factory(InfrastructureFactory[CassandraTrackingRecorder]):
    """Makes recorders for an application.

    It reads these environment variables, each also with the application's name in front, as in
    ``BANK_CASSANDRA_KEYSPACE``:

    ``CASSANDRA_CONTACT_POINTS``
        Addresses of some nodes, separated by commas. Required.
    ``CASSANDRA_KEYSPACE``
        The keyspace of the tables. Required.
    ``CASSANDRA_REPLICATION``
        Copies of each row: a number, or JSON with a number for each data centre.
    ``CASSANDRA_PORT``, ``CASSANDRA_LOCAL_DC``, ``CASSANDRA_USERNAME``, ``CASSANDRA_PASSWORD``
        How the nodes are reached; the port is 9042 by default.
    ``CASSANDRA_CONSISTENCY``, ``CASSANDRA_SERIAL_CONSISTENCY``
        ``LOCAL_QUORUM`` and ``LOCAL_SERIAL`` by default.
    ``CASSANDRA_PATIENCE``
        Seconds for which a save goes on while nodes do not answer; 10 by default.
    ``ORIGINATOR_ID_TYPE``
        ``uuid``, the default, or ``text``.
    ``EVENT_METADATA``
        Whether metadata are stored with each event, by default yes.
    ``CREATE_TABLE``
        Whether keyspace and tables are made when the factory is; unlike in the library, not by default.

    :raises InfrastructureFactoryError: without contact points or keyspace, or with a bad value.
    """

    LENT = "FLASK_EVENTSOURCING_CASSANDRA"
    CONTACT_POINTS = "CASSANDRA_CONTACT_POINTS"
    KEYSPACE = "CASSANDRA_KEYSPACE"
    REPLICATION = "CASSANDRA_REPLICATION"
    ORIGINATOR_ID_TYPE = "ORIGINATOR_ID_TYPE"
    EVENT_METADATA = "EVENT_METADATA"
    CREATE_TABLE = "CREATE_TABLE"

    aggregate_recorder_class: type[CassandraAggregateRecorder] = CassandraAggregateRecorder
    application_recorder_class: type[CassandraApplicationRecorder] = CassandraApplicationRecorder
    tracking_recorder_class: type[CassandraTrackingRecorder] = CassandraTrackingRecorder
    process_recorder_class: type[CassandraProcessRecorder] = CassandraProcessRecorder

    def __init__(self, env: Environment | EnvType | None) -> None:
        super().__init__(env)
        token = self.env.get(self.LENT)
        self._owns_connection = token is None
        lent = self._open() if token is None else self._find(token)
        self.connection: Connection = lent.connection
        id_type = self._id_type()
        self.log: Log = Log(
            lent.connection,
            self.env.name,
            id_type=id_type,
            collect=lent.metadata,
            on_recorded=lent.on_recorded,
        )
        if strtobool(self.env.get(self.CREATE_TABLE) or "no"):
            Schema(lent.connection, {self.env.name.lower(): id_type}).create()

    def _find(self, token: str) -> Lent:
        lent = _lent.get(token)
        if lent is None:
            raise InfrastructureFactoryError(
                f"{self.LENT} names a connection that is gone, because its app was dropped or this is another process: "
                "construct the application again."
            )
        return lent

    def _open(self) -> Lent:
        wanted = strtobool(self.env.get(self.EVENT_METADATA) or "yes")
        return Lent(Connection(self._settings()), Collector() if wanted else None)

    def _settings(self) -> CassandraSettings:
        points = tuple(each.strip() for each in self._required(self.CONTACT_POINTS).split(",") if each.strip())
        options: dict[str, Any] = {}
        for name, convert in (
            ("port", int),
            ("patience", float),
            ("local_dc", str),
            ("username", str),
            ("password", str),
            ("consistency", str.upper),
            ("serial_consistency", str.upper),
        ):
            key = f"CASSANDRA_{name.upper()}"
            value = self.env.get(key)
            if value:
                options[name] = _accepted(key, self._converted(key, value, convert))
        if ("username" in options) != ("password" in options):
            raise InfrastructureFactoryError("CASSANDRA_USERNAME and CASSANDRA_PASSWORD go together: set both.")
        keyspace = _accepted(self.KEYSPACE, self._required(self.KEYSPACE))
        return CassandraSettings(_accepted(self.CONTACT_POINTS, points), keyspace, self._replication(), **options)

    def _required(self, key: str) -> str:
        value = self.env.get(key)
        if not value:
            keys = " or ".join(self.env.create_keys(key))
            raise InfrastructureFactoryError(f"There is no Cassandra cluster: set the environment variable {keys}.")
        return value

    def _converted(self, key: str, value: str, convert: Callable[[str], Any]) -> Any:
        try:
            return convert(value)
        except ValueError:
            raise InfrastructureFactoryError(f"{key} must be a number; found {value!r}.") from None

    def _replication(self) -> int | Mapping[str, int] | None:
        value = self.env.get(self.REPLICATION)
        if not value:
            return None
        try:
            found: int | dict[str, int] = json.loads(value)
        except ValueError:
            found = 0
        if isinstance(found, dict) and found and all(type(each) is int and each > 0 for each in found.values()):
            return found
        if type(found) is not int or found < 1:
            raise InfrastructureFactoryError(
                f'{self.REPLICATION} must be a number, or JSON as {{"datacenter1": 3}}; found {value!r}.'
            )
        return found

    def _id_type(self) -> Literal["uuid", "text"]:
        id_type = self.env.get(self.ORIGINATOR_ID_TYPE, "uuid").lower()
        if id_type not in ("uuid", "text"):
            raise InfrastructureFactoryError(f"{self.ORIGINATOR_ID_TYPE} must be 'uuid' or 'text'; found {id_type!r}.")
        return "text" if id_type == "text" else "uuid"

    def aggregate_recorder(self, purpose: str = "events") -> AggregateRecorder:
        """Make a recorder for a purpose: ``events`` or ``snapshots``."""
        if purpose not in ("events", "snapshots"):
            raise InfrastructureFactoryError(f"There is no table for {purpose!r}, only for 'events' and 'snapshots'.")
        return self.aggregate_recorder_class(self.log) if purpose == "events" else CassandraSnapshotRecorder(self.log)

    def application_recorder(self) -> ApplicationRecorder:
        """Make the recorder of an application."""
        recorder: ApplicationRecorder = self._class(self.APPLICATION_RECORDER_TOPIC, self.application_recorder_class)(
            self.log
        )
        return recorder

    def tracking_recorder(
        self, tracking_recorder_class: type[CassandraTrackingRecorder] | None = None
    ) -> CassandraTrackingRecorder:
        """Make a tracking recorder, or a view that derives from it."""
        cls = tracking_recorder_class or self._class(self.TRACKING_RECORDER_TOPIC, self.tracking_recorder_class)
        recorder: CassandraTrackingRecorder = cls(self.log)
        return recorder

    def process_recorder(self) -> ProcessRecorder:
        """Make the recorder of an application that processes the events of others."""
        recorder: ProcessRecorder = self._class(self.PROCESS_RECORDER_TOPIC, self.process_recorder_class)(self.log)
        return recorder

    def _class(self, key: str, default: type[Any]) -> type[Any]:
        topic = self.env.get(key)
        cls: type[Any] = resolve_topic(topic) if topic else default
        if not issubclass(cls, default):
            raise InfrastructureFactoryError(
                f"{key} names {cls.__qualname__}, which does not derive from {default.__name__}."
            )
        return cls

    def close(self) -> None:
        """Close the session, unless it belongs to a host."""
        connection = getattr(self, "connection", None)
        if connection is not None and self._owns_connection:
            connection.close()
