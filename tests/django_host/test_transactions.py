"""Events in Django's transactions."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from django.db import transaction
from django.db.transaction import TransactionManagementError
from django.test.utils import CaptureQueriesContext
from eventsourcing.persistence import DataError, IntegrityError, StoredEvent

from flask_eventsourcing.exceptions import StaleAggregateError
from flask_eventsourcing.signals import events_recorded
from tests.django_host.conftest import DjangoBank, UndoneError
from tests.django_host.test_projections import balances, run
from tests.domain import Account, conflict_with


def test_autocommit(site: DjangoBank) -> None:
    """Without a transaction, what was saved is durable when ``save()`` returns."""
    account_id = site.opened()
    assert site.stored() == (1, 0)
    site.bank.deposit(account_id, 5)
    assert site.elsewhere(lambda: site.bank.balance(account_id)) == 5


def test_commit_with_models(site: DjangoBank) -> None:
    """Events and models of an ``atomic()`` block are stored together, and nobody sees them before."""
    with site.atomic():
        account_id = site.opened()
        site.note()
        assert site.bank.balance(account_id) == 0
        assert site.stored() == (0, 0)
    assert site.stored() == (1, 1)


def test_rollback_with_models(site: DjangoBank) -> None:
    """An exception rolls back events and models."""
    with site.rolled_back():
        account_id = site.opened()
        site.note()
    assert site.stored() == (0, 0)
    assert site.bank.balance(account_id) is None


def test_rollback_of_an_inner_block(site: DjangoBank) -> None:
    """The events of an inner block that fails are gone, and those around it are stored."""
    with site.atomic():
        account_id = site.opened()
        with site.rolled_back():
            site.bank.deposit(account_id, 5)
        site.bank.deposit(account_id, 7)
    assert site.elsewhere(lambda: site.bank.balance(account_id)) == 7


def test_object_of_a_rollback_is_refused(site: DjangoBank) -> None:
    """An aggregate whose events were rolled back, in an inner block or in all, cannot be saved."""
    account = Account("Ada")
    with site.rolled_back():
        site.bank.save(account)
    with pytest.raises(StaleAggregateError):
        site.bank.save(account)
    account_id = site.opened()
    with site.atomic():
        with site.rolled_back():
            site.bank.deposit(account_id)
            read = site.bank.account(account_id)
        read.deposit(1)
        with pytest.raises(StaleAggregateError):
            site.bank.save(read)


def test_object_of_a_rollback_is_refused_by_another_thread(site: DjangoBank) -> None:
    """It is known at once, and in every thread, that an object's events were rolled back."""
    account = Account("Ada")
    with site.rolled_back():
        site.bank.save(account)
    with pytest.raises(StaleAggregateError):
        site.elsewhere(lambda: site.bank.save(account))


def test_object_of_a_commit_is_saved_again(site: DjangoBank) -> None:
    """An aggregate that was committed can be changed and saved in the next transaction."""
    account = Account("Ada")
    for _ in range(3):
        with site.atomic():
            account.deposit(1)
            site.bank.save(account)
    assert site.bank.balance(account.id) == 3


def test_conflict_marks_the_block(site: DjangoBank) -> None:
    """After a conflict the block can only be rolled back, as after an error of ``Model.save()``."""
    account_id = site.opened()
    save_late = conflict_with(site.bank, account_id)
    site.bank.deposit(account_id)
    with site.atomic():
        site.note()
        with pytest.raises(IntegrityError, match="Another writer was first"):
            save_late()
        assert site.connection.needs_rollback
        with pytest.raises(TransactionManagementError) as refused:
            site.note()
        with pytest.raises(TransactionManagementError):
            site.opened()
    assert site.stored() == (2, 0)
    # Django has it from the write, as it has it from Model.save().
    cause = refused.value.__cause__
    assert cause is not None
    assert isinstance(cause.__cause__, IntegrityError)


