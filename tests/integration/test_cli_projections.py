"""``flask eventsourcing run``, ``status``, ``rebuild`` and ``dead-letters``, as processes with real signals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from flask import Flask

from tests import servers
from tests.domain import Account, Bank
from tests.integration import projected_app
from tests.integration.projected_app import POISON
from tests.servers import Server, ServerFolder

pytestmark = pytest.mark.xdist_group("cli_projections")

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "flask", "--app", "tests.integration.projected_app", "eventsourcing"]
PATIENCE = 60.0


class Ledger:
    """An app with projections on a database, and its commands, as processes where signals or the log matter.

    :param folder: where the processes write what they print.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        os.environ["DATABASE_URL"] = url
        self.app: Flask = projected_app.create_app()

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        """Return the environment of a process."""
        return {**os.environ, "DATABASE_URL": self.url, "PYTHONPATH": str(ROOT), **variables}

    def create(self) -> None:
        """Make the tables."""
        assert self.run("init-db")[0] == 0
        with self.app.app_context():
            projected_app.db.create_all()

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Run a command to its end, in this process; returns the exit status and all that it prints."""
        result = self.app.test_cli_runner(env=variables).invoke(args=["eventsourcing", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    @contextmanager
    def running(self, *arguments: str, **variables: str) -> Iterator[Running]:
        """Run a command until the end of the block at the latest."""
        log = self.folder / f"run-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*COMMAND, *arguments], env=self.environment(variables), stdout=output, stderr=output
            )
        try:
            yield Running(process, log)
        finally:
            process.kill()
            process.wait()

    def deposit(self, amounts: Sequence[int], account_id: UUID | None = None) -> UUID:
        """Pay into an account, a new one unless told otherwise, in one commit."""
        with self.app.app_context():
            bank: Bank = projected_app.es.application
            account = Account("Ada") if account_id is None else bank.account(account_id)
            for amount in amounts:
                account.deposit(amount)
            bank.save(account)
            projected_app.db.session.commit()
            return account.id

    def scalar(self, query: Any) -> Any:
        """Return what a query finds."""
        with self.app.app_context():
            return projected_app.db.session.scalar(query)

    def balance(self, account_id: UUID) -> int | None:
        """Return what the read model has."""
        found: int | None = self.scalar(
            sa.select(projected_app.Balance.amount).where(projected_app.Balance.account_id == account_id)
        )
        return found

    def noted(self, by: str) -> list[int]:
        """Return the deposits that a projection has noted."""
        model = projected_app.Deposit
        with self.app.app_context():
            query = sa.select(model.amount).where(model.noted_by == by).order_by(model.account_id, model.version)
            return list(projected_app.db.session.scalars(query))

    def status(self) -> dict[str, dict[str, Any]]:
        """Return what ``status --json`` tells, by the names of the projections."""
        code, output = self.run("status", "--json")
        assert code == 0
        return {each["name"]: each for each in json.loads(output)["projections"]}

    def close(self) -> None:
        """Close every connection."""
        projected_app.es.close(self.app)
        with self.app.app_context():
            projected_app.db.engine.dispose()


class Running:
    """A process that runs, and what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something holds; the process has to live that long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.long),
        pytest.param("mariadb", marks=pytest.mark.long),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that processes can share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'bank.db'}"
    found: str = request.getfixturevalue("mariadb_url" if request.param == "mariadb" else "postgres_url")
    return found


