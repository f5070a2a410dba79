"""Projections that are built again beside the live ones.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing.exceptions import HandlerError, ProjectionBusyError, ProjectionHaltedError, RebuildError
from flask_eventsourcing.persistence.dialects.mysql import MySQLDialect
from flask_eventsourcing.projections import ModelProjection, on, swap
from flask_eventsourcing.projections.checkpoint import SWAPPING
from flask_eventsourcing.projections.consumers import Consumer
from flask_eventsourcing.projections.rebuilding import Rebuild, Rebuilt
from tests.domain import until
from tests.projections.conftest import MakeDesk
from tests.projections.desk import Created, Deposited, Desk

on_a_server_first = pytest.mark.parametrize(
    "uri",
    [
        pytest.param("sqlite-file", marks=pytest.mark.long),
        "postgresql",
        pytest.param("mariadb", marks=pytest.mark.long),
    ],
    indirect=True,
)
"""Where writers wait for nobody, and elsewhere in long runs only: what keeps every core busy."""


def names(desk: Desk) -> set[str]:
    """Return the tables that are there."""
    schema = desk.consumer().tables[0].schema
    return set(sa.inspect(desk.consumer().application.engine).get_table_names(schema=schema))


def indexes(desk: Desk, table: str) -> set[str]:
    """Return the names of a table's indexes."""
    return {str(index["name"]) for index in sa.inspect(desk.consumer().application.engine).get_indexes(table)}


def rebuild(desk: Desk, **options: Any) -> Rebuilt:
    """Rebuild to the end."""
    result = Rebuild(desk.consumer()).run(**options)
    assert result is not None
    return result


