"""Web servers that load the app before they fork: each process has an application and a session of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

from tests.cassandra.hosts.conftest import MakeApp
from tests.workers.serving import Served, gunicorn, serving, uwsgi

TARGET = "tests.cassandra.hosts.served:app"


def preloaded(port: int) -> list[str]:
    """Return the line that starts gunicorn, which loads the app before it forks."""
    return gunicorn("gthread", TARGET, port, "--preload")


LINES: dict[str, Callable[[int], list[str]]] = {
    "gunicorn-preload": preloaded,
    "uwsgi-prefork": partial(uwsgi, "prefork-threads", TARGET),
}


def sockets(served: Served, port: int) -> dict[int, set[int]]:
    """Return the local ports of connections with a node by the process that has them open."""
    found = {each.pid: each.net_connections("tcp") for each in served.processes()}
    return {pid: {c.laddr.port for c in own if getattr(c.raddr, "port", None) == port} for pid, own in found.items()}


@pytest.mark.parametrize(
    ("server", "imported"), [("gunicorn-preload", ""), ("gunicorn-preload", "used"), ("uwsgi-prefork", "")]
)
def test_one_application_and_one_session_in_every_process(
    server: str, imported: str, cassandra_server: str, bank_keyspace: str, make_app: MakeApp, tmp_path: Path
) -> None:
    """Every request is answered and stored, also when the parent had a session: no process uses another's."""
    variables = {"NODE": cassandra_server, "KEYSPACE": bank_keyspace, "IMPORTED": imported}
    with serving(LINES[server], tmp_path, None, **variables) as served:
        answers = served.load([f"/open/{number}" for number in range(60)], clients=8)
        assert answers.failed == {}, served.log.read_text(errors="replace")[-3000:]
        assert {answer["constructed"] for answer in answers.all} == {1}
        found = sockets(served, int(cassandra_server.partition(":")[2]))
    if not imported:
        # Otherwise each process has the parent's open too, and leaves it alone.
        assert all(found[pid] for pid in answers.pids)
        assert sum(map(len, found.values())) == len(set().union(*found.values()))
    app, es = make_app()
    with app.app_context():
        stored = {es.application.repository.get(UUID(answer["id"])).owner for answer in answers.all}
    assert stored == {str(number) for number in range(60)}


def test_master_of_uwsgi(cassandra_server: str, bank_keyspace: str, tmp_path: Path) -> None:
    """A session in the master of uWSGI, with which a worker may hang, is refused at once, with the reason."""
    variables = {"NODE": cassandra_server, "KEYSPACE": bank_keyspace, "IMPORTED": "used"}
    with (
        pytest.raises(RuntimeError, match="The master of uWSGI must not connect to Cassandra"),
        serving(LINES["uwsgi-prefork"], tmp_path, None, **variables),
    ):
        raise NotImplementedError
