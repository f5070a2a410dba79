"""SQLite's queue of writers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from eventsourcing.persistence import OperationalError

from flask_eventsourcing import WriteTimeoutError
from flask_eventsourcing.persistence.dialects.gate import Gate, gate_for
from flask_eventsourcing.persistence.dialects.sqlite import writes
from tests.bank import in_thread, in_threads
from tests.unit.test_lifecycle_fork import in_child


class Connection:
    """Stands for a connection, which is all that the gate looks at."""


def until(condition: Callable[[], bool], patience: float = 10) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def waiting(gate: Gate) -> int:
    """Return how many threads wait at a gate."""
    return len(gate._waiting)


def test_one_thread_at_a_time() -> None:
    """Only one thread's connection has the turn."""
    gate = Gate("bank.db")
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        connection = Connection()
        for _ in range(50):
            gate.acquire(connection, 20)
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            gate.release(connection)

    in_threads([work] * 8)
    assert most == [1] * 400


def test_first_come_first_served() -> None:
    """Threads get the turn in the order in which they came, so that none starves."""
    gate = Gate("bank.db")
    holder = Connection()
    gate.acquire(holder, 1)
    served: list[int] = []

    def come(number: int) -> None:
        connection = Connection()
        gate.acquire(connection, 20)
        served.append(number)
        gate.release(connection)

    threads = []
    for number in range(6):
        threads.append(threading.Thread(target=come, args=(number,)))
        threads[-1].start()
        until(lambda expected=number + 1: waiting(gate) == expected)  # type: ignore[misc]
    gate.release(holder)
    for thread in threads:
        thread.join(20)
    assert served == list(range(6))


def test_same_connection_may_take_the_turn_again() -> None:
    """A connection that has the turn keeps it, and one release gives it back."""
    gate = Gate("bank.db")
    connection = Connection()
    gate.acquire(connection, 1)
    gate.acquire(connection, 1)
    assert gate.is_mine()
    gate.release(connection)
    assert not gate.is_mine()
    in_thread(lambda: gate.acquire(Connection(), 0.1))


def test_timeout_names_the_database_and_the_remedy() -> None:
    """A thread that waits too long is told for how long, for which database, and what to do."""
    gate = Gate("bank.db")
    holder = Connection()
    gate.acquire(holder, 1)
    with pytest.raises(WriteTimeoutError, match=r"Waited 0\.05 s .* on bank\.db") as raised:
        in_thread(lambda: gate.acquire(Connection(), 0.05))
    assert "db.session.commit()" in str(raised.value)
    assert "EVENTSOURCING_LOCK_TIMEOUT" in str(raised.value)
    assert isinstance(raised.value, OperationalError)


def test_thread_that_gave_up_is_not_served() -> None:
    """The turn does not go to a thread that stopped waiting."""
    gate = Gate("bank.db")
    holder = Connection()
    gate.acquire(holder, 1)
    with pytest.raises(WriteTimeoutError):
        in_thread(lambda: gate.acquire(Connection(), 0.02))
    gate.release(holder)
    in_thread(lambda: gate.acquire(Connection(), 0.1))


def test_thread_that_would_wait_for_itself_is_told_at_once() -> None:
    """A second write transaction of the same thread is an error at once instead of a wait for nothing."""
    gate = Gate("bank.db")
    first, second = Connection(), Connection()
    gate.acquire(first, 1)
    with pytest.raises(WriteTimeoutError, match=r"This thread has an open write transaction on bank\.db"):
        gate.acquire(second, 20)


def test_only_the_owner_gives_the_turn_back() -> None:
    """A connection that has not the turn cannot give it away, whichever thread asks."""
    gate = Gate("bank.db")
    owner = Connection()
    gate.acquire(owner, 1)
    gate.release(Connection())
    assert gate.is_mine()
    in_thread(lambda: gate.release(owner))
    assert not gate.is_mine()


@pytest.mark.parametrize("waits", [False, True])
def test_connection_that_is_gone_has_the_turn_no_longer(waits: bool) -> None:
    """The turn of a connection that was collected without being closed goes to the next, who may wait already."""
    gate = Gate("bank.db")
    holder: list[Connection] = [Connection()]
    gate.acquire(holder[0], 1)
    if not waits:
        holder.clear()
        in_thread(lambda: gate.acquire(Connection(), 0))
        return
    waiter = threading.Thread(target=lambda: gate.acquire(kept, 20))
    kept = Connection()
    waiter.start()
    until(lambda: waiting(gate) == 1)
    holder.clear()
    waiter.join(10)
    assert not waiter.is_alive()
    with pytest.raises(WriteTimeoutError):
        gate.acquire(Connection(), 0)


def test_one_gate_for_each_file() -> None:
    """Everyone who opens a file gets its one gate, while another file has another."""
    gate = gate_for("a.db")
    assert gate_for("a.db") is gate
    assert gate_for("b.db") is not gate


def test_forked_process_has_a_gate_of_its_own() -> None:
    """A turn that the parent holds does not block a forked process."""
    gate = gate_for("a.db")
    holder = Connection()
    gate.acquire(holder, 1)
    parent = os.getpid()

    def child() -> bool:
        own = gate_for("a.db")
        own.acquire(Connection(), 0.1)
        return own is not gate and own is gate_for("a.db") and os.getpid() != parent

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
    assert writes(statement)


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
def test_statement_that_reads(statement: str) -> None:
    """Statements that only read take no lock."""
    assert not writes(statement)