@contextmanager
def repeating(*functions: Callable[[], object]) -> Iterator[None]:
    """Call functions again and again, each in a thread of its own."""
    stop, errors = threading.Event(), []

    def repeat(function: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                function()
                time.sleep(0.001)
        except Exception as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=repeat, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_rebuild_replaces_wrong_rows(desk: Desk) -> None:
    """A rebuild corrects rows of a faulty handler; the old table is kept until it is dropped on request."""
    desk.balances()
    first, second = desk.open(1, 2), desk.open(10)
    desk.run_once()
    before = names(desk)
    with desk.context():
        desk.session.execute(sa.update(desk.Balance).values(amount=-1))
        desk.session.commit()
    result = rebuild(desk)
    assert desk.amounts() == {first: 3, second: 10}
    assert (result.events, result.rows, result.resumed) == (5, {"balance": (2, 2)}, False)
    assert names(desk) == before | {"balance__old"}
    assert desk.consumer("Balances").of_kind("rebuild").checkpoint.read() is None
    assert Rebuild(desk.consumer()).drop_old() == ["balance__old"]
    assert names(desk) == before
    desk.deposit(first, 4)
    desk.run_once()
    assert desk.amounts() == {first: 7, second: 10}


def test_rebuild_again_and_again(desk: Desk) -> None:
    """Rebuilds one after the other leave the names of indexes and sequences as they were."""
    sa.Index("seen_by_account", desk.Seen.account_id)
    sa.Index("seen_once", desk.Seen.account_id, desk.Seen.version, unique=True)
    desk.listing(name="Balances")
    account_id = desk.open(1, 2)
    desk.run_once()
    before = indexes(desk, "seen")
    for _ in range(3):
        assert rebuild(desk).rows == {"seen": (3, 3)}
        assert indexes(desk, "seen") == before
    desk.deposit(account_id, 3)
    desk.run_once()
    with desk.context():
        texts = desk.session.scalars(sa.select(desk.Seen.text).order_by(desk.Seen.id)).all()
    assert texts == ["Created", "Deposited", "Deposited", "Deposited"]


@pytest.mark.xdist_group("rebuild")
@on_a_server_first
def test_readers_and_writers_go_on(desk: Desk) -> None:
    """No reader ever sees an empty or half-built table, writers and the live projection go on, the result is whole."""
    desk.balances()
    ids = [desk.open(1) for _ in range(20)]
    desk.run_once()
    seen: list[tuple[int, int]] = []

    def read() -> None:
        with desk.context():
            query = sa.select(sa.func.count(), sa.func.min(desk.Balance.amount)).select_from(desk.Balance)
            seen.append(tuple(desk.session.execute(query).one()))

    with desk.running():
        with repeating(read, lambda: desk.deposit(ids[0], 1), lambda: desk.deposit(ids[1], 1)):
            for _ in range(3):
                rebuild(desk)
        until(lambda: desk.row().position >= desk.head(), "the live projection")
    assert {count for count, _ in seen} == {20}
    assert all(least >= 1 for _, least in seen)
    expected = dict.fromkeys(ids, 1)
    with desk.context() as bank:
        for account_id in ids[:2]:
            expected[account_id] = bank.repository.get(account_id).balance
    assert desk.amounts() == expected
    assert expected[ids[0]] > 1


def test_stopped_rebuild_is_taken_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild that was stopped goes on where it was, unless the handlers have changed or it is to begin again."""
    desk.balances(batch_size=2)
    account_id = desk.open(*range(1, 12))
    desk.run_once()
    first = Rebuild(desk.consumer())
    monkeypatch.setattr(first.runner.pace, "adapt", lambda *args: first.stop.set())
    assert first.run() is None
    row = first.rebuild.checkpoint.read()
    assert row is not None
    assert 0 < row.position < desk.head()
    result = rebuild(desk)
    assert result.resumed
    assert result.events == 12 - row.applied
    assert desk.amounts() == {account_id: sum(range(1, 12))}
    assert not rebuild(desk).resumed


def test_restart_begins_at_the_first_event(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With restart, or when the code of the handlers has changed, an earlier rebuild is thrown away."""
    desk.balances(batch_size=2)
    account_id = desk.open(*range(1, 12))
    desk.run_once()
    for options, changed in (({"restart": True}, False), ({}, True)):
        stopped = Rebuild(desk.consumer())
        monkeypatch.setattr(stopped.runner.pace, "adapt", lambda *args, stopped=stopped: stopped.stop.set())
        assert stopped.run() is None
        following = Rebuild(desk.consumer())
        if changed:
            monkeypatch.setitem(vars(following.live), "fingerprint", "another")
        result = following.run(**options)
        assert result is not None
        assert (result.resumed, result.events) == (False, 12)
    assert desk.amounts() == {account_id: sum(range(1, 12))}


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_only_one_rebuild_at_a_time(desk: Desk) -> None:
    """A rebuild is refused while another process rebuilds the same projection."""
    desk.balances()
    desk.open(1)
    other = Rebuild(desk.consumer())
    assert other.lock.acquire()
    with pytest.raises(ProjectionBusyError, match="Another process rebuilds Balances"):
        rebuild(desk)
    other.lock.release()
    rebuild(desk)
    assert "balance__new" not in names(desk)


def test_counts_are_verified(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the rebuild has not applied exactly the events of the log, the live table stays as it is."""
    desk.balances()
    account_id = desk.open(1, 2)
    desk.run_once()
    with desk.context():
        desk.session.execute(sa.update(desk.Balance).values(amount=77))
        desk.session.commit()
    monkeypatch.setattr(Consumer, "count_events", lambda *args: 4711)
    with pytest.raises(RebuildError, match=r"applied 3 events.*log has 4711"):
        rebuild(desk)
    assert desk.amounts() == {account_id: 77}
    assert "balance__old" not in names(desk)
    monkeypatch.undo()
    rebuild(desk)
    assert desk.amounts() == {account_id: 3}


def test_reactions_are_not_called(desk: Desk) -> None:
    """Side effects do not happen again in a rebuild."""
    projection = desk.reacting(models=(desk.Balance,), name="Balances", **_handlers(desk))
    assert projection.handlers
    desk.open(1, 2)
    desk.run_once()
    called = len(desk.calls)
    assert called == 2
    rebuild(desk)
    desk.run_once()
    assert len(desk.calls) == called


def _handlers(desk: Desk) -> dict[str, Any]:
    @on(Created)
    def opened(self: Any, event: Any, session: orm.Session) -> None:
        session.add(desk.Balance(account_id=event.originator_id, amount=0))

    return {"opened": opened}


def test_halted_rebuild_leaves_the_live_projection_alone(desk: Desk) -> None:
    """A rebuild that meets an event that it cannot apply names it; the live tables stay; after the fix it goes on."""
    desk.balances(retries=0)
    account_id = desk.open(1, 13, 3)
    desk.run_once()
    desk.poison = {13}
    with pytest.raises(ProjectionHaltedError, match=r"halted before position 3: .*cannot digest 13"):
        rebuild(desk)
    assert desk.amounts() == {account_id: 17}
    desk.deposit(account_id, 4)
    desk.run_once()
    assert desk.amounts() == {account_id: 21}
    desk.poison.clear()
    assert rebuild(desk).resumed
    assert desk.amounts() == {account_id: 21}


def test_dead_letters_are_replaced(desk: Desk) -> None:
    """A rebuild after a fix applies what was set aside, and its own dead letters take the place of the old ones."""
    desk.balances(retries=0, on_failure="dead-letter")
    desk.poison = {13, 14}
    first, second = desk.open(1, 13, 100), desk.open(14)
    desk.run_once()
    assert (desk.status().dead_letters, desk.status().waiting) == (2, 1)
    desk.poison = {14}
    rebuild(desk)
    assert desk.amounts() == {first: 114, second: 0}
    assert (desk.status().dead_letters, desk.status().waiting) == (1, 0)


@on_a_server_first
def test_inline_projection_is_rebuilt_under_load(desk: Desk) -> None:
    """The read model of an inline projection misses no event that is saved while it is rebuilt."""
    desk.balances(inline=True)
    ids = [desk.open(1) for _ in range(5)]

    def deposit(account_id: Any) -> None:
        with desk.context():
            # On MariaDB, a transaction that began before the end of a rebuild is told to try again.
            desk.retry(lambda: desk.bank.deposit(account_id, 1), 10)

    with repeating(*(lambda account_id=account_id: deposit(account_id) for account_id in ids[:3])):
        for _ in range(3):
            rebuild(desk)
            time.sleep(0.1)
    with desk.context() as bank:
        expected = {account_id: bank.account(account_id).balance for account_id in ids}
    assert desk.amounts() == expected
    rebuild(desk)
    assert desk.amounts() == expected


def test_estimate_changes_nothing(desk: Desk) -> None:
    """A dry run says how many events there are, and leaves nothing behind."""
    desk.balances()
    account_id = desk.open(1, 2)
    desk.run_once()
    before = names(desk)
    estimate = Rebuild(desk.consumer()).estimate()
    assert estimate.events == 3
    assert estimate.seconds > 0
    assert names(desk) == before
    assert desk.amounts() == {account_id: 3}
    assert desk.consumer().of_kind("rebuild").checkpoint.read() is None


def test_textual_sql_is_refused(desk: Desk) -> None:
    """A handler that names its table in textual SQL would write the live one: the rebuild halts there and says why."""

    class Textual(ModelProjection):
        name = "Balances"
        models = (desk.Balance,)
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            session.execute(sa.text("UPDATE balance SET amount = 5"))

    desk.register(Textual)
    desk.open(1)
    desk.run_once()
    with pytest.raises(ProjectionHaltedError, match=r"names table 'balance' in textual SQL"):
        rebuild(desk)


def test_handlers_that_save_events_are_refused(desk: Desk) -> None:
    """A projection that saves events cannot be rebuilt, as they would be saved again."""

    class Saving(ModelProjection):
        name = "Balances"
        models = (desk.Balance,)
        retries = 0

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            if event.amount == 1:
                desk.bank.open_account()

    desk.register(Saving)
    desk.open(1)
    desk.run_once()
    head = desk.head()
    with pytest.raises(ProjectionHaltedError, match="saves events") as raised:
        rebuild(desk)
    assert isinstance(raised.value.__cause__, HandlerError)
    assert desk.head() == head


def test_handlers_that_commit_are_refused(desk: Desk) -> None:
    """A handler may not commit in a rebuild either: it halts before that event, and the live table stays."""
    commit = [False]

    class Committing(ModelProjection):
        name = "Balances"
        models = (desk.Balance,)
        retries = 0

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))
            if commit[0]:
                session.commit()

    desk.register(Committing)
    account_id = desk.open()
    desk.run_once()
    commit[0] = True
    with pytest.raises(ProjectionHaltedError, match="halted before position 1") as raised:
        rebuild(desk)
    assert isinstance(raised.value.__cause__, HandlerError)
    assert desk.amounts() == {account_id: 0}


def test_foreign_keys(desk: Desk) -> None:
    """Tables of one projection may refer to each other; another table that refers to one is named."""
    base: Any = desk.Model
    entry = {
        "__tablename__": "entry",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "account_id": orm.mapped_column(sa.ForeignKey("balance.account_id", ondelete="CASCADE"), nullable=False),
    }
    entry_model = type(base)("Entry", (base,), entry)
    desk.balances(models=(desk.Balance, entry_model))
    account_id = desk.open(1, 2)
    desk.run_once()
    for _ in range(2):
        rebuild(desk)
    assert desk.amounts() == {account_id: 3}
    keys = sa.inspect(desk.consumer().application.engine).get_foreign_keys("entry")
    assert [(key["referred_table"], key["referred_columns"]) for key in keys] == [("balance", ["account_id"])]
    Rebuild(desk.consumer()).drop_old()
    note = {
        "__tablename__": "note",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "account_id": orm.mapped_column(sa.ForeignKey("balance.account_id"), nullable=False),
    }
    type(base)("Note", (base,), note)
    with pytest.raises(RebuildError, match="Table 'note' has a foreign key to 'balance'"):
        rebuild(desk)


def test_nothing_to_rebuild(desk: Desk) -> None:
    """A projection without models is refused with the remedy."""
    desk.reacting(name="Balances")
    with pytest.raises(RebuildError, match="no models to rebuild"):
        Rebuild(desk.consumer("Balances:reactions"))


@pytest.mark.parametrize("uri", ["mariadb"], indirect=True)
@pytest.mark.parametrize("renamed", [False, True])
def test_interrupted_swap_is_settled(desk: Desk, renamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If renaming commits, a worker finishes or undoes the swap of a process that was killed."""
    desk.balances()
    account_id = desk.open(1, 2)
    desk.run_once()

    class Killed(BaseException):
        pass

    def die(*args: Any) -> None:
        raise Killed

    rebuilding = Rebuild(desk.consumer())
    if renamed:
        monkeypatch.setattr(swap, "hand_over", die)
    else:
        monkeypatch.setattr(MySQLDialect, "swap_tables", die)
        # A process that is killed settles nothing.
        monkeypatch.setattr(swap, "settle", die)
    with pytest.raises(Killed):
        rebuilding.run()
    monkeypatch.undo()
    assert desk.row().state == SWAPPING
    desk.deposit(account_id, 4)
    assert desk.run_once() == []
    assert desk.amounts() == {account_id: 7}
    left = desk.consumer().of_kind("rebuild").checkpoint.read()
    assert (left is None) == renamed
    rebuild(desk)
    assert desk.amounts() == {account_id: 7}


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_rebuild_in_a_schema(new_desk: MakeDesk, uri: str) -> None:
    """On PostgreSQL the tables may be in a schema, which the new ones share."""
    engine = sa.create_engine(uri, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA ledger")
    desk = new_desk(EVENTSOURCING_SCHEMA="ledger")
    base: Any = desk.Model
    body = {
        "__tablename__": "sums",
        "__table_args__": {"schema": "ledger"},
        "account_id": orm.mapped_column(sa.Uuid(), primary_key=True),
        "amount": orm.mapped_column(sa.Integer, nullable=False, index=True),
    }
    desk.Balance = type(base)("Sum", (base,), body)
    desk.balances()
    account_id = desk.open(1, 2)
    desk.run_once()
    for _ in range(2):
        rebuild(desk)
    assert desk.amounts() == {account_id: 3}
    assert {"sums", "sums__old"} <= names(desk)
