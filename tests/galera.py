"""A Galera cluster of three MariaDB servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import sqlalchemy as sa

from tests import servers
from tests.servers import Server, ServerFolder, require

LIBRARY = Path("/usr/lib/galera/libgalera_smm.so")
APT = "apt-get install mariadb-server galera-4 rsync socat"
PATIENCE = 120
"""Seconds for a node to get a copy of the data and to be in step."""


def require_galera() -> None:
    """Skip, or fail, where something for a cluster is missing."""
    require(LIBRARY.exists(), "Galera's library", APT)
    # The state is transferred to a new node by rsync, from a script of MariaDB's that asks for socat too.
    for program in ("mariadbd", "mariadb-install-db", "rsync", "socat"):
        require(servers.has_program(program), f"{program}, for Galera,", APT)


@contextmanager
def galera_cluster(folder: ServerFolder) -> Iterator[list[str]]:
    """Run three nodes; yields the URL of each."""
    require_galera()
    addresses: list[str] = []

    def start(path: Path) -> Server:
        return _start_node(path, addresses)

    with ExitStack() as stack:
        yield [stack.enter_context(folder.private("galera", start)).url for _ in range(3)]


def _start_node(folder: Path, addresses: list[str]) -> Server:
    """Start a node that joins those at *addresses*, and add its own."""
    port, transfer, increments = (servers.free_port() for _ in range(3))
    address = f"127.0.0.1:{port}"
    provider = {
        "base_host": "127.0.0.1",
        "base_port": port,
        "gmcast.listen_addr": f"tcp://{address}",
        "ist.recv_addr": f"127.0.0.1:{increments}",
        "gcache.size": "32M",
    }
    options = [
        "--wsrep-on=ON",
        f"--wsrep-provider={LIBRARY}",
        f"--wsrep-cluster-address=gcomm://{','.join(addresses)}",
        f"--wsrep-node-address={address}",
        f"--wsrep-provider-options={';'.join(f'{key}={value}' for key, value in provider.items())}",
        "--wsrep-sst-method=rsync",
        f"--wsrep-sst-receive-address=127.0.0.1:{transfer}",
        "--binlog-format=ROW",
        "--default-storage-engine=InnoDB",
        "--innodb-autoinc-lock-mode=2",
    ]
    if not addresses:
        options.append("--wsrep-new-cluster")
    server = servers.start_mariadb(folder, options, PATIENCE)
    try:
        _wait_until_synced(server.url)
    except BaseException:
        # Nobody else knows of it yet.
        server.stop()
        raise
    addresses.append(address)
    return server


def _wait_until_synced(url: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    deadline = time.monotonic() + PATIENCE
    state = None
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            state = connection.exec_driver_sql("SHOW STATUS LIKE 'wsrep_local_state_comment'").one()[1]
        if state == "Synced":
            return
        time.sleep(0.1)
    raise RuntimeError(f"The node at {url} is {state!r} after {PATIENCE} s, and not in step with its cluster.")


def catch_up(url: str) -> None:
    """Wait until a node has applied all that the cluster has committed."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("SET SESSION wsrep_sync_wait = 15")
        connection.exec_driver_sql("SELECT 1")
