"""Desks on each database.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from eventsourcing.application import Application

from flask_eventsourcing.projections import runners
from tests.projections.desk import Desk
from tests.projections.desk_hosts import FlaskDesk, make_desk, make_plain_desk, make_zope_desk

DATABASES = ("sqlite-file", "postgresql", "mariadb")
HOSTS = ("flask", "plain", "zope")
FOLDER = Path(__file__).parent
ON_FLASK = ("test_locks", "test_many_letters")
"""The modules of what no host has a part in: locks of the database, and long lists of letters."""
ON_SERVERS = ("test_handlers", "test_reactions", "test_repair", "test_waiting")
"""The modules whose tests run on a plain host on each database; the others on SQLite only, for their time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose what runs on the hosts without Flask, and what of that in long runs only."""
    items[:] = [item for item in items if _is_wanted(item)]
    for item in items:
        if item.path.parent == FOLDER and _parameters(item).get("host") in ("plain", "zope"):
            is_sqlite = str(_parameters(item).get("uri", "sqlite")).startswith("sqlite")
            if item.path.stem not in ON_SERVERS or not is_sqlite:
                item.add_marker(pytest.mark.long)


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _is_wanted(item: pytest.Item) -> bool:
    parameters = _parameters(item)
    if parameters.get("host") not in ("plain", "zope") or item.path.parent != FOLDER:
        return True
    if str(parameters.get("uri", "sqlite")).startswith("sqlite"):
        return item.path.stem not in ON_FLASK
    return parameters["host"] == "plain" and item.path.stem in ON_SERVERS


class MakeDesk(Protocol):
    """Makes a desk on the test's database that is closed at the end of the test."""

    def __call__(self, *classes: type[Application[Any]], id_type: Any = None, **config: Any) -> Desk:
        """Make it; keyword arguments are configuration keys."""


class MakeFlaskDesk(Protocol):
    """The same where there is Flask only."""

    def __call__(self, *classes: type[Application[Any]], id_type: Any = None, **config: Any) -> FlaskDesk:
        """Make it; keyword arguments are configuration keys."""


@pytest.fixture(params=DATABASES)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite-file":
        return f"sqlite:///{tmp_path / 'bank.db'}"
    if request.param == "sqlite-memory":
        return "sqlite://"
    url: str = request.getfixturevalue("mariadb_url" if request.param == "mariadb" else "postgres_url")
    return url


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> str:
    """The name of each host."""
    name: str = request.param
    return name


@pytest.fixture
def new_desk(uri: str, host: str, caplog: pytest.LogCaptureFixture) -> Iterator[MakeDesk]:
    """Makes desks on each host that are closed at the end; no log line of a plain host names a command of Flask's."""
    made: list[Desk] = []

    def make(*classes: type[Application[Any]], id_type: Any = None, **config: Any) -> Desk:
        if host == "plain":
            made.append(make_plain_desk(uri, id_type=id_type, **config))
        elif host == "zope":
            made.append(make_zope_desk(uri, id_type=id_type, **config))
        else:
            made.append(make_desk(uri, *classes, id_type=id_type, **config))
        return made[-1]

    yield make
    for desk in made:
        desk.close()
    assert host == "flask" or FlaskDesk.program not in caplog.text


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let tests wait for pauses: between tries, and of a worker that stands by."""
    monkeypatch.setattr(runners, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(runners, "STANDBY_PAUSE", 0.02)


@pytest.fixture
def desk(new_desk: MakeDesk) -> Desk:
    """A desk with the default configuration."""
    return new_desk()
