"""What holds for sessions that zope.sqlalchemy has registered, beside what holds on every host."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from eventsourcing.persistence import IntegrityError
from sqlalchemy import orm
from transaction import TransactionManager
from transaction.interfaces import DoomedTransaction, NoTransaction, TransientError

from flask_eventsourcing.contrib.zope import EventSourcing, event_models
from flask_eventsourcing.exceptions import (
    CommitInsideUnitError,
    ConfigurationError,
    RollbackOnlyError,
    UncommittedEventsError,
)
from flask_eventsourcing.metadata import event_metadata
from flask_eventsourcing.models import StoredEventMixin
from flask_eventsourcing.persistence.dialects.event_tables import ConflictError
from flask_eventsourcing.signals import events_recorded
from tests import servers
from tests.domain import Account, Bank, conflict_with, in_thread, in_threads
from tests.hosts.test_units_of_work import recorded
from tests.hosts.zope_site import ExplicitManager, ZopeSite
from tests.servers import ServerFolder
from tests.source import ROOT

SCRIPT = """
import sys
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from sqlalchemy import orm
from flask_eventsourcing.contrib.zope import EventSourcing, event_models
from tests.domain import Bank

class Base(orm.DeclarativeBase):
    pass

BankRecords = event_models(Base, "Bank")
engine = sa.create_engine(sys.argv[1])
Base.metadata.create_all(engine)
Session = orm.scoped_session(orm.sessionmaker(engine))
zope.sqlalchemy.register(Session)

es = EventSourcing(Bank, models=BankRecords, session=Session)
with transaction.manager:
    es.application.open_account("ada")

assert not [name for name in sys.modules if name.partition(".")[0] in ("click", "flask", "pyramid", "werkzeug")]
with transaction.manager:
    assert Session.scalar(sa.select(sa.func.count()).select_from(BankRecords.StoredEvent)) == 1
