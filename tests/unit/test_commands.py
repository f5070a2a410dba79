"""What commands do and print, without click and without an app."""

from __future__ import annotations

import ast
import io
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import click
import pytest
import sqlalchemy as sa
from eventsourcing import persistence
from eventsourcing.application import Application

from flask_eventsourcing import commands
from flask_eventsourcing.cli import ClickOutput, group
from flask_eventsourcing.commands import (
    CommandError,
    Output,
    PlainOutput,
    Subject,
    UnreachableError,
    UsageError,
    as_table,
    clear_errors,
    letters,
    reports,
    work,
)
from flask_eventsourcing.commands.reports import Reporter
from flask_eventsourcing.exceptions import RebuildError
from flask_eventsourcing.persistence import Datastore, DialectOptions
from flask_eventsourcing.projections.registry import BoundProjections
from flask_eventsourcing.projections.runners import Progress
from tests.source import MODULES, parse

FOLDER = Path(commands.__file__).parent
FRONTS = {"click", "flask", "flask_sqlalchemy", "werkzeug"}

METADATA = sa.MetaData()
EVENTS = sa.Table("events", METADATA, sa.Column("id", sa.Integer, primary_key=True))
ROWS = sa.Table("rows", METADATA, sa.Column("event_id", sa.ForeignKey("events.id"), primary_key=True))
UNRELATED = sa.Table("unrelated", METADATA, sa.Column("id", sa.Integer, primary_key=True))


class NoProjections:
    """Projections of a host that has none, but a table that they would need."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def runnable(self) -> list[Any]:
        """Return nothing to run."""
        return []

    def tables(self) -> list[sa.Table]:
        """Return a table that belongs to the application too, and one that does not."""
        return [EVENTS, ROWS]


@pytest.fixture
def engine() -> Iterator[sa.Engine]:
    """An empty database."""
    made = sa.create_engine("sqlite://")
    yield made
    made.dispose()


@pytest.fixture
def subject(engine: sa.Engine) -> Subject:
    """What commands work on, on a host that is not Flask."""
    return Subject(
        commit_mode="explicit",
        datastore=Datastore(engine, DialectOptions(program="manage.py events")),
        application_tables=[("Bank", EVENTS)],
        applications=lambda: {"Bank": Application[UUID]()},
        projections=cast(BoundProjections, NoProjections()),
    )


@pytest.fixture
def printed() -> io.StringIO:
    """What was printed."""
    return io.StringIO()


@pytest.fixture
def output(printed: io.StringIO) -> PlainOutput:
    """An output without a terminal."""
    return PlainOutput(printed)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_commands_know_no_front(path: Path) -> None:
    """The commands import neither click nor anything of Flask's, so that every host can have them."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            imported.add(node.module.partition(".")[0])
    assert imported & FRONTS == set()


def test_init_db(subject: Subject, output: PlainOutput, printed: io.StringIO) -> None:
    """``init-db`` creates the tables of applications and projections, each once, and no other; then all are there."""
    assert reports.init_db(subject, output) == 0
    assert printed.getvalue() == "Created table events.\nCreated table rows.\n"
    assert reports.init_db(subject, output) == 0
    assert printed.getvalue().endswith("\nAll tables are there.\n")
    assert not sa.inspect(subject.database.engine).has_table("unrelated")


def test_check(subject: Subject, output: PlainOutput, printed: io.StringIO) -> None:
    """``check`` tells the database, the mode, the tables with their owners, and the logs."""
    METADATA.create_all(subject.database.engine)
    assert reports.check(subject, output) == 0
    assert printed.getvalue().splitlines() == [
        "Database: sqlite:// (sqlite, pysqlite)",
        "Commit mode: explicit",
        "Bank: table events ok",
        "Projections: table rows ok",
        "Bank: log ok, last position 0",
    ]


