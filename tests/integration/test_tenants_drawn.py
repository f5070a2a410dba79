"""Drawn programs of sessions that change their search path: every tenant's log is its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import orm

from flask_eventsourcing.models import make_models
from flask_eventsourcing.persistence import Datastore, SQLAlchemyApplicationRecorder
from tests.length import examples

TENANTS = ("tenant_a", "tenant_b", "tenant_c")
FEW = settings(
    max_examples=examples(15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("SET"), st.sampled_from(TENANTS)),
        st.tuples(st.just("SET LOCAL"), st.sampled_from(TENANTS)),
        st.tuples(st.just("map"), st.sampled_from([None, *TENANTS])),
        st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 3, 101])),
        st.tuples(st.just("follow"), st.integers(0, 3)),
        st.tuples(st.just("gap"), st.sampled_from([1, 2])),
        st.tuples(st.just("read"), st.booleans()),
        st.tuples(st.just("savepoint"), st.booleans()),
        st.tuples(st.just("end"), st.booleans()),
        st.tuples(st.just("connection"), st.booleans()),
        st.tuples(st.just("again"), st.sampled_from(TENANTS)),
    ),
    min_size=4,
    max_size=25,
)
Key = tuple[UUID, int]


class Tenants:
    """A server with a schema for each tenant and a pool of two connections, beside a model of what is in the logs."""

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url, pool_size=2, max_overflow=0, connect_args={"prepare_threshold": 1})
        self.owner = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        self.models = make_models(orm.declarative_base(), "Bank")
        self.recorder = SQLAlchemyApplicationRecorder(
            Datastore(self.engine),
            self.models.tables["events"],
            tracking_table=self.models.tables["tracking"],
            snapshots_table=self.models.tables["snapshots"],
        )

    def make(self, tenant: str) -> None:
        """Make a tenant's tables, after those that it has were dropped."""
        with self.owner.connect() as connection:
            connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {tenant} CASCADE")
            connection.execute(sa.schema.CreateSchema(tenant))
            self.models.tables["events"].metadata.create_all(
                connection.execution_options(schema_translate_map={None: tenant})
            )

    def empty(self) -> None:
        """Delete every event."""
        with self.owner.connect() as connection:
            connection.exec_driver_sql(f"TRUNCATE {', '.join(f'{tenant}.bank_events' for tenant in TENANTS)}")

    def stored(self, tenant: str) -> list[Key]:
        """Read a tenant's table past the recorder, by position."""
        with self.owner.connect() as connection:
            statement = f"SELECT originator_id, originator_version FROM {tenant}.bank_events ORDER BY notification_id"
            return [(row[0], row[1]) for row in connection.exec_driver_sql(statement)]

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()
        self.owner.dispose()


@pytest.fixture
def tenants(postgres_url: str) -> Iterator[Tenants]:
    """The server."""
    made = Tenants(postgres_url)
    for tenant in TENANTS:
        made.make(tenant)
    yield made
    made.close()


