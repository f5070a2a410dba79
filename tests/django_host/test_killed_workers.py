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
from tests.django_host.working import DIED, RETRIES
from tests.domain import Account
from tests.source import ROOT

__all__ = ["quiet"]
PATIENCE = 180.0
WORKERS = 3
EACH = 10

LONG_ON_SERVERS = [
    "sqlite-file",
    *(pytest.param(each, marks=pytest.mark.long) for each in DATABASES if each != "sqlite-file"),
]
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
    """If a worker is killed between events, another one takes over, and each event is applied once."""
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


@pytest.mark.xdist_group("rebuild")
@pytest.mark.parametrize("url", DATABASES, indirect=True)
def test_an_event_that_ends_a_rebuild_becomes_a_dead_letter(site: DjangoBank) -> None:
    """A rebuild that is started again after its process has ended sets aside only the event that ended it."""
    from tests.django_host.ledger.models import BankRecords

    site.bank.save(*(Account(owner) for owner in ("one", "deadly", "three")))
    codes = [rebuild(site, "dead-letter")[0] for _ in range(RETRIES + 3)]
    assert codes == [DIED] * (RETRIES + 2) + [0]
    assert notes(site) == ["one", "three"]
    letters = BankRecords.DeadLetter.objects.using(site.alias)
    assert [(each.projection, each.position, each.attempts) for each in letters.all()] == [("Deadly", 2, RETRIES + 1)]
    names = BankRecords.Projection.objects.using(site.alias).values_list("name", flat=True)
    assert list(names) == ["Deadly"]


@pytest.mark.xdist_group("rebuild")
@pytest.mark.parametrize("url", LONG_ON_SERVERS, indirect=True)
def test_an_event_that_ends_a_rebuild_is_named(site: DjangoBank) -> None:
    """Where events are not set aside, the next rebuild names the event that ended it, and retries only on request."""
    site.bank.save(*(Account(owner) for owner in ("one", "deadly", "three")))
    site.note("old")
    assert [rebuild(site, "halt")[0] for _ in range(RETRIES + 2)] == [DIED] * (RETRIES + 2)
    for _ in range(2):
        code, text = rebuild(site, "halt")
        assert code == 1
        assert "halts before position 2, and nothing was changed" in text
        assert "tries it again only after 'manage.py eventsourcing rebuild Deadly --restart'" in text
    assert notes(site) == ["old"]
    assert rebuild(site, "halt", "--restart")[0] == DIED


def rebuild(site: DjangoBank, *words: str) -> tuple[int, str]:
    """Rebuild the deadly projection in a process, and return how that has ended and what it has printed."""
    command = [sys.executable, "-m", "tests.django_host.working", site.url, "rebuild", *words]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=PATIENCE, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout


def notes(site: DjangoBank) -> list[str]:
    """Return the rows that the deadly projection writes."""
    from tests.django_host.ledger.models import Note

    return sorted(Note.objects.using(site.alias).values_list("text", flat=True))
