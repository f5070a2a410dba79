"""Writers that do everything that could make a reader of the log skip an event, and readers that would notice."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID, uuid4

import sqlalchemy as sa
import zope.sqlalchemy
from django.db import Error as DjangoError
from django.db import connections, transaction
from eventsourcing.application import Application
from eventsourcing.persistence import IntegrityError, PersistenceError, StoredEvent
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm
from transaction import ThreadTransactionManager

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.contrib.django import get_application
from flask_eventsourcing.contrib.django.records import records_of
from flask_eventsourcing.contrib.zope import EventSourcing as ZopeEventSourcing
from flask_eventsourcing.contrib.zope import event_models
from flask_eventsourcing.persistence import SQLAlchemyApplicationRecorder
from tests.django_host import project
from tests.django_host.datastores import Opened
from tests.servers import forget_killed_connections

WRITERS = 32
LONGEST_PAUSE = 0.02
ROLLED_BACK = 0.05
COLLIDING = 0.15
LARGE, LARGE_SAVES = 120, 0.02
"""Events of a save whose positions PostgreSQL draws at the gate, and the part of the saves that are so."""


@dataclass
class Storm:
    """What happened."""

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


class Bank(Application[UUID]):
    """The application whose log is stormed."""


class Place(ABC):
    """A host on a database, in which writers save."""

    engine: sa.Engine
    recorder: SQLAlchemyApplicationRecorder
    events: sa.Table

    @abstractmethod
    def working(self) -> AbstractContextManager[object]:
        """What is around a unit of a writer."""

    @abstractmethod
    def commit(self) -> None:
        """Commit it."""

    @abstractmethod
    def rollback(self) -> None:
        """Roll it back."""

    @abstractmethod
    def close(self) -> None:
        """Close everything."""


class FlaskPlace(Place):
    """A Flask app."""

    def __init__(self, url: str, engine_options: dict[str, Any]) -> None:
        self.app = Flask("storm")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options
        self.db = SQLAlchemy(self.app)
        self.es = EventSourcing(self.app, db=self.db, application=Bank)
        with self.app.app_context():
            self.db.create_all()
            self.recorder = cast(SQLAlchemyApplicationRecorder, self.es.application.recorder)
            self.engine = self.db.engine
            self.events = next(iter(self.es.models.values())).tables["events"]

    def working(self) -> AbstractContextManager[object]:
        """An application context."""
        return self.app.app_context()

    def commit(self) -> None:
        """Commit the session."""
        self.db.session.commit()

    def rollback(self) -> None:
        """Roll the session back."""
        self.db.session.rollback()

    def close(self) -> None:
        """Close everything."""
        self.es.close(self.app)
        self.engine.dispose()


class ZopePlace(Place):
    """Sessions whose transactions a manager commits."""

    def __init__(self, url: str, engine_options: dict[str, Any]) -> None:
        base = orm.declarative_base()
        self.engine = sa.create_engine(url, **engine_options)
        models = event_models(base, "Bank")
        base.metadata.create_all(self.engine)
        self.session = orm.scoped_session(orm.sessionmaker(self.engine))
        self.manager = ThreadTransactionManager()
        zope.sqlalchemy.register(self.session, transaction_manager=self.manager)
        self.es = ZopeEventSourcing(Bank, models=models, session=self.session)
        self.recorder = cast(SQLAlchemyApplicationRecorder, self.es.application.recorder)
        self.events = models.tables["events"]

    def working(self) -> AbstractContextManager[object]:
        """A transaction that somebody else commits."""
        self.manager.begin()
        return nullcontext()

    def commit(self) -> None:
        """Commit the transaction."""
        self.manager.commit()

    def rollback(self) -> None:
        """Abort the transaction."""
        self.manager.abort()

    def close(self) -> None:
        """Close everything."""
        self.es.close()
        self.engine.dispose()


class DjangoPlace(Place):
    """A Django project, in which each thread has a connection."""

    def __init__(self, url: str, engine_options: dict[str, Any]) -> None:
        self.stack = ExitStack()
        self.alias = f"storm{uuid4().hex}"
        self.stack.enter_context(project.database(self.alias, url))
        self.stack.callback(Opened(self.alias).close)
        self.stack.enter_context(project.applications(Bank=self.alias))
        self.engine = sa.create_engine(url, **engine_options)
        self.stack.callback(self.engine.dispose)
        self.recorder = cast(SQLAlchemyApplicationRecorder, get_application("Bank").recorder)
        self.events = records_of("Bank").mirror.tables["events"]
        self.thread = threading.local()

    @contextmanager
    def working(self) -> Iterator[None]:
        """A block, which is rolled back unless it was committed."""
        try:
            self._begin()
        except DjangoError:
            # A request would close the connection that was lost, and the next one make another.
            connections[self.alias].close()
            self._begin()
        try:
            yield
        finally:
            self.rollback()

    def _begin(self) -> None:
        block: Any = transaction.atomic(using=self.alias)
        block.__enter__()
        self.thread.block = block

    def commit(self) -> None:
        """Leave the block."""
        self._leave(None, None, None)

    def rollback(self) -> None:
        """Leave the block with an error, if it is not left yet."""
        if self.thread.block is not None:
            self._leave(KeyError, KeyError(), None)

    def _leave(self, *error: Any) -> None:
        block, self.thread.block = self.thread.block, None
        block.__exit__(*error)

    def close(self) -> None:
        """Close everything."""
        self.stack.close()


PLACES: dict[str, Callable[[str, dict[str, Any]], Place]] = {
    "flask": FlaskPlace,
    "zope": ZopePlace,
    "django": DjangoPlace,
}


class Scene:
    """A host on a database, and the threads that work on it."""

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
        self.storm = Storm()
        self.stop = threading.Event()
        self.calm = threading.Event()
        self.seconds = seconds
        self.shared = [uuid4() for _ in range(4)]
        self.place = PLACES[host](url, {"pool_size": WRITERS + 8, "max_overflow": 8, **engine_options})
        self.recorder, self.engine = self.place.recorder, self.place.engine
        if unprotected is not None:
            unprotected(self.recorder)

    def write(self, number: int) -> None:
        """Save, pause, save again, and commit, roll back or fail, until the storm is over."""
        chance = random.Random(number)
        while not self.stop.is_set():
            with self.place.working():
                try:
                    self._unit(chance)
                except IntegrityError:
                    self._give_up()
                    self.storm.count("conflict")
                except (PersistenceError, sa.exc.SQLAlchemyError, DjangoError) as error:
                    # A killed connection: whether the commit was done is not known, and the table will tell.
                    self._give_up()
                    self.storm.count("killed" if is_kill(error) else "surprise")
                    if not is_kill(error):
                        self.storm.surprises.append(repr(error)[:300])

    def _give_up(self) -> None:
        # The connection may be killed while it rolls back.
        with suppress(sa.exc.SQLAlchemyError):
            self.place.rollback()

    def _unit(self, chance: random.Random) -> None:
        blocks = []
        for _ in range(chance.randint(1, 3)):
            positions = list(self.recorder.insert_events(self._events(chance)) or ())
            blocks.append(positions)
            time.sleep(chance.uniform(0, self.longest_pause))
        time.sleep(chance.uniform(0, self.longest_pause))
        if chance.random() < ROLLED_BACK:
            self.place.rollback()
            self.storm.count("rolled back")
            return
        self.place.commit()
        self.storm.count("committed")
        self.storm.blocks.extend(blocks)

    def _events(self, chance: random.Random) -> list[StoredEvent]:
        if chance.random() < COLLIDING:
            # One of few aggregates and a version that others try too.
            return [StoredEvent(chance.choice(self.shared), int(time.monotonic() * 20), "storm:Collided", b"{}")]
        originator_id = uuid4()
        count = LARGE if chance.random() < LARGE_SAVES else chance.randint(1, 3)
        return [StoredEvent(originator_id, n, "storm:Happened", b"{}") for n in range(count)]

    def read(self, name: str) -> None:
        """Follow the log by position, until the storm is over and everything is read."""
        seen = self.storm.seen.setdefault(name, [])
        while True:
            last_round = self.calm.is_set()
            try:
                page = self.recorder.read_log(seen[-1] if seen else None, 200, inclusive_of_start=False)
            except PersistenceError as error:
                if not is_kill(error):
                    self.storm.surprises.append(repr(error)[:300])
                continue
            seen.extend(notification.id for notification in page)
            if last_round and not page:
                return

    def subscribe(self, name: str) -> None:
        """Follow the log by subscriptions that are ended and begun again, until the storm is over."""
        seen = self.storm.seen.setdefault(name, [])
        while not self.calm.is_set():
            with self.recorder.subscribe(gt=seen[-1] if seen else None) as subscription:
                timer = threading.Timer(0.3, subscription.stop)
                timer.start()
                seen.extend(notification.id for notification in subscription)
                timer.join()
        self.read(name)

    def kill(self) -> None:
        """End connections on the server, at random, until the storm is over."""
        chance = random.Random(0)
        killer = sa.create_engine(self.engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
        with killer.connect() as connection:
            while not self.stop.wait(chance.uniform(0.1, 0.4)):
                victims = list(connection.exec_driver_sql(VICTIMS[self.engine.dialect.name]).scalars())
                if victims:
                    # The victim may be gone by itself in the meantime.
                    with suppress(sa.exc.OperationalError):
                        connection.exec_driver_sql(KILL[self.engine.dialect.name].format(chance.choice(victims)))
                        self.storm.count("kills")

    def run(self) -> Storm:
        """Let the storm loose, and return what happened."""
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
        order = self.place.events.c.notification_id
        with self.engine.connect() as connection:
            self.storm.stored = list(connection.scalars(sa.select(order).order_by(order)))
        return self.storm


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
def scene(
    url: str,
    seconds: float,
    *,
    longest_pause: float = LONGEST_PAUSE,
    unprotected: Callable[[Any], None] | None = None,
    engine_options: dict[str, Any] | None = None,
    kills: bool = True,
    host: str = "flask",
) -> Iterator[Scene]:
    """A scene, whose connections are closed at the end."""
    made = Scene(url, seconds, longest_pause, unprotected, engine_options or {}, kills, host)
    try:
        yield made
    finally:
        made.place.close()
        forget_killed_connections()
