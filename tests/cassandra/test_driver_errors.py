"""What errors of the driver mean for the protocol."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple
from unittest.mock import Mock
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import OperationalError, ProgrammingError

from flask_eventsourcing.exceptions import ConfigurationError, MissingRightError, MissingTableError

cassandra: Any = pytest.importorskip("cassandra", reason="cassandra-driver is not installed")
pytest.importorskip("cassandra.cluster", reason="cassandra-driver is not installed")


def maybe_done() -> list[Any]:
    """Return errors after which a write may have been done."""
    from cassandra import connection, protocol

    return [
        cassandra.WriteTimeout("timed out", write_type=5),
        cassandra.ReadTimeout("timed out"),
        cassandra.Unavailable("not enough"),
        cassandra.WriteFailure("failed"),
        cassandra.OperationTimedOut(),
        connection.ConnectionShutdown("closed"),
        protocol.ServerError(0, "null pointer", None),
        protocol.OverloadedErrorMessage(0x1001, "overloaded", None),
        protocol.CDCWriteException(0x1600, "no space for the log of changes", None),
        # CAS_WRITE_UNKNOWN, for which the driver has no class.
        protocol.ErrorMessage(0x1700, "CAS operation result is unknown", None),
        cassandra.DriverException("ID mismatch while trying to reprepare"),
    ]


def test_unknown_outcomes_are_told_from_others() -> None:
    """An error after which a write may have been done says so, also if the driver does not know the error."""
    from cassandra.cluster import NoHostAvailable

    from flask_eventsourcing.cassandra.errors import translated
    from flask_eventsourcing.cassandra.rows import MaybeDoneError, NotDoneError

    for error in maybe_done():
        with pytest.raises(MaybeDoneError), translated():
            raise error
    with pytest.raises(NotDoneError), translated():
        raise NoHostAvailable("no host", {})


def test_what_stays_wrong_is_told_at_once() -> None:
    """A missing table, a missing right, too large a save and other refusals have errors of their own."""
    from cassandra import protocol

    from flask_eventsourcing.cassandra import SaveTooLargeError
    from flask_eventsourcing.cassandra.errors import translated

    for error, expected in (
        (cassandra.InvalidRequest("table bank_log does not exist"), MissingTableError),
        (cassandra.InvalidRequest("Keyspace 'bank' does not exist"), MissingTableError),
        (cassandra.InvalidRequest("CQL Message of size 9 bytes exceeds allowed maximum of 8 bytes"), SaveTooLargeError),
        (cassandra.InvalidRequest("Unset value"), ProgrammingError),
        (cassandra.InvalidRequest("Undefined column name indexed in table bank.bank_log"), ProgrammingError),
        (cassandra.Unauthorized("no MODIFY permission"), MissingRightError),
        (protocol.ErrorMessage(0x2300, "no such option", None), ProgrammingError),
    ):
        with pytest.raises(expected), translated(9):
            raise error


def test_flag_that_cannot_be_written_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save or read does not fail because nodes do not answer when a row is flagged: nobody needs the flag."""
    from cassandra.cluster import NoHostAvailable

    from flask_eventsourcing.cassandra import CassandraSettings, Connection
    from flask_eventsourcing.cassandra.rows import Row
    from flask_eventsourcing.cassandra.store import CassandraStore

    def prepare(cql: str) -> None:
        raise NoHostAvailable("no host", {}) if "indexed = true" in cql else NotImplementedError

    connection = Connection(CassandraSettings(("127.0.0.1",), "bank"))
    monkeypatch.setattr(connection, "prepare", prepare)
    monkeypatch.setattr(Connection, "session", Mock())
    CassandraStore(connection, "bank").flag(Row(1, uuid4(), 1, 0, [], ()))


@pytest.mark.parametrize(
    ("others", "refused"),
    [
        ({}, True),
        ({"serial_consistency": "SERIAL"}, True),
        ({"consistency": "QUORUM", "serial_consistency": "SERIAL"}, False),
        ({"local_dc": "east"}, False),
    ],
)
def test_data_centre_is_chosen(others: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several data centres and none chosen, two of them would order saves, so the connection is refused."""
    from flask_eventsourcing.cassandra import CassandraSettings, Connection, connecting

    made = Mock()
    made.metadata.all_hosts.return_value = [Mock(datacenter="east"), Mock(datacenter="west")]
    monkeypatch.setattr(connecting, "Cluster", lambda *_, **__: made)
    connection = Connection(CassandraSettings(("127.0.0.1",), "bank", **others))
    if not refused:
        assert connection.session is made.connect()
        return
    with pytest.raises(ConfigurationError, match=r"several data centres, east, west, .*: set LOCAL_DC"):
        _ = connection.session
    made.shutdown.assert_called_once()


def test_nodes_are_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage of any length a process finds the nodes again; the driver's own pauses grow to minutes."""
    from flask_eventsourcing.cassandra import CassandraSettings, Connection, connecting

    options: dict[str, Any] = {}
    made = Mock()
    made.metadata.all_hosts.return_value = []

    def make(*_: Any, **others: Any) -> Mock:
        options.update(others)
        return made

    monkeypatch.setattr(connecting, "Cluster", make)
    _ = Connection(CassandraSettings(("127.0.0.1",), "bank")).session
    waits = list(islice(options["reconnection_policy"].new_schedule(), 10_000))
    assert len(waits) == 10_000
    assert max(waits) <= connecting.LONGEST_RECONNECT * 1.15


class Crowd:
    """A lock that counts who wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = threading.Semaphore(0)

    def __enter__(self) -> None:
        self._count.release()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, number: int) -> None:
        """Wait for so many."""
        for _ in range(number):
            assert self._count.acquire(timeout=60)


def test_threads_do_not_connect_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait while one finds no node get its error, and the next request tries again."""
    from flask_eventsourcing.cassandra import CassandraSettings, Connection

    crowd, tries = Crowd(), []

    def connect(_: Connection) -> None:
        tries.append(1)
        if len(tries) == 1:
            crowd.wait(5)
        raise OperationalError("nobody is there")

    connection = Connection(CassandraSettings(("127.0.0.1",), "bank"))
    monkeypatch.setattr(connection, "_lock", crowd)
    monkeypatch.setattr(Connection, "_connect", connect)

    def use(_: int) -> None:
        with pytest.raises(OperationalError, match="nobody is there"):
            _ = connection.session

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(use, range(5)))
    assert len(tries) == 1
    use(6)
    assert len(tries) == 2


