"""The bank on each host and database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.backends import url_for
from tests.hosts.sites import HOSTS, HostSite, make_host_site

DATABASES = ("sqlite-file", "sqlite-memory", "postgresql", "mariadb")


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
