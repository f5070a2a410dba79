"""The bare drivers: the statements of this package and nothing around them, as the limit of what it can reach."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent

from flask_eventsourcing.persistence.dialects.event_tables import begins, heads

from .contenders import Contender, This, Worker

_COLUMNS = "notification_id, originator_id, originator_version, topic, state"


class SQLiteWorker:
    """Works with a connection of ``sqlite3``."""

    def __init__(self, connection: sqlite3.Connection, insert: str) -> None:
        self._connection = connection
        self._insert = insert

    def insert(self, events: Sequence[StoredEvent]) -> None:
        """Begin a write transaction and insert events."""
        self._connection.execute("BEGIN IMMEDIATE")
        rows = [(This.encode_id(e.originator_id), e.originator_version, e.topic, e.state) for e in events]
        if len(rows) == 1:
            self._connection.execute(self._insert, rows[0])
        else:
            self._connection.executemany(self._insert, rows)

    def commit(self) -> None:
        """Commit."""
        self._connection.execute("COMMIT")

    def rollback(self) -> None:
        """Roll back, if there is a transaction."""
        self._connection.rollback()

    def read(self, originator_id: UUID) -> int:
        """Read the rows of an aggregate."""
        statement = (
            f"SELECT originator_version, topic, state FROM {BareSQLite.table} WHERE originator_id = ? "
            "ORDER BY originator_version"
        )
        return len(self._connection.execute(statement, (originator_id.hex,)).fetchall())

    def rebuild(self, originator_id: UUID) -> int:
        """A driver knows no aggregates."""
        raise NotImplementedError

    def page(self, start: int, limit: int) -> tuple[int, int]:
        """Read a page of rows."""
        statement = (
            f"SELECT {_COLUMNS} FROM {BareSQLite.table} WHERE notification_id >= ? ORDER BY notification_id LIMIT ?"
        )
        page = self._connection.execute(statement, (start, limit)).fetchall()
        return len(page), page[-1][0] if page else start


class PostgreSQLWorker:
    """Works with a connection of ``psycopg``; transactions are begun by a statement of their own, as drivers do."""

    def __init__(self, connection: Any, statements: dict[str, str]) -> None:
        self._connection = connection
        self._cursor = connection.cursor(binary=True)
        self._statements = statements

    def insert(self, events: Sequence[StoredEvent]) -> None:
        """Begin a transaction and insert events."""
        self._cursor.execute("BEGIN")
        rows = [(str(e.originator_id), e.originator_version, e.topic, e.state) for e in events]
        identity = int(self._statements["identity"])
        if len(rows) == 1:
            how = "begin" if begins(events[0]) else "follow"
            self._cursor.execute(self._statements[how], (*rows[0], identity, None))
        else:
            columns = [list(column) for column in zip(*rows, strict=True)]
            first = heads(events)
            keys = [str(e.originator_id) for e in first], [e.originator_version for e in first]
            self._cursor.execute(self._statements["block"], (None, identity, *keys, len(rows), *columns))
        self._cursor.fetchall()

    def commit(self) -> None:
        """Commit."""
        self._cursor.execute("COMMIT")

    def rollback(self) -> None:
        """Roll back, if there is a transaction."""
        self._connection.rollback()

    def read(self, originator_id: UUID) -> int:
        """Read the rows of an aggregate."""
        statement = (
            f"SELECT originator_version, topic, state FROM {BarePostgreSQL.table} WHERE originator_id = %s "
            "ORDER BY originator_version"
        )
        return len(self._cursor.execute(statement, (originator_id,)).fetchall())

    def rebuild(self, originator_id: UUID) -> int:
        """A driver knows no aggregates."""
        raise NotImplementedError

    def page(self, start: int, limit: int) -> tuple[int, int]:
        """Read the high-water mark and a page of rows."""
        mark = self._cursor.execute(self._statements["mark"]).fetchall()[0][0]
        statement = (
            f"SELECT {_COLUMNS} FROM {BarePostgreSQL.table} WHERE notification_id >= %s AND notification_id <= %s "
            "ORDER BY notification_id LIMIT %s"
        )
        page = self._cursor.execute(statement, (start, mark, limit)).fetchall()
        return len(page), page[-1][0] if page else start


def _statements_of(recorder: Any) -> dict[str, str]:
    """Return the statements of a recorder, made by using them once in a transaction that the caller rolls back."""
    first, second, *others = (StoredEvent(uuid4(), 1, "topic", b"") for _ in range(4))
    recorder.high_water_mark()
    recorder.insert_events([first])
    recorder.insert_events([StoredEvent(first.originator_id, 2, "topic", b"")])
    recorder.insert_events([second, *others])
    recorder.dialect.insert_statement(recorder.events_table)
    logs = getattr(recorder.dialect, "_logs", {})
    statements = dict(recorder.events_table.statements)
    for log in logs.values():
        statements |= {"identity": str(log.identity), **log.statements}
    return statements


class Bare(Contender):
    """A driver; the tables are those of this package."""

    name = "bare"
    rebuilds = False

    def __init__(self, url: sa.URL, connections: int) -> None:
        self._url = url
        self._connections = connections
        self._statements: dict[str, str] | None = None

    def create_tables(self) -> None:
        """Create the tables of this package."""
        this = This(self._url, 1)
        this.create_tables()
        this.close()

    def statements(self) -> dict[str, str]:
        """The statements of this package, by their use."""
        if self._statements is None:
            this = This(self._url, 1)
            with this.app.app_context():
                recorder: Any = this.es.application.recorder
                self._statements = _statements_of(recorder)
                this.db.session.rollback()
            this.close()
        return self._statements

    def close(self) -> None:
        """The workers close their connections."""
        return


class BareSQLite(Bare):
    """The driver ``sqlite3``."""

    title = "sqlite3, bare"
    databases = ("sqlite",)

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Work with a connection of this thread."""
        insert = self.statements()["insert"]
        with closing(sqlite3.connect(str(self._url.database), timeout=30, isolation_level=None)) as connection:
            yield SQLiteWorker(connection, insert)


class BarePostgreSQL(Bare):
    """The driver ``psycopg``."""

    title = "psycopg, bare"
    databases = ("postgresql",)
    requires = ("psycopg",)

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Work with a connection of this thread."""
        import psycopg

        url = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        statements = self.statements()
        with psycopg.connect(url, autocommit=True) as connection:
            yield PostgreSQLWorker(connection, statements)
