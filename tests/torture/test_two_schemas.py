"""No reader skips an event where one process writes to the logs of two tenants, each in a schema of its own."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import PersistenceError, StoredEvent
from sqlalchemy import orm

from flask_eventsourcing.models import make_models
from flask_eventsourcing.persistence import Datastore, SQLAlchemyApplicationRecorder
from tests.servers import forget_killed_connections
from tests.torture.log_under_load import KILL, VICTIMS, Observations, is_kill

TENANTS = ("tenant_a", "tenant_b")
WRITERS = 12


class Schemas:
    """A recorder for the logs of two tenants, and the threads that work on them."""

    def __init__(self, url: str, seconds: float) -> None:
        self.engine = sa.create_engine(url, pool_size=WRITERS, max_overflow=4)
        self.seconds = seconds
        self.observations = {tenant: Observations() for tenant in TENANTS}
        self.stop = threading.Event()
        self.calm = threading.Event()
        models = make_models(orm.declarative_base(), "Bank")
        for tenant in TENANTS:
            with self.engine.begin() as connection:
                connection.execute(sa.schema.CreateSchema(tenant))
                translated = connection.execution_options(schema_translate_map={None: tenant})
                models.tables["events"].metadata.create_all(translated)
        self.recorder = SQLAlchemyApplicationRecorder(
            Datastore(self.engine),
            models.tables["events"],
            tracking_table=models.tables["tracking"],
            snapshots_table=models.tables["snapshots"],
        )
        self.dialect: Any = self.recorder.dialect

    def note(self, observed: Observations, error: Exception) -> None:
        """Count an error, which must be that of a killed connection."""
        observed.count("killed" if is_kill(error) else "surprise")
        if not is_kill(error):
            observed.surprises.append(repr(error)[:300])

    def write(self, number: int) -> None:
        """Append for one tenant and for the other in the same transactions, and commit or roll back."""
        chance = random.Random(number)
        while not self.stop.is_set():
            try:
                with self.engine.connect() as connection:
                    self._unit(connection, chance)
            except (PersistenceError, sa.exc.SQLAlchemyError) as error:
                self.note(self.observations[TENANTS[0]], error)

    def _unit(self, connection: sa.Connection, chance: random.Random) -> None:
        blocks = []
        for _ in range(chance.randint(1, 3)):
            tenant = chance.choice(TENANTS)
            blocks.append((tenant, self._append(connection, tenant, chance)))
            time.sleep(chance.uniform(0, 0.01))
        if chance.random() < 0.1:
            connection.rollback()
            for tenant, _ in blocks:
                self.observations[tenant].count("rolled back")
            return
        connection.commit()
        for tenant, block in blocks:
            self.observations[tenant].count("committed")
            self.observations[tenant].blocks.append(block)

    def _append(self, connection: sa.Connection, tenant: str, chance: random.Random) -> list[int]:
        events = [
            StoredEvent(uuid4(), 1, f"bank:{tenant}", b"{}") for _ in range(chance.choice([1, 1, 1, 2, 3, 3, 150]))
        ]
        way = chance.choice(["SET", "SET LOCAL", "map"])
        if way == "map":
            connection = connection.execution_options(schema_translate_map={None: tenant})
        else:
            connection.exec_driver_sql(f"{way} search_path TO {tenant}")
            connection = connection.execution_options(schema_translate_map={})
        table = self.dialect.located(connection, self.recorder.events_table)
        positions: list[int] = self.dialect.append(connection, table, events)
        return positions

    def read(self, name: str) -> None:
        """Follow both logs in turns, on whatever connection the pool gives."""
        while True:
            last_round, found = self.calm.is_set(), 0
            for tenant in TENANTS:
                seen = self.observations[tenant].seen.setdefault(name, [])
                try:
                    found += self._page(tenant, seen)
                except (PersistenceError, sa.exc.SQLAlchemyError) as error:
                    self.note(self.observations[tenant], error)
                    found += 1
            if last_round and not found:
                return

    def _page(self, tenant: str, seen: list[int]) -> int:
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"SET search_path TO {tenant}")
            page = self.dialect.select_notifications(
                connection, self.recorder.events_table, seen[-1] if seen else None, 100, inclusive_of_start=False
            )
        seen.extend(each.id for each in page)
        wrong = {each.topic for each in page} - {f"bank:{tenant}"}
        if wrong:
            self.observations[tenant].surprises.append(f"{tenant} has {wrong}")
        return len(page)

    def kill(self) -> None:
        """End connections on the server, at random."""
        chance = random.Random(0)
        killer = sa.create_engine(self.engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
        with killer.connect() as connection:
            while not self.stop.wait(chance.uniform(0.1, 0.4)):
                victims = list(connection.exec_driver_sql(VICTIMS["postgresql"]).scalars())
                if victims:
                    connection.exec_driver_sql(KILL["postgresql"].format(chance.choice(victims)))
                    self.observations[TENANTS[0]].count("kills")

    def run(self) -> dict[str, Observations]:
        """Let all threads work for a while, and return what happened to each tenant."""
        jobs = [threading.Thread(target=self.write, args=(number,)) for number in range(WRITERS)]
        jobs.append(threading.Thread(target=self.kill))
        readers = [threading.Thread(target=self.read, args=(f"reader {number}",)) for number in range(2)]
        for thread in [*jobs, *readers]:
            thread.start()
        time.sleep(self.seconds)
        self.stop.set()
        for thread in jobs:
            thread.join()
        self.calm.set()
        for thread in readers:
            thread.join()
        with self.engine.connect() as connection:
            for tenant, observed in self.observations.items():
                statement = f"SELECT notification_id FROM {tenant}.bank_events ORDER BY notification_id"
                observed.stored = list(connection.exec_driver_sql(statement).scalars())
        return self.observations


@contextmanager
def schemas(url: str, seconds: float) -> Iterator[Schemas]:
    """Both tenants, whose connections are closed at the end."""
    made = Schemas(url, seconds)
    try:
        yield made
    finally:
        with suppress(sa.exc.SQLAlchemyError):
            made.engine.dispose()
        forget_killed_connections()


def check(observations: dict[str, Observations]) -> None:
    """Check that nothing was skipped, doubled, disordered, torn or written to the other tenant."""
    for observed in observations.values():
        assert observed.surprises == []
        assert observed.skipped() == {}
        assert observed.disorder() == []
        assert observed.torn() == []
        assert min(observed.counts[what] for what in ("committed", "rolled back")) > 0
        assert len(observed.stored) >= observed.counts["committed"]
    assert observations[TENANTS[0]].counts["kills"] > 0


@pytest.mark.long
def test_nothing_is_skipped_in_two_schemas(postgres_url: str) -> None:
    """Readers of two tenants see every event of theirs once and in order, and none of the other's."""
    with schemas(postgres_url, seconds=5) as made:
        check(made.run())


@pytest.mark.torture
def test_nothing_is_skipped_in_two_schemas_in_a_minute(postgres_url: str) -> None:
    """The same holds for a minute."""
    with schemas(postgres_url, seconds=60) as made:
        check(made.run())