@pytest.fixture
def empty(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """An app on a database without tables."""
    monkeypatch.setenv("DATABASE_URL", url)
    made = Ledger(url, tmp_path)
    yield made
    made.close()


@pytest.fixture
def ledger(empty: Ledger) -> Ledger:
    """An app with its tables."""
    empty.create()
    return empty


@pytest.fixture
def sqlite_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """An app on SQLite, for what does not depend on the database."""
    monkeypatch.setenv("DATABASE_URL", "")
    made = Ledger(f"sqlite:///{tmp_path / 'bank.db'}", tmp_path)
    made.create()
    yield made
    made.close()


def test_missing_tables_are_one_line(empty: Ledger) -> None:
    """Without its tables every command says in one line which are missing and what to run; ``init-db`` makes them."""
    for arguments in (("run", "--all"), ("status",), ("rebuild", "Balances"), ("dead-letters", "list")):
        code, output = empty.run(*arguments)
        assert code == 1
        assert output.startswith("Error: Tables are missing (")
        assert "bank_projections" in output
        assert "flask eventsourcing init-db" in output
        assert output.count("\n") == 1
    code, output = empty.run("check")
    assert code == 1
    assert "Projections: table balance is missing" in output
    code, output = empty.run("init-db")
    assert code == 0
    assert "Created table bank_dead_letters.\n" in output
    assert "Created table balance.\n" in output
    assert empty.run("check")[0] == 0


def test_once_catches_up_and_ends(ledger: Ledger) -> None:
    """``run --once`` applies what there is, reactions after the models that they follow, and exits with 0."""
    account_id = ledger.deposit([1] * 50)
    with ledger.running("run", "Balances", "--once") as worker:
        assert worker.process.wait(PATIENCE) == 0, worker.output
        assert "INFO Balances: up to date, position 51, head 51, lag 0, " in worker.output
    assert ledger.balance(account_id) == 50
    status = ledger.status()
    assert [status[name]["position"] for name in ("Balances", "Balances:reactions", "Picky")] == [51, 51, 0]
    assert status["Balances"]["lag_events"] == 0
    assert status["Picky"]["lag_events"] == 50


def test_only_the_reactions(ledger: Ledger) -> None:
    """``run Balances:reactions`` runs the reactions alone, and they wait for their models."""
    ledger.deposit([1])
    assert ledger.run("run", "Balances:reactions", "--once")[0] == 0
    assert {ledger.status()[name]["position"] for name in ("Balances", "Balances:reactions")} == {0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_worker(ledger: Ledger, number: int) -> None:
    """SIGTERM and SIGINT finish the batch in progress and exit with 0, and no process is left."""
    account_id = ledger.deposit([1] * 4000)
    with ledger.running("run", "Balances", "--log-every", "0.5", PAUSE="0.01") as worker:
        worker.wait_for(lambda: "Balances: catching up, position" in worker.output)
        assert ledger.status()["Balances"]["state"] == "running"
        assert worker.end(number) == 0, worker.output
        assert f"{signal.Signals(number).name}: ending after the batch in progress" in worker.output
        assert "Traceback" not in worker.output
    status = ledger.status()["Balances"]
    assert status["state"] == "stopped"
    assert status["runner"] is None
    assert ledger.balance(account_id) == status["position"] - 1 < 4000


def test_a_second_signal_ends_at_once(sqlite_ledger: Ledger) -> None:
    """A second signal does not wait for the batch, which is then as if it had not begun."""
    sqlite_ledger.deposit([1])
    with sqlite_ledger.running("run", "Balances", "--log-every", "0.2", PAUSE="3600") as worker:
        worker.wait_for(lambda: "position 1, " in worker.output)
        worker.process.send_signal(signal.SIGTERM)
        worker.wait_for(lambda: "ending after the batch" in worker.output)
        assert worker.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert sqlite_ledger.status()["Balances"]["position"] <= 1


def test_a_halted_projection_does_not_stop_the_others(ledger: Ledger) -> None:
    """A projection that halts is named at once, the others go on, and the exit status is 1 at the end."""
    account_id = ledger.deposit([5, POISON, 5])
    with ledger.running("run", "Balances", "Fragile") as worker:
        worker.wait_for(lambda: "Fragile is halted before position 3" in worker.output)
        ledger.deposit([1], account_id)
        worker.wait_for(lambda: ledger.balance(account_id) == 24)
        assert worker.end() == 1
        assert worker.output.rpartition("\nError: ")[2].startswith("Fragile is halted before position 3: event 3 (")
    status = ledger.status()["Fragile"]
    assert (status["state"], status["failed_position"], status["position"]) == ("halted", 3, 2)
    assert ledger.noted("fragile") == [5]
    code, output = ledger.run("status", "--check")
    assert code == 1
    assert "Fragile: halted at event 3 (" in output
    assert ledger.run("run", "Fragile", "--once", CORRECTED="1")[0] == 0
    assert ledger.noted("fragile") == [5, POISON, 5, 1]


def test_a_restarted_worker_tries_again(sqlite_ledger: Ledger) -> None:
    """A worker that starts lets a halted projection try again, which halts again when nothing was corrected."""
    sqlite_ledger.deposit([POISON])
    for _ in range(2):
        code, output = sqlite_ledger.run("run", "Fragile", "--once")
        assert code == 1
        assert "thirteen is not an amount" in output
    assert sqlite_ledger.run("run", "Fragile", "--once", CORRECTED="1")[0] == 0
    assert sqlite_ledger.status()["Fragile"]["state"] == "stopped"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Give the projections to run, or --all. Registered: Balances, Balances:reactions, Fragile, Picky."),
        (["Nobody"], 1, "There is no projection 'Nobody'. Registered: Balances, Balances:reactions, Fragile, Picky"),
        (["Balances", "--all"], 2, "Give names or --all, not both."),
        (["Inline"], 1, "Projection 'Inline' is inline: it runs within save()"),
        (["Fragile:reactions"], 1, "There is no projection 'Fragile:reactions'"),
        (["--all", "--log-every", "0"], 2, "--log-every"),
    ],
)
def test_what_cannot_be_run(sqlite_ledger: Ledger, arguments: list[str], code: int, message: str) -> None:
    """What cannot be run is one clear message that names what can."""
    found, output = sqlite_ledger.run("run", *arguments)
    assert found == code
    assert message in output


