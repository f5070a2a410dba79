"""What a client of the site, and its operator, can rely on."""

from __future__ import annotations

import http.cookiejar
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

import pytest

ROOT = Path(__file__).resolve().parents[3]
MANAGE = str(ROOT / "examples" / "django_site" / "manage.py")


class Visitor:
    """A visitor with cookies."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.cookies = http.cookiejar.CookieJar()
        self._opener = build_opener(ProxyHandler({}), HTTPCookieProcessor(self.cookies))

    def get(self, path: str) -> str:
        """Return a page."""
        with self._opener.open(self.address + path, timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def send(self, page: str, action: str, **fields: str) -> tuple[int, str, str]:
        """Fill in a form of a page; return the status, where it led to, and the text."""
        found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', self.get(page))
        assert found is not None
        data = urlencode({**fields, "csrfmiddlewaretoken": found[1]}).encode()
        try:
            with self._opener.open(self.address + action, data, timeout=60) as answer:
                return answer.status, answer.url, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.url or "", error.read().decode()


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which the site has a database of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("DJANGO_SETTINGS_MODULE", "DEBUG")}
    return {**kept, "BANK_DATABASE": str(folder / "bank.db"), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The site, started by the line of its README on another port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.django_site", str(port)],
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                Visitor(f"http://127.0.0.1:{port}").get("/")
                break
            except URLError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()


def test_the_site_starts_with_one_line(address: str) -> None:
    """``python -m examples.django_site`` migrates, serves pages with their style sheet, and runs the projection."""
    visitor = Visitor(address)
    assert "--ground" in visitor.get("/static/style.css")
    status, page, text = visitor.send("/accounts/new", "/accounts/new", owner="Ada", first_deposit="10")
    assert (status, "Welcome, Ada" in text) == (200, True)
    account = page.removeprefix(address)

    def pay_in() -> None:
        one = Visitor(address)
        answers.extend(one.send(account, f"{account}/deposit", amount="1")[0] for _ in range(5))

    # Eight clients that pay into one account at once lose no update.
    answers: list[int] = []
    threads = [threading.Thread(target=pay_in) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 40
    assert "€50.00" in visitor.get(account)
    deadline = time.monotonic() + 30
    while "€50.00" not in visitor.get("/"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_tests_of_the_site_pass(tmp_path: Path) -> None:
    """The site's own tests, which are Django's, pass with warnings as errors."""
    command = [sys.executable, "-W", "error", MANAGE, "test", "examples.django_site.bank", "-v", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Ran [1-9]\d* tests", done.stderr), done.stderr
