"""SQLite's queue of writers."""

from __future__ import annotations

import os
import threading

import pytest
from eventsourcing.persistence import OperationalError

from flask_eventsourcing import WriteTimeoutError
from flask_eventsourcing.persistence.dialects.locks import WriteQueue, _Place, write_queue_of
from flask_eventsourcing.persistence.dialects.sqlite import kind_of
from tests.domain import in_thread, in_threads, until
from tests.unit.test_lifecycle_fork import in_child


class Connection:
    """Stands for a connection, which is all that the queue looks at."""


def waiting(queue: WriteQueue) -> int:
    """Return how many threads wait in a queue."""
    return len(queue._waiting)


def test_one_thread_at_a_time() -> None:
    """Only one thread's connection owns the queue."""
    queue = WriteQueue("bank.db")
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        connection = Connection()
        for _ in range(50):
            queue.acquire(connection, 20)
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            queue.release(connection)

    in_threads([work] * 8)
    assert most == [1] * 400


def test_first_come_first_served() -> None:
    """Threads get the queue in the order in which they came, so that none starves."""
    queue = WriteQueue("bank.db")
    holder = Connection()
    queue.acquire(holder, 1)
    served: list[int] = []

    def come(number: int) -> None:
        connection = Connection()
        queue.acquire(connection, 20)
        served.append(number)
        queue.release(connection)

    threads = []
    for number in range(6):
        threads.append(threading.Thread(target=come, args=(number,)))
        threads[-1].start()
        until(lambda expected=number + 1: waiting(queue) == expected)  # type: ignore[misc]
    queue.release(holder)
    for thread in threads:
        thread.join(20)
    assert served == list(range(6))


def test_owner_may_acquire_again() -> None:
    """A connection that owns the queue can take it again, and one release is enough."""
    queue = WriteQueue("bank.db")
    connection = Connection()
    queue.acquire(connection, 1)
    queue.acquire(connection, 1)
    assert queue.is_owner(connection)
    queue.release(connection)
    assert not queue.is_owner(connection)
    in_thread(lambda: queue.acquire(Connection(), 0.1))


def test_timeout_names_the_database_and_the_remedy() -> None:
    """The error of a thread that waits too long says for how long, for which database, and what to do."""
    queue = WriteQueue("bank.db")
    holder = Connection()
    queue.acquire(holder, 1)
    with pytest.raises(WriteTimeoutError, match=r"Waited 0\.05 s .* on bank\.db") as raised:
        in_thread(lambda: queue.acquire(Connection(), 0.05))
    assert "db.session.commit()" in str(raised.value)
    assert "EVENTSOURCING_LOCK_TIMEOUT" in str(raised.value)
    assert isinstance(raised.value, OperationalError)


def test_thread_that_gave_up_is_not_served() -> None:
    """The queue does not go to a thread that stopped waiting."""
    queue = WriteQueue("bank.db")
    holder = Connection()
    queue.acquire(holder, 1)
    with pytest.raises(WriteTimeoutError):
        in_thread(lambda: queue.acquire(Connection(), 0.02))
    queue.release(holder)
    in_thread(lambda: queue.acquire(Connection(), 0.1))


def test_thread_that_would_wait_for_itself_is_told_at_once() -> None:
    """A second write transaction of the same thread is an error at once instead of a wait for nothing."""
    queue = WriteQueue("bank.db")
    first, second = Connection(), Connection()
    queue.acquire(first, 1)
    with pytest.raises(WriteTimeoutError, match=r"This thread has an open write transaction on bank\.db"):
        queue.acquire(second, 20)


def test_only_the_owner_releases() -> None:
    """A connection that does not own the queue cannot release it, and any thread can for the one that does."""
    queue = WriteQueue("bank.db")
    owner = Connection()
    queue.acquire(owner, 1)
    queue.release(Connection())
    assert queue.is_owner(owner)
    in_thread(lambda: queue.release(owner))
    assert not queue.is_owner(owner)


def test_release_during_an_acquire() -> None:
    """A connection that the garbage collector ends while its thread is within the queue waits for nothing."""
    queue = WriteQueue("bank.db")
    owner = Connection()
    queue.acquire(owner, 1)
    with queue._lock:
        queue.release(owner)
        assert not queue.try_acquire(Connection(), blocking=False)
    assert not queue.is_owner(owner)
    in_thread(lambda: queue.acquire(Connection(), 0))


def test_release_while_another_thread_is_within_the_queue() -> None:
    """A waiting thread is served even if the release found the queue's own lock taken."""
    queue = WriteQueue("bank.db")
    owner, other = Connection(), Connection()
    queue.acquire(owner, 1)
    waiter = threading.Thread(target=lambda: queue.acquire(other, 20))
    waiter.start()
    until(lambda: waiting(queue) == 1)
    with queue._lock:
        queue.release(owner)
    assert not queue.try_acquire(Connection())
    waiter.join(10)
    assert queue.is_owner(other)