def test_a_progress_bar_on_a_terminal(sqlite_ledger: Ledger) -> None:
    """On a terminal there is a bar with the rate and the time left while it catches up, and a line when it has."""
    sqlite_ledger.deposit([1] * 3000)
    controller, terminal = pty.openpty()
    environment = sqlite_ledger.environment({"PAUSE": "0.0005", "TERM": "xterm"})
    command = [*COMMAND, "run", "Picky", "--once"]
    process = subprocess.Popen(command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while chunk := _read(controller):
            shown += chunk
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    text = shown.decode()
    assert re.search(r"Picky  \[#+-+\] +\d+%  \d\d:\d\d:\d\d  [\d,]+ events/s", text)
    assert "Picky: up to date, position 3001, head 3001" in text


def _read(file: int) -> bytes:
    try:
        return os.read(file, 4096)
    except OSError:
        # That is how the end of a terminal reads.
        return b""


def test_the_status_for_people_and_machines(ledger: Ledger) -> None:
    """``status`` shows a line for each projection, and ``--json`` the same for programs, with who runs it."""
    ledger.deposit([1, 2])
    code, output = ledger.run("status")
    assert code == 0
    heads, *lines = output.splitlines()
    assert heads.split()[:6] == ["NAME", "APPLICATION", "STATE", "POSITION", "HEAD", "LAG"]
    assert [line.split()[:6] for line in lines] == [
        ["Balances", "Bank", "stopped", "0", "3", "3"],
        ["Balances:reactions", "Bank", "stopped", "0", "3", "2"],
        ["Fragile", "Bank", "stopped", "0", "3", "2"],
        ["Picky", "Bank", "stopped", "0", "3", "2"],
        ["Inline", "Bank", "inline", "3", "3", "0"],
    ]
    with ledger.running("run", "--all") as worker:
        worker.wait_for(lambda: all(each["state"] in ("running", "inline") for each in ledger.status().values()))
        status = ledger.status()["Balances"]
        assert str(status["runner"]).endswith(f":{worker.process.pid}")
        assert status["since"].endswith("+00:00")
        assert ledger.run("status", "--check")[0] == 0
        assert worker.end() == 0


def test_another_worker_stands_by(ledger: Ledger) -> None:
    """A second worker says that it stands by, and takes over when the first one is killed."""
    account_id = ledger.deposit([1])
    with ledger.running("run", "Balances", "--log-every", "0.5") as first:
        first.wait_for(lambda: ledger.balance(account_id) == 1)
        with ledger.running("run", "Balances", "--log-every", "0.5") as second:
            second.wait_for(lambda: "Balances: standing by, position 2; another process runs it" in second.output)
            first.process.kill()
            ledger.deposit([1], account_id)
            second.wait_for(lambda: ledger.balance(account_id) == 2)
            assert second.end() == 0


def test_dead_letters(ledger: Ledger) -> None:
    """Events that were set aside are listed and shown, fail again until their handler is corrected, and are applied."""
    first, second = ledger.deposit([1, POISON, 2]), ledger.deposit([3])
    assert ledger.run("dead-letters", "list") == (0, "There are no dead letters.\n")
    assert ledger.run("run", "Picky", "--once")[0] == 0
    assert ledger.noted("picky").count(3) == 1
    code, output = ledger.run("dead-letters", "list", "--json")
    failed, waiting = json.loads(output)
    assert (failed["position"], failed["originator_id"], failed["attempts"]) == (3, str(first), 1)
    assert (waiting["position"], waiting["error"]) == (4, None)
    code, output = ledger.run("dead-letters", "list", "--projection", "Picky")
    assert "Account.Deposited" in output
    assert "ValueError: thirteen is not an amount" in output
    assert "(waits for the one before it)" in output
    assert "Picky: 1 dead letter, 1 waiting behind" in ledger.run("status")[1]
    code, output = ledger.run("dead-letters", "show", str(failed["id"]))
    assert code == 0
    assert 'raise ValueError("thirteen is not an amount")' in output
    code, output = ledger.run("dead-letters", "retry", "--all")
    assert code == 1
    assert f"{failed['id']} failed: Picky, event 3" in output
    code, output = ledger.run("dead-letters", "retry", str(failed["id"]), CORRECTED="1")
    assert code == 0
    assert [line.split()[1] for line in output.splitlines()] == ["applied:", "applied:"]
    assert ledger.run("dead-letters", "list") == (0, "There are no dead letters.\n")
    assert sorted(ledger.noted("picky")) == [1, 2, 3, POISON]
    assert second != first


def test_dead_letters_are_discarded_when_confirmed(sqlite_ledger: Ledger) -> None:
    """Discarding asks first; then the event is removed from the list, and those that wait for it are applied."""
    sqlite_ledger.deposit([POISON, 2])
    assert sqlite_ledger.run("run", "Picky", "--once")[0] == 0
    ids = [each["id"] for each in json.loads(sqlite_ledger.run("dead-letters", "list", "--json")[1])]
    code, output = sqlite_ledger.run("dead-letters", "discard", str(ids[0]))
    assert code == 1
    assert "Discard them? [y/N]" in output
    assert sqlite_ledger.noted("picky") == []
    code, output = sqlite_ledger.run("dead-letters", "discard", str(ids[1]), "--yes")
    assert code == 1
    assert "only waits for an earlier one" in output
    assert sqlite_ledger.run("dead-letters", "discard", str(ids[0]), "--yes")[0] == 0
    assert sqlite_ledger.noted("picky") == [2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "7"], 1, "There is no dead letter 7"),
        (["retry", "7"], 1, "There is no dead letter 7"),
        (["retry"], 2, "Give the ids of dead letters, or --all."),
        (["retry", "--all", "7"], 2, "Give the ids of dead letters, or --all."),
        (["list", "--projection", "Nobody"], 1, "There is no projection 'Nobody'"),
        (["show", "9" * 20], 2, "ID is a number up to 9223372036854775807"),
        (["retry", "7", "9" * 20], 2, "ID is a number up to 9223372036854775807"),
        (["list", "--aggregate", "\udcff"], 2, "--aggregate is no text in the encoding of the command line."),
    ],
)
def test_dead_letters_that_are_not_there(sqlite_ledger: Ledger, arguments: list[str], code: int, message: str) -> None:
    """A dead letter or projection that does not exist is one clear message."""
    found, output = sqlite_ledger.run("dead-letters", *arguments)
    assert found == code
    assert message in output


