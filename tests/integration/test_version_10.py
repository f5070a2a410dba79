"""The recorders of version 10 of the library, 10.0.0a7, read the tables that we make.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from tests.bank import Site, make_site
from tests.domain import Account, Bank
from tests.servers import require

VERSION = "10.0.0a7"
PROGRAM = """
import json, sys
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID
from eventsourcing.dataclasses import Decision
from eventsourcing.dataclasses.legacy import DatetimeAsISO, LegacyJSONTranscoder
from eventsourcing.errors import MapperDeserialisationError
from eventsourcing.persistence import AggregateEventMapper, IntegrityError, StoredEvent
from eventsourcing.utils import register_topic

class Deposited(Decision):
    amount: int
    timestamp: datetime

register_topic("tests.domain:Account.Deposited", Deposited)
address, asked = json.loads(sys.argv[1])
if isinstance(address, str):
    from eventsourcing.sqlite import SQLiteAggregateRecorder, SQLiteApplicationRecorder, SQLiteDatastore
    datastore = SQLiteDatastore(address, originator_id_type="uuid")
    aggregates, application = SQLiteAggregateRecorder, SQLiteApplicationRecorder
else:
    from eventsourcing.postgres import PostgresAggregateRecorder, PostgresApplicationRecorder, PostgresDatastore
    datastore = PostgresDatastore(**address, originator_id_type="uuid")
    aggregates, application = PostgresAggregateRecorder, PostgresApplicationRecorder
events = application(datastore, events_table_name=asked["table"])
snapshots = aggregates(datastore, events_table_name="bank_snapshots")

def shown(found):
    return [
        [getattr(e, "id", None), str(e.originator_id), e.originator_version, e.topic, e.state.decode(),
         str(UUID(str(e.uuid))), e.metadata] for e in found
    ]

def stream(asked):
    return {**asked, "originator_id": UUID(asked["originator_id"])}

def mapped(transcoder):
    mapper, found = AggregateEventMapper(transcoder), []
    for each in events.select_notifications(None, 100):
        try:
            event = mapper.to_domain_event(each)
        except MapperDeserialisationError as error:
            found.append(type(error.__cause__).__name__)
        else:
            found.append([event.decision.amount, event.decision.timestamp is not None, event.metadata == each.metadata])
    return found

def appended():
    # What version 10 does when an application is made: its types and its index; the table is there.
    table = application(datastore, events_table_name="bank_events")
    table.create_table()
    event = StoredEvent(
        originator_id=UUID(int=7), originator_version=1, topic="t", state=b"{}", uuid=UUID(int=77),
        metadata={"by": "version 10"},
    )
    try:
        first = table.insert_events([event])
    except Exception as error:
        return str(error)
    try:
        table.insert_events([event])
    except IntegrityError:
        return list(first)

legacy = LegacyJSONTranscoder()
legacy.register(DatetimeAsISO())
told = {
    "log": [shown(events.select_notifications(**each)) for each in asked["log"]],
    "last": events.max_notification_id(),
    "streams": [shown(events.select_events(**stream(each))) for each in asked["streams"]],
    "snapshots": [shown(snapshots.select_events(**stream(each))) for each in asked["snapshots"]],
    "mapped": mapped(legacy),
    "appended": appended(),
}
print(json.dumps(told))
datastore.close()
"""
NOBODY = "00000000-0000-0000-0000-000000000000"
"""Version 10's id of an event that has none."""


@pytest.fixture(scope="session")
def version_10() -> Path:
    """A folder with version 10, which does not go beside the version that the tests have; made once for each user."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flask-eventsourcing-tests"
    folder = home / f"eventsourcing-{VERSION}"
    home.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = folder.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command = [*pip, "--target", str(draft), f"eventsourcing=={VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            require(done.returncode == 0, f"eventsourcing {VERSION}", f"{' '.join(command)}: {done.stderr[-500:]}")
            draft.rename(folder)
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    """A database's address, for us, and for version 10."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'bank.db'}", str(tmp_path / "bank.db")
    url: str = request.getfixturevalue("postgres_url")
    parts = make_url(url)
    return url, {
        "dbname": parts.database,
        "host": str(parts.host or parts.query.get("host") or ""),
        "port": parts.port or 5432,
        "user": parts.username or "",
        "password": parts.password or "none",
    }


