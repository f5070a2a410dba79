"""The bank on each host and database."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.backends import url_for
from tests.hosts.sites import HOSTS, HostSite, make_host_site

FOLDER = Path(__file__).parent
DATABASES = ("sqlite-file", pytest.param("sqlite-memory", marks=pytest.mark.long), "postgresql", "mariadb")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the other hosts on servers to long runs: what a host does differs by host, not by database.

    What has no meaning for a host is left out.
    """
    items[:] = [item for item in items if _has_meaning(item)]
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        is_sqlite = str(parameters.get("url", "sqlite")).startswith("sqlite")
        if item.path.parent == FOLDER and not is_sqlite and parameters.get("site", "flask") != "flask":
            item.add_marker(pytest.mark.long)


def _has_meaning(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if item.path.parent != FOLDER or parameters.get("site") != "django":
        return True
    own = [str(value) for name, value in parameters.items() if name not in ("site", "url")]
    has_meaning: bool = importlib.import_module("tests.hosts.django_site").has_meaning(
        f"{getattr(item, 'originalname', item.name)}[{'-'.join(own)}", str(parameters["url"])
    )
    return has_meaning


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind."""
    return url_for(request.param, tmp_path, request)


@pytest.fixture(params=HOSTS)
def site(request: pytest.FixtureRequest, url: str) -> Iterator[HostSite]:
    """The bank on each host that this process has."""
    made = make_host_site(request.param, url)
    yield made
    made.close()
    made.remove()
