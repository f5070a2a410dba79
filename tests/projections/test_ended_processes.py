"""Events whose handler ends the process: they count as tried, like those whose handler raises an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_eventsourcing.projections import checkpoint
from flask_eventsourcing.projections.checkpoint import Checkpoint, CheckpointRow
from tests.domain import until
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Desk
from tests.projections.dying import DIED, RETRIES, make

ROOT = Path(__file__).parents[2]
REACTIONS = "Reacting:reactions"
MOST = 12
"""Processes, after which there would be no end."""
long_on_servers = pytest.mark.parametrize(
    "uri",
    ["sqlite-file", *(pytest.param(each, marks=pytest.mark.long) for each in ("postgresql", "mariadb"))],
    indirect=True,
)
"""For what takes many processes, and no other way than the test on every database."""


@pytest.fixture
def dying(uri: str, on_failure: str) -> Iterator[Desk]:
    """A desk with a poisoned event in the middle of the log."""
    desk = make(uri, on_failure)
    yield desk
    desk.close()


def restart(uri: str, on_failure: str, *arguments: str) -> list[int]:
    """Start a process again until it ends by itself, as a supervisor does; return how each has ended."""
    command = [sys.executable, "-m", "tests.projections.dying", uri, on_failure, *arguments]
    codes: list[int] = []
    while len(codes) < MOST and codes[-1:] in ([], [DIED]):
        codes.append(subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode)
    return codes


def letters(desk: Desk, name: str) -> list[tuple[int, int, bool]]:
    """Return position, tries and whether it waits, of each dead letter."""
    application = desk.consumer(name).application
    with application.engine.connect() as connection:
        found = application.dead_letters.select(connection, [name])
    return [(each.position, each.attempts, each.error is None) for each in found]


@pytest.mark.xdist_group("rebuild")
@pytest.mark.parametrize("on_failure", ["dead-letter"])
def test_an_event_that_ends_the_process_becomes_a_dead_letter(dying: Desk, uri: str, on_failure: str) -> None:
    """An event that ends its process is set aside after as many tries as an error gets; no other event is blamed."""
    one, two = dying.open(1, 13, 4), dying.open(5, 6)
    codes = restart(uri, on_failure)
    assert codes[-1] == 0
    # One death that is not noted yet, and those of a projection and of a reaction.
    assert len(codes) - 1 <= 2 * (1 + RETRIES + 1)
    assert letters(dying, "Balances") == [(3, RETRIES + 1, False), (4, 0, True)]
    assert letters(dying, REACTIONS) == [(3, RETRIES + 1, False), (4, 0, True)]
    assert letters(dying, "Slow") == []
    assert dying.amounts() == {one: 1, two: 11}
    with dying.consumer().application.engine.connect() as connection:
        (letter, _) = dying.consumer().application.dead_letters.select(connection, ["Balances"])
    assert letter.error is not None
    assert letter.error.startswith("ProcessEndedError: the process ended while it applied the event")


@pytest.mark.xdist_group("rebuild")
@long_on_servers
@pytest.mark.parametrize("on_failure", ["halt"])
def test_an_event_that_ends_the_process_halts_the_projection(dying: Desk, uri: str, on_failure: str) -> None:
    """Where events are not set aside, the projection halts before it, and the others of the process run on."""
    account_id = dying.open(1, 13, 4)
    codes = restart(uri, on_failure)
    assert codes[-1] == len(["Balances", REACTIONS])
    for name in ("Balances", REACTIONS):
        status = dying.status(name)
        assert (status.state, status.failed_position, status.position) == ("halted", 3, 2)
        assert status.error is not None
        assert "ProcessEndedError" in status.error
    assert dying.position("Slow") == 4
    assert dying.amounts() == {account_id: 1}


@pytest.mark.xdist_group("rebuild")
@long_on_servers
@pytest.mark.parametrize("on_failure", ["dead-letter"])
def test_an_event_that_ends_a_rebuild_becomes_a_dead_letter(dying: Desk, uri: str, on_failure: str) -> None:
    """A rebuild that is started again after its process has ended continues, and sets aside the event that ended it."""
    one, two = dying.open(1, 13, 4), dying.open(5, 6)
    assert restart(uri, on_failure, "rebuild") == [DIED] * (RETRIES + 2) + [0]
    assert letters(dying, "Balances") == [(3, RETRIES + 1, False), (4, 0, True)]
    assert dying.amounts() == {one: 1, two: 11}


@pytest.mark.xdist_group("rebuild")
@long_on_servers
@pytest.mark.parametrize("on_failure", ["halt"])
def test_a_supervisor_does_not_have_it_tried_again(dying: Desk, uri: str, on_failure: str) -> None:
    """A supervisor that restarts ``run`` ends no further process, until an operator or other code tries the event."""
    account_id = dying.open(1, 13, 4)
    assert restart(uri, on_failure, "run")[-1] == 1
    assert [restart(uri, on_failure, "run") for _ in range(2)] == [[1], [1]]
    for name in ("Balances", REACTIONS):
        status = dying.status(name)
        assert (status.state, status.failed_position) == ("halted", 3)
        assert f"projections resume {name}" in str(status.error)
    assert dying.command("projections", "resume", "Balances").exit_code == 0
    assert restart(uri, on_failure, "run") == [DIED] * (RETRIES + 1) + [1]
    assert restart(uri, on_failure, "run") == [1]
    assert restart(uri, on_failure, "run", "corrected") == [0]
    assert dying.amounts() == {account_id: 18}


def leave_claim(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a claim as a process that was killed does."""
    consumer = desk.consumer()
    consumer.checkpoint.ensure()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "LEASE", 0.0)
        assert consumer.checkpoint.claim(lease=consumer.leased) is not None


def test_a_process_that_gives_its_claim_back_is_followed_by_batches(
    new_desk: MakeDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only after a process has ended are events tried one by one, and only those that may have ended it."""
    tried: list[int] = []
    original = Checkpoint.note_try

    def note(self: Checkpoint, claimed: CheckpointRow, position: int, attempts: int, **error: str) -> None:
        tried.append(position)
        original(self, claimed, position, attempts, **error)

    monkeypatch.setattr(Checkpoint, "note_try", note)
    desk = new_desk()
    desk.balances(batch_size=4)
    account_id = desk.open(1, 2, 3)
    assert not desk.run_once()
    assert tried == []
    desk.deposit(account_id, *range(4, 12))
    leave_claim(desk, monkeypatch)
    assert not desk.run_once()
    assert tried == [5, 6, 7, 8]
    leave_claim(desk, monkeypatch)
    with desk.running() as worker:
        # It has nothing to apply: what comes later was not what the process died of.
        until(lambda: worker.runners[0].progress.state == "up to date" and not worker.runners[0].turn.suspects.left)
        desk.deposit(account_id, 12, 13)
        until(lambda: desk.position() == 14)
    assert tried == [5, 6, 7, 8]
    assert desk.amounts() == {account_id: sum(range(1, 14))}
    row: Any = desk.row()
    assert (row.failed_position, row.error) == (None, None)
