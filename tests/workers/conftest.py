"""Where the programs of a test keep their data, and the databases of the tests of web servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import ServerFolder
from tests.workers.programs import Workspace
from tests.workers.serving import Database, logged_database


@pytest.fixture
def workspace(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Workspace:
    """A Redis and a database of its own, PostgreSQL unless the test is parametrised with ``"sqlite"``."""
    kind = getattr(request, "param", "postgresql")
    if kind == "sqlite":
        return Workspace(tmp_path, f"sqlite:///{tmp_path / 'queues.db'}", redis_url)
    return Workspace(tmp_path, request.getfixturevalue("postgres_url"), redis_url)


@pytest.fixture
def database(server_folder: ServerFolder) -> Iterator[Database]:
    """A new database, on a PostgreSQL server that logs every statement with its connection."""
    with logged_database(server_folder) as made:
        yield made
