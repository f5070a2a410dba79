"""The examples in README.md and docs/ do what the text beside them says."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path

import pytest

from flask_eventsourcing.config import PREFIX, Config
from tests.docs.pages import PAGES, ROOT, Block, blocks, files, program
from tests.servers import require

README = ROOT / "README.md"
SHOWN = files(ROOT / "docs" / "projections.md")
"""What the README has lines of."""
FLASK = [sys.executable, "-m", "flask"]


def name(page: Path) -> str:
    """Name a page in the ids of tests."""
    return page.name


def with_mark(mark: str) -> list[Path]:
    """Return the pages that have a block with a mark."""
    return [page for page in PAGES if any(block.mark == mark for block in blocks(page, "python"))]


def fill(folder: Path, page: Path) -> None:
    """Write the README's files into a folder, and those of the page."""
    for file_name, code in {**files(README), **files(page)}.items():
        (folder / file_name).write_text(code)


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a newcomer's shell: no variable of Flask's is set but these."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FLASK_", "SQLALCHEMY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


def run(folder: Path, page: Path, marks: set[str], **variables: str) -> None:
    """Run the blocks of a page as one program."""
    if page.name == "task-queues.md":
        for package in ("celery", "rq"):
            require(find_spec(package), package, f"pip install Flask-EventSourcing[{package}]")
    fill(folder, page)
    script = folder / "page.py"
    script.write_text(program(page, marks))
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{page.name} (line numbers are those of the page)\n{done.stdout}{done.stderr}"


@pytest.mark.long
@pytest.mark.parametrize("page", with_mark("run"), ids=name)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    """The examples of a page, run one after the other in an empty folder beside ``bank.py``, do what the page says."""
    run(tmp_path, page, {"run"})


def test_examples_run_in_one_folder(tmp_path: Path) -> None:
    """The examples of all pages work one after the other in one folder."""
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [page for page in PAGES if page in with_mark("run")]
    for page in sorted(pages, key=lambda page: index.find(f"\n{page.stem}\n")):
        run(tmp_path, page, {"run"})


@pytest.mark.parametrize("page", with_mark("run: postgresql"), ids=name)
def test_examples_run_on_postgresql(page: Path, tmp_path: Path, postgres_url: str) -> None:
    """The examples of a page about PostgreSQL work there, with the address in the environment."""
    marks = {"run", "run: postgresql"}
    run(tmp_path, page, marks, FLASK_SQLALCHEMY_DATABASE_URI=postgres_url, DATABASE_URL=postgres_url)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_example_is_checked(page: Path) -> None:
    """Every example is tested: it is run, is a file that a test runs, or is part of such a file."""
    for block in blocks(page, "python"):
        kind, _, argument = block.mark.partition(": ")
        assert kind in {"file", "from", "project", "run"}, f"{page.name}:{block.line} has no mark"
        if kind == "from":
            whole = {**SHOWN, **files(README), **files(page)}[argument]
            assert block.code in whole, f"{page.name}:{block.line} is not in {argument}"


def test_every_setting_is_documented() -> None:
    """The configuration page has a section for every key, and its table shows the defaults of the code."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    defaults = dict(re.findall(r"^\| \[`(EVENTSOURCING_\w+)`\]\(#[\w-]+\) \| .+ \| `(.+)` \|$", text, re.M))
    for setting, default in asdict(Config()).items():
        key = PREFIX + setting.upper()
        assert f"\n## {key}\n" in text
        assert literal_eval(defaults.pop(key)) == default
    assert not defaults


@pytest.mark.parametrize("page", [page for page in PAGES if "conftest.py" in files(page)], ids=name)
def test_tests_pass(page: Path, tmp_path: Path) -> None:
    """The tests that a page shows pass, in a folder beside ``bank.py``, with and without pytest-flask."""
    fill(tmp_path, page)
    for options in ([], ["-p", "no:flask"]):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_first_example_works_as_written(tmp_path: Path) -> None:
    """The README's first example, copied into an empty folder, answers as the README says, restarted too."""
    fill(tmp_path, README)
    tables, requests, restarted = [block for block in blocks(README, "console") if block.mark.startswith("console")]
    commands = dict(commands_of(tables))
    assert commands.pop("flask --app bank run") == ""
    for command, printed in commands.items():
        program_name, *arguments = shlex.split(command)
        assert program_name == "flask"
        done = subprocess.run([*FLASK, *arguments], cwd=tmp_path, env=environment(), capture_output=True, check=True)
        assert done.stdout.decode() == printed
    for block in (requests, restarted):
        with server(tmp_path) as port:
            for command, printed in commands_of(block):
                assert curl(command, port) == printed


def commands_of(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with what it prints."""
    found = re.finditer(r"^\$ (?P<command>.*)\n(?P<printed>(?:(?!\$ ).*\n)*)", block.code, re.M)
    return [(each["command"], each["printed"]) for each in found]


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """Run the development server, on a free port instead of the usual one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder / "server.log"
    with log.open("ab") as output:
        command = [*FLASK, "--app", "bank", "run", "--port", str(port)]
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def answers(port: int) -> bool:
    """Tell whether a server listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def curl(command: str, port: int) -> str:
    """Do what a curl command would, and return what it would print."""
    program_name, *arguments = shlex.split(command)
    assert program_name == "curl"
    path = arguments.pop().removeprefix("http://127.0.0.1:5000")
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        if arguments:
            option, data = arguments
            assert option == "-d"
            connection.request("POST", path, data, {"Content-Type": "application/x-www-form-urlencoded"})
        else:
            connection.request("GET", path)
        return connection.getresponse().read().decode()
