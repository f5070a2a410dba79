"""A checkpoint knows the log, the tables and the code that it belongs to.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing import utils
from sqlalchemy import orm

from flask_eventsourcing.exceptions import CheckpointError, CheckpointMismatchError, MissingTableError, UnsafeTableError
from flask_eventsourcing.persistence.dialects.locks import utc_now
from flask_eventsourcing.persistence.dialects.mysql_looks import ORDER
from flask_eventsourcing.projections import ModelProjection, on, reaction, upkeep
from flask_eventsourcing.projections.applying import pages
from flask_eventsourcing.projections.checkpoint import CheckpointRow
from flask_eventsourcing.projections.definitions import fingerprints
from flask_eventsourcing.projections.definitions.fingerprints import fingerprint_of, note_sources
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.runners import Runner, claims
from tests.domain import Account, until
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Created, Deposited, Desk

on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)
OTHER = "0" * 64


def events(desk: Desk) -> sa.Table:
    """Return the table of the log."""
    return desk.events_table


def execute(desk: Desk, *statements: Any) -> None:
    """Do something to the database behind the package's back."""
    with desk.any_consumer().application.engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement) if isinstance(statement, str) else statement)


def restore_log(desk: Desk, end: int) -> None:
    """Set the log, and nothing else, back to an earlier point."""
    name = desk.any_consumer().application.engine.dialect.name
    again = {
        "postgresql": f"SELECT setval(pg_get_serial_sequence('bank_events', 'notification_id'), {end})",
        "sqlite": f"UPDATE sqlite_sequence SET seq = {end} WHERE name = 'bank_events'",
        "mysql": f"UPDATE bank_tracking SET notification_id = {end} WHERE application_name = '{ORDER}'",
    }
    execute(
        desk,
        f"CREATE TABLE dump AS SELECT * FROM bank_events WHERE notification_id <= {end}",
        "DELETE FROM bank_events",
        "INSERT INTO bank_events SELECT * FROM dump",
        "DROP TABLE dump",
        again["mysql" if name == "mariadb" else name],
    )


def make_again(desk: Desk) -> None:
    """Drop the table of the read model, and make it again."""
    engine = desk.consumer().application.engine
    table = desk.Balance.__table__
    table.drop(engine)
    # A database may tell tables by the second in which they were made.
    time.sleep(1.1)
    table.create(engine)


def refused(desk: Desk, state: str, name: str = "Balances", position: int = 1) -> None:
    """Check that everybody is told the same."""
    status = desk.status(name)
    assert status.state == state
    assert status.problem
    with desk.context():
        assert not desk.health().ok
    done = desk.command("check")
    assert done.exit_code == 1
    assert status.problem in done.output
    assert desk.command("status", "--check").exit_code == 1
    (error,) = desk.run_once(name)
    assert isinstance(error, CheckpointMismatchError)
    assert str(error) == status.problem
    if name == "Balances":
        with desk.context(), pytest.raises(CheckpointMismatchError):
            desk.wait_for(name, position, timeout=5)


def command(desk: Desk, *arguments: str) -> str:
    """Call a command that succeeds."""
    done = desk.command(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


def rebuild(desk: Desk) -> None:
    """Rebuild to the end."""
    assert Rebuild(desk.consumer()).run() is not None


# -------------------------------------------------------------------------------------------------------------- the log


def test_a_checkpoint_ahead_of_its_log_is_a_named_state(desk: Desk) -> None:
    """After a restore of the log alone, run, status, check, health and wait_for name the fault; none shows "lag 0"."""
    desk.balances()
    account_id = desk.open(1, 2, 3, 4)
    assert not desk.run_once()
    restore_log(desk, 3)
    desk.deposit(account_id, 10)
    refused(desk, "ahead of its log", position=4)
    rebuild(desk)
    assert desk.amounts() == {account_id: 13}
    assert desk.status().state == "stopped"
    desk.deposit(account_id, 1)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 14}


def test_another_event_at_the_position_is_a_named_state(desk: Desk) -> None:
    """A restored log that has grown beyond the checkpoint, with other events, is noticed."""
    desk.balances()
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    restore_log(desk, 1)
    other = desk.open(5, 6, 7)
    refused(desk, "another log")
    rebuild(desk)
    assert desk.amounts() == {account_id: 0, other: 18}


