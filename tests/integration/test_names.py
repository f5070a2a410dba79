"""Names of applications: an accepted name works on every database, others are refused at the start."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import IntegrityError, StoredEvent

from flask_eventsourcing import ConfigurationError
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_a_file_first
from tests.source import ROOT

NAMES = [
    "O'Brien",
    "100%",
    "%s",
    'a"b',
    "a`b",
    "a.b",
    "a, b",
    "Bücher 💰"[:6],
    "{x}",
    "back\\slash",
    "x" * 37,
    ":id",
    "a?b",
]


class Dog(Aggregate):
    """An aggregate with a trick."""

    @event("Learned")
    def learn(self, trick: str) -> None:
        """Learn it."""
        self.trick = trick


def named(name: str) -> type[Application[Any]]:
    """Return an application class of this name, which takes snapshots."""
    return type("Named", (Application,), {"name": name, "is_snapshotting_enabled": True})


@pytest.mark.parametrize("name", NAMES)
def test_any_name_works(new_site: MakeSite, name: str) -> None:
    """An application of any name saves, reads, waits for news and tells conflicts."""
    site = new_site(named(name))
    with site.app.app_context():
        application: Any = site.bank
        dog = Dog()
        dog.learn("to roll over")
        application.save(dog)
        application.save(Dog(), Dog())
        site.db.session.commit()
        assert application.repository.get(dog.id).trick == "to roll over"
        assert [each.id for each in application.notification_log.select(1, 10)] == [1, 2, 3, 4]
        application.take_snapshot(dog.id)
        site.db.session.commit()
        first = application.recorder.select_events(dog.id)[0]
        with pytest.raises(IntegrityError, match="Another writer was first"):
            application.recorder.insert_events([first])
        site.db.session.rollback()
    with site.app.app_context(), site.bank.recorder.subscribe() as subscription:
        assert [next(subscription).id for _ in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\ud800b", " a", "a ", "\x1b[2J"], ids=ascii)
def test_name_that_cannot_be(new_site: MakeSite, name: str) -> None:
    """A name with control characters, halves of surrogate pairs or spaces at its ends is refused at the start."""
    with pytest.raises(ConfigurationError, match="Set another class attribute 'name'") as raised:
        new_site(named(name))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["x" * 60, "x" * 300, "ü" * 25])
def test_name_that_is_too_long(new_site: MakeSite, uri: str, name: str) -> None:
    """A name that the database would truncate is refused at the start, with the greatest length."""
    if not uri.startswith("postgresql") and len(name) == 25:
        new_site(named(name))
        return
    with pytest.raises(ConfigurationError, match=r"takes names of 63 (bytes|characters)"):
        new_site(named(name))


class Kennel(Application[UUID]):
    """Takes snapshots when it is told to."""

    is_snapshotting_enabled = True


def test_snapshot_of_the_same_version_is_replaced(new_site: MakeSite) -> None:
    """A second snapshot of a version replaces the first, and the session can be used further."""
    site = new_site(Kennel)
    with site.app.app_context():
        application: Any = site.bank
        dog = Dog()
        application.save(dog)
        site.db.session.commit()
        application.take_snapshot(dog.id)
        application.take_snapshot(dog.id)
        recorder = application.snapshots.recorder
        (old,) = recorder.select_events(dog.id)
        other = StoredEvent(dog.id, 7, "a:b", b"")
        recorder.insert_events([StoredEvent(dog.id, old.originator_version, old.topic, b"new"), other])
        assert [each.state for each in recorder.select_events(dog.id)] == [b"new", b""]
        dog.learn("to sit")
        application.save(dog)
        site.db.session.commit()
    with site.app.app_context():
        assert [each.state for each in site.bank.snapshots.recorder.select_events(dog.id)] == [b"new", b""]  # type: ignore[union-attr]


INIT_DB = """
import sys
from tests.bank import make_site
site = make_site(sys.argv[1], create=False)
input()
result = site.app.test_cli_runner().invoke(args=["eventsourcing", "init-db"])
site.close()
print(result.output)
sys.exit(result.exit_code)
"""


@on_a_file_first
def test_init_db_in_several_processes_at_once(uri: str, tmp_path: Path) -> None:
    """Each of several processes that create the tables at once ends well, and the tables are there."""
    command = [sys.executable, "-c", INIT_DB, uri]
    for _ in range(2):
        processes = [
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            done = list(pool.map(lambda process: process.communicate("\n", timeout=120), processes))
        assert [process.returncode for process in processes] == [0] * 4, done
        assert any("Created table bank_events" in output or "All tables are there" in output for output, _ in done)