def test_interrupted_write_marks_the_block(site: DjangoBank) -> None:
    """If Ctrl-C interrupts a save, it is not committed with earlier work, even if the error is caught."""
    site.opened()

    def interrupt(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        done = execute(sql, params, many, context)
        if "INSERT INTO" in sql and "bank_events" in sql:
            raise KeyboardInterrupt
        return done

    with site.atomic():
        site.note()
        with site.connection.execute_wrapper(interrupt), pytest.raises(KeyboardInterrupt):
            site.opened()
        assert site.connection.needs_rollback
    assert site.stored() == (1, 0)


def test_conflict_in_an_inner_block(site: DjangoBank) -> None:
    """A conflict that is caught around an inner block rolls back only that block."""
    account_id = site.opened()
    save_late = conflict_with(site.bank, account_id)
    site.bank.deposit(account_id)
    with site.atomic():
        site.note()
        with pytest.raises(IntegrityError), site.atomic():
            save_late()
        site.bank.deposit(account_id)
    assert site.stored() == (3, 1)


def test_durable_blocks(site: DjangoBank) -> None:
    """``save()`` works in a durable block, and makes no block durable itself."""
    with site.atomic(durable=True):
        site.opened()
    with site.atomic():
        site.opened()
        with pytest.raises(RuntimeError, match="durable"), site.atomic(durable=True):
            pass
    assert site.stored() == (2, 0)


def test_signal_and_order_of_on_commit(site: DjangoBank) -> None:
    """``events_recorded`` comes after the commit, between the functions noted before ``save()`` and after it."""
    told: list[Any] = []

    def receiver(sender: object, notifications: Any, **_: Any) -> None:
        told.append([each.originator_version for each in notifications])
        assert site.stored()[0] == 1

    with events_recorded.connected_to(receiver):
        with site.atomic():
            transaction.on_commit(lambda: told.append("before"), using=site.alias)
            site.opened()
            transaction.on_commit(lambda: told.append("after"), using=site.alias)
            assert told == []
        assert told == ["before", [1], "after"]
        with site.rolled_back():
            site.opened()
        assert told == ["before", [1], "after"]


def test_failing_on_commit(site: DjangoBank) -> None:
    """A function of another package that fails after the commit loses no events."""
    account = Account("Ada")

    def work() -> None:
        with site.atomic():
            transaction.on_commit(_fail, using=site.alias)
            site.bank.save(account)

    with pytest.raises(UndoneError):
        work()
    account_id = account.id
    assert site.stored() == (1, 0)
    site.bank.deposit(account_id)
    assert site.stored() == (2, 0)


def _fail() -> None:
    raise UndoneError


def test_statements_are_djangos(site: DjangoBank) -> None:
    """What is read and written appears among Django's queries, and every save has the same number of them."""
    account_id = site.opened()
    site.bank.deposit(account_id)
    counted = []
    for _ in range(3):
        with CaptureQueriesContext(site.connection) as queries, site.atomic():
            site.bank.deposit(account_id)
        assert any("INSERT INTO" in each["sql"] and "bank_events" in each["sql"] for each in queries.captured_queries)
        counted.append([each["sql"][:90] for each in queries.captured_queries])
    assert counted[0] == counted[1] == counted[2]


def test_save_is_one_statement(site: DjangoBank) -> None:
    """In a block, a save of one event is one statement, as that of a row is."""
    account = site.bank.account(site.opened())
    account.deposit(1)
    # Some looks are made once.
    site.opened()
    for save in (site.note, site.opened, lambda: site.bank.save(account)):
        with CaptureQueriesContext(site.connection) as queries, site.atomic():
            save()
        begin, *found, commit = (each["sql"] for each in queries.captured_queries)
        assert (begin.split()[0], commit) == ("BEGIN", "COMMIT")
        assert [each.count("INSERT INTO") for each in found] == [1], found


def test_listener_of_sqlalchemys(site: DjangoBank) -> None:
    """Listeners for statements of SQLAlchemy's engines, such as tracers, also hear of the recorders' statements."""
    account_id, heard = site.opened(), list[str]()
    recorder: Any = site.bank.recorder

    @sa.event.listens_for(recorder.datastore.engine, "before_cursor_execute")
    def hear(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement)

    site.bank.deposit(account_id, 3)
    assert [each for each in heard if "bank_events" in each and "INSERT INTO" in each]
    assert site.elsewhere(lambda: site.bank.balance(account_id)) == 3


def test_gaps_are_refused(site: DjangoBank) -> None:
    """An event that cannot follow what is stored is refused, and one that follows a snapshot is stored."""
    recorder: Any = site.bank.recorder
    snapshots: Any = site.bank.factory.aggregate_recorder(purpose="snapshots")
    account_id, erased = uuid4(), uuid4()
    recorder.insert_events([StoredEvent(account_id, 1, "topic", b"state")])
    snapshots.insert_events([StoredEvent(erased, 4, "topic", b"state")])
    for refused in (StoredEvent(account_id, 3, "topic", b"state"), StoredEvent(erased, 1, "topic", b"state")):
        with pytest.raises(IntegrityError, match="would leave a gap"), site.atomic():
            recorder.insert_events([refused])
    for stored in (StoredEvent(account_id, 2, "topic", b"state"), StoredEvent(erased, 5, "topic", b"state")):
        with site.atomic():
            recorder.insert_events([stored])
    found = recorder.select_notifications(1, 10)
    assert [each.originator_version for each in found] == [1, 2, 5]


@pytest.mark.parametrize("url", ["mariadb-mysqlclient"], indirect=True)
def test_event_longer_than_a_statement(site: DjangoBank) -> None:
    """An event that is too large for the server is refused with the setting's name, and the connection stays."""
    recorder: Any = site.bank.recorder
    site.opened()
    with pytest.raises(DataError, match="max_allowed_packet"), site.atomic():
        recorder.insert_events([StoredEvent(uuid4(), 1, "topic", bytes(17 * 2**20))])
    site.opened()
    assert site.stored() == (2, 0)


def test_execute_wrapper(site: DjangoBank) -> None:
    """A wrapper of Django's sees the statements, and what it raises is raised."""
    site.opened()

    def forbid(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if "bank_events" in sql:
            raise UndoneError
        return execute(sql, params, many, context)

    with site.connection.execute_wrapper(forbid), pytest.raises(UndoneError):
        site.opened()
    assert site.stored() == (1, 0)


def test_wrapper_that_adds_parameters(site: DjangoBank) -> None:
    """A wrapper may change the parameters of a statement, as packages do that send their context with each."""

    def add(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if isinstance(params, dict) and not many:
            params.update(context="of the request")
        return execute(sql, params, many, context)

    with site.connection.execute_wrapper(add):
        with site.atomic():
            account_id = site.opened()
        run()
    assert balances(site) == {account_id: 0}


def test_many_events_of_one_save(site: DjangoBank) -> None:
    """A large save is stored whole, and its positions are contiguous."""
    account = Account("Ada")
    for _ in range(450):
        account.deposit(1)
    with site.atomic():
        recordings = site.bank.save(account)
    positions = [each.notification.id for each in recordings]
    assert positions == list(range(positions[0], positions[0] + 451))
    assert site.bank.balance(account.id) == 450


def test_manual_transactions(site: DjangoBank) -> None:
    """Where autocommit is switched off, a commit or a rollback by any code includes the events."""
    site.connection.set_autocommit(False)
    try:
        site.opened()
        site.note()
        assert site.stored() == (0, 0)
        site.connection.rollback()
        assert site.stored() == (0, 0)
        site.opened()
        site.connection.commit()
        assert site.stored() == (1, 0)
    finally:
        site.connection.rollback()
        site.connection.set_autocommit(True)
    assert site.stored() == (1, 0)


def test_log_is_read_to_its_end(site: DjangoBank) -> None:
    """The log has all that is committed, in order, whether a transaction is open or not."""
    for _ in range(3):
        site.opened()
    positions = [each.id for each in site.bank.notification_log.select(1, 10)]
    with site.atomic():
        site.note()
        assert [each.id for each in site.bank.notification_log.select(1, 10)] == positions
    assert len(positions) == 3


def test_connection_that_was_closed(site: DjangoBank) -> None:
    """Between two saves the connection may be closed, as Django does after a request."""
    account_id = site.opened()
    site.connection.close()
    site.bank.deposit(account_id, 2)
    site.connection.close()
    assert site.bank.balance(account_id) == 2


def test_records_read_through_the_orm(site: DjangoBank) -> None:
    """The record classes are models: ids, times and metadata come as Python has them."""
    from tests.django_host.ledger.models import BankRecords

    account_id = site.opened()
    stored = BankRecords.StoredEvent.objects.using(site.alias).get(originator_id=account_id)
    assert stored.originator_id == account_id
    assert stored.recorded_at.tzinfo is not None
    assert set(stored.metadata) == {"correlation_id"} or stored.correlation_id
    recorder: Any = site.bank.recorder
    found = recorder.find_recorded([stored.notification_id])[stored.notification_id]
    assert (found.event_id, found.time) == (stored.event_id, stored.recorded_at)


def test_end_of_the_log_never_goes_back(site: DjangoBank) -> None:
    """While an event is saved, the end of the log that readers see never goes back."""
    account_id = site.opened()
    marks: list[int] = []

    def look(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        done = execute(sql, parameters, many, context)
        if "INSERT INTO" in sql and "bank_events" in sql:
            recorder: Any = site.bank.recorder
            marks.append(site.elsewhere(recorder.high_water_mark))
        return done

    with site.connection.execute_wrapper(look):
        for _ in range(3):
            site.bank.deposit(account_id, 1)
    assert marks == [1, 2, 3]
