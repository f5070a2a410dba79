"""Makes the keyspace and the tables on every node, and checks them and the nodes."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, TypeVar

import cassandra
from cassandra.cluster import NoHostAvailable
from cassandra.pool import Host
from cassandra.protocol import ConfigurationException, ErrorMessage
from cassandra.query import SimpleStatement
from eventsourcing.persistence import OperationalError, ProgrammingError

from ..exceptions import MissingRightError
from .connecting import Connection
from .schema import TABLES, IdType, statements

R = TypeVar("R")

DRIVER_ERRORS: tuple[type[Exception], ...] = (cassandra.DriverException, NoHostAvailable, ErrorMessage)
PATIENCE = 60.0
"""Seconds until a change of the schema must be on every node."""
PAUSE = 0.2
KEYSPACE = "SELECT replication, durable_writes FROM system_schema.keyspaces WHERE keyspace_name = %s"
COLUMNS = (
    "SELECT table_name, column_name, type, kind, position FROM system_schema.columns "
    "WHERE keyspace_name = %s AND table_name IN ({})"
)
IDENTITY = "SELECT id FROM system_schema.tables WHERE keyspace_name = %s AND table_name = %s"
SETTINGS = "SELECT name, value FROM system_views.settings WHERE name IN ('commitlog_sync', 'paxos_variant')"
REMEDY = "run the command 'init-db'"
PERIODIC = (
    "with which it loses acknowledged events when it is killed: set commitlog_sync: batch, or group, in cassandra.yaml"
)
OLD_PAXOS = "so the outcome of concurrent writes is unknown more often: set paxos_variant to v2 in cassandra.yaml"

Line = tuple[str, bool]
"""A line of a check, and whether it is a fault."""
Shape = tuple[Mapping[str, str], Sequence[str]]
"""The columns of a table with their types, and those of its primary key in their order."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the driver's errors into the library's.

    :raises MissingRightError: when the role lacks a right.
    :raises OperationalError: when nodes do not answer in time.
    :raises ProgrammingError: when a node refuses a statement.
    """
    try:
        yield
    except cassandra.Unauthorized as error:
        raise MissingRightError(first_line(error)) from error
    except (cassandra.InvalidRequest, ConfigurationException) as error:
        raise ProgrammingError(first_line(error)) from error
    except DRIVER_ERRORS as error:
        raise OperationalError(first_line(error)) from error


def first_line(error: object) -> str:
    """Return the text of a driver's error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def wanted(prefix: str, id_type: IdType) -> dict[str, Shape]:
    """Return the tables that an application needs, by their names."""
    found: dict[str, Shape] = {}
    for purpose, statement in TABLES.items():
        text = statement.replace("{id_type}", id_type)
        columns = dict(re.findall(r"^    ([a-z_]+) (.+?)(?: PRIMARY KEY)?,?$", text, re.MULTILINE))
        key = re.search(r"PRIMARY KEY \((.+)\)", text)
        single = re.search(r"^    ([a-z_]+) .+ PRIMARY KEY,?$", text, re.MULTILINE)
        names = key[1].split(", ") if key else [single[1]] if single else [""]
        columns.pop("PRIMARY", None)
        found[f"{prefix}_{purpose}"] = columns, names
    return found