def test_rebuild(ledger: Ledger) -> None:
    """``rebuild`` corrects rows from the log, reports their numbers, and drops the old tables on request."""
    account_id = ledger.deposit([1, 2, 3])
    assert ledger.run("run", "Balances", "--once")[0] == 0
    with ledger.app.app_context():
        projected_app.db.session.execute(sa.update(projected_app.Balance).values(amount=-1))
        projected_app.db.session.commit()
    code, output = ledger.run("rebuild", "Balances", "--dry-run")
    assert code == 0
    assert output.startswith("4 events, about ")
    assert ledger.balance(account_id) == -1
    code, output = ledger.run("rebuild", "Balances", "--drop-old")
    assert code == 0, output
    assert "balance: 1 rows, 1 before." in output
    assert "Rebuilt up to position 4 (4 events in " in output
    assert "Dropped table balance__old." in output
    assert ledger.balance(account_id) == 6


def test_what_rebuilds_leave(sqlite_ledger: Ledger) -> None:
    """``status`` names what rebuilds have left behind; ``--clean`` and ``--give-up`` drop it, once."""
    sqlite_ledger.deposit([1, 2, 3])
    assert sqlite_ledger.run("rebuild", "Balances")[0] == 0
    assert (
        "Balances: balance__old replaced by a rebuild: drop with 'flask eventsourcing rebuild Balances --clean'"
        in (sqlite_ledger.run("status")[1])
    )
    with sqlite_ledger.app.app_context():
        projected_app.db.session.execute(sa.text("CREATE TABLE balance__new (account_id INTEGER)"))
        projected_app.db.session.commit()
    assert "balance__new left of a rebuild" in sqlite_ledger.run("status")[1]
    assert sqlite_ledger.run("rebuild", "Balances", "--clean") == (0, "Dropped table balance__old.\n")
    assert sqlite_ledger.run("rebuild", "Balances", "--give-up") == (0, "Dropped table balance__new.\n")
    assert sqlite_ledger.run("rebuild", "Balances", "--give-up") == (0, "There is nothing to drop.\n")
    assert "__" not in sqlite_ledger.run("status")[1]
    assert sqlite_ledger.run("rebuild", "Balances", "--clean", "--give-up")[0] == 2


