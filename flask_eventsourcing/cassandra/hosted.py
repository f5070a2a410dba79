"""Cassandra as the store of a host's applications: the part of this package that hosts call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from ..config import Config
from ..exceptions import ConfigurationError
from ..lifecycle import PerProcess
from ..metadata import Collector
from .connecting import Connection
from .drivers import check_drivers
from .infrastructure import Factory, Lent, lend
from .inspecting import Line, Schema, readable_errors
from .recording import Parts
from .schema import CassandraSettings, IdType

MODULE = __name__.rpartition(".")[0]


class HostedCassandra:
    """The store of the events of one host's applications.

    :param settings: how the cluster is reached.
    :param collector: collects the metadata of a save; None if none are stored.
    :param id_types: the type of the aggregates' ids by the name of the application.
    """

    title = "Cassandra"

    def __init__(
        self, settings: CassandraSettings, collector: Collector | None, id_types: Mapping[str, IdType]
    ) -> None:
        self.settings = settings
        self.id_types: dict[str, IdType] = dict(id_types)
        self._lent = PerProcess(lambda: _Lent(Lent(Connection(settings), collector)))

    @property
    def connection(self) -> Connection:
        """The connection of this process, which opens a session when it is first used."""
        return self._lent.get().lent.connection

    def environment(self, env: Mapping[str, str], application_name: str | None = None) -> dict[str, str]:
        """Return the environment with which an application uses this store.

        :param env: what the user has configured.
        :param application_name: the application's name.
        """
        ours = {Factory.PERSISTENCE_MODULE: MODULE, Factory.LENT: self._lent.get().token}
        if application_name is not None:
            ours[Factory.ORIGINATOR_ID_TYPE] = self.id_types[application_name]
            # Otherwise a variable of the process's environment with the application's name in front would win.
            ours |= {f"{application_name.upper()}_{key}": value for key, value in ours.items()}
        return {**env, **ours}

    def create_tables(self) -> list[str]:
        """Make the keyspace and the tables that are missing, and return the names of these tables."""
        with readable_errors():
            return self._schema().create()

    def look(self) -> Iterator[Line]:
        """Return a report on the nodes, the keyspace and the tables: lines, and which of them are faults."""
        is_whole = True
        with readable_errors():
            for text, is_fault in self._schema().look():
                is_whole = is_whole and not is_fault
                yield text, is_fault
            # Otherwise nothing could be read.
            for name in self.id_types if is_whole else ():
                yield from self._look_at_streams(name)

    def _look_at_streams(self, name: str) -> Iterator[Line]:
        for key in Parts(self.connection, name.lower()).reader.unstreamed():
            lacking = f"the table {name.lower()}_events lacks events of {key} that the log has"
            yield f"{lacking}: end all processes that save, and call write_streams() of the recorder of {name}", True

    def log_identity(self, application_name: str) -> int | None:
        """Return the identity of an application's log, which is that of its table."""
        with readable_errors():
            return self._schema().identity(application_name.lower())

    def address(self) -> str:
        """Return the address of the store, as users read it."""
        settings = self.settings
        return f"{self.title}: {', '.join(settings.contact_points)}, port {settings.port}, keyspace {settings.keyspace}"

    def close(self) -> None:
        """Close the session of this process; the next use opens one again."""
        self.connection.close()

    def _schema(self) -> Schema:
        return Schema(self.connection, {name.lower(): each for name, each in self.id_types.items()})


class _Lent:
    """The connection that is lent to the factories of one process, and the token by which they find it."""

    def __init__(self, lent: Lent) -> None:
        self.lent = lent
        self.token = lend(lent)


def make_store(config: Config, collector: Collector | None, id_types: Mapping[str, IdType]) -> HostedCassandra:
    """Make the store that a host's settings describe; no connection is opened.

    :raises ConfigurationError: when the driver does not work in this process, or no tables can have these names.
    """
    _check_names(id_types)
    # Again, as gevent may have patched the sockets since the driver was imported.
    check_drivers()
    return HostedCassandra(settings_of(config), collector, id_types)


def _check_names(names: Iterable[str]) -> None:
    """Check that there can be tables of these names."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise ConfigurationError(
                f"The application {name!r} has a name that tables in Cassandra cannot have: give it one of ASCII "
                "letters, digits and underscores."
            )


def settings_of(config: Config) -> CassandraSettings:
    """Return the settings of the cluster among those of a host."""
    return CassandraSettings(
        contact_points=tuple(config.cassandra_contact_points),
        keyspace=config.cassandra_keyspace or "",
        replication=config.cassandra_replication,
        port=config.cassandra_port,
        local_dc=config.cassandra_local_dc,
        username=config.cassandra_username,
        password=config.cassandra_password,
        ssl_context=config.cassandra_ssl_context,
        consistency=config.cassandra_consistency,
        serial_consistency=config.cassandra_serial_consistency,
        patience=config.cassandra_patience,
    )
