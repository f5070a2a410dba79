"""What operators do with projections that run: pause, resume, skip, and reset of reactions.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import orm

from flask_eventsourcing.exceptions import CheckpointError, ProjectionHaltedError
from flask_eventsourcing.metadata import put_metadata_in_context
from flask_eventsourcing.projections import ModelProjection, on, reaction, swap, upkeep
from flask_eventsourcing.projections.checkpoint import FencedError
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.swap import Swap, settle
from flask_eventsourcing.projections.upkeep.repair import retry
from tests.domain import until
from tests.projections.desk import Created, Deposited, Desk

pytestmark = pytest.mark.usefixtures("short_pauses")
on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)


def command(desk: Desk, *arguments: str) -> tuple[int, str]:
    """Run a command; returns the exit status and what it prints."""
    result = desk.command(*arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


# ------------------------------------------------------------------------------------------------------------- pause


def test_no_worker_runs_a_paused_projection(desk: Desk) -> None:
    """A running worker stops at a pause, one that is started obeys it too, and both go on when it is resumed."""
    desk.balances()
    account_id = desk.open(1)
    with desk.running() as worker:
        until(lambda: desk.position() == 2)
        assert command(desk, "projections", "pause", "Balances", "--by", "ada", "--reason", "a  migration")[0] == 0
        until(lambda: worker.runners[0].progress.state == "paused")
        desk.deposit(account_id, 1)
        status = desk.status()
        assert (status.state, status.changed_by, status.reason) == ("paused", "ada", "a migration")
        assert status.lag_events == 1
        assert "Balances is paused by ada: a migration. " in (status.problem or "")
        with desk.running() as other:
            until(lambda: other.runners[0].progress.state == "paused")
            assert desk.amounts() == {account_id: 1}
        assert command(desk, "projections", "resume", "Balances")[0] == 0
        until(lambda: desk.position() == 3)
    assert not worker.errors
    assert desk.amounts() == {account_id: 2}


def test_a_pause_is_not_ok(desk: Desk) -> None:
    """``status --check``, ``check``, ``health()``, ``wait_for`` and ``run --once`` name a pause."""
    desk.balances()
    desk.open(1)
    assert command(desk, "projections", "pause", "Balances")[0] == 0
    code, output = command(desk, "status", "--check")
    assert code == 1
    assert "paused" in output
    assert f"Let it go on with '{desk.program} projections resume Balances'" in output
    assert command(desk, "check")[0] == 1
    with desk.context():
        assert not desk.health().ok
        with pytest.raises(ProjectionHaltedError, match="Balances is paused by"):
            desk.wait_for("Balances", 1, timeout=30)
    code, output = command(desk, "run", "Balances", "--once")
    assert (code, "Error: Balances is paused by" in output) == (1, True)
    # The start of a worker lets halted projections try again, and no paused ones.
    assert desk.row().state == "paused"
    assert desk.position() == 0
    assert command(desk, "projections", "resume", "Balances")[0] == 0
    assert not desk.run_once()
    assert desk.position() == 2


@on_sqlite
def test_what_cannot_be_paused_and_resumed(desk: Desk) -> None:
    """One that is inline, unknown, or neither paused nor halted is refused with a message."""
    desk.balances(inline=True)
    desk.reacting()
    assert "is inline" in command(desk, "projections", "pause", "Balances")[1]
    assert "There is no projection 'Nobody'" in command(desk, "projections", "pause", "Nobody")[1]
    assert "it never ran" in command(desk, "projections", "resume", "Reacting")[1]
    desk.open(1)
    assert not desk.run_once()
    code, output = command(desk, "projections", "resume", "Reacting:reactions")
    assert (code, output) == (1, "Error: Reacting:reactions is neither paused nor halted.\n")
    assert command(desk, "projections", "pause", "Reacting")[0] == 0
    assert desk.status("Reacting:reactions").state == "paused"
    assert command(desk, "projections", "list")[1].count("paused") == 1


def test_a_halted_projection_is_resumed_without_a_restart(desk: Desk) -> None:
    """``resume`` has a running worker try again what it has halted at, also after a pause in between."""
    desk.balances(retries=0)
    desk.poison = {13}
    account_id = desk.open(13)
    with desk.running() as worker:
        until(lambda: worker.runners[0].progress.state == "halted")
        assert command(desk, "projections", "pause", "Balances")[0] == 0
        until(lambda: worker.runners[0].progress.state == "paused")
        desk.poison = set()
        assert command(desk, "projections", "resume", "Balances")[0] == 0
        until(lambda: desk.position() == 2)
    assert not worker.errors
    assert desk.amounts() == {account_id: 13}


def test_a_failure_does_not_end_a_pause(desk: Desk) -> None:
    """An event that fails while its projection is being paused leaves it paused, not halted."""
    desk.balances()
    checkpoint = desk.consumer().checkpoint
    checkpoint.ensure()
    claimed = checkpoint.claim(lease=False)
    assert claimed is not None
    upkeep.pause(desk.consumer(), by="ada")
    checkpoint.halt(claimed, 1, "no")
    assert desk.row().state == "paused"
    assert checkpoint.claim(lease=False) is None
    with pytest.raises(FencedError), checkpoint.engine.begin() as connection:
        checkpoint.advance(connection, claimed, 1, 1, lease=False)


def test_a_reaction_in_progress_is_noted(desk: Desk) -> None:
    """A reaction that is running when it is paused is finished, and is not called again for that event."""
    calls: list[int] = []
    called, go_on = threading.Event(), threading.Event()

    class Slow(ModelProjection):
        @reaction(Deposited)
        def call(self, event: Any, key: str) -> None:
            calls.append(event.amount)
            called.set()
            assert go_on.wait(60)

    desk.register(Slow)
    desk.open(1, 2)
    with desk.running() as worker:
        try:
            assert called.wait(30)
            assert command(desk, "projections", "pause", "Slow:reactions")[0] == 0
        finally:
            go_on.set()
        until(lambda: worker.runners[0].progress.state == "paused")
        assert (calls, desk.row("Slow:reactions").position) == ([1], 2)
        assert command(desk, "projections", "resume", "Slow:reactions")[0] == 0
        until(lambda: desk.position("Slow:reactions") == 3)
    assert calls == [1, 2]


@pytest.mark.parametrize("outcome", ["swapped", "renamed", "taken back"])
def test_a_rebuild_leaves_a_paused_projection_paused(desk: Desk, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paused projection is rebuilt up to the end of the log and stays paused, whatever was killed in between."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    upkeep.pause(desk.consumer(), by="ada", reason="rest")
    desk.deposit(account_id, 1)
    if outcome != "swapped" and not desk.consumer().application.datastore.dialect.swaps_in_transaction:

        class KilledError(BaseException):
            pass

        original = Swap._rename

        def kill(self: Swap, connection: Any) -> None:
            if outcome == "renamed":
                original(self, connection)
            raise KilledError

        def die(consumer: object) -> None:
            raise KilledError

        monkeypatch.setattr(Swap, "_rename", kill)
        # A process that is killed settles nothing.
        monkeypatch.setattr(swap, "settle", die)
        with pytest.raises(KilledError):
            Rebuild(desk.consumer()).run()
        monkeypatch.undo()
        assert desk.row().state == "swapping"
        with pytest.raises(CheckpointError, match="is about to end"):
            upkeep.pause(desk.consumer(), by="ada")
        settle(desk.consumer())
        assert desk.row().state == "paused"
    assert Rebuild(desk.consumer()).run()
    assert (desk.row().state, desk.row().position, desk.row().reason) == ("paused", 3, "rest")
    upkeep.accept(desk.consumer())
    assert desk.row().state == "paused"
    upkeep.resume(desk.consumer(), by="ada")
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 2}


# -------------------------------------------------------------------------------------------------------------- skip


def test_a_skipped_event_is_a_dead_letter(desk: Desk) -> None:
    """A projection goes on after a skipped event; events of its aggregate wait until it is retried or discarded."""
    desk.balances(retries=0)
    desk.poison = {13}
    ada = desk.open(1, 13, 2)
    bob = desk.open(5)
    with desk.running() as worker:
        until(lambda: worker.runners[0].progress.state == "halted")
        code, output = command(desk, "projections", "skip", "Balances", "3", "--reason", "a bad import", "--by", "eve")
        assert code == 0
        assert output.startswith("Balances goes on after event 3 (Account.Deposited ")
        until(lambda: desk.position() == desk.head())
    assert not worker.errors
    assert desk.amounts() == {ada: 1, bob: 5}
    failed, waiting = json.loads(command(desk, "dead-letters", "list", "--json")[1])
    assert (failed["position"], failed["changed_by"], failed["reason"]) == (3, "eve", "a bad import")
    assert failed["error"] == "PoisonError: cannot digest 13"
    assert (waiting["position"], waiting["error"]) == (4, None)
    shown = command(desk, "dead-letters", "show", str(failed["id"]))[1]
    assert "changed by: eve\nreason: a bad import\n" in shown
    assert (desk.status().dead_letters, desk.status().waiting, desk.status().error) == (1, 1, None)
    desk.poison = set()
    retry(desk.consumer())
    assert desk.amounts() == {ada: 16, bob: 5}
    desk.deposit(ada, 1)
    assert not desk.run_once()
    assert desk.amounts() == {ada: 17, bob: 5}


def test_a_letter_tells_where_its_event_came_from(desk: Desk) -> None:
    """``dead-letters show`` has id, time and metadata of the event, each on one line whatever is in them."""
    desk.balances(retries=0, on_failure="dead-letter")
    desk.poison = {13}
    with put_metadata_in_context({"user": "eve\nerror: none", "correlation_id": "request-7"}):
        desk.open(1, 13)
    desk.run_once()
    with desk.context():
        recorded = desk.consumer().application.recorder.find_recorded([3])[3]
    code, text = command(desk, "dead-letters", "show", "1")
    assert code == 0
    assert f"event id: {recorded.event_id}\n" in text
    assert recorded.time is not None
    assert f"recorded at: {recorded.time.isoformat()}\n" in text
    assert r'metadata: {"correlation_id": "request-7", "user": "eve\nerror: none"}' in text
    shown = json.loads(command(desk, "dead-letters", "show", "1", "--json")[1])
    assert shown["event_id"] == str(recorded.event_id)
    assert shown["metadata"] == {"user": "eve\nerror: none", "correlation_id": "request-7"}


def test_a_letter_does_nothing_to_a_terminal(desk: Desk) -> None:
    """Errors, tracebacks and metadata are shown with escapes for what a terminal would obey."""

    class Failing(ModelProjection):
        on_failure = "dead-letter"
        retries = 0

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            raise ValueError("\x1b[2J forged \x9b31m\x07")

    desk.register(Failing)
    with put_metadata_in_context({"user": "eve\x1b[2J\x9b\x7f"}):
        desk.open(1)
    desk.run_once()
    for arguments in (("list",), ("show", "1")):
        text = command(desk, "dead-letters", *arguments)[1]
        assert "forged" in text
        assert all(each.isprintable() or each == "\n" for each in text)


def test_a_reaction_is_skipped(desk: Desk) -> None:
    """Halted reactions go on after a skipped event, and later events do not wait for it."""
    desk.reacting(retries=0)
    desk.poison = {13}
    desk.open(13, 1)
    bob = desk.open(2)
    assert desk.run_once()
    assert command(desk, "projections", "skip", "Reacting:reactions", "2", "--reason", "no")[0] == 0
    del desk.calls[:]
    assert not desk.run_once()
    assert [call[0] for call in desk.calls] == [bob]


def test_only_the_event_before_which_it_stands_is_skipped(desk: Desk) -> None:
    """A skip is refused if the consumer has not halted at this event, or has new handlers for earlier ones."""
    desk.balances(retries=0)
    refused = ("projections", "skip", "Balances", "2", "--reason", "no")
    assert "Balances has not halted before position 2" in command(desk, *refused)[1]
    desk.poison = {13}
    desk.open(1, 13)
    assert desk.run_once()
    code, output = command(desk, *refused)
    assert code == 1
    assert "Balances is halted before position 3" in output
    upkeep.pause(desk.consumer(), by="ada")
    assert "Balances is paused by ada" in command(desk, "projections", "skip", "Balances", "3", "--reason", "no")[1]
    assert command(desk, "projections", "skip", "Balances", "3")[0] == 2
    assert command(desk, "projections", "skip", "Balances", "3", "--reason", " ")[0] == 2
    assert (desk.row().position, desk.status().dead_letters) == (2, 0)


@on_sqlite
def test_events_with_a_new_handler_are_not_passed_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skip passes no event that only the present code handles."""
    # However slow the machine is, the second page has both of the events.
    monkeypatch.setattr(type(desk.projections.host.datastore.dialect), "batch_seconds", 600.0)

    def counting(*events: Any) -> None:
        class Counting(ModelProjection):
            retries = 0

            @on(*events)
            def seen(self, event: Any, session: orm.Session) -> None:
                if getattr(event, "amount", 0) == 13:
                    raise ValueError("no")

        desk.register(Counting)

    counting(Deposited)
    desk.open()
    desk.open(13)
    assert desk.run_once()
    assert (desk.row("Counting").position, desk.row("Counting").failed_position) == (1, 3)
    counting(Deposited, Created)
    code, output = command(desk, "projections", "skip", "Counting", "3", "--reason", "no")
    assert code == 1
    assert "now has handlers for events (1) between its position 1 and 3" in output


