"""What a client of the site, and its operator, can rely on."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from webtest import TestApp

from examples.pyramid_site.models import BankRecords, Transfer
from flask_eventsourcing.contrib.pyramid.console import main as console

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

ROOT = Path(__file__).resolve().parents[3]


def session_of(app: Any) -> Session:
    """Return a session that looks at what is stored."""
    made: Session = app.registry["dbsession_factory"]()
    return made


def open_account(visitor: Any, owner: str = "Ada", amount: str = "10") -> str:
    """Open an account and return its id."""
    made: str = visitor.post("/accounts", {"owner": owner, "amount": amount}).json["id"]
    return made


def test_account_has_its_entries(visitor: Any) -> None:
    """What a client pays in and out is in the account's statement."""
    account = open_account(visitor)
    visitor.post(f"/accounts/{account}/deposits", {"amount": "2.50"})
    visitor.post(f"/accounts/{account}/withdrawals", {"amount": "1"})
    shown = visitor.get(f"/accounts/{account}").json
    assert shown["balance"] == "11.50"
    assert [each["kind"] for each in shown["entries"]] == ["opened", "deposit", "deposit", "withdrawal"]
    assert visitor.get("/").json.keys() == {"accounts", "transfers"}


def test_transfer_is_all_or_nothing(bank_site: Any, visitor: Any) -> None:
    """A transfer stores the events of both accounts and its row, and one that is refused nothing."""
    sender, recipient = open_account(visitor), open_account(visitor, "Bob", "0")
    posted = {"sender": sender, "recipient": recipient, "amount": "4"}
    visitor.post("/transfers", posted)
    refused = visitor.post("/transfers", {**posted, "amount": "400"}, status=409)
    assert refused.json["title"] == "Not enough money in the account"
    assert [visitor.get(f"/accounts/{each}").json["balance"] for each in (sender, recipient)] == ["6.00", "4.00"]
    with session_of(bank_site) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Transfer)) == 1


@pytest.mark.parametrize("path", ["/accounts/none", "/accounts/00000000-0000-0000-0000-000000000000"])
def test_unknown_account(visitor: Any, path: str) -> None:
    """There is no page for an account that there is not."""
    visitor.get(path, status=404)


def test_bad_amount(bank_site: Any, visitor: Any) -> None:
    """What is no amount is refused, and nothing is stored."""
    visitor.post("/accounts", {"owner": "Ada", "amount": "1e5"}, status=400)
    with session_of(bank_site) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(BankRecords.StoredEvent)) == 0


def test_clients_on_one_account(bank_site: Any, visitor: Any) -> None:
    """Eight clients that pay into one account at once lose no update."""
    account = open_account(visitor)
    answers: list[int] = []

    def pay_in() -> None:
        answers.extend(
            TestApp(bank_site).post(f"/accounts/{account}/deposits", {"amount": "1"}).status_code for _ in "12345"
        )

    threads = [threading.Thread(target=pay_in) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 40
    assert visitor.get(f"/accounts/{account}").json["balance"] == "50.00"


def test_projection_and_commands(bank_site: Any, visitor: Any, ini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``pyramid-eventsourcing`` runs the projection that a page lists, and tells its status."""
    open_account(visitor)
    assert visitor.get("/accounts").json == {"accounts": []}
    assert console([str(ini), "check"]) == 0
    assert console([str(ini), "run", "--all", "--once"]) == 0
    assert [each["balance"] for each in visitor.get("/accounts").json["accounts"]] == ["10.00"]
    capsys.readouterr()
    assert console([str(ini), "status"]) == 0
    assert "Balances" in capsys.readouterr().out


def test_migrations_make_what_the_models_say(ini: Path) -> None:
    """After the migrations, autogenerate finds nothing to do."""
    command.check(Config(ini))


def test_the_site_starts_with_one_line(tmp_path: Path) -> None:
    """``python -m examples.pyramid_site`` migrates the database and serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    code = (
        "import sys; from pathlib import Path; import examples.pyramid_site.__main__ as site; "
        "site.INI = Path(sys.argv[1]); site.main(int(sys.argv[2]))"
    )
    ini = tmp_path / "start.ini"
    text = (ROOT / "examples" / "pyramid_site" / "development.ini").read_text()
    text = text.replace("%(here)s/bank.db", f"{tmp_path}/bank.db")
    ini.write_text(text.replace("%(here)s/alembic", str(ROOT / "examples" / "pyramid_site" / "alembic")))
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", code, str(ini), str(port)], cwd=ROOT, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/accounts", timeout=5) as answer:
                    assert answer.read() == b'{"accounts": []}'
                break
            except URLError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(30)