"""


class Voter:
    """A participant that votes no, or fails when everybody has agreed."""

    def __init__(self, manager: Any, *, key: str, fails_in: str) -> None:
        self.transaction_manager = manager
        self.key = key
        self.fails_in = fails_in

    def __repr__(self) -> str:
        return "<the mailer>"

    def _fail(self, where: str) -> None:
        if where == self.fails_in:
            raise KeyError(where)

    def abort(self, transaction: Any) -> None:
        """Do nothing."""

    def tpc_begin(self, transaction: Any) -> None:
        """Do nothing."""

    def commit(self, transaction: Any) -> None:
        """Do nothing."""

    def tpc_vote(self, transaction: Any) -> None:
        """Vote no."""
        self._fail("vote")

    def tpc_finish(self, transaction: Any) -> None:
        """Fail when it is too late."""
        self._fail("finish")

    def tpc_abort(self, transaction: Any) -> None:
        """Do nothing."""

    def sortKey(self) -> str:  # noqa: N802
        """Say when it votes."""
        return self.key


@pytest.fixture
def zope_site(tmp_path: Path) -> Any:
    """A site on SQLite."""
    made = ZopeSite(f"sqlite:///{tmp_path}/bank.db", scoped=True)
    yield made
    made.close()


@pytest.fixture
def zope_on_postgres(server_folder: ServerFolder) -> Any:
    """A site on PostgreSQL whose sessions commit in two phases."""
    settings = "max_prepared_transactions = 20\n"
    server = server_folder.shared("postgres-two-phases", lambda folder: servers.start_postgres(folder, settings))
    with servers.postgres_database(server.url) as url:
        made = ZopeSite(url, scoped=True, twophase=True)
        yield made
        made.close()


def test_a_script_works_as_it_is_written(tmp_path: Path) -> None:
    """The script of the documentation stores its events, and neither Flask nor Pyramid is imported for it."""
    command = [sys.executable, "-c", SCRIPT, f"sqlite:///{tmp_path}/bank.db"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transaction_of_the_manager_commits_and_aborts(zope_site: ZopeSite) -> None:
    """Events are stored when the manager commits, with the rows beside them, and gone when it aborts."""
    with zope_site.manager:
        zope_site.bank.open_account()
        zope_site.note()
    with suppress(KeyError), zope_site.manager:
        zope_site.bank.open_account()
        raise KeyError
    assert zope_site.stored() == (1, 1)


def test_abort_is_no_loss(zope_site: ZopeSite, caplog: pytest.LogCaptureFixture) -> None:
    """There is no warning for events of an abort, or of a commit that fails."""
    with suppress(KeyError), zope_site.manager:
        zope_site.bank.open_account()
        raise KeyError
    with suppress(sa.exc.IntegrityError), zope_site.manager:
        zope_site.bank.open_account()
        zope_site.session.add(zope_site.Note(text=None))
    zope_site.manager.abort()
    assert caplog.records == []
    assert zope_site.stored() == (0, 0)


@pytest.mark.parametrize("scoped", [True, False])
def test_session_that_does_not_begin_by_itself(tmp_path: Path, scoped: bool) -> None:
    """With ``autobegin=False`` a save and a unit of work begin the session; who reads first begins it, as for rows."""
    site = ZopeSite(f"sqlite:///{tmp_path}/bank.db", scoped=scoped, autobegin=False)
    with site.manager:
        account_id = site.bank.open_account()
    with site.manager:
        site.session.begin()
        site.bank.deposit(account_id)
        site.note()
    with site.es.transaction():
        site.bank.deposit(account_id)
    assert site.stored() == (3, 1)
    site.close()


def test_explicit_manager_of_a_sessionmaker(tmp_path: Path) -> None:
    """Each transaction of an explicit manager has a session of its own; outside of it a save commits by itself."""
    site = ZopeSite(f"sqlite:///{tmp_path}/bank.db", scoped=False, explicit=True)
    with site.manager:
        account_id = site.bank.open_account()
        assert site.bank.balance(account_id) == 0
        assert site.stored() == (0, 0)
    site.bank.deposit(account_id)
    assert site.stored() == (2, 0)
    with pytest.raises(NoTransaction):
        site.manager.get()
    with site.es.transaction():
        site.bank.deposit(account_id)
        site.note()
    assert site.stored() == (3, 1)
    site.manager.begin()
    site.close()


def test_unit_within_a_transaction_joins_it(zope_site: ZopeSite) -> None:
    """Within a transaction that other code has begun, a unit of work leaves the commit to its owner."""
    with suppress(KeyError), zope_site.manager:
        with zope_site.es.transaction():
            zope_site.bank.open_account()
        assert zope_site.stored() == (0, 0)
        raise KeyError
    assert zope_site.stored() == (0, 0)
    with zope_site.manager, zope_site.es.transaction():
        zope_site.bank.open_account()
    assert zope_site.stored() == (1, 0)


def test_unit_that_fails_within_a_transaction_dooms_it(zope_site: ZopeSite) -> None:
    """A transaction around a failed unit of work cannot be committed, even if the error is caught."""

    def go_on_after_an_error() -> None:
        with zope_site.manager:
            zope_site.bank.open_account()
            with suppress(KeyError), zope_site.es.transaction():
                raise KeyError

    with pytest.raises(DoomedTransaction):
        go_on_after_an_error()
    zope_site.manager.abort()
    assert zope_site.stored() == (0, 0)


def test_unit_after_work_without_a_transaction_commits(zope_site: ZopeSite) -> None:
    """A transaction that only the session has begun, at its first use, is committed by the unit."""
    zope_site.session.execute(sa.select(zope_site.Note.id)).all()
    zope_site.note()
    with zope_site.es.transaction():
        zope_site.bank.open_account()
    assert zope_site.stored() == (1, 1)


def test_commit_within_a_unit_is_refused(zope_site: ZopeSite) -> None:
    """Inside a unit of work the manager must not commit, and nothing of the unit is stored."""

    def commit() -> None:
        with zope_site.es.transaction() as session, session.begin_nested():
            zope_site.bank.open_account()
            zope_site.manager.commit()

    def abort() -> None:
        with zope_site.es.transaction():
            zope_site.bank.open_account()
            zope_site.manager.abort()
            zope_site.bank.open_account()

    with pytest.raises(CommitInsideUnitError):
        commit()
    with pytest.raises(RollbackOnlyError):
        abort()
    assert zope_site.stored() == (0, 0)


def test_decorated_function(zope_site: ZopeSite) -> None:
    """``transactional`` and ``retry_on_conflict`` run a function in a unit, the latter again after a conflict."""
    account_id = zope_site.opened()
    zope_site.es.transactional(zope_site.bank.deposit)(account_id, 1)
    tries: list[int] = []

    @zope_site.es.retry_on_conflict(times=2)
    def deposit() -> None:
        zope_site.bank.deposit(account_id, 10)
        tries.append(1)
        if len(tries) < 3:
            raise ConflictError

    deposit()
    with zope_site.manager:
        assert zope_site.bank.balance(account_id) == 11
    with pytest.raises(ConfigurationError):
        zope_site.es.retry_on_conflict(times=-1)


def test_conflict_is_transient(zope_site: ZopeSite) -> None:
    """A conflict is the library's error and one after which ``attempts()`` tries again, up to its limit."""
    account_id = zope_site.opened()
    with zope_site.manager:
        save = conflict_with(zope_site.bank, account_id)
    zope_site.elsewhere(lambda: zope_site.bank.deposit(account_id))
    with pytest.raises(IntegrityError) as caught, zope_site.manager:
        save()
    assert isinstance(caught.value, TransientError)
    tries: list[int] = []

    def conflict() -> None:
        tries.append(1)
        account = zope_site.bank.account(account_id)
        zope_site.manager.abort()
        zope_site.manager.begin()
        zope_site.elsewhere(lambda: zope_site.bank.deposit(account_id))
        account.deposit(1)
        zope_site.bank.save(account)

    def attempt() -> None:
        for each in zope_site.manager.attempts(3):
            with each:
                conflict()

    with pytest.raises(TransientError):
        attempt()
    assert len(tries) == 3


