"""The library's ``System``, its runners and its projections, with the environment of a Flask app, on each database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import NAMESPACE_URL, UUID, uuid5

import pytest
import sqlalchemy as sa
from eventsourcing.application import AggregateNotFoundError, Application, ProcessingEvent
from eventsourcing.dispatch import singledispatchmethod
from eventsourcing.domain import Aggregate, DomainEventProtocol, event
from eventsourcing.persistence import Tracking
from eventsourcing.projection import EventSourcedProjection, EventSourcedProjectionRunner, Projection, ProjectionRunner
from eventsourcing.system import (
    Leader,
    MultiThreadedRunner,
    NewMultiThreadedRunner,
    NewSingleThreadedRunner,
    ProcessApplication,
    RecordingEvent,
    RecordingEventReceiver,
    Runner,
    SingleThreadedRunner,
    System,
)
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing, StaleAggregateError
from flask_eventsourcing.persistence import SQLAlchemyTrackingRecorder
from tests.bank import make_app
from tests.contract.backends import url_for
from tests.domain import PATIENCE, in_thread, until

BACKENDS = ("sqlite-file", "postgresql", "mariadb")
RUNNERS = [SingleThreadedRunner, NewSingleThreadedRunner, MultiThreadedRunner, NewMultiThreadedRunner]


class Dog(Aggregate):
    """A dog that learns tricks."""

    @event("Registered")
    def __init__(self, name: str) -> None:
        self.name = name

    @event("TrickAdded")
    def add_trick(self, trick: str) -> None:
        """Learn a trick."""


class Counter(Aggregate):
    """Counts how often a trick was learned."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    @classmethod
    def create_id(cls, name: str) -> UUID:
        """Make the id of the name."""
        return uuid5(NAMESPACE_URL, f"/counters/{name}")

    @event("Incremented")
    def increment(self) -> None:
        """Count one more."""
        self.count += 1


TrickAdded: Any = Dog.TrickAdded  # type: ignore[attr-defined]


class School(Application[UUID]):
    """Where dogs are."""

    def register(self, name: str, *tricks: str) -> UUID:
        """Register a dog that knows tricks already."""
        dog = Dog(name)
        for trick in tricks:
            dog.add_trick(trick)
        self.save(dog)
        return dog.id


class Counters(ProcessApplication[UUID]):
    """Follows the school."""

    @singledispatchmethod
    def policy(self, domain_event: DomainEventProtocol[Any], processing_event: ProcessingEvent[UUID]) -> None:
        """Count tricks."""
        if isinstance(domain_event, TrickAdded):
            name = cast(Any, domain_event).trick
            try:
                counter = cast(Counter, self.repository.get(Counter.create_id(name)))
            except AggregateNotFoundError:
                counter = Counter(name)
            counter.increment()
            processing_event.collect_events(counter)

    def count(self, name: str) -> int:
        """Say how often a trick was learned."""
        try:
            return cast(Counter, self.repository.get(Counter.create_id(name))).count
        except AggregateNotFoundError:
            return 0


class CounterProjection(EventSourcedProjection[UUID]):
    """The same as a projection of the library."""

    policy = Counters.policy
    count: Any = Counters.count


tricks = sa.Table(
    "tricks",
    sa.MetaData(),
    sa.Column("trick", sa.String(20), primary_key=True),
    sa.Column("amount", sa.Integer, nullable=False),
)


class TricksView(SQLAlchemyTrackingRecorder):
    """Counts tricks in a table beside the position."""

    def add(self, trick: str | None, tracking: Tracking) -> None:
        """Count a trick."""
        with self.transaction() as connection:
            self.write_tracking(connection, tracking)
            if trick is None:
                return
            change = sa.update(tricks).where(tricks.c.trick == trick).values(amount=tricks.c.amount + 1)
            if not connection.execute(change).rowcount:
                connection.execute(sa.insert(tricks).values(trick=trick, amount=1))

    def amount(self, trick: str) -> int:
        """Return a count."""
        with self.datastore.reading() as read:
            return read.connection.scalar(sa.select(tricks.c.amount).where(tricks.c.trick == trick)) or 0