def test_messages_name_the_program(subject: Subject, output: PlainOutput, printed: io.StringIO) -> None:
    """A message that names a command names it as the user calls it on this host."""
    with pytest.raises(
        CommandError, match=r"^Tables are missing: run 'manage\.py events init-db' or your migrations\.$"
    ):
        reports.check(subject, output)
    assert "Bank: table events is missing\n" in printed.getvalue()
    missing = r"^Tables are missing \(events, rows\): run 'manage\.py events init-db' or your migrations\.$"
    with pytest.raises(CommandError, match=missing):
        reports.status(subject, output)
    METADATA.create_all(subject.database.engine)
    with pytest.raises(CommandError, match=r"^There is no dead letter 7: see 'manage\.py events dead-letters list'\.$"):
        letters.show_letter(subject, output, 7)


def words_of(call: ast.Call) -> str:
    """Return the words with which a message names a command, with X for what is filled in."""
    given = call.args[0]
    parts = given.values if isinstance(given, ast.JoinedStr) else [given]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)


def command_of(words: str) -> click.Command | None:
    """Return the command that words call."""
    found: click.Command | None = group
    for word in words.split():
        if not isinstance(found, click.Group):
            break
        found = found.get_command(click.Context(found), word)
    return found


def test_every_remedy_is_a_command() -> None:
    """Each command that a message names exists, and is named as the host says; none has a host's way of its own."""
    calls = [
        node
        for name in MODULES
        if name != "cli"
        for node in ast.walk(parse(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "command"
    ]
    named = {words for call in calls if (words := words_of(call)) != "X"}
    assert {"rebuild", "projections accept", "dead-letters list", "init-db"} <= named
    assert {words for words in named if type(command_of(words)) is not click.Command} == set()
    texts = {
        f"{name}:{node.lineno}"
        for name in MODULES
        for node in ast.walk(parse(name))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "flask eventsourcing" in node.value
    }
    spoken = {each for each in texts if not each.endswith(":1")}
    assert {each.partition(":")[0] for each in spoken} == {"web.state"}, spoken


def test_status_without_projections(subject: Subject, output: PlainOutput, printed: io.StringIO) -> None:
    """Without projections ``status`` says so, to people and to programs, and nothing is wrong."""
    METADATA.create_all(subject.database.engine)
    assert reports.status(subject, output, check=True) == 0
    assert printed.getvalue() == "No projection is registered.\n"
    printed.truncate(0)
    printed.seek(0)
    assert reports.status(subject, output, as_json=True) == 0
    assert json.loads(printed.getvalue()) == {"ok": True, "projections": []}


def test_a_wrong_call_has_another_exit_status(subject: Subject, output: PlainOutput) -> None:
    """A call that makes no sense ends with 2, as programs do, and what fails with 1."""
    with pytest.raises(UsageError) as wrong:
        work.run(subject, output, ["Balances"], everything=True)
    with pytest.raises(UsageError):
        letters.retry_letters(subject, output)
    with pytest.raises(CommandError, match="No projection is registered") as failed:
        work.run(subject, output)
    assert (wrong.value.exit_status, failed.value.exit_status) == (2, 1)


def test_a_lost_database_is_told_from_other_errors() -> None:
    """Errors of the database and of this package become one message, which tells an outage from a wait for others."""
    with pytest.raises(UnreachableError, match=r"^The database cannot be reached: gone$"), clear_errors():
        raise persistence.OperationalError("gone")
    deadlock = sa.exc.OperationalError("UPDATE t", {}, sqlite3.OperationalError("database is locked"))
    with (
        pytest.raises(UnreachableError, match=r"^Another transaction was in the way: database is locked\. Run"),
        clear_errors(),
    ):
        raise deadlock
    with pytest.raises(CommandError, match=r"^It has no models\.$") as failed, clear_errors():
        raise RebuildError("It has no models.")
    assert not isinstance(failed.value, UnreachableError)
    with pytest.raises(CommandError, match=r"^ArgumentError: no such thing$"), clear_errors():
        raise sa.exc.ArgumentError("no such thing")
    with pytest.raises(KeyError), clear_errors():
        raise KeyError


def test_columns_of_numbers_are_set_to_the_right() -> None:
    """A table's columns are as wide as their widest cell, numbers to the right, and no line ends with spaces."""
    rows = [["Balances", "7", "-"], ["Mails", "1024", "b:2"]]
    assert as_table(["NAME", "LAG", "RUNNER"], rows).splitlines() == [
        "NAME       LAG  RUNNER",
        "Balances     7  -",
        "Mails     1024  b:2",
    ]


def test_a_plain_output_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a stream a plain output prints to the standard output of that moment, and shows no bar."""
    output = PlainOutput()
    output.write("one\ntwo")
    assert capsys.readouterr() == ("one\ntwo\n", "")
    assert output.bar(10, "Balances") is None


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), (" Yes ", True), ("", False), ("no", False), ("j", False)])
def test_a_plain_output_asks(answer: str, agreed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a yes is a yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
    assert PlainOutput().confirm("Go on?") is agreed


@pytest.mark.parametrize("make", [PlainOutput, ClickOutput])
def test_what_the_encoding_lacks_is_escaped(make: Callable[[], Output], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command prints escapes for characters that the encoding of standard output lacks, and does not fail."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "latin-1"))
    make().write("caf\xe9 \u2192 \udcff")
    sys.stdout.flush()
    assert printed.getvalue() == b"caf\xe9 \\u2192 \\udcff\n"


@pytest.mark.parametrize("make", [PlainOutput, ClickOutput])
def test_closed_outputs(make: Callable[[], Output], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose standard output and error are closed prints nothing, shows no bar and does not fail."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    make().write("nothing")
    assert make().bar(10, "rebuilding") is None
    with work.shown_log():
        work.logger.info("nothing")


def test_a_reader_that_has_seen_enough() -> None:
    """A command whose output is read by ``head`` ends with 1, without a traceback, when that has seen enough."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream, pytest.raises(SystemExit) as ended:
        PlainOutput(stream).write("more")
    assert ended.value.code == 1


def test_the_end_of_the_input_is_no(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of the input, a question of a command is answered with no."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert PlainOutput().confirm("Go on?") is False
    assert capsys.readouterr().out == "Go on? [y/N]: "


class Following:
    """A runner that catches up."""

    name = "Balances"

    def __init__(self) -> None:
        self.progress = Progress("catching up", high_water_mark=2000)


class Terminal(PlainOutput):
    """An output that has a bar, and notes what it shows."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.shown: list[Any] = []

    def bar(self, length: int, label: str) -> Terminal:
        """Show a bar."""
        self.shown.append((length, label))
        return self

    def move(self, position: int, length: int, note: str) -> None:
        """Move it."""
        self.shown.append((position, length))

    def finish(self) -> None:
        """End it."""
        self.shown.append("finished")


def test_progress_is_a_bar_or_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A bar on a terminal moves until the end of the log, which may grow; elsewhere lines are logged."""
    caplog.set_level("INFO", "flask_eventsourcing")
    runner = Following()
    terminal = Terminal()
    reporter = Reporter(cast(Any, [runner]), terminal, 0.001)
    reporter.tick()
    assert caplog.messages == []
    runner.progress.position, runner.progress.high_water_mark = 1500, 2500
    reporter.tick()
    runner.progress.position = 2500
    reporter.tick()
    assert terminal.shown == [(2000, "Balances"), (0, 2000), (1500, 2500), (2500, 2500), (2500, 2500), "finished"]
    assert caplog.messages[0].startswith("Balances: catching up, position 2500, head 2500, lag 0, ")
    runner.progress.position = 0
    reporter = Reporter(cast(Any, [runner]), PlainOutput(), 0.001)
    time.sleep(0.01)
    reporter.tick()
    assert caplog.messages[1].startswith("Balances: catching up, position 0, head 2500, lag 2500, ")
