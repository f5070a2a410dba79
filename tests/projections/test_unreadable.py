"""A row of the log that cannot be read, and secrets in errors: what projections and commands make of them.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import DataError
from sqlalchemy import orm

from flask_eventsourcing.exceptions import ProjectionHaltedError, UnreadableEventError
from flask_eventsourcing.projections import ModelProjection, on
from tests.projections.desk import Deposited, Desk

pytestmark = pytest.mark.usefixtures("short_pauses")

DAMAGE = {
    "text id": ("originator_id", "user-ann"),
    "id that forges a line": ("originator_id", "x\nERROR all is lost"),
    "integer as id": ("originator_id", 5),
    "text as state": ("state", "{}"),
    "integer as state": ("state", 7),
    "topic of nothing": ("topic", "no.such:Thing"),
}
CASES = [("sqlite-file", name) for name in DAMAGE] + [("mariadb", "text id"), ("mariadb", "topic of nothing")]
damaged = pytest.mark.parametrize(("uri", "damage"), CASES, indirect=["uri"])
SECRET = "4111-1111-1111-1111"


def write(desk: Desk, position: int, damage: str) -> None:
    """Write past the package into a row of the log."""
    column, value = DAMAGE[damage]
    with desk.context():
        name = desk.events_table.name
        statement = sa.text(f"UPDATE {name} SET {column} = :value WHERE notification_id = :position")
        desk.session.execute(statement, {"value": value, "position": position})
        desk.session.commit()


def command(desk: Desk, *arguments: str) -> str:
    """Run a command, which ends without a traceback, and return what it prints."""
    result = desk.command(*arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.output


@damaged
def test_projection_halts_before_the_row_by_its_name(desk: Desk, damage: str) -> None:
    """Events before an unreadable row are applied, the projection halts and names it, and commands work."""
    desk.balances(retries=0)
    ada = desk.open(1, 2)
    write(desk, 3, damage)
    (error,) = desk.run_once()
    assert isinstance(error, ProjectionHaltedError)
    assert "event 3 " in str(error)
    assert "\n" not in str(error)
    assert desk.amounts() == {ada: 1}
    assert "halted" in command(desk, "status")
    assert command(desk, "check")
    assert "position 3" in command(desk, "run", "--all", "--once")


@damaged
def test_row_is_a_dead_letter(desk: Desk, damage: str) -> None:
    """Where the projection sets such events aside, the row is a dead letter, and the rest of the log is applied."""
    desk.balances(retries=0, on_failure="dead-letter")
    ada = desk.open(1)
    write(desk, 1, damage)
    bob = desk.open(4, 5)
    assert not desk.run_once()
    assert desk.amounts().get(bob) == 9
    assert "1" in command(desk, "dead-letters", "list")
    assert "position" in command(desk, "dead-letters", "show", "1")
    assert "1 failed" in command(desk, "dead-letters", "retry", "--all")
    told = command(desk, "status")
    assert "NAME" in told
    assert "dead letter" in told
    assert command(desk, "check")
    carl = desk.open(6)
    assert not desk.run_once()
    assert desk.amounts().get(carl) == 6
    assert ada not in desk.amounts() or damage


@pytest.mark.parametrize(
    ("uri", "damage"),
    [case for case in CASES if case[1] != "topic of nothing"],
    indirect=["uri"],
)
def test_log_is_read_up_to_the_row(desk: Desk, damage: str) -> None:
    """A reader of the log gets the events before the row, and then an error that names its position."""
    desk.balances()
    desk.open(1, 2)
    write(desk, 3, damage)
    with desk.context():
        recorder = desk.bank.recorder
        assert [each.id for each in recorder.select_notifications(None, 10)] == [1, 2]
        with pytest.raises(UnreadableEventError, match="at position 3 of") as raised:
            recorder.select_notifications(3, 10)
        assert isinstance(raised.value, DataError)
        assert "\n" not in str(raised.value)
        assert recorder.max_notification_id() == 3
        desk.session.rollback()


@pytest.mark.parametrize("on_failure", ["halt", "dead-letter"])
def test_values_of_statements_are_nowhere(desk: Desk, on_failure: str, caplog: pytest.LogCaptureFixture) -> None:
    """The parameters of a failed statement are in no log, status or dead letter."""

    class Cards(ModelProjection):
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            # Longer than its column, in two of the databases, and there already in all of them.
            for _ in range(2):
                row = {"id": 1, "account_id": SECRET, "version": 1, "text": SECRET}
                session.execute(sa.insert(desk.Seen).values(row))

    Cards.on_failure = on_failure  # type: ignore[assignment]
    desk.register(Cards)
    desk.open(1)
    with caplog.at_level(logging.DEBUG, logger="flask_eventsourcing"):
        errors = desk.run_once()
    assert len(errors) == (on_failure == "halt")
    told = [command(desk, "status"), command(desk, "dead-letters", "list"), caplog.text, *map(str, errors)]
    if on_failure == "dead-letter":
        told.append(command(desk, "dead-letters", "show", "1"))
    else:
        told.append(command(desk, "run", "--all", "--once"))
    assert any("IntegrityError" in each for each in told)
    assert [each for each in told if SECRET in each] == []
