"""What holds for projections on a host without a framework only.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.exceptions import ConfigurationError, MissingTableError, ProjectionHaltedError
from flask_eventsourcing.host import PlainHost
from flask_eventsourcing.models import make_models
from tests.domain import Bank, Shop
from tests.projections.desk import Idle
from tests.projections.desk_hosts import PlainDesk, make_plain_desk


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    """A desk without Flask."""
    made = make_plain_desk(f"sqlite:///{tmp_path}/bank.db")
    yield made
    made.close()


def test_a_table_elsewhere(desk: PlainDesk, tmp_path: Path) -> None:
    """A projection whose table the sessions have in another database is refused, and then is not registered."""
    other = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    desk.maker.configure(binds={desk.Balance: other})
    with pytest.raises(ConfigurationError, match="'balance' of Balances is not in the database of the events"):
        desk.balances()
    assert list(desk.projections) == []
    other.dispose()


def test_an_application_without_models(desk: PlainDesk) -> None:
    """A projection of an application that has no models for projections is refused, naming those that have."""
    with pytest.raises(ConfigurationError, match=r"has no models for projections here \(there are some for: Bank\)"):
        desk.projections.register(Idle, of=Shop)


def test_no_two_own_one_table(desk: PlainDesk) -> None:
    """Two projections with one table are refused, naming both."""
    desk.balances()
    with pytest.raises(ConfigurationError, match="'Balances' of Bank and 'Other' of Bank both have table 'balance'"):
        desk.balances(name="Other")
    assert [each.name for each in desk.projections] == ["Balances"]


def test_a_name_is_taken(desk: PlainDesk) -> None:
    """Two projections of one name are refused."""
    desk.projections.register(Idle)
    with pytest.raises(ConfigurationError, match="Two projections of Bank are called 'Idle'"):
        desk.projections.register(type("Second", (Idle,), {"name": "Idle"}))


def test_remedies_are_those_of_the_program(desk: PlainDesk) -> None:
    """Messages of workers, ``status`` and ``wait_for`` name the program's own commands."""
    desk.balances()
    desk.poison = {5}
    desk.open(5)
    said = [str(error) for error in desk.run_once()]
    assert desk.command("projections", "pause", "Balances").exit_code == 0
    said += [desk.command("status").output, desk.command("check").output, desk.command("run", "--once").output]
    with pytest.raises(ProjectionHaltedError) as raised:
        desk.wait_for("Balances", 2)
    assert "'bank events projections skip Balances 2'" in said[0]
    for each in (*said[1:], str(raised.value)):
        assert "Let it go on with 'bank events projections resume Balances'" in each
    desk.Model.metadata.drop_all(desk.engine)
    with pytest.raises(MissingTableError, match=r"run 'bank events init-db' or your migrations\.$"):
        desk.open(1)


def test_a_host_that_names_no_program(tmp_path: Path) -> None:
    """Where a host does not say how its commands are called, messages name the command alone."""
    base = orm.declarative_base()
    models = make_models(base, "Bank")
    host = PlainHost(orm.sessionmaker(sa.create_engine(f"sqlite:///{tmp_path}/empty.db")), {Bank: models})
    with pytest.raises(MissingTableError, match=r"does not exist: run the command 'init-db' or your migrations\.$"):
        host[Bank].open_account()
    host.close()
    host.datastore.engine.dispose()


def test_commands_are_called_as_the_program_says(desk: PlainDesk) -> None:
    """The commands work on the host's database, name the program, and end with their exit status."""
    assert desk.command("init-db").exit_code == 0
    desk.balances()
    desk.open(5)
    assert desk.command("run", "--all", "--once").exit_code == 0
    assert list(desk.amounts().values()) == [5]
    assert desk.command("check").exit_code == 0
    failed = desk.command("run", "Nobody")
    assert failed.exit_code == 1
    assert "There is no projection 'Nobody'. Registered: Balances." in failed.output
    desk.engine.dispose()
    desk.Model.metadata.drop_all(desk.engine)
    assert "run 'bank events init-db'" in desk.command("status").output
