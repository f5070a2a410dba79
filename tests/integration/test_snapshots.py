"""Snapshots that are taken and dropped by command, and those whose class has changed since.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import logging
from dataclasses import field
from typing import Any, ClassVar
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.domain import Aggregate, event

from flask_eventsourcing import applications
from flask_eventsourcing.applications.erasure import erase
from tests.bank import Site
from tests.domain import Bank
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_sqlite_file


class Branch(Bank):
    """A bank that can take snapshots."""

    name = "Bank"
    is_snapshotting_enabled = True
    snapshotting_intervals: ClassVar[dict[type[Any], int]] = {}


class Parcel(Aggregate):
    """What changes its shape."""

    def __init__(self) -> None:
        self.stops = 0

    @event("Stopped")
    def stop(self) -> None:
        """Stop once more."""
        self.stops += 1


@pytest.fixture
def branch(new_site: MakeSite) -> Site:
    """A site with a bank that can take snapshots."""
    return new_site(Branch)


def run(site: Site, *arguments: str) -> tuple[int, str]:
    """Run a command and return its exit status and what it prints."""
    result = site.app.test_cli_runner().invoke(args=["eventsourcing", "snapshots", *arguments])
    return result.exit_code, result.output


def versions(site: Site) -> dict[UUID, list[int]]:
    """Return the versions of the snapshots of each aggregate."""
    with site.app.app_context():
        record: Any = site.es.Snapshot
        rows = site.db.session.execute(
            sa.select(record.originator_id, record.originator_version).order_by(record.originator_version)
        )
        found: dict[UUID, list[int]] = {}
        for originator_id, version in rows:
            found.setdefault(originator_id, []).append(version)
        return found


def test_take_and_drop(branch: Site) -> None:
    """A snapshot can be taken of an aggregate again and again, and all of its snapshots can be dropped."""
    account_id = branch.opened(1)
    assert run(branch, "take", str(account_id)) == (0, f"Bank {account_id}: 1 snapshot taken.\n")
    assert run(branch, "take", str(account_id))[0] == 0
    with branch.app.app_context():
        branch.bank.deposit(account_id, 1)
        branch.db.session.commit()
    assert run(branch, "take", str(account_id))[0] == 0
    assert versions(branch) == {account_id: [2, 3]}
    assert branch.balance(account_id) == 2
    assert run(branch, "drop", str(account_id)) == (0, f"Bank {account_id}: 2 snapshots dropped.\n")
    assert versions(branch) == {}
    assert branch.balance(account_id) == 2


def test_all(branch: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--all`` goes through every aggregate, page by page, and passes those by that were erased."""
    monkeypatch.setattr("flask_eventsourcing.commands.aggregates.AT_ONCE", 2)
    accounts = [branch.opened(1) for _ in range(5)]
    with branch.app.app_context():
        erase(branch.bank, accounts[0])
        erase(branch.bank, accounts[1], redact=True)
        branch.db.session.commit()
    assert run(branch, "take", "--all") == (0, "Bank: 3 snapshots taken, 0 failed.\n")
    assert versions(branch) == {each: [2] for each in accounts[2:]}
    assert run(branch, "drop", "--all") == (0, "Bank: 3 snapshots dropped, 0 failed.\n")
    assert versions(branch) == {}


def test_what_is_needed_is_not_dropped(branch: Site) -> None:
    """A snapshot is kept where the events before it were archived, as the aggregate could not be read without it."""
    account_id, other = branch.opened(1, 2), branch.opened(1)
    assert run(branch, "take", "--all")[0] == 0
    with branch.app.app_context():
        record: Any = branch.es.StoredEvent
        old = sa.delete(record).where(record.originator_id == account_id, record.originator_version < 3)
        branch.db.session.execute(old)
        branch.db.session.commit()
    code, printed = run(branch, "drop", "--all")
    assert code == 0
    assert f"Bank {account_id}, 1 kept, as there are no first events." in printed
    assert versions(branch) == {account_id: [3]}
    assert branch.balance(account_id) == 3
    # And one is taken on top of it.
    assert run(branch, "take", str(account_id))[0] == 0
    assert branch.balance(other) == 1


@on_sqlite_file
def test_what_is_refused(new_site: MakeSite) -> None:
    """No id, an unknown one, an erased one, and an application without snapshots are one line each, with the remedy."""
    site = new_site(Branch)
    account_id = site.opened(1)
    for arguments in (("take",), ("drop",), ("take", str(account_id), "--all")):
        code, printed = run(site, *arguments)
        assert (code, "Give the id of an aggregate, or --all." in printed) == (2, True)
    for command in ("take", "drop"):
        assert run(site, command, str(uuid4()))[0] == 1
    with site.app.app_context():
        site.es.erase(account_id)
        site.db.session.commit()
    code, printed = run(site, "take", str(account_id))
    assert (code, "was erased" in printed) == (1, True)
    plain = new_site(Bank, create=False)
    code, printed = run(plain, "take", str(plain.opened()))
    assert (code, "Bank takes no snapshots: set is_snapshotting_enabled = True" in printed) == (1, True)


# --------------------------------------------------------------------------------------- classes that have changed


