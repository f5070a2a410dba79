"""No gap in a stream: an event without its predecessor is refused, as its aggregate could not be read.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bank import Site
from tests.domain import Account, Bank
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_mariadb, on_postgresql
from tests.length import examples

FEW = settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LEVELS = ["REPEATABLE READ", "READ COMMITTED"]
ONE, OTHER = UUID(int=1), UUID(int=2)
VERSIONS = st.lists(st.tuples(st.sampled_from([ONE, OTHER]), st.integers(0, 5)), min_size=1, max_size=4)
SNAPSHOTS = st.lists(st.tuples(st.sampled_from([ONE, OTHER]), st.integers(0, 4)), max_size=1)


def made(keys: Sequence[tuple[UUID, int]]) -> list[StoredEvent]:
    """Return events of some aggregates and versions."""
    return [StoredEvent(originator_id, version, "topic", b"state") for originator_id, version in keys]


class Model:
    """What the events and snapshots are, and whether more can follow."""

    def __init__(self, snapshots: Sequence[tuple[UUID, int]]) -> None:
        self.snapshots = set(snapshots)
        self.events: set[tuple[UUID, int]] = set()

    def append(self, keys: Sequence[tuple[UUID, int]]) -> bool:
        """Add events, all or none, and return whether that leaves no gap."""
        events = set(self.events)
        for originator_id, version in keys:
            known = {n for each, n in events | self.snapshots if each == originator_id}
            follows = (originator_id, version - 1) in events | self.snapshots
            if (originator_id, version) in events or not (follows or (not known and version <= 1)):
                return False
            events.add((originator_id, version))
        self.events = events
        return True


@FEW
@given(saves=st.lists(VERSIONS, min_size=1, max_size=6), snapshots=SNAPSHOTS)
def test_streams_have_no_gaps(site: Site, saves: list[list[tuple[UUID, int]]], snapshots: list[Any]) -> None:
    """Saves in any order leave no gap: each event follows another one or a snapshot, or begins its stream."""
    save_all(site, saves, snapshots)


@pytest.fixture
def latest(new_site: MakeSite) -> Site:
    """A site in whose transactions each statement sees what is committed by then."""
    return new_site(SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": "READ COMMITTED"})


@on_mariadb
@FEW
@given(saves=st.lists(VERSIONS, min_size=1, max_size=6), snapshots=SNAPSHOTS)
def test_streams_have_no_gaps_in_another_level(latest: Site, saves: list[Any], snapshots: list[Any]) -> None:
    """The same where the statement that stores an event looks for its predecessor."""
    save_all(latest, saves, snapshots)


@on_mariadb
@pytest.mark.parametrize("level", LEVELS)
def test_append_of_one_event_is_one_statement(new_site: MakeSite, level: str) -> None:
    """MariaDB draws a position, looks for the predecessor and stores an event in one statement."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": level})
    account_id = site.opened()
    heard: list[str] = []
    with site.app.app_context():
        recorder = site.bank.recorder
        # Some looks are made once.
        recorder.insert_events(made([(account_id, 2)]))
        site.db.session.commit()

        @sa.event.listens_for(site.db.engine, "before_cursor_execute")
        def hear(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            heard.append(statement)

        for key in ((account_id, 3), (uuid4(), 1)):
            recorder.insert_events(made([key]))
            site.db.session.commit()
    assert [each.count("INSERT INTO") for each in heard] == [1, 1]


@on_mariadb
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_known", [True, False])
def test_positions_without_the_row_that_counts(new_site: MakeSite, level: str, is_known: bool) -> None:
    """Where other code has emptied the tracking table, positions go on behind the last event, without a gap."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": level})
    account_id = site.opened()
    if not is_known:
        site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": level})
    with site.app.app_context():
        with site.db.engine.begin() as connection:
            connection.execute(sa.delete(site.es.Tracking))
        found = [site.bank.recorder.insert_events(made([key])) for key in ((account_id, 2), (uuid4(), 1))]
        site.db.session.commit()
    assert found == [[2], [3]]
    assert site.stored() == (3, 0)


@on_mariadb
@pytest.mark.parametrize("level", LEVELS)
def test_refused_event_gives_its_position_back(new_site: MakeSite, level: str) -> None:
    """After an event that would leave a gap, the next one has the position that was drawn for it."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": level})
    account_id = site.opened()
    with site.app.app_context():
        for key in ((account_id, 7), (uuid4(), 3)):
            with pytest.raises(IntegrityError, match="would leave a gap"):
                site.bank.recorder.insert_events(made([key]))
        assert site.bank.recorder.insert_events(made([(account_id, 2)])) == [2]
        site.db.session.rollback()


def save_all(site: Site, saves: list[list[tuple[UUID, int]]], snapshots: list[Any]) -> None:
    """Save events, each with a commit of its own, and compare what is stored with what is to be."""
    model = Model(snapshots)
    with site.app.app_context():
        for record in (site.es.StoredEvent, site.es.Snapshot):
            site.db.session.execute(sa.delete(record))
        recorder: Any = site.bank.factory.aggregate_recorder(purpose="snapshots")
        recorder.insert_events(made(snapshots))
        site.db.session.commit()
        for keys in saves:
            try:
                site.bank.recorder.insert_events(made(keys))
                site.db.session.commit()
                stored = True
            except IntegrityError:
                site.db.session.rollback()
                stored = False
            assert stored is model.append(keys)
        found = site.db.session.execute(
            sa.select(site.es.StoredEvent.originator_id, site.es.StoredEvent.originator_version)
        )
        assert {tuple(row) for row in found} == model.events
        site.db.session.rollback()


