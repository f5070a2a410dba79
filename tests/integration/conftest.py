"""Sites on each database.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from eventsourcing.application import Application

from tests.bank import Site, make_site

DATABASES = ("sqlite-file", pytest.param("sqlite-memory", marks=pytest.mark.long), "postgresql", "mariadb")


class MakeSite(Protocol):
    """Makes a site on the test's database that is closed at the end of the test."""

    def __call__(self, *classes: type[Application[Any]], create: bool = True, **config: Any) -> Site:
        """Make it; keyword arguments are configuration keys."""


@pytest.fixture(params=DATABASES)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite-memory":
        return "sqlite://"
    if request.param == "sqlite-file":
        return f"sqlite:///{tmp_path / 'bank.db'}"
    url: str = request.getfixturevalue("mariadb_url" if request.param == "mariadb" else "postgres_url")
    return url


@pytest.fixture
def new_site(uri: str) -> Iterator[MakeSite]:
    """Makes sites that are closed at the end."""
    made: list[Site] = []

    def make(*classes: type[Application[Any]], create: bool = True, **config: Any) -> Site:
        made.append(make_site(uri, *classes, create=create, **config))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.fixture
def site(new_site: MakeSite) -> Site:
    """A site with the default configuration."""
    return new_site()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what nobody can do: in memory all share one driver connection, which is ended by its owner only."""
    # And with Django each thread would have a database of its own.
    behind = ("roll_back_driver", "commit_driver", "django")
    items[:] = [
        item for item in items if not ("sqlite-memory" in item.name and any(each in item.name for each in behind))
    ]