def test_another_event_of_the_same_aggregate_is_a_named_state(desk: Desk) -> None:
    """A restored log that has grown again is noticed although aggregate and version at the position are the same."""
    desk.balances()
    account_id = desk.open(1, 2, 3)
    assert not desk.run_once()
    restore_log(desk, 2)
    desk.deposit(account_id, 50)
    desk.deposit(account_id, 60)
    desk.deposit(account_id, 70)
    refused(desk, "another log", position=4)
    rebuild(desk)
    assert desk.amounts() == {account_id: 181}
    assert desk.status().state == "stopped"
    desk.deposit(account_id, 1)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 182}


def test_an_idle_worker_notices_another_event_of_the_same_aggregate(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner that waits for events looks at the one that it applied last, and leaves its read model alone."""
    monkeypatch.setattr(claims, "LOOK_EVERY", 0.0)
    desk.balances()
    account_id = desk.open(1, 2, 3)
    stop = threading.Event()
    runner = Runner(desk.consumer(), stop)
    thread = threading.Thread(target=lambda: suppressed(runner))
    thread.start()
    try:
        until(lambda: runner.progress.position == 4 and runner.progress.state == "up to date")
        restore_log(desk, 3)
        desk.deposit(account_id, 50)
        until(lambda: runner.progress.halted is not None)
    finally:
        stop.set()
        thread.join()
    assert desk.amounts() == {account_id: 6}


def suppressed(runner: Runner) -> None:
    """Run it until it is stopped, whatever it says then."""
    with contextlib.suppress(CheckpointMismatchError):
        runner.run()


def test_a_checkpoint_without_the_id_of_its_event_gets_it_with_the_next(desk: Desk) -> None:
    """A row of an older release is no alarm, and notes the id of the event that it applies next."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    execute(desk, "UPDATE bank_projections SET last_event_id = NULL")
    assert desk.status().problem is None
    desk.deposit(account_id, 2)
    assert not desk.run_once()
    assert desk.row().last_event_id is not None
    with desk.engine.begin() as connection:
        # As of an event that was erased in place.
        connection.execute(sa.update(desk.events_table).values(event_id=None))
    assert desk.status().problem is None


def test_an_event_that_the_projection_does_not_handle_tells_the_log_too(desk: Desk) -> None:
    """The checkpoint notes the event at its position, also if the projection has no handler for it."""

    class Openings(ModelProjection):
        models = (desk.Balance,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))

    desk.register(Openings)
    desk.open(1)
    assert not desk.run_once()
    assert desk.row("Openings").position == 2
    restore_log(desk, 1)
    desk.open(1, 2)
    assert desk.status("Openings").state == "another log"


def test_a_missing_event_is_no_alarm(desk: Desk) -> None:
    """An archived or erased event stops no projection while the log has later ones."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    desk.deposit(account_id, 2)
    table = events(desk)
    execute(desk, sa.delete(table).where(table.c.notification_id == 2))
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 3}
    assert desk.status().problem is None


def test_tables_of_events_that_were_made_again(desk: Desk) -> None:
    """A log has an identity, made with its tables, so another log is noticed even if it is longer."""
    desk.balances()
    desk.open(1)
    assert not desk.run_once()
    engine = desk.consumer().application.engine
    tables = [events(desk), desk.models.tables["tracking"]]
    for table in tables:
        table.drop(engine)
        table.create(engine)
    desk.open(5, 6)
    refused(desk, "another log")
    assert "goes on" in command(desk, "projections", "accept", "Balances")
    assert desk.status().state == "stopped"
    assert desk.row().position == 3


def test_a_clone_gets_an_identity_of_its_own(desk: Desk) -> None:
    """A command gives a clone's log a new identity, and its checkpoints still fit."""
    desk.reacting()
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    before = desk.consumer().application.log.identity()
    refused = desk.command("new-identity", "--application", "Shop")
    assert (refused.exit_code, "Choose the application with --application: Bank." in refused.output) == (2, True)
    assert desk.consumer().application.log.identity() == before
    assert "identity" in command(desk, "new-identity")
    assert desk.consumer().application.log.identity() != before
    desk.deposit(account_id, 1)
    with desk.engine.begin() as connection:
        # Only the key of an event from before there were ids has the identity.
        connection.execute(sa.update(desk.events_table).values(event_id=None))
    assert not desk.run_once()
    assert desk.calls[-1][2].split("/")[2] == str(desk.consumer().application.log.identity())


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_that_is_missing_is_a_named_state(desk: Desk) -> None:
    """A projection whose table was dropped, or never created, is a fault that names the table and the remedy."""
    desk.balances()
    table = desk.Balance.__table__
    engine = desk.consumer().application.engine
    table.drop(engine)
    account_id = desk.open(1)
    assert desk.status().state == "tables missing"
    (error,) = desk.run_once()
    assert isinstance(error, CheckpointMismatchError)
    table.create(engine)
    assert not desk.run_once()
    table.drop(engine)
    desk.deposit(account_id, 2)
    status = desk.status()
    assert status.state == "tables missing"
    with desk.context():
        assert not desk.health().ok
        with pytest.raises(CheckpointMismatchError, match=table.name):
            desk.wait_for("Balances", 3, timeout=5)
    done = desk.command("check")
    assert (done.exit_code, f"table {table.name} is missing" in done.output) == (1, True)
    assert desk.command("status", "--check").exit_code == 1
    (error,) = desk.run_once()
    assert str(error) == status.problem
    table.create(engine)
    rebuild(desk)
    assert desk.amounts() == {account_id: 3}


