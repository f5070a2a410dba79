"""Writers that do everything that could make a reader of the log skip an event, and readers that would notice."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from django.db import Error as DjangoError
from eventsourcing.persistence import IntegrityError, PersistenceError, StoredEvent

from tests.servers import forget_killed_connections
from tests.torture.writing_hosts import HOSTS

WRITERS = 32
LONGEST_PAUSE = 0.02
ROLLED_BACK = 0.05
COLLIDING = 0.15
LARGE, LARGE_SAVES = 120, 0.02
"""Events of a save whose positions PostgreSQL draws at the gate, and the part of the saves that are so."""


@dataclass
class Observations:
    """What is stored, what each reader has seen, and how often each outcome was."""

    stored: list[int] = field(default_factory=list)
    seen: dict[str, list[int]] = field(default_factory=dict)
    blocks: list[list[int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    surprises: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        """Count an outcome."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def skipped(self) -> dict[str, list[int]]:
        """The positions that are stored and that a reader has not seen, by reader."""
        missing = {name: sorted(set(self.stored) - set(seen)) for name, seen in self.seen.items()}
        return {name: positions for name, positions in missing.items() if positions}

    def disorder(self) -> list[str]:
        """What readers saw twice, out of order, or although it is not stored."""
        found = []
        for name, seen in self.seen.items():
            if seen != sorted(set(seen)):
                found.append(f"{name} saw positions twice or out of order")
            if set(seen) - set(self.stored):
                found.append(f"{name} saw what is not stored: {sorted(set(seen) - set(self.stored))[:5]}")
        return found

    def torn(self) -> list[list[int]]:
        """The saves whose positions are not contiguous."""
        return [block for block in self.blocks if block != list(range(block[0], block[0] + len(block)))]


