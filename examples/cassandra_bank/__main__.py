"""Starts the bank: ``python -m examples.cassandra_bank`` makes its tables, serves, and runs the projections.

Without ``CASSANDRA_NODES`` it starts a node of its own, of the tests. It and the lists are removed at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, suppress

FLASK = [sys.executable, "-m", "flask", "--app", "examples.cassandra_bank"]


def main(port: int = 5000) -> None:
    """Serve until Ctrl-C.

    :param port: of the loopback address.
    """
    with ExitStack() as stack:
        if "CASSANDRA_NODES" not in os.environ:
            from tests.cassandra_nodes import cassandra_cluster
            from tests.servers import ServerFolder

            folder = ServerFolder.create()
            stack.callback(folder.remove)
            (node,) = stack.enter_context(cassandra_cluster(folder, 1))
            os.environ["CASSANDRA_NODES"] = node.url
            # The lists go with the node: those of another log would be refused at the next start.
            os.environ["FLASK_SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{folder.path}/lists.db"
        subprocess.run([*FLASK, "eventsourcing", "init-db"], check=True)  # noqa: S603
        # In production the web server and the worker are programs of their own, with their own restarts.
        worker = subprocess.Popen([*FLASK, "eventsourcing", "run", "--all"], start_new_session=True)  # noqa: S603
        stack.callback(worker.wait)
        stack.callback(worker.terminate)
        with suppress(KeyboardInterrupt):
            subprocess.run([*FLASK, "run", "--port", str(port)], check=False)  # noqa: S603


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
