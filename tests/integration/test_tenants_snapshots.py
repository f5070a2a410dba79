"""Tenants of one application, of which some take snapshots and some have no table for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from flask_eventsourcing.models import make_models
from flask_eventsourcing.persistence import Datastore, SQLAlchemyApplicationRecorder

WAYS = ["postgresql-path", "postgresql-map", "mariadb-use", "mariadb-map", "sqlite-files", "sqlite-map"]
# On MariaDB a schema is the server's, which the processes of a parallel run share.
WITH, WITHOUT = f"tenant_with_{os.getpid()}", f"tenant_without_{os.getpid()}"


class Tenants:
    """A recorder whose one engine serves every tenant, chosen when a connection is made, checked out, or by a map."""

    def __init__(self, way: str, url: str, folder: Path) -> None:
        self.database, _, self.way = way.partition("-")
        self.url, self.folder = url, folder
        self.current = WITH
        self.failed: list[str] = []
        self.engine = self._engine()
        self.models = make_models(orm.declarative_base(), "Bank")
        for tenant in (WITH, WITHOUT):
            self._make(tenant)
        self.engine.dispose()
        self.recorder = SQLAlchemyApplicationRecorder(
            Datastore(self.engine),
            self.models.tables["events"],
            tracking_table=self.models.tables["tracking"],
            snapshots_table=self.models.tables["snapshots"],
        )
        self.dialect: Any = self.recorder.dialect
        sa.event.listen(self.engine, "handle_error", lambda context: self.failed.append(str(context.statement)))

    def _engine(self) -> sa.Engine:
        if self.database == "sqlite":
            if self.way == "files":
                engine = sa.create_engine(self.url, poolclass=sa.NullPool)
                sa.event.listen(engine, "do_connect", self._open)
                return engine
            engine = sa.create_engine(self.url)

            @sa.event.listens_for(engine, "connect")
            def attach(driver: Any, _: Any) -> None:
                for tenant in (WITH, WITHOUT):
                    driver.execute(f"ATTACH '{self.folder / tenant}.db' AS {tenant}").close()

            return engine
        return sa.create_engine(self.url, pool_size=1, max_overflow=0)

    def _make(self, tenant: str) -> None:
        tables = [self.models.tables[use] for use in ("events", "tracking", "snapshots")]
        with self.turn(tenant, made=False) as connection:
            if self.database != "sqlite":
                connection.execute(sa.schema.CreateSchema(tenant))
            translated = connection
            if self.way in ("path", "use"):
                translated = connection.execution_options(schema_translate_map={None: tenant})
            tables[0].metadata.create_all(translated, tables=tables[: 3 if tenant == WITH else 2])
            connection.commit()

    @contextmanager
    def turn(self, tenant: str, *, made: bool = True) -> Iterator[Connection]:
        """Have a connection of a tenant's in a transaction, which is committed."""
        self.current = tenant
        options = {"schema_translate_map": {None: tenant}} if self.way == "map" else {}
        with self.engine.connect().execution_options(**options) as connection:
            if made and self.way in ("path", "use"):
                connection.exec_driver_sql(f"{'USE' if self.way == 'use' else 'SET search_path TO'} {tenant}")
            yield connection
            connection.commit()

    def _open(self, dialect: Any, record: Any, arguments: list[Any], parameters: dict[str, Any]) -> None:
        arguments[0] = str(self.folder / f"{self.current}.db")

    def failures(self) -> list[str]:
        """Return the statements that have failed, but for the first by which MariaDB tells that ``USE`` is in use."""
        return self.failed[self.way == "use" :]

    def append(self, tenant: str, originator_id: UUID, version: int) -> None:
        """Append an event for a tenant."""
        with self.turn(tenant) as connection:
            table = self.dialect.located(connection, self.recorder.events_table)
            self.dialect.look(connection, table, "append")
            self.dialect.append(connection, table, [StoredEvent(originator_id, version, "topic", b"")])

    def snapshot(self, tenant: str, originator_id: UUID, version: int) -> None:
        """Store a snapshot of a tenant's, as of an aggregate whose events were deleted."""
        with self.turn(tenant) as connection:
            table = self.models.tables["snapshots"]
            values = {"originator_id": originator_id, "originator_version": version, "topic": "t", "state": b""}
            connection.execute(sa.insert(table).values(values))

    def give_snapshots(self, tenant: str) -> None:
        """Make the table for a tenant who had none."""
        with self.turn(tenant) as connection:
            self.models.tables["snapshots"].create(connection)


@pytest.fixture(params=WAYS)
def tenants(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tenants]:
    """Two tenants, one with snapshots and one without."""
    database = request.param.partition("-")[0]
    url = f"sqlite:///{tmp_path / 'main.db'}"
    if database != "sqlite":
        url = request.getfixturevalue("postgres_url" if database == "postgresql" else "mariadb_url")
    made = Tenants(request.param, url, tmp_path)
    yield made
    with made.engine.connect() as connection:
        if database == "mariadb":
            # They are the server's, and not of the test's own database.
            for tenant in (WITH, WITHOUT):
                connection.execute(sa.schema.DropSchema(tenant))
    made.engine.dispose()


@pytest.mark.parametrize("first", [WITH, WITHOUT], ids=["with", "without"])
def test_each_tenant_appends(tenants: Tenants, first: str) -> None:
    """Whichever comes first, each tenant begins streams and goes on with them, and no statement fails."""
    second = WITHOUT if first == WITH else WITH
    accounts = {tenant: uuid4() for tenant in (first, second)}
    for version in (1, 2):
        for tenant in (first, second):
            tenants.append(tenant, accounts[tenant], version)
    for tenant in (second, first):
        with pytest.raises(IntegrityError, match="would leave a gap"):
            tenants.append(tenant, accounts[tenant], 9)
        tenants.append(tenant, uuid4(), 1)
    assert tenants.failures() == []


def test_snapshots_are_looked_for_where_they_are(tenants: Tenants) -> None:
    """An event may follow a snapshot of its own tenant, and a stream that has one does not begin again."""
    account_id = uuid4()
    for tenant in (WITHOUT, WITH):
        tenants.append(tenant, uuid4(), 1)
    tenants.snapshot(WITH, account_id, 7)
    with pytest.raises(IntegrityError, match="would leave a gap"):
        tenants.append(WITHOUT, account_id, 8)
    with pytest.raises(IntegrityError, match="would leave a gap"):
        tenants.append(WITH, account_id, 1)
    tenants.append(WITH, account_id, 8)
    tenants.append(WITHOUT, account_id, 1)
    assert tenants.failures() == []


def test_table_that_is_made_later_is_seen(tenants: Tenants) -> None:
    """A tenant who takes snapshots from now on needs no restart of the application."""
    account_id = uuid4()
    for tenant in (WITHOUT, WITH, WITHOUT):
        tenants.append(tenant, uuid4(), 1)
    tenants.give_snapshots(WITHOUT)
    tenants.snapshot(WITHOUT, account_id, 7)
    with pytest.raises(IntegrityError, match="would leave a gap"):
        tenants.append(WITHOUT, account_id, 1)
    tenants.append(WITHOUT, account_id, 8)
    assert tenants.failures() == []


def test_is_there_is_a_tenants_own(tenants: Tenants) -> None:
    """An erasure knows for each tenant whether there are snapshots."""
    for _ in range(2):
        for tenant in (WITH, WITHOUT):
            with tenants.turn(tenant) as connection:
                table = tenants.dialect.located(connection, tenants.recorder.events_table)
                tenants.dialect.look(connection, table, "append")
                assert tenants.dialect.has_snapshots(connection, table) == (tenant == WITH)
