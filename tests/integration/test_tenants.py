"""A schema for each tenant, by search path or ``schema_translate_map``: one datastore keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent
from sqlalchemy import orm

from flask_eventsourcing.models import make_models
from flask_eventsourcing.persistence import Datastore, SQLAlchemyApplicationRecorder


@dataclass
class Tenants:
    """A recorder on a server with a schema for each tenant, and the tenant whose turn it is."""

    engine: sa.Engine
    recorder: SQLAlchemyApplicationRecorder
    current: list[str] = field(default_factory=lambda: ["tenant_a"])

    def append(self, tenant: str, *keys: tuple[UUID, int]) -> list[int]:
        """Append events for a tenant."""
        self.current[:] = [tenant]
        events = [StoredEvent(originator_id, version, "topic", b"state") for originator_id, version in keys]
        return list(self.recorder.insert_events(events) or ())

    def log(self, tenant: str, limit: int = 100) -> list[tuple[int, UUID]]:
        """Read the log of a tenant."""
        self.current[:] = [tenant]
        found = self.recorder.select_notifications(None, limit)
        return [(each.id, UUID(str(each.originator_id))) for each in found]


@pytest.fixture
def tenants(postgres_url: str) -> Iterator[Tenants]:
    """Two tenants, chosen by the search path of a pool with one connection."""
    engine = sa.create_engine(postgres_url, pool_size=1, max_overflow=0)
    base = orm.declarative_base()
    models = make_models(base, "Bank")
    for schema in ("tenant_a", "tenant_b"):
        with engine.begin() as connection:
            connection.execute(sa.schema.CreateSchema(schema))
            base.metadata.create_all(connection.execution_options(schema_translate_map={None: schema}))
    engine.dispose()
    recorder = SQLAlchemyApplicationRecorder(
        Datastore(engine),
        models.tables["events"],
        tracking_table=models.tables["tracking"],
        snapshots_table=models.tables["snapshots"],
    )
    made = Tenants(engine, recorder)

    @sa.event.listens_for(engine, "checkout")
    def choose(driver: Any, *_: Any) -> None:
        driver.execute(f"SET search_path TO {made.current[0]}")
        driver.commit()

    yield made
    engine.dispose()


def test_search_path_chooses_table_sequence_and_mark(tenants: Tenants) -> None:
    """What a name means is found out each time: positions, floors and rows are a tenant's own."""
    first, second, third = uuid4(), uuid4(), uuid4()
    assert tenants.append("tenant_a", (first, 1)) == [1]
    assert tenants.append("tenant_a", (first, 2), (first, 3)) == [2, 3]
    assert tenants.append("tenant_b", (second, 1)) == [1]
    assert tenants.append("tenant_a", (first, 4)) == [4]
    assert tenants.append("tenant_b", (second, 2), (third, 1)) == [2, 3]
    assert tenants.log("tenant_a") == [(position, first) for position in range(1, 5)]
    # A page below a mark that is known, of another tenant.
    assert tenants.log("tenant_a", 2) == [(1, first), (2, first)]
    assert tenants.log("tenant_b", 2) == [(1, second), (2, second)]
    assert tenants.log("tenant_b") == [(1, second), (2, second), (3, third)]
    assert tenants.recorder.max_notification_id() == 3


def test_gap_is_a_tenants_own(tenants: Tenants) -> None:
    """The predecessor in another tenant's table does not count."""
    account_id = uuid4()
    tenants.append("tenant_a", (account_id, 1))
    with pytest.raises(IntegrityError, match="would leave a gap"):
        tenants.append("tenant_b", (account_id, 2))
    tenants.append("tenant_a", (account_id, 2))


def test_floor_is_a_tenants_own(tenants: Tenants) -> None:
    """A transaction that writes for two tenants publishes a floor for each, below which no reader misses anything."""
    dialect, table = tenants.recorder.dialect, tenants.recorder.events_table
    for _ in range(5):
        tenants.append("tenant_a", (uuid4(), 1))
    with tenants.engine.connect() as connection, connection.begin():
        dialect.append(connection, table, [StoredEvent(uuid4(), 1, "topic", b"")])
        connection.exec_driver_sql("SET LOCAL search_path TO tenant_b")
        dialect.append(connection, table, [StoredEvent(uuid4(), 1, "topic", b"")])
        assert dialect.high_water_mark(connection, table, joined=False) == 0
        connection.exec_driver_sql("SET LOCAL search_path TO tenant_a")
        assert dialect.high_water_mark(connection, table, joined=False) == 5


def test_dropped_tenant_is_forgotten(tenants: Tenants) -> None:
    """A connection that has served a tenant who is gone serves the next one."""
    tenants.append("tenant_a", (uuid4(), 1))
    tenants.log("tenant_a")
    tenants.current[:] = ["tenant_b"]
    with tenants.engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA tenant_a CASCADE")
    assert tenants.append("tenant_b", (uuid4(), 1)) == [1]
    assert len(tenants.log("tenant_b")) == 1


def test_translated_schema_is_named(tenants: Tenants) -> None:
    """With a ``schema_translate_map`` on the connection the recorder's statements go where the models' go."""
    dialect, table = tenants.recorder.dialect, tenants.recorder.events_table
    for schema, stored in (("tenant_b", [1]), ("tenant_b", [2]), ("tenant_a", [1])):
        with tenants.engine.connect() as connection, connection.begin():
            translated = connection.execution_options(schema_translate_map={None: schema})
            located = dialect.located(translated, table)
            assert dialect.append(translated, located, [StoredEvent(uuid4(), 1, "topic", b"")]) == stored
    assert len(tenants.log("tenant_a")) == 1
    assert len(tenants.log("tenant_b")) == 2