class LogUnderLoad:
    """A host on a database, and the threads that write to its log and read it."""

    def __init__(
        self,
        url: str,
        seconds: float,
        longest_pause: float,
        unprotected: Callable[[Any], None] | None,
        engine_options: dict[str, Any],
        kills: bool,
        host: str,
    ) -> None:
        self.longest_pause = longest_pause
        self.kills = kills
        self.observations = Observations()
        self.stop = threading.Event()
        self.calm = threading.Event()
        self.seconds = seconds
        self.shared = [uuid4() for _ in range(4)]
        self.host = HOSTS[host](url, {"pool_size": WRITERS + 8, "max_overflow": 8, **engine_options})
        self.recorder, self.engine = self.host.recorder, self.host.engine
        if unprotected is not None:
            unprotected(self.recorder)

    def write(self, number: int) -> None:
        """Save, pause, save again, and commit, roll back or fail, until the time is over."""
        chance = random.Random(number)
        while not self.stop.is_set():
            with self.host.working():
                try:
                    self._unit(chance)
                except IntegrityError:
                    self._give_up()
                    self.observations.count("conflict")
                except (PersistenceError, sa.exc.SQLAlchemyError, DjangoError) as error:
                    # A killed connection: whether the commit was done is not known, and the table will tell.
                    self._give_up()
                    self.observations.count("killed" if is_kill(error) else "surprise")
                    if not is_kill(error):
                        self.observations.surprises.append(repr(error)[:300])

    def _give_up(self) -> None:
        # The connection may be killed while it rolls back.
        with suppress(sa.exc.SQLAlchemyError):
            self.host.rollback()

    def _unit(self, chance: random.Random) -> None:
        blocks = []
        for _ in range(chance.randint(1, 3)):
            positions = list(self.recorder.insert_events(self._events(chance)) or ())
            blocks.append(positions)
            time.sleep(chance.uniform(0, self.longest_pause))
        time.sleep(chance.uniform(0, self.longest_pause))
        if chance.random() < ROLLED_BACK:
            self.host.rollback()
            self.observations.count("rolled back")
            return
        self.host.commit()
        self.observations.count("committed")
        self.observations.blocks.extend(blocks)

    def _events(self, chance: random.Random) -> list[StoredEvent]:
        if chance.random() < COLLIDING:
            # One of few aggregates and a version that others try too.
            return [StoredEvent(chance.choice(self.shared), int(time.monotonic() * 20), "bank:Collided", b"{}")]
        originator_id = uuid4()
        count = LARGE if chance.random() < LARGE_SAVES else chance.randint(1, 3)
        return [StoredEvent(originator_id, n, "bank:Happened", b"{}") for n in range(count)]

    def read(self, name: str) -> None:
        """Follow the log by position, until the time is over and everything is read."""
        seen = self.observations.seen.setdefault(name, [])
        while True:
            last_round = self.calm.is_set()
            try:
                page = self.recorder.read_log(seen[-1] if seen else None, 200, inclusive_of_start=False)
            except PersistenceError as error:
                if not is_kill(error):
                    self.observations.surprises.append(repr(error)[:300])
                continue
            seen.extend(notification.id for notification in page)
            if last_round and not page:
                return

    def subscribe(self, name: str) -> None:
        """Follow the log by subscriptions that are ended and begun again, until the time is over."""
        seen = self.observations.seen.setdefault(name, [])
        while not self.calm.is_set():
            with self.recorder.subscribe(gt=seen[-1] if seen else None) as subscription:
                timer = threading.Timer(0.3, subscription.stop)
                timer.start()
                seen.extend(notification.id for notification in subscription)
                timer.join()
        self.read(name)

    def kill(self) -> None:
        """End connections on the server, at random, until the time is over."""
        chance = random.Random(0)
        killer = sa.create_engine(self.engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
        with killer.connect() as connection:
            while not self.stop.wait(chance.uniform(0.1, 0.4)):
                victims = list(connection.exec_driver_sql(VICTIMS[self.engine.dialect.name]).scalars())
                if victims:
                    # The victim may be gone by itself in the meantime.
                    with suppress(sa.exc.OperationalError):
                        connection.exec_driver_sql(KILL[self.engine.dialect.name].format(chance.choice(victims)))
                        self.observations.count("kills")

    def run(self) -> Observations:
        """Let all threads work for a while, and return what happened."""
        jobs: list[threading.Thread] = [threading.Thread(target=self.write, args=(n,)) for n in range(WRITERS)]
        readers = [threading.Thread(target=self.read, args=(f"reader {n}",)) for n in range(2)]
        readers.append(threading.Thread(target=self.subscribe, args=("subscriber",)))
        if self.kills:
            jobs.append(threading.Thread(target=self.kill))
        for thread in [*jobs, *readers]:
            thread.start()
        time.sleep(self.seconds)
        self.stop.set()
        for thread in jobs:
            thread.join()
        self.calm.set()
        for thread in readers:
            thread.join()
        order = self.host.events.c.notification_id
        with self.engine.connect() as connection:
            self.observations.stored = list(connection.scalars(sa.select(order).order_by(order)))
        return self.observations


VICTIMS = {
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
}
KILL = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}


def is_kill(error: BaseException) -> bool:
    """Whether an error is that of a connection which was ended."""
    text = str(error).lower()
    signs = (
        "terminat",
        "closed",
        "lost",
        "gone",
        "interrupted",
        "killed",
        "unknown thread",
        "broken pipe",
        "reconnect",
    )
    return any(sign in text for sign in signs)


@contextmanager
def under_load(
    url: str,
    seconds: float,
    *,
    longest_pause: float = LONGEST_PAUSE,
    unprotected: Callable[[Any], None] | None = None,
    engine_options: dict[str, Any] | None = None,
    kills: bool = True,
    host: str = "flask",
) -> Iterator[LogUnderLoad]:
    """A log under load, whose connections are closed at the end."""
    made = LogUnderLoad(url, seconds, longest_pause, unprotected, engine_options or {}, kills, host)
    try:
        yield made
    finally:
        made.host.close()
        forget_killed_connections()
