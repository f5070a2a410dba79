"""Drive the bank once over HTTP, from an empty database: ``python -m example_app.demo_check``.

It makes a database in a temporary folder, starts the development server on a free port of this machine, uses it as a
client would, says what it saw line by line, ends the server, and exits 0 if everything was as it should be.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, Request, build_opener

if TYPE_CHECKING:
    from collections.abc import Iterator

FLASK = [sys.executable, "-m", "flask", "--app", "example_app"]
START_SECONDS = 30.0


class CheckFailed(Exception):
    """Something was not as it should be."""


class Client:
    """A client that keeps cookies, follows redirects and goes through no proxy."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._opener = build_opener(ProxyHandler({}), HTTPCookieProcessor())

    def send(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> tuple[int, str]:
        """Send a request and return the status and the text of the answer."""
        headers = {"Content-Type": content_type} if body is not None else {}
        request = Request(self.address + path, data=body, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=10) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def call(self, method: str, path: str, data: dict[str, str] | None = None) -> tuple[int, Any]:
        """Send and receive JSON."""
        status, text = self.send(method, path, None if data is None else json.dumps(data).encode())
        return status, json.loads(text) if text else None

    def submit(self, page: str, action: str, fields: dict[str, str]) -> tuple[int, str]:
        """Fill in a form of a page and send it."""
        token = re.search(r'name="csrf_token" value="([^"]+)"', self.send("GET", page)[1])
        form = urlencode({**fields, "csrf_token": token[1] if token else ""}).encode()
        return self.send("POST", action, form, "application/x-www-form-urlencoded")


def see(what: str, found: object, expected: object) -> None:
    """Say what was found, and stop if it is not what was expected."""
    print(f"{what}: {found}", flush=True)
    if found != expected:
        raise CheckFailed(f"{what}: expected {expected}, found {found}")


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Run the development server on a new database and yield its address."""
    environment = {
        **os.environ,
        "DATABASE_URL": os.environ.get("DEMO_DATABASE_URL") or f"sqlite:///{folder / 'bank.db'}",
        "SECRET_KEY": "only for this check",
    }
    subprocess.run([*FLASK, "db", "upgrade"], env=environment, check=True, stderr=subprocess.DEVNULL)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = folder / "server.log"
    with log.open("wb") as output:
        command = [*FLASK, "run", "--host", "127.0.0.1", "--port", str(port), "--no-reload"]
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(server, address)
        yield address
    except (CheckFailed, URLError):
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise CheckFailed(f"The server ended with exit code {server.returncode}.")
        try:
            Client(address).send("GET", "/api/accounts")
        except URLError:
            time.sleep(0.1)
        else:
            return
    raise CheckFailed(f"The server did not answer within {START_SECONDS:.0f} s.")


def check_accounts(client: Client) -> tuple[str, str]:
    """Open, pay in, pay out, transfer, overdraw."""
    status, ada = client.call("POST", "/api/accounts", {"owner": "Ada"})
    see("Open an account for Ada", (status, ada["balance"]), (201, "0.00"))
    status, ben = client.call("POST", "/api/accounts", {"owner": "Ben", "first_deposit": "5.00"})
    see("Open an account for Ben with 5.00", (status, ben["balance"]), (201, "5.00"))
    path = f"/api/accounts/{ada['id']}"
    status, account = client.call("POST", f"{path}/deposits", {"amount": "100.00", "note": "salary"})
    see("Ada pays in 100.00", (status, account["balance"]), (201, "100.00"))
    status, account = client.call("POST", f"{path}/withdrawals", {"amount": "30.25"})
    see("Ada pays out 30.25", (status, account["balance"]), (201, "69.75"))
    order = {"sender_id": ada["id"], "recipient_id": ben["id"], "amount": "9.75", "note": "lunch"}
    status, transfer = client.call("POST", "/api/transfers", order)
    see("Ada sends 9.75 to Ben", (status, transfer["amount"]), (201, "9.75"))
    see("Ben now has", client.call("GET", f"/api/accounts/{ben['id']}")[1]["balance"], "14.75")
    status, problem = client.call("POST", f"{path}/withdrawals", {"amount": "60.01"})
    see("Ada asks for 60.01, a cent too much", (status, problem["title"]), (422, "Not enough money in the account"))
    see("Ada still has", client.call("GET", path)[1]["balance"], "60.00")
    return ada["id"], ben["id"]


def check_statement(client: Client, account_id: str) -> None:
    """Read the statement as of now and as of a version of the past."""
    path = f"/api/accounts/{account_id}/statement"
    status, now = client.call("GET", path)
    see(
        "Ada's statement",
        (status, [entry["amount"] for entry in now["entries"]]),
        (200, ["0.00", "100.00", "-30.25", "-9.75"]),
    )
    status, past = client.call("GET", f"{path}?version=2")
    see("Ada's statement as of version 2", (status, past["balance"], len(past["entries"])), (200, "100.00", 2))
    see("Ada's statement as of version 99", client.call("GET", f"{path}?version=99")[0], 404)


def check_pages(client: Client, account_id: str) -> None:
    """Use the pages, up to closing the account."""
    page = f"/accounts/{account_id}"
    see("The list of accounts shows Ada", "Ada" in client.send("GET", "/")[1], True)
    see(
        "A form without its token",
        client.send("POST", f"{page}/deposit", b"amount=1", "application/x-www-form-urlencoded")[0],
        400,
    )
    status, text = client.submit(page, f"{page}/withdraw", {"amount": "1000"})
    see("The page of an overdrawn account says so", (status, "Not enough money in the account" in text), (422, True))
    status, text = client.submit(page, f"{page}/close", {})
    see("An account with money in it is not closed", (status, "still holds money" in text), (409, True))
    status, text = client.submit(page, f"{page}/withdraw", {"amount": "60.00"})
    see("Ada pays out the rest", (status, "€60.00 paid out." in text), (200, True))
    see("Ada's account is closed", client.call("DELETE", f"/api{page}")[0], 204)
    see("A deposit to a closed account", client.call("POST", f"/api{page}/deposits", {"amount": "1.00"})[0], 409)
    see("Her history stays", client.call("GET", f"/api{page}/statement")[1]["latest_version"], 6)


def main() -> int:
    """Run the whole check and return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with running_server(Path(folder)) as address:
                print(f"The bank is open at {address}", flush=True)
                client = Client(address)
                ada, _ = check_accounts(client)
                check_statement(client, ada)
                check_pages(client, ada)
        except (CheckFailed, URLError, subprocess.CalledProcessError) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    print("Everything is as it should be.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
