"""Desks on each database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from eventsourcing.application import Application

from tests.projections.desk import Desk, make_desk

DATABASES = ("sqlite-file", "postgresql", "mariadb")


class MakeDesk(Protocol):
    """Makes a desk on the test's database that is closed at the end of the test."""

    def __call__(self, *classes: type[Application[Any]], id_type: Any = None, **config: Any) -> Desk:
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


@pytest.fixture
def new_desk(uri: str) -> Iterator[MakeDesk]:
    """Makes desks that are closed at the end."""
    made: list[Desk] = []

    def make(*classes: type[Application[Any]], id_type: Any = None, **config: Any) -> Desk:
        made.append(make_desk(uri, *classes, id_type=id_type, **config))
        return made[-1]

    yield make
    for desk in made:
        desk.close()


@pytest.fixture
def desk(new_desk: MakeDesk) -> Desk:
    """A desk with the default configuration."""
    return new_desk()
