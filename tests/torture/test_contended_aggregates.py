"""Many clients on one aggregate get on with it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import StoredEvent
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing

CLIENTS = 32


class Bank(Application[UUID]):
    """The application with the hot aggregate."""


def change_one_aggregate(url: str, units: int) -> int:
    """Read the aggregate's last event and add one, *units* times from many threads; returns how many are stored."""
    app = Flask("hot")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": CLIENTS}
    db = SQLAlchemy(app)
    es = EventSourcing(app, db=db, application=Bank)
    hot = uuid4()
    together = threading.Barrier(CLIENTS)

    @es.retry_on_conflict(times=5)
    def unit() -> None:
        recorder = es.application.recorder
        last = recorder.select_events(hot, desc=True, limit=1)[0].originator_version
        recorder.insert_events([StoredEvent(hot, last + 1, "hot:Changed", b"{}")])

    def client(number: int) -> None:
        together.wait()
        for _ in range(units // CLIENTS):
            with app.app_context():
                unit()

    with app.app_context():
        db.create_all()
        es.application.recorder.insert_events([StoredEvent(hot, 1, "hot:Created", b"{}")])
        db.session.commit()
    with ThreadPoolExecutor(CLIENTS) as executor:
        list(executor.map(client, range(CLIENTS)))
    with app.app_context():
        stored = db.session.scalars(sa.select(sa.func.count()).select_from(es.StoredEvent)).one()
    es.close(app)
    return stored - 1


@pytest.mark.parametrize("database", ["sqlite", "postgres_url", "mariadb_url"])
def test_every_unit_succeeds(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each of many units of work that change one aggregate at a time succeeds within five retries."""
    url = f"sqlite:///{tmp_path}/hot.db" if database == "sqlite" else request.getfixturevalue(database)
    assert change_one_aggregate(url, 640) == 640


@pytest.mark.torture
@pytest.mark.parametrize("database", ["sqlite", "postgres_url", "mariadb_url"])
def test_every_one_of_two_thousand_units_succeeds(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each of 2,000 units of work on one aggregate succeeds within five retries."""
    url = f"sqlite:///{tmp_path}/hot.db" if database == "sqlite" else request.getfixturevalue(database)
    assert change_one_aggregate(url, 2016) == 2016