def filled(url: str) -> tuple[Site, list[str]]:
    """Make a bank with three accounts, a snapshot, and an event of before there were metadata."""
    site = make_site(
        url, Bank, EVENTSOURCING_POSTGRES_ORDER="table-lock", EVENTSOURCING_ENV={"IS_SNAPSHOTTING_ENABLED": "y"}
    )
    with site.app.app_context(), site.es.event_metadata(reason='Grüße\u2028\U0001f600"\\', correlation_id="c"):
        accounts = [Account("Ada") for _ in range(3)]
        for account in accounts:
            for amount in (1, 2, 3):
                account.deposit(amount)
        site.bank.save(*accounts)
        site.bank.take_snapshot(accounts[0].id, version=2)
        site.db.session.commit()
        table: Any = site.es.StoredEvent.__table__
        old = sa.update(table).where(table.c.notification_id == 12)
        site.db.session.execute(old.values(event_id=None, metadata=None))
        site.db.session.commit()
        return site, [str(account.id) for account in accounts]


VIEW = "CREATE VIEW for_the_library AS SELECT notification_id AS rowid, * FROM bank_events"
"""On SQLite the library's recorders ask for "rowid", which SQLite calls by the name of the column that it is."""
LOG: list[dict[str, Any]] = [
    {"start": None, "limit": 12},
    {"start": 3, "limit": 4},
    {"start": 3, "limit": 4, "inclusive_of_start": False},
    {"start": 2, "limit": 10, "stop": 6},
    {"start": 1, "limit": 3, "topics": ["tests.domain:Account.Created"]},
    {"start": 2, "limit": 5, "stop": 11, "topics": ["tests.domain:Account.Deposited", "none"]},
]
STREAM: list[dict[str, Any]] = [
    {},
    {"gt": 2},
    {"lte": 2},
    {"desc": True, "limit": 1},
    {"gt": 1, "lte": 3, "desc": True},
    {"gt": 4},
]


def test_version_10_reads_ours(database: tuple[str, Any], version_10: Path) -> None:
    """Version 10's recorders read events and snapshots as ours do, with id and metadata; what its mapper and its
    append make of them is what the page on metadata says."""
    site, (account, *_) = filled(database[0])
    stream = [{"originator_id": account, **each} for each in STREAM]
    asked = {"log": LOG, "streams": stream, "snapshots": stream[:2], "table": "bank_events"}
    if isinstance(database[1], str):
        asked["table"] = "for_the_library"
        with site.app.app_context():
            site.db.session.execute(sa.text(VIEW))
            site.db.session.commit()
    told = run(version_10, database[1], asked)
    with site.app.app_context():
        recorder: Any = site.bank.recorder
        stored = site.db.session.scalars(sa.select(site.es.StoredEvent)).all()
        known = {(str(each.originator_id), each.originator_version): each for each in stored}
        theirs = recorder.find_recorded([13])
        (snapshot,) = site.db.session.scalars(sa.select(site.es.Snapshot))
        expected = shown(known, recorder.select_notifications)
        assert told["log"] == [expected(**each) for each in LOG]
        expected = shown(known, recorder.select_events)
        assert told["streams"] == [expected(**{**each, "originator_id": snapshot.originator_id}) for each in stream]
    assert told["last"] == 12 == len({each[5] for each in told["log"][0]})
    assert told["log"][0][0][6] == {"reason": 'Grüße\u2028\U0001f600"\\', "correlation_id": "c"}
    assert told["log"][0][11][5:] == [NOBODY, {}]
    taken: list[Any] = [None, account, 2, snapshot.topic, bytes(snapshot.state).decode(), NOBODY, {}]
    assert told["snapshots"] == [[taken], []]
    # Its decisions take what 9.5 has in an event's state, by the transcoder that it keeps for that; what begins a
    # stream has a topic that is none of the decisions of the program.
    amounts = [each if isinstance(each, str) else each[0] for each in told["mapped"]]
    assert amounts == ["TopicError", 1, 2, 3] * 3
    if isinstance(database[1], str):
        # It inserts without the names of columns, of which ours has more.
        assert told["appended"] == "table bank_events has 9 columns but 6 values were supplied"
    else:
        assert told["appended"] == [13]
        assert theirs[13][:2] == (13, UUID(int=77))
        assert theirs[13].metadata == {"by": "version 10"}
    site.close()


def shown(known: dict[Any, Any], read: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Return what describes what our recorder reads as the program describes what version 10's does."""

    def beside(record: Any) -> tuple[str, Any]:
        return str(record.event_id or NOBODY), record.event_metadata or {}

    def describe(**arguments: Any) -> list[Any]:
        return [
            [
                getattr(each, "id", None),
                str(each.originator_id),
                each.originator_version,
                each.topic,
                bytes(each.state).decode(),
                *beside(known[str(each.originator_id), each.originator_version]),
            ]
            for each in read(**arguments)
        ]

    return describe


def run(folder: Path, address: Any, asked: Any) -> Any:
    """Run the program with version 10."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([address, asked])]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
