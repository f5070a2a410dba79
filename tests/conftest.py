"""Fixtures that bring real servers, and the hooks that stop them."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import servers
from tests.cassandra_nodes import keyspace_on, require_cassandra, start_node
from tests.galera import galera_cluster
from tests.length import is_drawn
from tests.servers import ServerFolder, require

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

# Here, before any test is collected: tests of several folders import these, whose asserts show what was compared.
pytest.register_assert_rewrite("tests.workers.checks", "tests.workers.serving")

FOLDER = pytest.StashKey[ServerFolder]()
LEFT_OUT = pytest.StashKey[int]()
WORKER_KEY = "server_folder"
COUNT_KEY = "left_out"


def pytest_configure(config: pytest.Config) -> None:
    """Take the run's folder from the controller, or make it; name the modules whose asserts are rewritten."""
    worker_input: dict[str, str] | None = getattr(config, "workerinput", None)
    config.stash[FOLDER] = ServerFolder(Path(worker_input[WORKER_KEY])) if worker_input else ServerFolder.create()
    # Here, as tests of several folders import these modules, whose asserts show what was compared.
    pytest.register_assert_rewrite("tests.workers.checks", "tests.workers.serving")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Tell a worker of pytest-xdist the run's folder."""
    node.workerinput[WORKER_KEY] = str(node.config.stash[FOLDER].path)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked ``long``, but in a long run; where all servers are, a part of them is drawn."""
    run: str = getattr(config, "workerinput", {}).get("testrunuid", "")
    drawn = {item: not item.get_closest_marker("long") or is_drawn(item.nodeid, run) for item in items}
    left_out = [item for item in items if not drawn[item]]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if drawn[item]]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the controller how many tests a worker has left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[COUNT_KEY] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Take the number from a worker: each has collected the same tests."""
    stash = node.config.stash
    stash[LEFT_OUT] = max(stash.get(LEFT_OUT, 0), getattr(node, "workeroutput", {}).get(COUNT_KEY, 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many tests were left out, and how they are run."""
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} long tests were left out: 'make test LONG=1' runs them too.")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the servers, once every worker is gone."""
    if FOLDER in config.stash and not hasattr(config, "workerinput"):
        config.stash[FOLDER].remove()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a skipped test a failed one where REQUIRE_SERVERS=1 is set."""
    report = yield
    if servers.REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although REQUIRE_SERVERS=1 is set: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Make a skipped module a failed one where REQUIRE_SERVERS=1 is set."""
    report = yield
    if servers.REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped although REQUIRE_SERVERS=1 is set: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.fixture(scope="session")
def server_folder(pytestconfig: pytest.Config) -> ServerFolder:
    """The folder in which this run's servers keep their data."""
    return pytestconfig.stash[FOLDER]


@pytest.fixture(scope="session")
def postgres_server_url(server_folder: ServerFolder) -> str:
    """A database on the run's PostgreSQL server, for a user who may create others."""
    return os.environ.get("TEST_POSTGRES_URL") or server_folder.shared("postgres", servers.start_postgres).url


@pytest.fixture(scope="session")
def postgres_databases(postgres_server_url: str) -> Callable[[], AbstractContextManager[str]]:
    """Lends empty PostgreSQL databases."""
    if "TEST_POSTGRES_URL" in os.environ:
        return partial(servers.postgres_database, postgres_server_url)
    return servers.PostgresDatabases(postgres_server_url).lend


@pytest.fixture
def postgres_url(postgres_databases: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """An empty PostgreSQL database, for this test only."""
    with postgres_databases() as url:
        yield url


@pytest.fixture
def pgbouncer_url(server_folder: ServerFolder, postgres_url: str) -> Iterator[str]:
    """A new PostgreSQL database, behind a PgBouncer in transaction mode."""
    require(servers.has_program("pgbouncer"), "PgBouncer", "apt-get install pgbouncer")
    with server_folder.private("pgbouncer", lambda folder: servers.start_pgbouncer(folder, postgres_url)) as server:
        yield server.url


@pytest.fixture(scope="session")
def mariadb_server_url(server_folder: ServerFolder) -> str:
    """A database on the run's MariaDB server, for a user who may create others."""
    if url := os.environ.get("TEST_MYSQL_URL"):
        return url
    require(
        servers.has_program("mariadbd") and servers.has_program("mariadb-install-db"),
        "MariaDB",
        "apt-get install mariadb-server, or set TEST_MYSQL_URL",
    )
    return server_folder.shared("mariadb", servers.start_mariadb).url


@pytest.fixture
def mariadb_url(mariadb_server_url: str) -> Iterator[str]:
    """A new MariaDB database, for this test only."""
    with servers.mariadb_database(mariadb_server_url) as url:
        yield url


@pytest.fixture(scope="session")
def galera_urls(server_folder: ServerFolder) -> Iterator[list[str]]:
    """The URLs of three nodes of a Galera cluster; what asks for it is to be of the group ``galera``."""
    with galera_cluster(server_folder) as urls:
        yield urls


@pytest.fixture
def redis_url(server_folder: ServerFolder) -> Iterator[str]:
    """A new and empty Redis, for this test only."""
    require(servers.has_program("redis-server"), "Redis", "apt-get install redis-server")
    with server_folder.private("redis", servers.start_redis) as server:
        yield server.url


@pytest.fixture(scope="session")
def cassandra_server(server_folder: ServerFolder) -> str:
    """The address and port of the run's one Cassandra node, or of the one that TEST_CASSANDRA_NODE names."""
    require_cassandra()
    if node := os.environ.get("TEST_CASSANDRA_NODE"):
        return node
    return server_folder.shared("cassandra", start_node).url


@pytest.fixture
def cassandra_keyspace(cassandra_server: str) -> Iterator[str]:
    """The name of a keyspace on the run's node that is not there yet, for this test only."""
    with keyspace_on(cassandra_server) as name:
        yield name
