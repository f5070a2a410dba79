"""Web servers that load the app before they fork: each process has an application and a session of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
from flask import Flask

from flask_eventsourcing import EventSourcing
from tests.cassandra.hosts.conftest import MakeApp
from tests.cassandra.hosts.site import Bank, settings
from tests.cassandra_nodes import Node, keyspace_on
from tests.workers.serving import AnswerError, Served, gunicorn, serving, uwsgi

TARGET = "tests.cassandra.hosts.served:app"

ANSWER = 180
"""Seconds for an answer: longer than a save is tried, whose error tells more."""
LONGEST = 1800
"""Seconds for all requests, however busy the machine is."""


def preloaded(kind: str, target: str, port: int) -> list[str]:
    """Return the line that starts gunicorn, which loads the app before it forks."""
    return gunicorn(kind, target, port, "--preload")


LINES: dict[str, Callable[[int], list[str]]] = {
    "gunicorn-preload": partial(preloaded, "gthread", TARGET),
    "gunicorn-gevent": partial(gunicorn, "gevent", TARGET),
    "gunicorn-gevent-preload": partial(preloaded, "gevent", TARGET),
    "django-four": partial(preloaded, "gthread-four", "tests.cassandra.hosts.served_django:app"),
    "uwsgi-prefork": partial(uwsgi, "prefork-threads", TARGET),
    "uwsgi-four": partial(uwsgi, "prefork-four", TARGET),
}


def sockets(served: Served, port: int) -> dict[int, set[int]]:
    """Return the local ports of connections with a node by the process that has them open."""
    found = {each.pid: each.net_connections("tcp") for each in served.processes()}
    return {pid: {c.laddr.port for c in own if getattr(c.raddr, "port", None) == port} for pid, own in found.items()}


@pytest.mark.parametrize(
    ("server", "imported"),
    [
        ("gunicorn-preload", ""),
        ("gunicorn-preload", "used"),
        ("gunicorn-gevent", ""),
        ("uwsgi-prefork", ""),
    ],
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


def test_gevent_behind_the_driver(cassandra_server: str, bank_keyspace: str, tmp_path: Path) -> None:
    """Where gevent has patched the sockets after the driver was imported, a request fails at once, with the reason."""
    variables = {"NODE": cassandra_server, "KEYSPACE": bank_keyspace, "IMPORTED": ""}
    with serving(LINES["gunicorn-gevent-preload"], tmp_path, None, **variables) as served:
        with pytest.raises(AnswerError, match="500"):
            served.ask("/open/nobody")
        assert "was imported before gevent patched the sockets" in served.log.read_text(errors="replace")


def test_master_of_uwsgi(cassandra_server: str, bank_keyspace: str, tmp_path: Path) -> None:
    """A session in the master of uWSGI, with which a worker may hang, is refused at once, with the reason."""
    variables = {"NODE": cassandra_server, "KEYSPACE": bank_keyspace, "IMPORTED": "used"}
    with (
        pytest.raises(RuntimeError, match="The master of uWSGI must not connect to Cassandra"),
        serving(LINES["uwsgi-prefork"], tmp_path, None, **variables),
    ):
        raise NotImplementedError


@pytest.mark.xdist_group("cassandra-cluster")
@pytest.mark.parametrize(
    ("server", "count", "before"),
    [
        pytest.param("django-four", 300, 30, id="django"),
        pytest.param("django-four", 300, 0, id="django-start", marks=pytest.mark.torture),
        pytest.param("uwsgi-four", 300, 0, id="flask-start", marks=pytest.mark.torture),
        pytest.param("django-four", 2000, 200, id="django-long", marks=pytest.mark.torture),
        pytest.param("uwsgi-four", 2000, 200, id="flask-long", marks=pytest.mark.torture),
    ],
)
def test_every_request_is_answered_while_a_node_is_down(
    server: str, count: int, before: int, cluster: list[Node], tmp_path: Path
) -> None:
    """No request to four processes fails when a node dies; each is stored once, on one session of each process.

    The node dies before the first of them, or under the load.
    """
    paths = [f"/open/{number}" for number in range(count)]
    points = {"CASSANDRA_CONTACT_POINTS": [node.address for node in cluster], "CASSANDRA_REPLICATION": 3}
    with keyspace_on(cluster[0].url) as keyspace, ExitStack() as stack:
        app, es = Flask(__name__), EventSourcing(application=Bank)
        app.config.update(settings(cluster[0].url, keyspace, **points))
        es.init_app(app)
        stack.callback(es.close)
        result = app.test_cli_runner().invoke(args=["eventsourcing", "init-db"])
        assert result.exit_code == 0, result.output
        variables = {"NODE": cluster[0].url, "KEYSPACE": keyspace, "IMPORTED": ""}
        variables["CONTACT_POINTS"] = " ".join(node.address for node in cluster)
        with serving(LINES[server], tmp_path, None, **variables) as served:
            first = served.load(paths[:before], clients=8, timeout=ANSWER)
            cluster[1].kill()
            stack.callback(cluster[1].wait)
            stack.callback(cluster[1].start)
            then = served.load(paths[before:], clients=8, timeout=ANSWER, patience=LONGEST)
            assert first.failed | then.failed == {}, served.log.read_text(errors="replace")[-3000:]
            answers = [*first.all, *then.all]
            assert {answer["constructed"] for answer in answers} == {1}
            assert len({answer["pid"] for answer in answers}) == 4
            counted = served.load([f"/sessions?{number}" for number in range(100)], clients=8)
            assert {answer["sessions"] for answer in counted.all} == {1}
            found = sockets(served, cluster[0].port)
            assert sum(map(len, found.values())) == len(set().union(*found.values()))
        with app.app_context():
            recorder = es.application.recorder
            assert recorder.max_notification_id() == len(answers) == count
            owners: set[str] = {es.application.repository.get(UUID(answer["id"])).owner for answer in answers}
    assert owners == {str(number) for number in range(count)}