def test_attempts_of_many_threads_all_succeed(postgres_url: str) -> None:
    """Threads that change one aggregate under ``attempts()`` queue for it after a conflict, and lose no update."""
    site = ZopeSite(postgres_url, scoped=True)
    account_id = site.opened()

    def pay_in() -> None:
        for _ in range(5):
            for attempt in site.manager.attempts(20):
                with attempt:
                    site.bank.deposit(account_id)

    in_threads([pay_in] * 4)
    with site.manager:
        assert site.bank.balance(account_id) == 20
    site.close()


def test_what_waits_for_a_commit_comes_after_a_transaction_that_has_only_read(zope_site: ZopeSite) -> None:
    """zope.sqlalchemy commits a session that has only read, if something waits for that."""
    called: list[str] = []
    with zope_site.manager:
        unit = zope_site.host.unit()
        assert unit is not None
        zope_site.session.execute(sa.select(zope_site.Note.id)).all()
        assert unit.awaits_commit
        unit.on_commit(lambda: called.append("committed"))
    assert called == ["committed"]


def test_statement_past_the_orm_is_committed_with_a_unit(zope_site: ZopeSite) -> None:
    """A unit of work commits what was written with a plain statement, where zope.sqlalchemy alone rolls back."""
    with zope_site.es.transaction() as session:
        session.connection().execute(sa.insert(zope_site.Note.__table__).values(text="note"))
    assert zope_site.stored() == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep_session": True}, "keep_session"), ({"initial_state": "readonly"}, "read only"), (None, "no transaction")],
)
def test_session_that_would_lose_events_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    """A session whose registration cannot keep the promise of a commit is refused at the first save."""
    base = orm.declarative_base()
    models = event_models(base, "Bank")
    engine = sa.create_engine(f"sqlite:///{tmp_path}/bank.db")
    base.metadata.create_all(engine)
    session = orm.scoped_session(orm.sessionmaker(engine))
    manager = ExplicitManager()
    if options is not None:
        zope.sqlalchemy.register(session, transaction_manager=manager, **options)
    es = EventSourcing(Bank, models=models, session=session)
    with pytest.raises(ConfigurationError, match=message), manager:
        es.application.open_account()
    session.remove()
    es.close()
    engine.dispose()


def test_database_with_one_phase_is_told_so(tmp_path: Path) -> None:
    """On SQLite, a session that wants two phases and a savepoint of the manager are refused with one clear error."""
    site = ZopeSite(f"sqlite:///{tmp_path}/bank.db", scoped=True, twophase=True)
    with pytest.raises(ConfigurationError, match="twophase"), site.manager:
        site.bank.open_account()
    site.close()
    site = ZopeSite(f"sqlite:///{tmp_path}/bank.db", scoped=True)

    def savepoint(*, optimistic: bool) -> None:
        with site.manager:
            site.bank.open_account()
            site.manager.savepoint(optimistic=optimistic)

    with pytest.raises(TypeError, match=r"zope\.sqlalchemy has no savepoints"):
        savepoint(optimistic=False)
    site.manager.abort()
    assert site.stored() == (0, 0)
    savepoint(optimistic=True)
    assert site.stored() == (1, 0)
    site.close()