class Schema:
    """The keyspace and the tables of applications, on the nodes of a cluster.

    :param id_types: the type of the aggregates' ids by the name of the application in lower case.
    """

    def __init__(self, connection: Connection, id_types: Mapping[str, IdType]) -> None:
        self._connection = connection
        self._id_types = id_types
        self.tables: dict[str, Shape] = {}
        for prefix, id_type in id_types.items():
            self.tables |= wanted(prefix, id_type)

    def create(self) -> list[str]:
        """Make what is missing, wait until every node has it, and return the names of the tables that were made.

        :raises OperationalError: when a node does not have them in time.
        """
        first, missing = self._again(self._first)
        if missing:
            for prefix, id_type in self._id_types.items():
                for statement in statements(self._connection.settings, prefix, id_type=id_type):
                    # Every process asks the same node: two nodes would give a table two identities.
                    self._again(lambda cql=statement: self._ask(cql, host=first))  # type: ignore[misc]
        self._wait()
        return missing

    def _first(self) -> tuple[Host, list[str]]:
        """Return the first node that can be asked, and what it lacks."""
        node = self._up()[0]
        return node, self._missing(node)

    def look(self) -> Iterator[Line]:
        """Return a report on the nodes, the keyspace and the tables."""
        nodes = self._connection.nodes()
        for node in nodes:
            yield from self._look_at(node)
        yield from self._look_at_data_centres(nodes)
        keyspace = self._keyspace(self._up()[0])
        name = self._connection.settings.keyspace
        if keyspace is None:
            yield f"keyspace {name} is missing: {REMEDY}", True
            return
        yield from self._look_at_keyspace(keyspace)
        yield from _look_at_copies(keyspace.replication, nodes)
        found = self._found(self._up()[0])
        for table, shape in self.tables.items():
            if table not in found:
                yield f"table {name}.{table} is missing: {REMEDY}", True
            elif differences := list(_differences(found[table], shape)):
                yield f"table {name}.{table} is not as it should be", False
                yield from ((f"{table}: {each}", True) for each in differences)
            else:
                yield f"table {name}.{table} ok", False

    def identity(self, prefix: str) -> int | None:
        """Return the identity of an application's log, or None if it has no table."""
        names = (self._connection.settings.keyspace, f"{prefix}_log")
        found = self._connection.execute(SimpleStatement(IDENTITY), names).one()
        return None if found is None else int.from_bytes(blake2b(found.id.bytes, digest_size=8).digest()) >> 1

    def _up(self) -> list[Host]:
        nodes = self._connection.nodes()
        # A node that was not asked yet may lack anything.
        return [node for node in nodes if node.is_up] or nodes

    def _ask(self, cql: str, parameters: Any = None, *, host: Host) -> Any:
        return self._connection.execute(cql, parameters, timeout=PATIENCE, host=host)

    def _again(self, function: Callable[[], R]) -> R:
        """Call a function again until it succeeds: a node that answers may not be ready yet."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return function()
            except (cassandra.InvalidRequest, cassandra.Unauthorized, ConfigurationException):
                # Another try would fail too.
                raise
            except DRIVER_ERRORS:
                if time.monotonic() > end:
                    raise
            time.sleep(PAUSE)

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        for node in self._up():
            while left := self._again(lambda node=node: self._missing(node)):  # type: ignore[misc]
                if time.monotonic() > end:
                    raise OperationalError(
                        f"The node {node.endpoint} has no {', '.join(left)} after {PATIENCE:.0f} s: look at its log, "
                        "and run the command again when it answers."
                    )
                time.sleep(PAUSE)

    def _missing(self, node: Host) -> list[str]:
        found = self._found(node)
        return [name for name in self.tables if name not in found]

    def _found(self, node: Host) -> dict[str, Shape]:
        """Return the tables that a node has."""
        marks = ", ".join(["%s"] * len(self.tables))
        rows = self._ask(COLUMNS.format(marks), (self._connection.settings.keyspace, *self.tables), host=node).all()
        found: dict[str, Shape] = {}
        for name in {row.table_name for row in rows}:
            own = [row for row in rows if row.table_name == name]
            keys = [(row.kind != "partition_key", row.position, row.column_name) for row in own if row.position >= 0]
            found[name] = {row.column_name: row.type for row in own}, [key[2] for key in sorted(keys)]
        return found

    def _keyspace(self, node: Host) -> Any:
        return self._ask(KEYSPACE, (self._connection.settings.keyspace,), host=node).one()

    def _look_at(self, node: Host) -> Iterator[Line]:
        name = f"node {node.endpoint}"
        if not node.is_up:
            yield f"{name} cannot be reached", False
            return
        yield f"{name}: {node.release_version}, {node.datacenter}", False
        if int(str(node.release_version).partition(".")[0] or 0) < 5:
            yield f"{name} has version {node.release_version}: 5.0 is the first that this package is tried with", True
        try:
            settings = {row.name: row.value for row in self._ask(SETTINGS, host=node).all()}
        except cassandra.Unauthorized:
            yield f"{name} does not show its settings to this role: grant it SELECT on system_views.settings", False
            return
        sync, paxos = settings.get("commitlog_sync"), settings.get("paxos_variant")
        if sync not in ("batch", "group"):
            yield f"{name} has commitlog_sync: {sync}, {PERIODIC}", True
        if paxos != "v2":
            yield f"{name} has paxos_variant: {paxos}, {OLD_PAXOS}", False

    def _look_at_data_centres(self, nodes: Sequence[Host]) -> Iterator[Line]:
        settings = self._connection.settings
        names = sorted({str(node.datacenter) for node in nodes})
        if settings.local_dc is not None and settings.local_dc not in names:
            yield f"there is no data centre {settings.local_dc}, which LOCAL_DC names: {', '.join(names)}", True
        elif settings.local_dc is None and len(names) > 1:
            yield f"there are several data centres, {', '.join(names)}: set LOCAL_DC", True

    def _look_at_keyspace(self, keyspace: Any) -> Iterator[Line]:
        name, asked = self._connection.settings.keyspace, self._connection.settings.replication
        found = {key: value for key, value in keyspace.replication.items() if key != "class"}
        strategy = keyspace.replication["class"].rpartition(".")[2]
        yield (
            f"keyspace {name}: {strategy}, {', '.join(f'{key} {value}' for key, value in sorted(found.items()))}",
            False,
        )
        if not keyspace.durable_writes:
            yield f"keyspace {name} has durable_writes = false, so that a killed node loses events: alter it", True
        if asked is not None and found != _copies(asked, found):
            yield f"keyspace {name} has another replication than the settings: change one of them", True


def _copies(asked: int | Mapping[str, int], found: Mapping[str, str]) -> dict[str, str]:
    """Return the options of the replication that a keyspace should have."""
    if isinstance(asked, int):
        return {"replication_factor": str(asked)}
    if set(asked) == {"replication_factor"}:
        # A number counts for each data centre, and the nodes store it by their names.
        return dict.fromkeys(found, str(asked["replication_factor"]))
    return {name: str(number) for name, number in asked.items()}


def _look_at_copies(replication: Mapping[str, str], nodes: Sequence[Host]) -> Iterator[Line]:
    """Check that there are enough nodes for the copies. Otherwise no save would find enough of them."""
    counted = Counter(str(node.datacenter) for node in nodes)
    for name, text in replication.items():
        there = len(nodes) if name == "replication_factor" else counted[name]
        if name != "class" and text.isdigit() and int(text) > there:
            yield f"{name} asks for {text} copies, but there are {there} nodes: add nodes or lower it", True


def _plain(kind: str) -> tuple[bool, str]:
    """Return a type as the package writes it: a node adds ``frozen`` to each type within a frozen one."""
    return kind.startswith("frozen<"), re.sub(r"frozen|[<> ]", "", kind)


def _differences(found: Shape, shape: Shape) -> Iterator[str]:
    for column, kind in shape[0].items():
        if column not in found[0]:
            yield f"column {column} is missing"
        elif _plain(found[0][column]) != _plain(kind):
            yield f"column {column} is {found[0][column]}, and should be {kind}"
    if list(found[1]) != list(shape[1]):
        yield f"its primary key is ({', '.join(found[1])}), and should be ({', '.join(shape[1])})"
