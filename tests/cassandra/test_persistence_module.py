"""An application of the library on Cassandra, without any framework."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import InfrastructureFactory, InfrastructureFactoryError, IntegrityError

from flask_eventsourcing.metadata import event_metadata

if TYPE_CHECKING:
    from flask_eventsourcing.cassandra import Connection, Factory


pytestmark = pytest.mark.xdist_group("cassandra-cluster")


class Dog(Aggregate):
    """A dog."""

    @event("Registered")
    def __init__(self, name: str) -> None:
        self.name = name
        self.tricks: list[str] = []

    @event("TrickAdded")
    def add_trick(self, trick: str) -> None:
        """Learn something."""
        self.tricks.append(trick)


class Dogs(Application[UUID]):
    """Dogs."""

    is_snapshotting_enabled = True


@pytest.fixture(scope="module")
def env(connection: Connection) -> dict[str, str]:
    """The environment of an application."""
    settings = connection.settings
    return {
        "PERSISTENCE_MODULE": "flask_eventsourcing.cassandra",
        "CASSANDRA_CONTACT_POINTS": ", ".join(settings.contact_points),
        "CASSANDRA_PORT": str(settings.port),
        "CASSANDRA_KEYSPACE": settings.keyspace,
        "CASSANDRA_REPLICATION": str(settings.replication),
        "CREATE_TABLE": "yes",
    }


@pytest.fixture
def dogs(env: dict[str, str]) -> Iterator[Dogs]:
    """An application."""
    with Dogs(env=env) as made:
        yield made


def factory_of(application: Dogs) -> Factory:
    """Return the factory of an application."""
    factory: Any = application.factory
    return factory  # type: ignore[no-any-return]


def test_application_saves_and_reads(dogs: Dogs) -> None:
    """Aggregates are saved and read as on any database, with snapshots, and another process would see them."""
    dog = Dog("Fido")
    first = dogs.save(dog)
    dog.add_trick("roll over")
    dogs.save(dog)
    dogs.take_snapshot(dog.id)
    dog.add_trick("play dead")
    (last,) = dogs.save(dog)
    found: Dog = dogs.repository.get(dog.id)
    assert (found.version, found.tricks) == (3, ["roll over", "play dead"])
    page = dogs.notification_log.select(first[0].notification.id, 10)
    assert [each.originator_version for each in page if each.originator_id == dog.id] == [1, 2, 3]
    assert dogs.recorder.max_notification_id() == last.notification.id


def test_conflict_is_an_integrity_error(dogs: Dogs) -> None:
    """Of two writers of one version one succeeds; nothing from the save of the other is recorded."""
    dog = Dog("Fido")
    dogs.save(dog)
    one: Dog = dogs.repository.get(dog.id)
    other: Dog = dogs.repository.get(dog.id)
    one.add_trick("jump")
    dogs.save(one)
    other.add_trick("sit")
    along = Dog("Rex")
    with pytest.raises(IntegrityError):
        dogs.save(along, other)
    assert along.id not in dogs.repository


def test_metadata_are_stored(dogs: Dogs) -> None:
    """The metadata of an event are kept, and are found by its position."""
    with event_metadata(correlation_id="request-7", user="kim"):
        (recording,) = dogs.save(Dog("Fido"))
    recorder: Any = dogs.recorder
    (recorded,) = recorder.find_recorded([recording.notification.id]).values()
    assert recorded.correlation_id == "request-7"
    assert recorded.metadata["user"] == "kim"
    assert recorded.event_id is not None
    assert recorded.time.tzinfo is not None
    (row,) = factory_of(dogs).connection.execute(
        f"SELECT correlation_id, event_id FROM {factory_of(dogs).connection.settings.keyspace}.dogs_events "
        f"WHERE originator_id = {recording.domain_event.originator_id}"
    )
    assert tuple(row) == ("request-7", recorded.event_id)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CASSANDRA_CONTACT_POINTS", "", "CASSANDRA_CONTACT_POINTS"),
        ("CASSANDRA_KEYSPACE", "", "BANK_CASSANDRA_KEYSPACE"),
        ("CASSANDRA_CONTACT_POINTS", "127.0.0.1:9042", "CASSANDRA_CONTACT_POINTS must be a list .*, without a port"),
        ("CASSANDRA_KEYSPACE", 'bank"; DROP KEYSPACE bank', "CASSANDRA_KEYSPACE must be a name"),
        ("CASSANDRA_PORT", "many", "must be a number"),
        ("CASSANDRA_PORT", "70000", "CASSANDRA_PORT must be a whole number"),
        # With it, what was acknowledged could be missed.
        ("CASSANDRA_CONSISTENCY", "one", "CASSANDRA_CONSISTENCY must be .*; found 'ONE'"),
        ("CASSANDRA_SERIAL_CONSISTENCY", "QUORUM", "CASSANDRA_SERIAL_CONSISTENCY must be"),
        ("CASSANDRA_PATIENCE", "nan", "CASSANDRA_PATIENCE must be a number of seconds"),
        ("CASSANDRA_USERNAME", "ada", "CASSANDRA_USERNAME and CASSANDRA_PASSWORD go together"),
        ("CASSANDRA_REPLICATION", "0", "must be a number"),
        ("CASSANDRA_REPLICATION", "{}", "must be a number"),
        ("ORIGINATOR_ID_TYPE", "int", "must be 'uuid' or 'text'"),
    ],
)
def test_bad_environment_is_refused(key: str, value: str, message: str) -> None:
    """A variable that is missing, or has a bad value, is named."""
    from eventsourcing.utils import Environment

    pytest.importorskip("cassandra.cluster", reason="cassandra-driver is not installed")
    env = {
        "PERSISTENCE_MODULE": "flask_eventsourcing.cassandra",
        "CASSANDRA_CONTACT_POINTS": "127.0.0.1",
        "CASSANDRA_KEYSPACE": "bank",
    }
    with pytest.raises(InfrastructureFactoryError, match=message):
        InfrastructureFactory.construct(Environment("Bank", env | {key: value}))


def test_missing_tables_are_named(env: dict[str, str]) -> None:
    """Without tables the error says which command makes them."""
    from flask_eventsourcing.exceptions import MissingTableError

    class Cats(Application[UUID]):
        """An application without tables."""

    with Cats(env=env | {"CREATE_TABLE": "no"}) as cats, pytest.raises(MissingTableError, match="init-db"):
        cats.save(Dog("no dog"))
