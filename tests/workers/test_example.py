"""The example's statement by mail, from the request to the mail server, through real workers."""

from __future__ import annotations

import importlib.util
import shlex
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.servers import require
from tests.workers.programs import ROOT, Workspace

REQUEST = """
from example_app import create_app
from example_app.extensions import db, es
app = create_app()
with app.app_context():
    db.create_all()
client = app.test_client()
account = client.post("/api/accounts", json={"owner": "Ada", "first_deposit": "12.50"}).get_json()
path = f"/api/accounts/{account['id']}/statement-mail"
answer = client.post(path, json={"recipient": "ada@example.com"})
assert answer.status_code == 202, answer.text
print(answer.get_json()["task_id"])
"""

pytestmark = pytest.mark.xdist_group("queues")


class MailServer(socketserver.ThreadingTCPServer):
    """Takes every mail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Conversation)
        self.mails: list[str] = []


class Conversation(socketserver.StreamRequestHandler):
    """One conversation in the Simple Mail Transfer Protocol, RFC 5321."""

    server: MailServer

    def handle(self) -> None:
        """Answer until the client is done."""
        self.answer("220 ready")
        while line := self.rfile.readline().decode().strip().upper():
            if line == "DATA":
                self.answer("354 go on")
                lines = list(iter(lambda: self.rfile.readline().decode(), ".\r\n"))
                self.server.mails.append("".join(lines))
            self.answer("221 bye" if line == "QUIT" else "250 fine")

    def answer(self, text: str) -> None:
        """Send a line."""
        self.wfile.write(f"{text}\r\n".encode())


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    """A mail server."""
    with MailServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def commands() -> dict[str, list[str]]:
    """Return the lines with which the example's README starts workers."""
    lines = (ROOT / "example_app" / "README.md").read_text().splitlines()
    found = [shlex.split(line.removeprefix("$ ")) for line in lines if " worker" in line and line.startswith("$ ")]
    return {command[0]: command for command in found}


@pytest.mark.parametrize("workspace", ["sqlite"], indirect=True)
@pytest.mark.parametrize("queue", ["celery", "rq"])
def test_a_statement_is_mailed(
    workspace: Workspace, mail_server: MailServer, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker started by the README's line sends the mail that a request asked for."""
    require(importlib.util.find_spec(queue), queue, f"pip install Flask-EventSourcing[{queue}]")
    host, port = mail_server.server_address[:2]
    for name, value in {
        "DATABASE_URL": workspace.database,
        "MAIL_SERVER": f"{host!s}:{port}",
        "REDIS_URL": workspace.redis,
        "SECRET_KEY": "only for tests",
        "STATEMENT_QUEUE": queue,
    }.items():
        monkeypatch.setenv(name, value)
    task_id = workspace.python(REQUEST)
    program, *arguments = commands()[queue]
    module = {"celery": "celery", "rq": "rq.cli"}[program]
    arguments = [workspace.redis if argument.startswith("redis://") else argument for argument in arguments]
    with workspace.program(module, *arguments) as worker:
        worker.wait_for(lambda: mail_server.mails)
        worker.end()
    (text,) = mail_server.mails
    assert "To: ada@example.com" in text
    assert task_id in text


def test_the_readme_starts_both_workers() -> None:
    """The example's README has one line for each task queue."""
    found = commands()
    assert set(found) == {"celery", "rq"}