def test_one_that_never_ran_and_cannot_is_a_named_state_at_once(desk: Desk) -> None:
    """If a table is missing and no worker has run yet, ``wait_for`` names the table and asks for no worker."""
    desk.balances()
    desk.Balance.__table__.drop(desk.engine)
    desk.open(1)
    assert desk.consumer().checkpoint.read() is None
    with desk.context(), pytest.raises(CheckpointMismatchError, match="lacks its table balance"):
        desk.wait_for("Balances", 2, timeout=60)
    assert desk.status().state == "tables missing"


def test_an_inline_projection_without_its_table_is_a_named_state(desk: Desk) -> None:
    """An inline projection whose table is missing is a fault for all that ask, with a checkpoint and without."""
    desk.balances(inline=True)
    desk.open(1)
    desk.Balance.__table__.drop(desk.engine)
    for has_row in (False, True):
        if has_row:
            desk.consumer().checkpoint.ensure()
        status = desk.status()
        assert status.state == "tables missing"
        assert status.problem is not None
        assert "rebuild Balances" in status.problem
        with desk.context(), pytest.raises(CheckpointMismatchError, match="lacks its table balance"):
            desk.wait_for("Balances", 2, timeout=60)
        assert not desk.health().ok
        assert desk.command("status", "--check").exit_code == 1


@pytest.mark.parametrize("name", ["projections", "dead_letters", "inline_ranges"])
def test_a_table_of_this_package_that_is_missing_is_named(desk: Desk, name: str) -> None:
    """Without one of the tables that come with projections, each says which, and how to create it."""
    desk.balances(inline=name == "inline_ranges")
    desk.open(1)
    table = desk.consumer().application.models.tables[name]
    table.drop(desk.engine)
    expected = pytest.raises(MissingTableError, match=f"{table.name}.*init-db")
    with expected:
        desk.health()
    if name != "dead_letters":
        with desk.context(), expected:
            desk.wait_for("Balances", 2, timeout=60)


def test_a_table_that_is_dropped_under_a_runner_sets_no_event_aside(desk: Desk) -> None:
    """The events of a projection whose table is dropped while it runs are no dead letters, and do not halt it."""
    desk.balances(on_failure="dead-letter", retries=0)
    account_id = desk.open(1)
    stop = threading.Event()
    runner = Runner(desk.consumer(), stop)
    thread = threading.Thread(target=lambda: suppressed(runner))
    thread.start()
    try:
        until(lambda: runner.progress.position == 2 and runner.progress.state == "up to date")
        desk.Balance.__table__.drop(desk.consumer().application.engine)
        desk.deposit(account_id, 2)
        until(lambda: isinstance(runner.progress.halted, CheckpointMismatchError))
    finally:
        stop.set()
        thread.join()
    status = desk.status()
    assert (status.state, status.dead_letters, status.position) == ("tables missing", 0, 2)


def test_a_table_that_was_made_again_is_a_named_state(desk: Desk) -> None:
    """A projection whose table was dropped and created again is a fault, until a rebuild."""
    desk.balances()
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    make_again(desk)
    refused(desk, "tables made again")
    rebuild(desk)
    assert desk.amounts() == {account_id: 3}
    assert desk.status().state == "stopped"
    assert not desk.run_once()


