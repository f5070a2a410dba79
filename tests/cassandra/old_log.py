"""A log that other processes have written, and whose horizon nobody has moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from eventsourcing.persistence import StoredEvent

if TYPE_CHECKING:
    from flask_eventsourcing.cassandra.recording import Log
    from flask_eventsourcing.cassandra.rows import Row

TOGETHER = 20
"""Rows of one bucket that are sent together; a node warns of batches of 5 KiB."""


def fill(log: Log, appends: int) -> None:
    """Write appends of one event each to a log that is empty; none of them is indexed."""
    from flask_eventsourcing.cassandra.rows import Append, bucket_of, row_of

    found: list[Row] = []
    batches: list[Sequence[Row]] = []
    for at in range(1, appends + 1):
        found.append(row_of(at, at - 1, [Append([StoredEvent(uuid4(), 1, "topic", b"state")])]))
        if len(found) == TOGETHER or bucket_of(at) != bucket_of(at + 1):
            batches.append(found)
            found = []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(_write, log), [*batches, *([found] if found else [])]))


def _write(log: Log, rows: Sequence[Row]) -> None:
    from cassandra.query import BatchStatement, BatchType

    from flask_eventsourcing.cassandra.errors import translated
    from flask_eventsourcing.cassandra.rows import bucket_of

    store = log.parts.store

    def write() -> None:
        batch = BatchStatement(BatchType.UNLOGGED)
        with translated():
            plainly = store.connection.prepare(store._cql.insert.replace(" IF NOT EXISTS", ""))
            for row in rows:
                parts = [tuple(part) for part in row.parts]
                at = (bucket_of(row.position), row.position)
                batch.add(plainly, (*at, row.id, row.size, row.last_event, parts, row.versions, row.contents))
            store.connection.execute(batch, timeout=60)

    # A node that is busy may not answer in time; the same rows again change nothing.
    log.parts.walker.repeat(write)


class Start:
    """What a process does that starts on a log.

    :param log: as no other process has used it.
    """

    def __init__(self, log: Log) -> None:
        self.requests = 0
        """Requests to the nodes for which somebody has waited."""
        self.read = 0
        """How many there were when the log was read up to its end."""
        self._log = log

    @contextmanager
    def counted(self, when_read: Callable[[], object] = object) -> Iterator[None]:
        """Count requests for a block.

        :param when_read: called whenever the log was read up to its end.
        """
        writer, connection = self._log.parts.writer, self._log.parts.store.connection
        follow: Any = writer._follow
        execute, execute_all = connection.execute, connection.execute_all

        def followed(memory: Any) -> Any:
            found = follow(memory)
            self.read = self.requests
            when_read()
            return found

        def executed(*arguments: Any, **options: Any) -> Any:
            self.requests += 1
            return execute(*arguments, **options)

        def executed_all(statements: Sequence[Any], timeout: float) -> None:
            self.requests += len(statements)
            execute_all(statements, timeout)

        replaced: tuple[tuple[Any, str, Any], ...] = (
            (writer, "_follow", followed),
            (connection, "execute", executed),
            (connection, "execute_all", executed_all),
        )
        for owner, name, function in replaced:
            setattr(owner, name, function)
        try:
            yield
        finally:
            for owner, name, _ in replaced:
                delattr(owner, name)