def test_an_event_is_skipped_in_a_rebuild(desk: Desk) -> None:
    """A rebuild that halts at an event that was skipped goes on after it when it is skipped there too."""
    desk.balances(retries=0)
    desk.poison = {13}
    ada, bob = desk.open(1, 13, 2), desk.open(5)
    assert desk.run_once()
    upkeep.skip(desk.consumer(), 3, by="ada", reason="no")
    assert not desk.run_once()
    with pytest.raises(ProjectionHaltedError, match="projections skip Balances:rebuild 3"):
        Rebuild(desk.consumer()).run()
    assert command(desk, "projections", "skip", "Balances:rebuild", "3", "--reason", "no")[0] == 0
    rebuilt = Rebuild(desk.consumer()).run()
    assert rebuilt is not None
    assert (rebuilt.dead_letters, rebuilt.waiting) == (1, 1)
    assert (desk.status().dead_letters, desk.status().waiting) == (1, 1)
    assert desk.amounts() == {ada: 1, bob: 5}


# ------------------------------------------------------------------------------------------------- reset of reactions


def test_reactions_are_reset_to_a_position(desk: Desk) -> None:
    """After a reset reactions are called again for the events after the position, with the same keys."""
    desk.reacting()
    account_id = desk.open(1, 2, 3)
    with desk.running():
        until(lambda: desk.position("Reacting:reactions") == 4)
        first = list(desk.calls)
        assert [call[1] for call in first] == [2, 3, 4]
        code, output = command(desk, "reactions", "reset", "Reacting", "--position", "2")
        assert code == 1
        assert "at position 4. Have it called again for 2 events up to 4? [y/N]" in output
        code, output = command(desk, "reactions", "reset", "Reacting", "--position", "2", "--yes", "--by", "ada")
        assert (code, output) == (0, "Reacting:reactions goes on after position 2.\n")
        until(lambda: len(desk.calls) == 5)
        assert desk.calls[3:] == first[1:]
    assert desk.status("Reacting:reactions").changed_by == "ada"
    desk.deposit(account_id, 4)
    command(desk, "reactions", "reset", "Reacting:reactions", "--position", "5", "--yes")
    assert not desk.run_once()
    assert len(desk.calls) == 5


