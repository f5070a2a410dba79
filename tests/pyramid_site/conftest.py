"""Pyramid applications that are closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.contract.backends import url_for
from tests.pyramid_site.site import VETO, PyramidSite


class MakePyramidSite(Protocol):
    """Makes an application on the test's database."""

    def __call__(self, **further: Any) -> PyramidSite:
        """Make it; keyword arguments are those of ``PyramidSite``."""


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database, in a file unless the test asks for another kind."""
    return url_for(getattr(request, "param", "sqlite-file"), tmp_path, request)


@pytest.fixture
def new_site(url: str) -> Iterator[MakePyramidSite]:
    """Makes applications that are closed at the end."""
    made: list[PyramidSite] = []

    def make(**further: Any) -> PyramidSite:
        made.append(PyramidSite(url, **further))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.fixture
def site(new_site: MakePyramidSite) -> PyramidSite:
    """An application with a commit veto."""
    return new_site(**VETO)