class Tricks(Projection[TricksView]):
    """A projection of the library, to the view."""

    name = "tricks"

    def process_event(self, domain_event: DomainEventProtocol[Any], tracking: Tracking) -> None:
        """Count tricks."""
        self.view.add(getattr(domain_event, "trick", None), tracking)


@pytest.fixture(params=BACKENDS)
def flask_app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Flask]:
    """An app whose extension knows the applications, with all tables."""
    app = make_app(url_for(request.param, tmp_path, request))
    db = SQLAlchemy(app)

    class TricksTracking(Application[UUID]):
        """Has the tables of the view."""

        name = "tricks"

    es = EventSourcing(app, db=db, applications=[School, Counters, CounterProjection, TricksTracking])
    with app.app_context():
        db.create_all()
        tricks.create(db.engine)
    yield app
    es.close()


@contextmanager
def in_context(flask_app: Flask, inside: bool) -> Iterator[None]:
    """An application context, or none."""
    with flask_app.app_context() if inside else nullcontext():
        yield


def commit(flask_app: Flask, inside: bool) -> None:
    """Commit what was saved within a context; without one it is committed by save()."""
    if inside:
        flask_app.extensions["sqlalchemy"].session.commit()


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("runner_class", RUNNERS)
def test_a_system(flask_app: Flask, runner_class: type[Runner[UUID]], inside: bool) -> None:
    """An application is followed by another, inside and outside an application context, and each event counts once."""
    env = flask_app.extensions["eventsourcing"].env
    system = System(pipes=[[School, Counters]])
    with in_context(flask_app, inside), runner_class(system, env) as runner:
        school, counters = runner.get(School), runner.get(Counters)
        for number in range(5):
            school.register(f"Rex {number}", "roll over", "beg")
            commit(flask_app, inside)
        until(lambda: _fresh(flask_app, inside) or counters.count("beg") == 5)
        assert counters.count("roll over") == 5


def _fresh(flask_app: Flask, inside: bool) -> bool:
    # On MariaDB a transaction reads what there was at its beginning.
    if inside:
        flask_app.extensions["sqlalchemy"].session.rollback()
    return False


def _has_counted(counters: Counters, number: int) -> bool:
    return counters.count("beg") == number


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_a_system_that_is_stopped_goes_on_where_it_was(flask_app: Flask, runner_class: type[Runner[UUID]]) -> None:
    """What was recorded while a system did not run is processed, once, when it runs again."""
    env = flask_app.extensions["eventsourcing"].env
    system = System(pipes=[[School, Counters]])
    for round_number in (1, 2, 3):
        School(env).register("Rex", "beg")
        with runner_class(system, env) as runner:
            counters = runner.get(Counters)
            runner.get(School).register("Max", "beg")
            until(partial(_has_counted, counters, 2 * round_number))


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_an_event_sourced_projection(flask_app: Flask, inside: bool) -> None:
    """``EventSourcedProjectionRunner`` follows an application of the app."""
    env = flask_app.extensions["eventsourcing"].env
    with (
        in_context(flask_app, inside),
        EventSourcedProjectionRunner(application_class=School, projection_class=CounterProjection, env=env) as runner,
    ):
        runner.app.register("Rex", "beg", "sit")
        commit(flask_app, inside)
        until(lambda: _fresh(flask_app, inside) or runner.projection.count("sit") == 1)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_a_projection_with_a_view(flask_app: Flask, inside: bool) -> None:
    """``ProjectionRunner`` fills a view that derives from the tracking recorder, and ``wait`` waits for it."""
    env = flask_app.extensions["eventsourcing"].env
    with (
        in_context(flask_app, inside),
        ProjectionRunner(application_class=School, projection_class=Tricks, view_class=TricksView, env=env) as runner,
    ):
        runner.app.register("Rex", "beg", "sit")
        runner.app.register("Max", "beg")
        commit(flask_app, inside)
        head = runner.app.recorder.max_notification_id()
        runner.wait(head, timeout=PATIENCE)
        # What a view reads belongs to the session's transaction.
        _fresh(flask_app, inside)
        assert (runner.projection.view.amount("beg"), runner.projection.view.amount("sit")) == (2, 1)


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_followers_process_what_is_committed(flask_app: Flask, runner_class: type[Runner[UUID]]) -> None:
    """A follower processes each committed event once and the last one too, and nothing that was rolled back."""
    session = flask_app.extensions["sqlalchemy"].session
    system = System(pipes=[[School, Counters]])
    with runner_class(system, flask_app.extensions["eventsourcing"].env) as runner:
        school, counters = runner.get(School), runner.get(Counters)
        for end in ("rollback", "commit", "rollback", "commit", "commit"):
            with flask_app.app_context():
                school.register("Rex", end)
                savepoint = session.begin_nested()
                school.register("Max", "rollback")
                savepoint.rollback()
                getattr(session, end)()
        until(lambda: counters.count("commit") == 3)
        assert counters.count("rollback") == 0


