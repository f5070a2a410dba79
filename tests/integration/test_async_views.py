"""Asynchronous views: they are run in another thread than the end of their request.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.bank import Site, make_site


@pytest.fixture(params=["memory", "file"])
def async_site(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A site on SQLite whose views are asynchronous."""
    uri = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path / 'bank.db'}"
    site = make_site(uri, EVENTSOURCING_LOCK_TIMEOUT=5)

    @site.app.post("/save/<int:status>")
    async def save(status: int) -> tuple[str, int]:
        site.bank.open_account()
        site.note(str(status))
        site.db.session.flush()
        await asyncio.sleep(0)
        if status < 300:
            site.db.session.commit()
        return "", status

    yield site
    site.close()


def save(site: Site, status: int) -> None:
    """Send a request that is to be answered with a status."""
    assert site.app.test_client().post(f"/save/{status}").status_code == status


def test_what_an_async_view_has_not_committed_is_not_stored(async_site: Site) -> None:
    """What a view saved before it answered 404 is rolled back, and a later request does not commit it."""
    save(async_site, 404)
    assert async_site.stored() == (0, 0)
    save(async_site, 201)
    assert async_site.stored() == (1, 1)
    save(async_site, 404)
    async_site.opened()
    assert async_site.stored() == (2, 1)


def test_async_views_do_not_keep_others_waiting(async_site: Site) -> None:
    """A request that ended in another thread than its view leaves the database to the next one at once."""
    for status in (404, 201, 500, 200):
        save(async_site, status)
        async_site.opened()
    assert async_site.stored() == (6, 2)