def test_a_rebuild_that_was_stopped_goes_on(sqlite_ledger: Ledger) -> None:
    """SIGTERM ends a rebuild after its batch, with 1 as it is not done; run again, it goes on from there."""
    account_id = sqlite_ledger.deposit([1] * 300)
    assert sqlite_ledger.run("run", "Balances", "--once")[0] == 0
    with sqlite_ledger.running("rebuild", "Balances", PAUSE="0.01") as building:
        building.wait_for(lambda: "Balances:rebuild: catching up, position" in building.output)
        assert building.end() == 1
        assert "run it again to go on" in building.output
    assert sqlite_ledger.balance(account_id) == 300
    code, output = sqlite_ledger.run("rebuild", "Balances")
    assert code == 0
    assert "continued from an earlier run" in output
    assert sqlite_ledger.balance(account_id) == 300


@pytest.mark.parametrize("name", ["Balances:reactions", "Fragile", "Nobody"])
def test_what_cannot_be_rebuilt(sqlite_ledger: Ledger, name: str) -> None:
    """Reactions, projections without models and unknown names are one clear message."""
    code, output = sqlite_ledger.run("rebuild", name)
    assert code == 1
    assert output.startswith("Error: ")
    assert output.count("\n") == 1


@pytest.fixture
def own_postgres(server_folder: ServerFolder) -> Iterator[Server]:
    """A PostgreSQL server that only this test has, and may restart."""
    with server_folder.private("postgres", servers.start_postgres) as server:
        yield server


def test_a_worker_survives_a_restart_of_the_database(
    own_postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database is restarted the worker waits, says so, and then goes on; it may also be started before it."""
    monkeypatch.setenv("DATABASE_URL", own_postgres.url)
    ledger = Ledger(own_postgres.url, tmp_path)
    ledger.create()
    account_id = ledger.deposit([1])
    with ledger.running("run", "Balances") as worker:
        worker.wait_for(lambda: ledger.balance(account_id) == 1)
        ledger.close()
        own_postgres.stop()
        worker.wait_for(lambda: "as the database failed" in worker.output)
        with ledger.running("run", "Balances") as early:
            early.wait_for(lambda: "as the database cannot be reached" in early.output)
            assert ledger.run("run", "Balances", "--once")[1].startswith("Error: The database cannot be reached")
            servers.restart_postgres(own_postgres)
            ledger.deposit([1], account_id)
            worker.wait_for(lambda: ledger.balance(account_id) == 2)
            assert worker.end() == 0
            ledger.deposit([1], account_id)
            early.wait_for(lambda: ledger.balance(account_id) == 3)
            assert early.end() == 0
    ledger.close()
    servers.forget_killed_connections()