def test_a_checkpoint_without_a_column_of_this_version_is_named(desk: Desk) -> None:
    """Before the migration that adds a column, each says which command names it; after that, projections go on."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    kind = desk.consumer().checkpoint.table.c.last_event_id.type.compile(desk.engine.dialect)
    execute(desk, "ALTER TABLE bank_projections DROP COLUMN last_event_id")
    (error,) = desk.run_once()
    assert isinstance(error, UnsafeTableError)
    assert "bank_projections lacks a column" in str(error)
    with desk.context():
        with pytest.raises(UnsafeTableError, match="check"):
            desk.health()
        with pytest.raises(UnsafeTableError, match="check"):
            desk.wait_for("Balances", 2, timeout=5)
    assert "lacks a column" in desk.command("status").output
    done = desk.command("check")
    assert done.exit_code == 1
    assert "bank_projections.last_event_id is missing: let a migration add it" in done.output
    execute(desk, f"ALTER TABLE bank_projections ADD COLUMN last_event_id {kind}")
    desk.deposit(account_id, 1)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 2}


def test_a_model_that_was_added_is_a_named_state(desk: Desk) -> None:
    """A model that is added to a projection is a fault, as it lacks rows of earlier events."""
    first = desk.balances()
    desk.open(1)
    assert not desk.run_once()
    first.models = (desk.Balance, desk.Seen)
    with desk.context():
        desk.create_all()
    vars(desk.consumer()).pop("tables", None)
    refused(desk, "tables made again")
    command(desk, "projections", "accept", "Balances")
    assert not desk.run_once()
    assert desk.status().problem is None


def test_tables_that_were_altered_or_restored_with_all_others_are_as_they_were(desk: Desk) -> None:
    """A migration, and an empty table that lacks no rows, are not faults."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    execute(desk, "ALTER TABLE balance ADD COLUMN note VARCHAR(10)", "CREATE TABLE elsewhere (id INTEGER)")
    try:
        desk.deposit(account_id, 2)
        assert not desk.run_once()
        assert desk.amounts() == {account_id: 3}
    finally:
        execute(desk, "DROP TABLE elsewhere")


def test_an_idle_worker_sees_that_its_tables_were_made_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle worker notices the fault, too, and halts."""
    monkeypatch.setattr(claims, "LOOK_EVERY", 0.1)
    desk.balances()
    desk.open(1, 2)
    runner = Runner(desk.consumer(), threading.Event())
    with started(runner):
        until(lambda: desk.position() == 3)
        until(lambda: json.loads(desk.row().tables_id or "{}").get("applied") == 3)
        make_again(desk)
        until(lambda: runner.progress.state == "halted")
    assert isinstance(runner.progress.halted, CheckpointMismatchError)


# ----------------------------------------------------------------------------------------------------------------- code


def started(runner: Runner) -> Any:
    """Run a runner in a thread, within the block."""
    return Started(runner)


class Started:
    """A thread that runs a runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.runner.run()
        except CheckpointMismatchError:
            logging.getLogger(__name__).debug("halted")

    def __enter__(self) -> Runner:
        self.thread.start()
        return self.runner

    def __exit__(self, *_: object) -> None:
        self.runner.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


def with_code(desk: Desk, fingerprint: str) -> Any:
    """Return the consumer as a process with other code has it."""
    consumer = desk.consumer()
    vars(consumer)["fingerprint"] = fingerprint
    return consumer


def rebuild_by(desk: Desk, fingerprint: str) -> None:
    """Rebuild as a process with other code does."""
    building = Rebuild(with_code(desk, fingerprint))
    vars(building.live)["fingerprint"] = fingerprint
    assert building.run() is not None


