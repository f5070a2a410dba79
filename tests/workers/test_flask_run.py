"""``flask run`` with its reloader."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.workers.serving import AnswerError, Database, Served, check, serving

pytestmark = pytest.mark.xdist_group("web-servers")


def line(port: int) -> list[str]:
    """Return the line that starts the development server."""
    return [sys.executable, "-m", "flask", "--app", "edited:app", "run", "--debug", "--port", str(port)]


def test_one_application_in_every_process(database: Database, tmp_path: Path) -> None:
    """The process that the reloader starts has one application, and so has the one after an edit."""
    module = tmp_path / "edited.py"
    module.write_text("from tests.workers.served import app\n")
    with serving(line, tmp_path, database) as served:
        before = check(served, database, 200)
        assert len(before.pids) == 1
        module.write_text("from tests.workers.served import app  # edited\n")
        pid = _restarted(served, before.pids, module)
        after = check(served, database, 200)
        assert after.pids == {pid}


def _restarted(served: Served, before: set[int], module: Path) -> int:
    edited = time.monotonic()
    deadline = edited + 60
    while time.monotonic() < deadline:
        time.sleep(0.1)
        # An edit before the reloader first looks at a file is none for it.
        if time.monotonic() > edited + 5:
            module.touch()
            edited = time.monotonic()
        try:
            pid: int = served.ask("/", "GET")["pid"]
        except (OSError, AnswerError):
            continue
        if pid not in before:
            return pid
    raise AssertionError("the reloader did not restart the app")