class Program:
    """Runs the steps, with what each of them is to do to the logs."""

    def __init__(self, tenants: Tenants) -> None:
        self.tenants = tenants
        self.dialect: Any = tenants.recorder.dialect
        self.committed: dict[str, list[Key]] = {tenant: [] for tenant in TENANTS}
        self.pending: list[tuple[str, list[Key]]] = []
        self.session_path = {0: TENANTS[0], 1: TENANTS[0]}
        self.map: str | None = None
        self.changed: str | None = None
        self.number = 0
        self.connections = [tenants.engine.connect() for _ in range(2)]
        for connection in self.connections:
            connection.exec_driver_sql(f"SET search_path TO {TENANTS[0]}")
            connection.commit()
        self._begin()

    def _begin(self) -> None:
        self.path = self.session_path[self.number]

    @property
    def connection(self) -> sa.Connection:
        """The connection whose turn it is."""
        return self.connections[self.number]

    @property
    def meant(self) -> str:
        """The tenant whose tables the names mean."""
        return self.map or self.path

    def known(self) -> list[Key]:
        """What the transaction sees of the tenant's log."""
        own = [keys for tenant, keys in self.pending if tenant == self.meant]
        return [*self.committed[self.meant], *(key for keys in own for key in keys)]

    def located(self) -> tuple[sa.Connection, Any]:
        """The connection, and the table as it has it."""
        schemas = {None: self.map} if self.map else {}
        translated = self.connection.execution_options(schema_translate_map=schemas)
        return translated, self.dialect.located(translated, self.tenants.recorder.events_table)

    def append(self, keys: list[Key]) -> None:
        """Append events, whose positions must follow each other."""
        connection, table = self.located()
        positions = self.dialect.append(connection, table, [StoredEvent(*key, "topic", b"") for key in keys])
        assert positions == list(range(positions[0], positions[0] + len(keys)))
        self.pending.append((self.meant, keys))

    def step(self, what: str, value: Any) -> None:
        """Do one step."""
        getattr(self, f"do_{what.replace(' ', '_').lower()}")(value)

    def do_set(self, tenant: str) -> None:
        """Change the search path, which a rollback takes back."""
        self.connection.exec_driver_sql(f"SET search_path TO {tenant}")
        self.path = self.changed = tenant

    def do_set_local(self, tenant: str) -> None:
        """Change it for the transaction."""
        self.connection.exec_driver_sql(f"SET LOCAL search_path TO {tenant}")
        self.path = tenant

    def do_map(self, tenant: str | None) -> None:
        """Change the map of schemas."""
        self.map = tenant

    def do_append(self, count: int) -> None:
        """Begin a stream."""
        originator_id = uuid4()
        self.append([(originator_id, version) for version in range(1, count + 1)])

    def do_follow(self, number: int) -> None:
        """Go on with a stream, of this tenant."""
        known = self.known()
        if known:
            originator_id = known[number % len(known)][0]
            last = max(version for each, version in known if each == originator_id)
            self.append([(originator_id, last + 1)])

    def do_gap(self, count: int) -> None:
        """Try to go on with a stream that only another tenant has."""
        others = [key for tenant in TENANTS for key in self.committed[tenant] if tenant != self.meant]
        if others:
            connection, table = self.located()
            originator_id, version = others[0]
            events = [StoredEvent(originator_id, version + n, "topic", b"") for n in range(1, count + 1)]
            with pytest.raises(IntegrityError, match="would leave a gap"):
                self.dialect.append(connection, table, events)

    def do_read(self, joined: bool) -> None:
        """Read the log: joined with what the transaction has appended, otherwise without."""
        connection, table = self.located()
        page = self.dialect.select_notifications(connection, table, None, 5000, joined=joined)
        found = [(UUID(str(each.originator_id)), each.originator_version) for each in page]
        assert found == (self.known() if joined else self.committed[self.meant])

    def do_savepoint(self, roll_back: bool) -> None:
        """Append within a savepoint."""
        nested = self.connection.begin_nested()
        before = len(self.pending)
        self.do_append(2)
        if roll_back:
            nested.rollback()
            del self.pending[before:]
        else:
            nested.commit()

    def do_end(self, commit: bool) -> None:
        """End the transaction."""
        if commit:
            self.connection.commit()
            for tenant, keys in self.pending:
                self.committed[tenant] += keys
            self.session_path[self.number] = self.changed or self.session_path[self.number]
        else:
            self.connection.rollback()
        self.pending, self.changed = [], None
        self._begin()

    def do_connection(self, commit: bool) -> None:
        """End the transaction, and go on with the other connection."""
        self.do_end(commit)
        self.number = 1 - self.number
        self._begin()

    def do_again(self, tenant: str) -> None:
        """Drop a tenant's tables and make them again, between transactions."""
        self.do_end(True)
        self.tenants.make(tenant)
        self.committed[tenant] = []

    def close(self) -> None:
        """Close the connections."""
        for connection in self.connections:
            connection.rollback()
            connection.close()


@FEW
@given(steps=STEPS)
def test_logs_of_tenants_are_apart(tenants: Tenants, steps: list[tuple[str, Any]]) -> None:
    """Whatever the names mean from one statement to the next, an event is where it was appended, and in order there."""
    tenants.empty()
    program = Program(tenants)
    try:
        for what, value in steps:
            program.step(what, value)
        program.do_end(True)
        for tenant in TENANTS:
            assert tenants.stored(tenant) == program.committed[tenant]
    finally:
        program.close()