def test_thread_that_waits_and_is_stopped_leaves_the_queue() -> None:
    """Ctrl-C while a thread waits removes that thread from the queue."""

    class Stopped(BaseException):
        """Ctrl-C."""

    class Called(threading.Event):
        """Is interrupted while it waits."""

        def wait(self, timeout: float | None = None) -> bool:
            """Be interrupted."""
            raise Stopped

    queue = WriteQueue("bank.db")
    owner, stopped = Connection(), Connection()
    queue.acquire(owner, 1)

    def wait() -> None:
        place = _Place(stopped)
        queue._waiting.append(place)
        queue._wait(place, Called(), 20)

    with pytest.raises(Stopped):
        in_thread(wait)
    assert waiting(queue) == 0
    queue.release(owner)
    in_thread(lambda: queue.acquire(Connection(), 0))


def test_thread_that_another_owner_uses_since() -> None:
    """A thread is not told that it waits for itself if another thread now uses the connection that owns the queue."""
    queue = WriteQueue("bank.db")
    owner = Connection()
    queue.acquire(owner, 1)
    in_thread(lambda: queue.acquire(owner, 1))
    with pytest.raises(WriteTimeoutError, match="Waited 0"):
        queue.acquire(Connection(), 0)


def test_reading_passes_the_transaction_of_the_same_thread_only() -> None:
    """A read does not wait for its own thread, and acquires nothing there; it waits for others."""
    queue = WriteQueue("bank.db")
    owner, reader = Connection(), Connection()
    queue.acquire(owner, 1)
    assert queue.acquire(reader, 20, reading=True) is False
    assert not queue.is_owner(reader)
    with pytest.raises(WriteTimeoutError, match="Waited"):
        in_thread(lambda: queue.acquire(reader, 0.02, reading=True))
    queue.release(owner)
    assert queue.acquire(reader, 1, reading=True) is True


@pytest.mark.parametrize("waits", [False, True])
def test_connection_that_is_gone_owns_the_queue_no_longer(waits: bool) -> None:
    """The queue of a connection that was collected without being closed goes to the next thread."""
    queue = WriteQueue("bank.db")
    holder: list[Connection] = [Connection()]
    queue.acquire(holder[0], 1)
    if not waits:
        holder.clear()
        in_thread(lambda: queue.acquire(Connection(), 0))
        return
    waiter = threading.Thread(target=lambda: queue.acquire(kept, 20))
    kept = Connection()
    waiter.start()
    until(lambda: waiting(queue) == 1)
    holder.clear()
    waiter.join(10)
    assert not waiter.is_alive()
    with pytest.raises(WriteTimeoutError):
        queue.acquire(Connection(), 0)


def test_one_queue_for_each_file() -> None:
    """Every connection to a file shares one queue. Another file has another queue."""
    queue = write_queue_of("a.db")
    assert write_queue_of("a.db") is queue
    assert write_queue_of("b.db") is not queue


def test_forked_process_has_a_queue_of_its_own() -> None:
    """A queue that the parent has acquired does not block a forked process."""
    queue = write_queue_of("a.db")
    holder = Connection()
    queue.acquire(holder, 1)
    parent = os.getpid()

    def child() -> bool:
        own = write_queue_of("a.db")
        own.acquire(Connection(), 0.1)
        return own is not queue and own is write_queue_of("a.db") and os.getpid() != parent

    assert in_child(child) is True


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO t VALUES (1)",
        "insert or ignore into t values (1)",
        "\n  UPDATE t SET a = 1",
        "DELETE FROM t",
        "REPLACE INTO t VALUES (1)",
        "SAVEPOINT a",
        "-- why\nUPDATE t SET a = 1",
        "/* why */ /* because */ DELETE FROM t",
        "WITH a AS (SELECT 1) INSERT INTO t SELECT * FROM a",
        "WITH a AS (SELECT 1)\nDELETE FROM t",
    ],
)
def test_statement_that_writes(statement: str) -> None:
    """Statements that write, or announce it, are known as such, whatever stands before them."""
    assert kind_of(statement) == "write"


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "  select updated from t",
        "SELECT 'INSERT INTO t'",
        "-- INSERT\nSELECT 1",
        "/* UPDATE */ SELECT 1",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "PRAGMA journal_mode",
        "RELEASE a",
        "ROLLBACK TO a",
        "INSERTED",
        "",
    ],
)
def test_statement_that_does_not_write(statement: str) -> None:
    """Statements that only read take no lock."""
    assert kind_of(statement) != "write"


@pytest.mark.parametrize(
    ("statement", "known"),
    [
        ("SELECT 1", True),
        ("/* why */ select 1", True),
        ("VALUES (1)", True),
        ("EXPLAIN SELECT 1", True),
        ("PRAGMA table_info(t)", True),
        ("WITH a AS (SELECT 1) SELECT * FROM a", True),
        ("WITH a AS (SELECT 1) DELETE FROM t", False),
        ("CREATE TABLE t (a)", False),
        ("COMMIT", False),
        ("ROLLBACK", False),
        ("RELEASE a", False),
        ("", False),
    ],
)
def test_statement_that_is_known_to_read(statement: str, known: bool) -> None:
    """What may do more than read, such as DDL and what ends transactions, is not taken for a read."""
    assert (kind_of(statement) == "read") is known
