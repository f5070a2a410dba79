"""The site on a database of its own, whose tables the migrations have made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from alembic import command
from alembic.config import Config
from webtest import TestApp

from examples.pyramid_site import main
from examples.pyramid_site.__main__ import INI

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SETTINGS = {"tm.commit_veto": "pyramid_tm.default_commit_veto", "retry.attempts": "3"}


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    """An ini file that names another database, with its tables."""
    path = tmp_path / "testing.ini"
    text = INI.read_text().replace("%(here)s/bank.db", f"{tmp_path}/bank.db")
    path.write_text(text.replace("%(here)s/alembic", str(INI.parent / "alembic")))
    command.upgrade(Config(path), "head")
    return path


@pytest.fixture
def bank_site(ini: Path) -> Iterator[Any]:
    """The WSGI application."""
    made = main({}, **SETTINGS, **{"sqlalchemy.url": f"sqlite:///{ini.parent}/bank.db"})
    yield made
    made.registry["flask_eventsourcing"].close()
    made.registry["dbsession_factory"].kw["bind"].dispose()


@pytest.fixture
def visitor(bank_site: Any) -> Any:
    """A client of the site."""
    return TestApp(bank_site)