@pytest.mark.parametrize("fails_in", ["vote", "finish"])
def test_events_of_a_session_with_one_phase_may_be_stored_although_the_transaction_failed(
    zope_site: ZopeSite, fails_in: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a later participant fails, the events that were committed are announced, and the log names it."""

    def transfer() -> None:
        with zope_site.manager:
            zope_site.bank.open_account()
            zope_site.manager.get().join(Voter(zope_site.manager, key="~~later", fails_in=fails_in))

    with recorded() as heard:
        with pytest.raises(KeyError):
            transfer()
        zope_site.manager.abort()
        assert [count for _, count in heard] == [1]
    assert zope_site.stored() == (1, 0)
    assert "<the mailer> failed. The events are stored" in caplog.text


def test_participant_that_votes_no_before_the_database(zope_site: ZopeSite) -> None:
    """If a participant before the database votes no, nothing is stored and nothing is announced."""

    def transfer() -> None:
        with zope_site.manager:
            zope_site.bank.open_account()
            zope_site.manager.get().join(Voter(zope_site.manager, key="earlier", fails_in="vote"))

    with recorded() as heard:
        with pytest.raises(KeyError):
            transfer()
        zope_site.manager.abort()
        assert heard == []
    assert zope_site.stored() == (0, 0)


def test_two_phases_on_postgresql(zope_on_postgres: ZopeSite) -> None:
    """With ``twophase`` a later vote of no rolls the events back; without it they are committed and announced."""
    site = zope_on_postgres

    def transfer(key: str) -> None:
        with site.manager:
            site.bank.open_account()
            site.note()
            site.manager.get().join(Voter(site.manager, key=key, fails_in="vote"))

    with recorded() as heard:
        for key in ("earlier", "~~later"):
            with pytest.raises(KeyError):
                transfer(key)
            site.manager.abort()
            assert site.stored() == (0, 0)
        assert heard == []
        with site.manager:
            site.bank.open_account()
            site.note()
        assert [count for _, count in heard] == [1]
    assert site.stored() == (1, 1)


def test_savepoint_of_the_manager(postgres_url: str) -> None:
    """What was saved since ``transaction.savepoint()`` is gone when that is rolled back, and the rest is stored."""
    site = ZopeSite(postgres_url, scoped=True)
    with recorded() as heard:
        with site.manager:
            account_id = site.bank.open_account()
            savepoint = site.manager.savepoint()
            site.bank.deposit(account_id)
            savepoint.rollback()
            assert site.bank.balance(account_id) == 0
        assert [count for _, count in heard] == [1]
    with site.manager:
        savepoint = site.manager.savepoint()
        site.bank.deposit(account_id)
        savepoint.rollback()
    assert site.stored() == (1, 0)
    site.close()


def test_conflict_at_the_first_of_two_phases_is_tried_again(zope_on_postgres: ZopeSite) -> None:
    """A serialization failure while the database prepares the commit passes as it is, so ``run()`` tries again."""
    site = zope_on_postgres
    serializable = site.engine.execution_options(isolation_level="SERIALIZABLE")
    assert site.scoped is not None
    site.scoped.session_factory.configure(bind=serializable)
    site.scoped.remove()
    count = sa.select(sa.func.count()).select_from(site.Note)
    tries: list[int] = []

    def overtake() -> None:
        with orm.Session(serializable) as session:
            session.add(site.Note(text=f"after {session.scalar(count)}"))
            session.commit()

    def work() -> None:
        tries.append(1)
        site.session.scalar(count)
        site.bank.open_account()
        site.note()
        site.session.flush()
        if len(tries) == 1:
            in_thread(overtake)

    with recorded() as heard:
        site.manager.run(work)
        assert [count for _, count in heard] == [1]
    assert len(tries) == 2
    assert site.stored() == (1, 2)
    assert site.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_models_are_checked(zope_site: ZopeSite) -> None:
    """A class that is not an application, or has no models, is refused with the remedy."""
    for models in (object(), {Bank: object()}, {}):
        with pytest.raises(ConfigurationError):
            EventSourcing(Bank, models=models, session=zope_site.scoped)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="session_factory"):
        EventSourcing(Bank, models=event_models(orm.declarative_base(), "Bank"), session=lambda: zope_site.session)


def test_unit_after_a_save_without_a_transaction_commits(zope_site: ZopeSite) -> None:
    """A unit of work commits although the first use of the session was a save outside of every transaction."""
    zope_site.bank.open_account()
    with zope_site.es.transaction():
        zope_site.bank.open_account()
    assert zope_site.stored() == (2, 0)


def test_commit_of_a_manager_that_the_session_has_not_joined_fails(tmp_path: Path) -> None:
    """A session that was marked as changed with the wrong manager makes the commit fail; its events are not lost."""
    site = ZopeSite(f"sqlite:///{tmp_path}/bank.db", scoped=True)

    def save() -> None:
        with site.manager:
            zope.sqlalchemy.mark_changed(site.session)
            site.bank.open_account()

    with pytest.raises(UncommittedEventsError, match="of another manager"):
        save()
    site.manager.abort()
    transaction.abort()
    assert site.stored() == (0, 0)
    site.close()


def test_receiver_cannot_save_in_the_commit_it_hears_of(zope_site: ZopeSite) -> None:
    """A receiver of ``events_recorded`` that saves in the session is refused, as nothing would commit that."""
    refused = []

    def receive(sender: object, **_: Any) -> None:
        with pytest.raises(UncommittedEventsError, match="cannot save in the session that was committed"):
            zope_site.bank.open_account()
        refused.append(sender)

    with events_recorded.connected_to(receive), zope_site.manager:
        zope_site.bank.open_account()
    assert refused
    assert zope_site.stored() == (1, 0)


@pytest.mark.parametrize("unit", [False, True])
def test_hook_cannot_save_in_the_transaction_that_was_committed(zope_site: ZopeSite, unit: bool) -> None:
    """A hook that the transaction calls after its commit is refused to save, and the next transaction works."""
    raised: list[Exception] = []

    def save() -> None:
        with zope_site.es.transaction() if unit else nullcontext():
            zope_site.bank.open_account()

    def hook(_: bool) -> None:
        try:
            save()
        except UncommittedEventsError as error:
            raised.append(error)

    for number in range(2):
        with zope_site.manager as current:
            current.addAfterCommitHook(hook)
            zope_site.bank.open_account()
            zope_site.note()
        assert "cannot save in the session that was committed" in str(raised[number])
        assert zope_site.stored() == (number + 1, number + 1)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("way", ["hook", "synchronizer"])
def test_events_saved_during_an_abort_are_told(
    zope_site: ZopeSite, way: str, empty: bool, unit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What a hook or a synchronizer saves after a rollback is rolled back too, as rows are, and logged once."""

    class Saving:
        """Saves at the end of a transaction."""

        def newTransaction(self, transaction: object) -> None:  # noqa: N802
            """Do nothing."""

        afterCompletion = newTransaction  # noqa: N815

        def beforeCompletion(self, transaction: object = None) -> None:  # noqa: N802
            """Save."""
            with zope_site.es.transaction() if unit else nullcontext():
                zope_site.bank.open_account()

    saving = Saving()
    current = zope_site.manager.begin()
    if way == "synchronizer":
        zope_site.manager.registerSynch(saving)
    else:
        current.addAfterAbortHook(saving.beforeCompletion)
    if not empty:
        zope_site.bank.open_account()
    zope_site.manager.abort()
    assert ["was saved by a hook or synchronizer" in each for each in caplog.messages] == [True]
    zope_site.manager.clearSynchs()
    with zope_site.manager:
        zope_site.bank.open_account()
    assert zope_site.stored() == (1, 0)


@pytest.mark.parametrize("late", [False, True])
def test_threads_that_share_a_transaction(zope_site: ZopeSite, late: bool) -> None:
    """A commit waits for the save of another thread in its session, and announces it; a save in a commit is refused."""
    manager, factory = TransactionManager(explicit=True), orm.sessionmaker(zope_site.engine)
    zope.sqlalchemy.register(factory, transaction_manager=manager)
    es = EventSourcing(Bank, models=zope_site.models, session=factory)
    reached, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        if threading.current_thread() is pausing:
            reached.set()
            go_on.wait(20)

    def save() -> None:
        try:
            es.application.open_account()
        except UncommittedEventsError as error:
            refused.append(str(error))

    refused: list[str] = []
    manager.begin()
    es.application.open_account()
    first, second = (manager.commit, save) if late else (save, manager.commit)
    pausing = threading.Thread(target=first)
    sa.event.listen(zope_site.engine, "commit" if late else "before_cursor_execute", pause)
    with recorded() as heard:
        pausing.start()
        assert reached.wait(20)
        other = threading.Thread(target=second)
        other.start()
        other.join(0.2)
        go_on.set()
        for each in (pausing, other):
            each.join(20)
        assert sum(count for _, count in heard) == zope_site.stored()[0] == 2 - late
    assert ["Another thread commits the session" in each for each in refused] == [True] * late
    es.close()


@pytest.mark.parametrize("listener", ["before_flush", "after_flush"])
def test_listener_of_a_flush_saves_in_the_commit(zope_site: ZopeSite, listener: str) -> None:
    """Events that a listener saves when the commit flushes the session are committed with the rows, or not at all."""

    def save(session: orm.Session, *_: object) -> None:
        if not session.info.setdefault("has saved", False):
            session.info["has saved"] = True
            zope_site.bank.open_account()

    session = zope_site.session
    sa.event.listen(session, listener, save)
    with recorded() as heard:
        with zope_site.manager:
            zope_site.note()
        assert [count for _, count in heard] == [1]
    assert zope_site.stored() == (1, 1)
    session.info["has saved"] = False

    def fail() -> None:
        with zope_site.manager as current:
            zope_site.note()
            current.join(Voter(zope_site.manager, key="earlier", fails_in="vote"))

    with recorded() as heard:
        with pytest.raises(KeyError):
            fail()
        zope_site.manager.abort()
        assert heard == []
    assert zope_site.stored() == (1, 1)


def test_savepoint_that_is_older_than_the_session(zope_site: ZopeSite, caplog: pytest.LogCaptureFixture) -> None:
    """A savepoint from before the session's first use can be rolled back, and later events are committed."""
    with zope_site.manager:
        account_id = zope_site.bank.open_account()
    with zope_site.manager:
        savepoint = zope_site.manager.savepoint()
        zope_site.bank.deposit(account_id, 5)
        savepoint.rollback()
        zope_site.bank.deposit(account_id, 2)
    assert zope_site.bank.balance(account_id) == 2
    zope_site.manager.abort()
    assert caplog.messages == []
    zope_site.manager.begin()
    savepoint = zope_site.manager.savepoint()
    zope_site.bank.deposit(account_id, 5)
    savepoint.rollback()
    zope_site.bank.deposit(account_id, 1)
    zope_site.manager.get().join(Voter(zope_site.manager, key="~~later", fails_in="vote"))
    with pytest.raises(KeyError):
        zope_site.manager.commit()
    zope_site.manager.abort()
    assert "<the mailer> failed. The events are stored" in caplog.text


class RecordBase(orm.DeclarativeBase):
    """A base with a record class of the user's."""


class TenantEvent(StoredEventMixin, RecordBase):
    """A record class with a column of its own."""

    __tablename__ = "bank_events"
    tenant: orm.Mapped[str] = orm.mapped_column(sa.String(20))

    @classmethod
    def column_values(cls, event: Any, metadata: Mapping[str, str]) -> Mapping[str, Any]:
        """Fill it."""
        return {"tenant": f"{metadata['tenant']} {type(event).__name__}"}


def test_column_values(tmp_path: Path) -> None:
    """``column_values()`` of a record class fills its columns from event and metadata, in the session's transaction."""
    models = event_models(RecordBase, "Bank", stored_event_model=TenantEvent)
    engine = sa.create_engine(f"sqlite:///{tmp_path}/bank.db")
    RecordBase.metadata.create_all(engine)
    sessions = orm.scoped_session(orm.sessionmaker(engine))
    manager = transaction.ThreadTransactionManager()
    zope.sqlalchemy.register(sessions, transaction_manager=manager)
    es = EventSourcing(Bank, models=models, session=sessions)
    with manager, event_metadata(tenant="acme"):
        account: Account = es.application.repository.get(es.application.open_account("ada"))
        account.deposit(1)
        es.application.save(account)
    with suppress(KeyError), manager:
        es.application.open_account("bob")
    assert sessions.scalars(sa.select(TenantEvent.tenant)).all() == ["acme Created", "acme Deposited"]
    sessions.remove()
    es.close()
    engine.dispose()