def test_a_leader_refuses_stale_objects(flask_app: Flask) -> None:
    """An application that a runner has constructed refuses an object whose events were rolled back."""
    system = System(pipes=[[School, Counters]])
    env = flask_app.extensions["eventsourcing"].env
    with SingleThreadedRunner[UUID](system, env) as runner, flask_app.app_context():
        dog = Dog("Rex")
        runner.get(School).save(dog)
        flask_app.extensions["sqlalchemy"].session.rollback()
        with pytest.raises(StaleAggregateError):
            runner.get(School).save(dog)


@pytest.mark.parametrize("flask_app", ["postgresql"], indirect=True)  # elsewhere writers wait for each other
@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("runner_class", [MultiThreadedRunner, NewMultiThreadedRunner])
def test_followers_miss_nothing_that_is_committed_late(
    flask_app: Flask, runner_class: type[Runner[UUID]], end: str
) -> None:
    """An event is processed even if it is committed after one with a higher position."""
    extension = flask_app.extensions["sqlalchemy"]
    env = flask_app.extensions["eventsourcing"].env
    system = System(pipes=[[School, Counters]])
    # One as in this process, and one as in another.
    with runner_class(system, env) as runner, School(env) as elsewhere:
        school, counters = runner.get(School), runner.get(Counters)
        for early in (school, elsewhere):
            with flask_app.app_context():
                early.register("Rex", "early")
                in_thread(lambda: school.register("Max", "late"))
                getattr(extension.session, end)()
        school.register("Moritz", "last")
        until(lambda: counters.count("last") == 1)
        assert (counters.count("late"), counters.count("early")) == (2, 2 if end == "commit" else 0)


class Noted(RecordingEventReceiver[UUID]):
    """A receiver of the user's own, which notes what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def receive_recording_event(self, new_recording_event: RecordingEvent[UUID]) -> None:
        """Note the positions."""
        self.told += [each.notification.id for each in new_recording_event.recordings]


class Telling(Leader[UUID], School):
    """A leader that overrides what the library calls."""

    name = "School"
    notified = 0

    def _notify(self, recordings: Any) -> None:
        self.notified += 1
        super()._notify(recordings)


@pytest.mark.parametrize("mode", ["explicit", "save"])
def test_a_receiver_of_ones_own_is_told_after_the_commit(flask_app: Flask, mode: str) -> None:
    """Overrides of ``_notify()`` are called within ``save()``, receivers once the events can be read."""
    other = make_app(flask_app.config["SQLALCHEMY_DATABASE_URI"], EVENTSOURCING_COMMIT=mode)
    db = SQLAlchemy(other)
    es = EventSourcing(other, db=db, application=School)
    receiver = Noted()
    with other.app_context(), Telling(other.extensions["eventsourcing"].env) as leader:
        leader.lead(receiver)
        leader.register("Rex")
        assert (leader.notified, len(receiver.told)) == (1, 0 if mode == "explicit" else 1)
        db.session.commit()
        assert len(receiver.told) == 1
    with Telling(other.extensions["eventsourcing"].env) as leader:
        leader.lead(receiver)
        leader.register("Rex")
        assert len(receiver.told) == 2
    es.close(other)