def test_old_code_stands_by_after_a_rebuild(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A worker with code from before a rebuild does not write the new tables, and says so."""
    desk.balances()
    account_id = desk.open(1)
    old = Runner(desk.consumer(), threading.Event())
    with caplog.at_level(logging.WARNING), started(old):
        until(lambda: desk.position() == 2 and old.progress.state == "up to date")
        rebuild_by(desk, OTHER)
        until(lambda: old.progress.state == "standing by")
        new = Runner(with_code(desk, OTHER), threading.Event())
        with started(new):
            until(lambda: new.progress.state == "up to date")
            desk.deposit(account_id, 5)
            until(lambda: new.progress.events == 1)
            assert desk.position() == 3
            assert desk.row().is_run_by(OTHER)
    assert "old code" in caplog.text
    assert desk.status().state == "old code"
    (error,) = desk.run_once("Balances")
    assert "projections accept Balances" in str(error)
    command(desk, "projections", "accept", "Balances")
    assert not desk.run_once()
    assert desk.status().code_changed


def test_new_code_without_a_rebuild_goes_on(desk: Desk) -> None:
    """Deploying new code does not stop a projection; the status shows that the code has changed."""
    desk.balances()
    account_id = desk.open(1)
    Runner(with_code(desk, OTHER), threading.Event()).run(once=True)
    assert desk.row().fingerprint == OTHER
    desk.deposit(account_id, 2)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 3}
    assert desk.status().code_changed
    assert "code has changed" in command(desk, "status")
    rebuild(desk)
    assert not desk.status().code_changed
    # Both of them ran, and only the last one is not old now.
    rebuild_by(desk, "1" * 64)
    assert set((desk.row().earlier_fingerprints or "").split()) == {OTHER, desk.consumer().fingerprint}


def test_a_rebuild_beside_an_idle_worker_gives_the_claim_back(desk: Desk) -> None:
    """A worker that has nothing to do goes on after a rebuild, and the status says that it runs."""
    desk.balances()
    account_id = desk.open(1)
    with desk.running():
        until(lambda: desk.position() == 2)
        rebuild(desk)
        assert desk.status().state == "running"
        desk.deposit(account_id, 5)
        until(lambda: desk.position() == 3)
    assert desk.amounts() == {account_id: 6}


MODULE = '''
from flask_eventsourcing.projections import ModelProjection, on
from {base} import Base


class Balances(Base, ModelProjection):
    """Balances."""

    @on(object)
    def opened(self, event, session):
        # {comment}
        return event{operator}1
'''
BASE = """
class Base:
    FACTOR = {factor}
"""


@pytest.fixture
def fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Returns the fingerprint of a projection in modules of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made: list[str] = ["belonging_projection", "belonging_base"]

    def make(comment: str = "one", operator: str = "+", factor: int = 1) -> str:
        for name in made:
            sys.modules.pop(name, None)
        (tmp_path / "belonging_base.py").write_text(BASE.format(factor=factor))
        text = MODULE.format(base="belonging_base", comment=comment, operator=operator)
        (tmp_path / "belonging_projection.py").write_text(text)
        importlib.invalidate_caches()
        cls = importlib.import_module("belonging_projection").Balances
        note_sources(cls)
        return fingerprint_of(cls, cls.handlers.functions.values())

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_a_fingerprint_changes_with_the_code_and_not_with_comments(fingerprint: Callable[..., str]) -> None:
    """Comments, docstrings and blank lines do not change the fingerprint; handlers and bases do."""
    first = fingerprint()
    assert fingerprint(comment="another\n\n\n") == first
    assert fingerprint(operator=" + ") == first
    assert fingerprint(operator="-") != first
    assert fingerprint(factor=2) != first


def test_a_fingerprint_is_the_same_while_other_threads_parse(
    fingerprint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runners parse one after the other, and again where Python fails because another thread has parsed something."""
    first = fingerprint()
    parse = ast.parse
    running: list[int] = []
    most: list[int] = []
    failing = [True]

    def watched(source: str, *args: Any, **kwargs: Any) -> ast.Module:
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()
        if failing and failing.pop():
            raise SystemError("AST constructor recursion depth mismatch (before=171, after=226)")
        parsed: ast.Module = parse(source, *args, **kwargs)
        return parsed

    monkeypatch.setattr(ast, "parse", watched)
    monkeypatch.setattr(fingerprints, "_digests", {})
    cls = sys.modules["belonging_projection"].Balances
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fingerprint_of(cls, cls.handlers.functions.values()), range(4)))
    assert found == [first] * 4
    assert set(most) == {1}


def test_a_fingerprint_is_that_of_the_source_when_the_class_was_registered(
    fingerprint: Callable[..., str], tmp_path: Path
) -> None:
    """A deployment that replaces the files under a running process does not change what that process is."""
    first = fingerprint()
    cls = sys.modules["belonging_projection"].Balances
    (tmp_path / "belonging_base.py").write_text(BASE.format(factor=7))
    assert fingerprint_of(cls, cls.handlers.functions.values()) == first


