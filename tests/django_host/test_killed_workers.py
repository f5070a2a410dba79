"""Workers of a Django project that are killed, and those that take over."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from flask_eventsourcing.contrib.django import wait_for
from tests.contract.backends import url_for
from tests.django_host.conftest import DATABASES, DjangoBank
from tests.django_host.test_projections import balances, quiet, status
from tests.source import ROOT

__all__ = ["quiet"]
PATIENCE = 180.0
WORKERS = 3
EACH = 10

LONG = [pytest.param(each, marks=pytest.mark.long) for each in DATABASES if each != "postgresql"]


@pytest.fixture(params=["postgresql", *LONG])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind in a long run."""
    return url_for(request.param, tmp_path, request)


def running(workers: dict[int, subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Return the worker that runs the projection, as the status has it."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found = workers.get(int((status().runner or ":0").rpartition(":")[2]))
        if found is not None:
            return found
        time.sleep(0.02)
    raise RuntimeError("Nobody runs it.")


def test_killed_workers(site: DjangoBank) -> None:
    """When the worker that runs is killed in the midst of events, another takes over; each event is applied once."""
    command = [sys.executable, "-m", "tests.django_host.working", site.url]
    accounts = [site.opened() for _ in range(3)]
    saved: list[int] = []

    def save() -> None:
        for number in range(EACH):
            site.bank.deposit(accounts[number % 3], number)
            saved.append(number)

    with ExitStack() as stack:
        workers: dict[int, subprocess.Popen[bytes]] = {}
        for _ in range(WORKERS):
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT))
            stack.callback(process.kill)
            workers[process.pid] = process
        while len(workers) > 1:
            killed = running(workers)
            save()
            killed.kill()
            save()
            del workers[killed.pid]
            killed.wait(PATIENCE)
        last = running(workers)
        wait_for("Balances", len(accounts) + len(saved), timeout=PATIENCE)
        last.terminate()
        assert last.wait(PATIENCE) == 0
    assert sum(balances(site).values()) == sum(saved)
    assert (status().position, status().runner) == (len(accounts) + len(saved), None)
