"""What is the same for each server: how it ends, and what is left when a worker is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.domain import until
from tests.workers.serving import Answers, Database, serving

Line = Callable[[int], list[str]]


def ends_gracefully(line: Line, bare: Line, folder: Path, database: Database, **variables: str) -> None:
    """Check that a server told to end finishes its requests, closes the applications, and ends as it would alone."""
    with serving(bare, _made(folder / "bare")) as served:
        # uWSGI takes note of signals only when its workers are there.
        served.settle()
        expected = served.end()
    answers: list[Answers] = []
    with serving(line, _made(folder / "served"), database, **variables) as served:
        served.settle()
        names = [f"slow-{number}" for number in range(2)]
        clients = threading.Thread(
            target=lambda: answers.append(served.load([f"/open/{name}?seconds=1.5" for name in names], clients=2))
        )
        clients.start()
        until(lambda: database.log.read_text(errors="replace").count("INSERT INTO") >= 1)
        time.sleep(0.7)
        status = served.end()
        clients.join()
        log = served.log.read_text(errors="replace")
        assert answers[0].failed == {}, log
        assert status == expected, log
        owners, notes = database.names()
        assert owners - {"never committed"} == notes == set(names)
        closed = [tuple(map(int, row.split())) for row in served.closed.read_text().splitlines()]
        # Each process closes its own; the library's application closes itself again when it is collected.
        assert {process for _, process in closed} >= answers[0].pids
        assert all(made_in == process for made_in, process in closed)


def survives_a_kill(line: Line, folder: Path, database: Database, **variables: str) -> None:
    """Check what is stored when a worker is killed in the middle of requests, and that another takes its place."""
    with serving(line, folder, database, **variables) as served:
        first = {process.pid for process in served.processes()}
        answers: list[Answers] = []
        paths = [f"/open/{number}?seconds=0.05" for number in range(300)]
        clients = threading.Thread(target=lambda: answers.append(served.load(paths, clients=8)))
        clients.start()
        killed = set()
        for number in range(3):
            time.sleep(0.4)
            victim = served.ask(f"/open/victim-{number}")["pid"]
            # Others wait in line, so that it has the next one by now.
            time.sleep(0.02)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        clients.join()
        (found,) = answers
        # What was in progress in the killed worker; others may be refused while the server takes note of it.
        assert 0 < len(found.failed) < len(paths) / 2, served.log.read_text(errors="replace")[-3000:]
        answered = {path.split("/")[2].partition("?")[0] for path in found.done}
        until(lambda: database.site.stored()[0] >= len(answered))
        owners, notes = database.names()
        assert owners == notes
        assert answered <= owners
        serving_now: set[int] = set()
        deadline = time.monotonic() + 20
        # With gevent, one worker may take all that comes while another is still starting.
        while not serving_now - first:
            assert time.monotonic() < deadline, served.log.read_text(errors="replace")[-3000:]
            after = served.load([f"/open/after-{number}-{len(database.names()[0])}" for number in range(200)])
            assert after.failed == {}
            assert {(answer["constructed"], answer["made_in"] == answer["pid"]) for answer in after.all} == {(1, True)}
            serving_now |= after.pids
        assert serving_now & killed == set()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