def test_driver_that_tells_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the machine's clock is set back and the driver never returns an answer, the outcome is unknown."""
    from flask_eventsourcing.cassandra import connecting
    from flask_eventsourcing.cassandra.errors import translated
    from flask_eventsourcing.cassandra.rows import MaybeDoneError

    monkeypatch.setattr(connecting, "GRACE", 0.01)
    with pytest.raises(MaybeDoneError), translated():
        connecting.answer(Mock(), 0.01)


def test_request_is_repeated_elsewhere() -> None:
    """A node that gave no answer is asked last for some time, and one that could not do the work for a short one."""
    from cassandra.policies import LoadBalancingPolicy
    from cassandra.protocol import ServerError

    from flask_eventsourcing.cassandra.connecting import _LastResort, _noted

    nodes = [Mock(endpoint=name) for name in "abc"]

    class InOrder(LoadBalancingPolicy):  # type: ignore[misc]
        def make_query_plan(self, working_keyspace: str | None = None, query: Any = None) -> Any:
            return iter(nodes)

    order = _LastResort(InOrder())
    assert list(order.make_query_plan()) == nodes
    with pytest.raises(cassandra.OperationTimedOut), _noted(order):
        raise cassandra.OperationTimedOut({}, nodes[0])
    assert list(order.make_query_plan()) == [nodes[1], nodes[2], nodes[0]]
    with pytest.raises(ServerError), _noted(order, Mock(coordinator_host=nodes[1])):
        raise ServerError(0, "null pointer", None)
    with pytest.raises(cassandra.InvalidRequest), _noted(order, Mock(coordinator_host=nodes[2])):
        raise cassandra.InvalidRequest("no table")
    assert list(order.make_query_plan()) == [nodes[2], nodes[0], nodes[1]]
    order._until.clear()
    assert list(order.make_query_plan()) == nodes


def test_writes_are_sent_in_portions() -> None:
    """The streams of many aggregates are written in parts, because nodes must answer a whole request in time."""
    from eventsourcing.persistence import StoredEvent

    from flask_eventsourcing.cassandra import CassandraSettings
    from flask_eventsourcing.cassandra.rows import Append, row_of
    from flask_eventsourcing.cassandra.store import AT_ONCE, CassandraStore

    connection = Mock(settings=CassandraSettings(("127.0.0.1",), "bank"))
    events = [StoredEvent(uuid4(), 1, "topic", b"state") for _ in range(1000)]
    CassandraStore(connection, "bank").index(row_of(1, 0, [Append(events)]))
    sizes = [len(call.args[0]) for call in connection.execute_all.call_args_list]
    assert (sum(sizes), max(sizes)) == (1000, AT_ONCE)


class StreamRow(NamedTuple):
    """A row of a stream."""

    originator_id: UUID
    originator_version: int
    topic: str
    state: bytes


@pytest.mark.parametrize("most", [5, 100_000], ids=["large rows", "small rows"])
def test_stream_is_read_some_rows_at_a_time(most: int) -> None:
    """A request asks for no more rows than a node can send if they are large, and for fewer if no answer comes."""
    from flask_eventsourcing.cassandra import CassandraSettings
    from flask_eventsourcing.cassandra.store import CassandraStore

    connection, statement, sizes = Mock(settings=CassandraSettings(("127.0.0.1",), "bank")), Mock(), []
    connection.prepare.return_value.bind.return_value = statement
    stream = [StreamRow(uuid4(), version, "topic", b"") for version in range(1, 1001)]

    def execute(_: object, paging_state: bytes | None, **others: object) -> Mock:
        first, size = int(paging_state or b"0"), statement.fetch_size
        if size > most:
            raise cassandra.OperationTimedOut
        sizes.append(size)
        left = str(first + size).encode() if first + size < len(stream) else None
        return Mock(current_rows=stream[first : first + size], paging_state=left)

    connection.execute = execute
    found = CassandraStore(connection, "bank").select("events", stream[0][0], None, None, desc=False, limit=None)
    assert [each.originator_version for each in found] == [each.originator_version for each in stream]
    assert max(sizes) <= 128


def test_save_that_no_node_takes_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is too large for a connection is refused before it is sent, so that its outcome is known."""
    from eventsourcing.persistence import StoredEvent

    from flask_eventsourcing.cassandra import CassandraSettings, SaveTooLargeError, store
    from flask_eventsourcing.cassandra.rows import Append, row_of

    monkeypatch.setattr(store, "MOST_BYTES", 100)
    connection = Mock(settings=CassandraSettings(("127.0.0.1",), "bank"))
    append = Append([StoredEvent(uuid4(), 1, "topic", bytes(101))])
    with pytest.raises(SaveTooLargeError, match="A save of 101 bytes is too large"):
        store.CassandraStore(connection, "bank").insert(row_of(1, 0, [append]))
    connection.execute.assert_not_called()