def test_reactions_are_reset_to_a_time(desk: Desk) -> None:
    """A reset to a time calls reactions again for the events since then, also those of slow writers."""
    desk.reacting()
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    since = datetime.now(UTC)
    desk.deposit(account_id, 3, 4)
    assert not desk.run_once()
    application = desk.consumer("Reacting:reactions").application
    assert upkeep.position_before(application, since) == 3
    assert upkeep.position_before(application, since - timedelta(days=1)) == 0
    assert upkeep.position_before(application, since + timedelta(days=1)) == 5
    del desk.calls[:]
    code, output = command(desk, "reactions", "reset", "Reacting", "--since", since.isoformat(), "--yes")
    assert (code, output) == (0, "Reacting:reactions goes on after position 3.\n")
    assert not desk.run_once()
    assert [call[1] for call in desk.calls] == [4, 5]


@on_sqlite
@pytest.mark.parametrize("number", [1, 2, 9, 40, 300])
def test_the_position_of_any_time_is_found(desk: Desk, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset to a time begins at the first event that is not earlier, also if timestamps are out of order."""
    desk.reacting()
    application = desk.consumer("Reacting:reactions").application
    start = datetime(2026, 1, 1, tzinfo=UTC)
    # Every seventh has no timestamp, every fifth is late by three.
    times: dict[int, datetime | None] = {
        each: None if each % 7 == 0 else start + timedelta(seconds=each - (3 if each % 5 == 0 else 0))
        for each in range(1, number + 1)
    }

    class Event:
        def __init__(self, position: int) -> None:
            self.id = position

    def page(self: Any, after: int, limit: int, stop: int, topics: Any) -> tuple[list[Event], int]:
        upto = min(after + limit, stop)
        return [Event(each) for each in range(after + 1, upto + 1)], upto

    monkeypatch.setattr(type(application.log), "page", page)
    monkeypatch.setattr(type(application), "high_water_mark", lambda self: number)
    monkeypatch.setattr(type(application), "time_of", lambda self, event: times[event.id])
    for moment in {each for each in times.values() if each is not None}:
        position = upkeep.position_before(application, moment)
        since = [each for each, time in times.items() if time is not None and time >= moment]
        assert position < min(since)
        between = [times[each] for each in range(position + 1, min(since))]
        assert all(each is None for each in between)


def test_dead_letters_behind_the_position_are_dealt_with_again(desk: Desk) -> None:
    """A reset deletes the dead letters of the events that are called again, and keeps those before."""
    desk.reacting(retries=0, on_failure="dead-letter")
    desk.poison = {13}
    ada, bob = desk.open(13), desk.open(13, 1)
    assert not desk.run_once()
    name = "Reacting:reactions"
    assert (desk.status(name).dead_letters, desk.status(name).waiting) == (2, 1)
    desk.poison = set()
    del desk.calls[:]
    assert command(desk, "reactions", "reset", "Reacting", "--position", "2", "--yes")[0] == 0
    assert (desk.status(name).dead_letters, desk.status(name).waiting) == (1, 0)
    assert not desk.run_once()
    assert [call[0] for call in desk.calls] == [bob, bob]
    assert ada != bob


@on_sqlite
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["Reacting"], 2, "Give --position or --since."),
        (["Reacting", "--position", "1", "--since", "2026-01-01"], 2, "Give --position or --since."),
        (["Reacting", "--since", "yesterday"], 2, "--since takes a time in ISO format"),
        (["Reacting", "--position", "9", "--yes"], 1, "a position of the log, which is 0 to 2; found 9"),
        (["Reacting", "--position", "9" * 20, "--yes"], 2, "--position is a number up to 9223372036854775807"),
        (["\udcff", "--position", "1"], 2, "NAME is no text in the encoding of the command line."),
        (["Balances", "--position", "1"], 1, "Balances has no reactions."),
        (["Nobody", "--position", "1"], 1, "There is no projection 'Nobody'"),
    ],
)
def test_what_cannot_be_reset(desk: Desk, arguments: list[str], code: int, message: str) -> None:
    """An invalid reset is one clear message, and changes nothing."""
    desk.balances()
    desk.reacting()
    desk.open(1)
    assert not desk.run_once()
    found, output = command(desk, "reactions", "reset", *arguments)
    assert found == code
    assert message in output
    assert desk.position("Reacting:reactions") == 2
    with pytest.raises(CheckpointError, match="only reactions are reset"):
        upkeep.reset_reactions(desk.consumer(), 1, by="ada")
