"""The page of the documentation about Cassandra."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from uuid import UUID

from tests.docs.pages import ROOT, files
from tests.workers.serving import serving

PAGE = ROOT / "docs" / "cassandra.md"


def test_program_of_the_page(cassandra_server: str, cassandra_keyspace: str, tmp_path: Path) -> None:
    """The program that the page shows works as it says, word for word, under ``flask run``."""
    for name, text in files(PAGE).items():
        (tmp_path / name).write_text(text)
    host, _, port = cassandra_server.partition(":")
    variables = {
        "FLASK_EVENTSOURCING_CASSANDRA_CONTACT_POINTS": json.dumps([host]),
        "FLASK_EVENTSOURCING_CASSANDRA_PORT": port,
        "FLASK_EVENTSOURCING_CASSANDRA_KEYSPACE": json.dumps(cassandra_keyspace),
        "FLASK_EVENTSOURCING_CASSANDRA_REPLICATION": "1",
    }
    command = [sys.executable, "-m", "flask", "--app", "ledger"]
    environment = {**variables, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    made = subprocess.run(
        [*command, "eventsourcing", "init-db"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "Created table bank_log." in made.stdout
    with serving(lambda at: [*command, "run", "--port", str(at)], tmp_path, None, **variables) as served:
        connection = HTTPConnection("127.0.0.1", served.port, timeout=60)
        with closing(connection):
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/accounts", "owner=ada", headers)
            answer = connection.getresponse()
            assert answer.status == 201
            assert UUID(json.loads(answer.read())["id"]).version == 4