def test_a_source_that_was_replaced_during_the_import_is_not_taken(
    fingerprint: Callable[..., str], tmp_path: Path
) -> None:
    """A process that has loaded the old code keeps its fingerprint, although the files have changed."""
    new = fingerprint(operator="-")
    fingerprint(operator="+")
    cls = sys.modules["belonging_projection"].Balances
    text = MODULE.format(base="belonging_base", comment="one", operator="-")
    (tmp_path / "belonging_projection.py").write_text(text)
    note_sources(cls)
    assert fingerprint_of(cls, cls.handlers.functions.values()) != new


def test_a_fingerprint_without_source_is_made_of_code_objects() -> None:
    """Without source, code objects still tell one release from another."""

    def make(text: str) -> str:
        namespace: dict[str, Any] = {"__name__": "no_such_module"}
        exec(textwrap.dedent(text), namespace)  # noqa: S102
        cls = namespace["Thing"]
        return fingerprint_of(cls, [cls.handle])

    first = make("class Thing:\n    def handle(self): return 1 if self in {'a', 'b'} else 2")
    assert make("class Thing:\n\n    # more\n    def handle(self): return 1 if self in {'a', 'b'} else 2") == first
    assert make("class Thing:\n    def handle(self): return 1 if self in {'a', 'c'} else 2") != first
    assert make("class Thing:\n    def handle(self): return 1 if self in {'a', 'b'} else 3") != first


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """The fingerprint does not depend on hashes or the order of imports."""
    text = (
        "from flask_eventsourcing.projections.definitions.fingerprints import fingerprint_of\n"
        "from tests.domain import Account\n"
        "print(fingerprint_of(Account, []))"
    )
    done = []
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        run = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=True)
        done.append(run.stdout.strip())
    assert done == [fingerprint_of(Account, [])] * 2


# --------------------------------------------------------------------------------------------------------------- topics


def move_topic(desk: Desk, topic: str) -> None:
    """Let the deposits have another topic, as those of a class that was moved."""
    table = events(desk)
    deposited = table.c.topic == utils.get_topic(Deposited)
    execute(desk, sa.update(table).where(deposited).values(topic=topic))


@pytest.mark.parametrize("collect_from", [0, 2000])
def test_an_event_whose_class_is_gone_halts(desk: Desk, monkeypatch: pytest.MonkeyPatch, collect_from: int) -> None:
    """An event of a renamed class is not skipped silently: the projection halts and names the topic."""
    monkeypatch.setattr(pages, "COLLECT_FROM", collect_from)
    desk.balances(retries=0)
    account_id = desk.open(1, 2)
    move_topic(desk, "tests.no_module_left:Konto.Deposited")
    (error,) = desk.run_once("Balances")
    assert "tests.no_module_left:Konto" in str(error)
    assert "register_topic" in str(error)
    assert desk.position() == 1
    utils.register_topic("tests.no_module_left:Konto", Account)
    try:
        desk.consumer().checkpoint.resume()
        assert not desk.run_once()
        assert desk.amounts() == {account_id: 3}
    finally:
        del utils._topic_cache["tests.no_module_left:Konto"]
        utils._topic_cache.pop("tests.no_module_left:Konto.Deposited", None)


@on_sqlite
@pytest.mark.parametrize("collect_from", [0, 2000])
def test_a_class_that_is_imported_by_its_topic_is_handled(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, collect_from: int
) -> None:
    """An event is handled whose class no module has imported yet; a rebuild handles it too."""
    monkeypatch.setattr(pages, "COLLECT_FROM", collect_from)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "belonging_late.py").write_text(
        "from tests.domain import Account\n\n"
        "class Late(Account):\n    class Deposited(Account.Deposited):\n        pass\n"
    )
    desk.balances()
    account_id = desk.open(1, 2)
    move_topic(desk, "belonging_late:Late.Deposited")
    try:
        assert not desk.run_once()
        assert desk.amounts() == {account_id: 3}
        rebuild(desk)
        assert desk.amounts() == {account_id: 3}
    finally:
        sys.modules.pop("belonging_late", None)