def grown(site: Site, change: Any) -> tuple[UUID, Any]:
    """Save a parcel with a snapshot and an event behind it, and change the snapshot to that of another class."""
    with site.app.app_context():
        parcel = Parcel()
        site.bank.save(parcel)
        parcel.stop()
        site.bank.save(parcel)
        site.bank.take_snapshot(parcel.id)
        parcel.stop()
        site.bank.save(parcel)
        snapshot: Any = next(iter(site.bank.snapshots.get(parcel.id)))  # type: ignore[union-attr]
        vars(snapshot).update(change)
        site.bank.snapshots.put([snapshot])  # type: ignore[union-attr]
        site.db.session.commit()
    return parcel.id, snapshot


CHANGES = [
    pytest.param({"state": {}}, id="an attribute is new"),
    pytest.param({"topic": "tests.integration.test_snapshots:Moved"}, id="the class was moved"),
    pytest.param({"state": {"stops": "one"}}, id="a type is another"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_that_does_not_fit_is_passed_by(
    branch: Site, change: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aggregate whose snapshot is of another shape of its class is read from its events; the log says so once."""
    monkeypatch.setattr(applications, "_warned", set())
    parcel_id, _ = grown(branch, change)
    with branch.app.app_context(), caplog.at_level(logging.WARNING, "flask_eventsourcing"):
        for _ in range(2):
            found: Any = branch.bank.repository.get(parcel_id)
            assert (found.stops, found.version) == (2, 3)
    (record,) = caplog.records
    assert "flask eventsourcing snapshots take --all" in record.getMessage()
    caplog.clear()
    assert run(branch, "take", "--all") == (0, "Bank: 1 snapshot taken, 0 failed.\n")
    with branch.app.app_context():
        found = branch.bank.repository.get(parcel_id)
        assert (found.stops, found.version) == (2, 3)
    assert caplog.records == []


class Box(Aggregate):
    """An aggregate with fields."""

    colour: str
    weight: list[int]
    label: str = "none"


@on_sqlite_file
def test_a_snapshot_that_lacks_a_field_is_passed_by(branch: Site) -> None:
    """A snapshot that lacks a field without a default is not used, also if no event follows it."""
    with branch.app.app_context():
        made: Any = Box
        box = made(colour="red", weight=[1])
        branch.bank.save(box)
        branch.bank.take_snapshot(box.id)
        snapshot: Any = next(iter(branch.bank.snapshots.get(box.id)))  # type: ignore[union-attr]
        del snapshot.state["weight"], snapshot.state["label"]
        branch.bank.snapshots.put([snapshot])  # type: ignore[union-attr]
        branch.db.session.commit()
        found: Any = branch.bank.repository.get(box.id)
        assert (found.colour, found.label, found.weight) == ("red", "none", [1])


class Bag(Aggregate):
    """An aggregate with a field that nobody sets."""

    colour: str
    never: int = field(init=False)


@on_sqlite_file
def test_a_field_that_is_not_set(branch: Site, caplog: pytest.LogCaptureFixture) -> None:
    """An aggregate with a field that is never set can be read from its events and from its snapshot."""
    with branch.app.app_context():
        made: Any = Bag
        bag = made(colour="red")
        branch.bank.save(bag)
        found: Any = branch.bank.repository.get(bag.id)
        assert found.colour == "red"
        assert caplog.records == []
        branch.bank.take_snapshot(bag.id)
        found = branch.bank.repository.get(bag.id)
        assert found.colour == "red"


@on_sqlite_file
def test_take_ignores_older_snapshots(branch: Site) -> None:
    """A new snapshot is made from the events, so wrong values of an older one are not kept."""
    parcel_id, _ = grown(branch, {"state": {"stops": 100}})
    with branch.app.app_context():
        found: Any = branch.bank.repository.get(parcel_id)
        assert found.stops == 101
    assert run(branch, "take", str(parcel_id))[0] == 0
    with branch.app.app_context():
        found = branch.bank.repository.get(parcel_id)
        assert found.stops == 2


@on_sqlite_file
def test_a_class_with_another_version(branch: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a new ``class_version`` and no upcast, older snapshots are not used."""
    parcel_id, _ = grown(branch, {"state": {"stops": 100}})
    monkeypatch.setattr(Parcel, "class_version", 2, raising=False)
    with branch.app.app_context():
        found: Any = branch.bank.repository.get(parcel_id)
        assert found.stops == 2


@on_sqlite_file
def test_an_error_of_the_class_stays_what_it_is(branch: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that events cause, too, is raised unchanged; ``take --all`` names the aggregate, and continues."""
    account_id = branch.opened(1)
    parcel_id, _ = grown(branch, {})

    class Broken:
        """An event whose class has nothing of an event."""

    stopped: Any = Parcel.Stopped  # type: ignore[attr-defined]
    monkeypatch.setattr(stopped, "apply", lambda *_: Broken().missing)  # type: ignore[attr-defined]
    with branch.app.app_context(), pytest.raises(AttributeError, match="missing"):
        branch.bank.repository.get(parcel_id)
    code, printed = run(branch, "take", "--all")
    assert code == 1
    assert f"Bank {parcel_id}: It cannot be made of its events: AttributeError" in printed
    assert "Bank: 1 snapshot taken, 1 failed." in printed
    assert versions(branch)[account_id] == [2]