def saved_after_rollback(site: Site) -> Account:
    """Roll back the save of an account, and change it again."""
    account = Account("Ada")
    site.bank.save(account)
    site.db.session.rollback()
    account.deposit(1)
    return account


def test_gap_is_told_with_aggregate_and_versions(site: Site) -> None:
    """The error names the aggregate, the version that was to be stored and the one that is missing."""
    account_id = uuid4()
    told = f"Version 7 of aggregate {account_id}.*version 6 is neither"
    with site.app.app_context():
        recorder = site.bank.recorder
        with pytest.raises(IntegrityError, match=told):
            recorder.insert_events(made([(account_id, 7)]))
        site.db.session.rollback()
    with pytest.raises(IntegrityError, match=told):
        recorder.insert_events(made([(account_id, 7)]))
    assert site.stored() == (0, 0)


def test_gap_in_a_batch_is_told(site: Site) -> None:
    """In a save of many events each stream is checked, and none is stored if one has a gap."""
    with site.app.app_context():
        recorder = site.bank.recorder
    good = [(uuid4(), 1) for _ in range(150)]
    bad = (uuid4(), 3)
    more = [(good[0][0], version) for version in range(2, 9)]
    with pytest.raises(IntegrityError, match=f"Version 3 of aggregate {bad[0]}"):
        recorder.insert_events(made([*good, bad, *more]))
    recorder.insert_events(made([*good, *more]))
    assert site.stored() == (157, 0)


def test_no_position_is_lost_by_a_gap_that_was_caught(site: Site) -> None:
    """After a refused save the transaction goes on, as nothing was written."""
    with site.app.app_context():
        first = site.bank.recorder.insert_events(made([(ONE, 1)]))
        with pytest.raises(IntegrityError):
            site.bank.recorder.insert_events(made([(ONE, 3)]))
        second = site.bank.recorder.insert_events(made([(ONE, 2)]))
        site.db.session.commit()
    assert first is not None
    assert second is not None
    assert second[0] == first[0] + 1
    assert site.stored() == (2, 0)


def test_aggregate_whose_events_were_rolled_back_leaves_no_gap(site: Site) -> None:
    """An account that is saved after a rollback with a further change is not stored without its beginning."""
    with site.app.app_context():
        account = saved_after_rollback(site)
        with pytest.raises(Exception, match=str(account.id)):
            site.bank.save(account)
        site.db.session.rollback()
    assert site.stored() == (0, 0)


def test_predecessor_in_the_same_transaction_counts(site: Site) -> None:
    """An event may follow one that the same session has saved and not committed."""
    with site.app.app_context():
        account_id = site.bank.open_account()
        site.bank.deposit(account_id)
        site.bank.deposit(account_id)
        site.db.session.commit()
    assert site.balance(account_id) == 2


def test_application_without_a_table_of_snapshots_appends(site: Site) -> None:
    """The library makes no table of snapshots for an application that takes none; events can be appended without it."""
    with site.app.app_context():
        site.es.models[Bank].tables["snapshots"].drop(site.db.engine)
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id)
        site.db.session.commit()
        with pytest.raises(IntegrityError):
            site.bank.recorder.insert_events(made([(account_id, 9)]))
        site.db.session.rollback()
    assert site.balance(account_id) == 1


@on_postgresql
def test_gap_in_a_frozen_snapshot_is_a_conflict(site: Site) -> None:
    """A transaction with an old snapshot gets a conflict for later events of others, and may run again."""
    account_id = site.opened()
    with site.app.app_context():
        site.db.session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        site.bank.account(account_id)
        site.elsewhere(lambda: site.bank.deposit(account_id))
        dialect = site.bank.recorder.dialect  # type: ignore[attr-defined]
        with pytest.raises(IntegrityError) as raised:
            site.bank.recorder.insert_events(made([(account_id, 3)]))
        assert dialect.is_conflict(raised.value)
        site.db.session.rollback()
        with pytest.raises(IntegrityError) as raised:
            site.bank.recorder.insert_events(made([(account_id, 4)]))
        assert not dialect.is_conflict(raised.value)
        site.db.session.rollback()


@on_postgresql
def test_event_is_appended_by_one_statement_unless_what_it_follows_is_unusual(site: Site) -> None:
    """A first event, or one behind another, costs one round trip; one behind a snapshot or a version 0 costs two."""
    texts: list[str] = []
    with site.app.app_context():
        recorder: Any = site.bank.factory.aggregate_recorder(purpose="snapshots")
        recorder.insert_events(made([(OTHER, 7)]))
        site.bank.recorder.insert_events(made([(uuid4(), 1)]))

        @sa.event.listens_for(site.db.engine, "before_cursor_execute")
        def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            texts.append(statement)

        kept = uuid4()
        for key, count in (
            ((ONE, 1), 1),
            ((ONE, 2), 1),
            ((OTHER, 8), 2),
            ((OTHER, 9), 1),
            ((kept, 0), 1),
            ((kept, 1), 2),
        ):
            texts.clear()
            site.bank.recorder.insert_events(made([key]))
            assert len(texts) == count, key
        site.db.session.commit()