def test_known_topics_are_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The topics of a log are stored with the position up to which they were collected, and not read again."""
    monkeypatch.setattr(pages, "COLLECT_FROM", 3)
    desk.balances()
    desk.open(1, 2, 3, 4)
    assert not desk.run_once()
    row = desk.row()
    assert set(json.loads(row.topics or "")) == {utils.get_topic(Created), utils.get_topic(Deposited)}
    assert row.topics_position == row.position == 5


def test_topics_that_a_migration_has_changed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild reads events whose topics were changed in the database, although the class has its old topic too."""
    monkeypatch.setattr(pages, "COLLECT_FROM", 3)
    desk.balances()
    account_id = desk.open(1, 2, 3, 4)
    assert not desk.run_once()
    assert desk.row().topics
    utils.register_topic("tests.migrated:Deposited", Deposited)
    table = events(desk)
    change = sa.update(table).where(table.c.topic == utils.get_topic(Deposited))
    execute(desk, change.values(topic="tests.migrated:Deposited"))
    rebuild(desk)
    assert desk.amounts() == {account_id: 10}


# ------------------------------------------------------------------------------------------------------- names and keys


def rename_row(desk: Desk, old: str, new: str) -> None:
    """Have a checkpoint as if the projection had had another name."""
    table = desk.any_consumer().application.models.tables["projections"]
    execute(desk, sa.update(table).where(table.c.name == old).values(name=new))


def test_reactions_do_not_begin_again_beside_an_orphan(desk: Desk) -> None:
    """Reactions of a renamed projection send nothing a second time; a command gives them their position."""
    desk.reacting()
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    rename_row(desk, "Reacting:reactions", "Former:reactions")
    refused(desk, "beside an orphan", "Reacting:reactions")
    assert len(desk.calls) == 2
    assert "not registered" in command(desk, "projections", "list")
    listed = json.loads(command(desk, "projections", "list", "--json"))
    assert [entry["name"] for entry in listed if entry["orphan"]] == ["Former:reactions"]
    command(desk, "projections", "rename", "Former", "Reacting")
    desk.deposit(account_id, 3)
    assert not desk.run_once()
    assert [version for _, version, _ in desk.calls] == [2, 3, 4]


def test_a_projection_does_not_begin_again_in_rows_of_a_former_name(desk: Desk) -> None:
    """The events of a renamed projection are not applied to its rows a second time; a command gives it its position."""
    desk.listing()
    account_id = desk.open(1, 2)
    assert not desk.run_once()
    rename_row(desk, "Listing", "Former")
    for _ in range(2):
        refused(desk, "beside an orphan", "Listing")
    # As a command may have made it, or an earlier version.
    desk.consumer("Listing").checkpoint.ensure()
    refused(desk, "beside an orphan", "Listing")
    assert seen(desk) == [1, 2, 3]
    command(desk, "projections", "rename", "Former", "Listing")
    desk.deposit(account_id, 3)
    assert not desk.run_once()
    assert seen(desk) == [1, 2, 3, 4]


def seen(desk: Desk) -> list[int]:
    """Return the versions of the events that are listed."""
    with desk.engine.connect() as connection:
        return list(connection.scalars(sa.select(desk.Seen.version).order_by(desk.Seen.id)))


def test_a_projection_is_rebuilt_beside_an_orphan(desk: Desk) -> None:
    """One that has the tables of a removed projection is rebuilt, and one with tables of its own is not kept back."""
    desk.listing()
    desk.open(1)
    assert not desk.run_once()
    rename_row(desk, "Listing", "Former")
    assert Rebuild(desk.consumer("Listing")).run() is not None
    assert not desk.run_once()
    assert seen(desk) == [1, 2]
    desk.balances()
    assert not desk.run_once()


def test_rows_of_a_lost_checkpoint_are_told(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that begins at the start of the log warns if the tables have rows, as events may be applied twice."""
    desk.listing()
    desk.open(1)
    assert not desk.run_once()
    assert "has rows" not in caplog.text
    execute(desk, "DELETE FROM bank_projections")
    assert not desk.run_once()
    assert "Listing begins at the start of the log, and its table seen has rows" in caplog.text


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_table_that_was_emptied_is_a_named_state(desk: Desk) -> None:
    """A table that somebody has truncated lacks its rows, which the state says."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    amounts = desk.amounts()
    execute(desk, "TRUNCATE TABLE balance")
    refused(desk, "tables made again", position=2)
    rebuild(desk)
    assert desk.amounts() == amounts
    desk.deposit(account_id, 2)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 3}


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_table_that_was_rewritten_or_emptied_by_its_handlers_is_as_it_was(desk: Desk) -> None:
    """A table that was rewritten has its rows, and one that handlers have emptied needs none."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    with desk.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM FULL balance")
    assert desk.status().problem is None
    desk.deposit(account_id, 2)
    assert not desk.run_once()
    assert desk.amounts() == {account_id: 3}


def test_what_is_not_registered_can_be_forgotten(desk: Desk) -> None:
    """A command deletes the checkpoints of a removed projection, and not those of a registered one."""
    desk.reacting()
    desk.open(1)
    assert not desk.run_once()
    rename_row(desk, "Reacting:reactions", "Former:reactions")
    application = desk.any_consumer().application
    with pytest.raises(CheckpointError, match="registered"):
        upkeep.forget(application, "Reacting")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        upkeep.forget(application, "Nobody")
    assert "Forgot Former:reactions" in command(desk, "projections", "forget", "Former", "--yes")
    assert not desk.run_once()
    assert len(desk.calls) == 2


def test_a_projection_with_a_checkpoint_of_its_own_takes_no_other(desk: Desk) -> None:
    """Renaming overwrites no other position, and is refused while a worker runs, or to what can be no name."""
    desk.balances()
    desk.reacting()
    desk.open(1)
    assert not desk.run_once()
    application = desk.consumer().application
    with pytest.raises(CheckpointError, match="of its own"):
        upkeep.rename(application, "Reacting", "Balances")
    for name in ("", "a:b", "x" * 101):
        with pytest.raises(CheckpointError, match="1 to 100 characters"):
            upkeep.rename(application, "Reacting", name)
    with desk.running("Balances"):
        until(lambda: desk.status().state == "running")
        with pytest.raises(CheckpointError, match="is run by"):
            upkeep.rename(application, "Balances", "Other")


def test_a_key_names_the_event(desk: Desk) -> None:
    """After a restore of the log, another event at the same position has another key."""
    desk.reacting()
    account_id = desk.open(1)
    assert not desk.run_once()
    restore_log(desk, 1)
    command(desk, "projections", "accept", "Reacting:reactions")
    desk.deposit(account_id, 2)
    assert not desk.run_once()
    (_, first_version, first), (_, version, second) = desk.calls
    assert first_version == version == 2
    assert first != second
    assert first.split("/")[:-1] == second.split("/")[:-1]


# ------------------------------------------------------------------------------------------------------------ the claim


def test_a_row_that_was_set_back_is_seen_by_an_idle_worker(desk: Desk) -> None:
    """After a restore in place a waiting worker applies the events that are saved again."""
    desk.balances()
    account_id = desk.open(1)
    assert not desk.run_once()
    table = desk.consumer().checkpoint.table
    with desk.consumer().application.engine.connect() as connection:
        before = connection.execute(sa.select(table)).mappings().one()
    desk.deposit(account_id, 5)
    with desk.running():
        until(lambda: desk.position() == 3)
        execute(desk, sa.update(table).values(**dict(before)), sa.update(desk.Balance.__table__).values(amount=1))
        until(lambda: desk.amounts() == {account_id: 6})


@on_sqlite
def test_a_lease_of_a_wrong_clock_is_taken_over(new_desk: MakeDesk) -> None:
    """A lease that is not renewed is taken over within seconds, even if a wrong clock set its end an hour ahead."""
    desk = new_desk(EVENTSOURCING_PROJECTION_LOCK="lease")
    desk.balances()
    account_id = desk.open(1)
    checkpoint = desk.consumer().checkpoint
    checkpoint.ensure()
    claimed = checkpoint.claim(lease=True)
    assert isinstance(claimed, CheckpointRow)
    checkpoint.note(claimed, leased_until=utc_now() + timedelta(hours=1))
    assert desk.status().state == "stopped"
    with desk.running():
        until(lambda: desk.amounts() == {account_id: 1})


def test_reactions_of_one_name(desk: Desk) -> None:
    """Keys of two projections for one event are different."""
    desk.reacting()

    class Mailing(ModelProjection):
        @reaction(Deposited)
        def mail(self, event: Any, key: str) -> None:
            desk.calls.append((event.originator_id, event.originator_version, key))

    desk.register(Mailing)
    desk.open(1)
    assert not desk.run_once()
    assert len({key for _, _, key in desk.calls}) == 2
