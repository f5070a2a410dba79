"""A database for each application, and sessions of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy_lite import SQLAlchemy as Lite
from sqlalchemy import orm

from flask_eventsourcing import (
    ConfigurationError,
    EventSourcing,
    NotInitializedError,
    SpanningTransactionError,
    events_discarded,
    events_recorded,
)
from flask_eventsourcing.host import PlainHost
from flask_eventsourcing.models import make_models
from flask_eventsourcing.projections import ModelProjection, on
from tests.bank import make_app
from tests.domain import Account, Bank, Shop


class Two:
    """An app with two applications, each in a database of its own."""

    def __init__(self, folder: Path, kind: str, **config: Any) -> None:
        self.urls = {name: f"sqlite:///{folder / name}.db" for name in ("main", "bank")}
        self.app = make_app(EVENTSOURCING_BINDS={"Bank": "bank"}, **config)
        if kind == "models":
            self.app.config["SQLALCHEMY_DATABASE_URI"] = self.urls["main"]
            self.app.config["SQLALCHEMY_BINDS"] = {"bank": self.urls["bank"]}
            self.db: Any = SQLAlchemy(self.app)
        else:
            self.app.config["SQLALCHEMY_ENGINES"] = {"default": self.urls["main"], "bank": self.urls["bank"]}
            self.db = Lite(self.app)
        self.es = EventSourcing(db=self.db, applications=[Shop, Bank])
        self.add_projection(kind)
        self.es.init_app(self.app)
        self.created = self.command("init-db")

    def add_projection(self, kind: str) -> None:
        """Count in the database of the bank."""
        base: Any = self.db.Model if kind == "models" else orm.declarative_base()
        body: dict[str, Any] = {"__tablename__": "count", "id": orm.mapped_column(sa.Integer, primary_key=True)}
        counted = type(base)("Count", (base,), body | ({"__bind_key__": "bank"} if kind == "models" else {}))

        @self.es.projection(of=Bank)
        class Counts(ModelProjection):
            models = (counted,)

            @on(Account.Event)
            def count(self, event: Any, session: Any) -> None:
                """Add a row in the same database."""
                session.connection(bind_arguments={"clause": counted.__table__})
                session.execute(sa.insert(counted))

        if kind == "lite":
            del self.es._registrations.entries[:]

    @property
    def session(self) -> orm.Session:
        """The current session."""
        current = self.db.session
        session: orm.Session = current() if isinstance(current, orm.scoped_session) else current
        return session

    def command(self, *args: str) -> str:
        """Run a command and return its output."""
        result = self.app.test_cli_runner().invoke(args=["eventsourcing", *args])
        assert result.exit_code == 0, result.output
        return result.output

    def tables(self, name: str) -> set[str]:
        """Return the tables in one of the databases."""
        engine = sa.create_engine(self.urls[name])
        found = set(sa.inspect(engine).get_table_names())
        engine.dispose()
        return found

    def stored(self, name: str) -> int:
        """Count the events in one of the databases."""
        engine = sa.create_engine(self.urls[name])
        table = "bank_events" if name == "bank" else "shop_events"
        with engine.connect() as connection:
            found = connection.scalar(sa.text(f"SELECT count(*) FROM {table}"))
        engine.dispose()
        return int(found or 0)

    def close(self) -> None:
        """Close everything."""
        with self.app.app_context():
            engines = list(self.db.engines.values())
        self.es.close()
        for engine in engines:
            engine.dispose()


@pytest.fixture(params=["models", "lite"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Two]:
    """The app with either kind of ``db`` object."""
    made = Two(tmp_path, request.param)
    yield made
    made.close()


def test_tables_and_commands_are_in_their_own_database(two: Two) -> None:
    """``init-db`` creates, and ``check`` finds, the tables of each application in its own database."""
    assert {"shop_events", "shop_snapshots", "shop_tracking"} <= two.tables("main")
    assert not any(name.startswith("bank") for name in two.tables("main"))
    assert {"bank_events", "bank_snapshots", "bank_tracking"} <= two.tables("bank")
    assert not any(name.startswith("shop") for name in two.tables("bank"))
    assert two.command("init-db") == "All tables are there.\n"
    checked = two.command("check")
    assert checked.count("Database: ") == 2
    assert "main.db" in checked
    assert "bank.db" in checked
    assert "Bank: log ok" in checked


def test_each_is_saved_in_its_own_database(two: Two) -> None:
    """Events are stored, read and announced by the application that saved them, one transaction each."""
    heard: list[str] = []

    def hear(sender: object, application: Any, notifications: Any) -> None:
        heard.append(application.name)

    with two.app.app_context(), events_recorded.connected_to(hear, two.app):
        for application in (two.es[Bank], two.es[Shop]):
            account_id = application.open_account()
            two.db.session.commit()
            assert application.balance(account_id) == 0
            application.deposit(account_id, 5)
            two.db.session.rollback()
            assert application.balance(account_id) == 0
            two.db.session.rollback()
    assert heard == ["Bank", "Shop"]
    assert [two.stored(name) for name in ("main", "bank")] == [1, 1]


def test_transaction_that_would_span_both_is_refused(two: Two) -> None:
    """Events of both in one transaction are refused, and nothing is stored."""

    @two.es.transactional
    def both() -> None:
        two.es[Shop].open_account()
        two.es[Bank].open_account()

    with two.app.app_context(), pytest.raises(SpanningTransactionError, match="events of Shop"):
        both()
    assert [two.stored(name) for name in ("main", "bank")] == [0, 0]


@pytest.mark.parametrize("application", [Shop, Bank])
def test_guard_looks_at_both(two: Two, application: type[Bank]) -> None:
    """Uncommitted events of either application make an answer 500."""

    def view() -> str:
        two.es[application].open_account()
        return "done"

    client = two.app.test_client()
    assert client.post("/", environ_overrides={"tests.view": view}).status_code == 500
    assert [two.stored(name) for name in ("main", "bank")] == [0, 0]


def test_projection_runs_in_the_database_of_its_application(tmp_path: Path) -> None:
    """A projection's checkpoint and models are beside the events that it follows."""
    two = Two(tmp_path, "models")
    assert {"bank_projections", "count"} <= two.tables("bank")
    with two.app.app_context():
        for _ in range(3):
            two.es[Bank].open_account()
        two.db.session.commit()
    two.command("run", "--all", "--once")
    assert "Counts" in two.command("status")
    engine = sa.create_engine(two.urls["bank"])
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM count")) == 3
    engine.dispose()
    two.close()


def test_models_of_a_projection_elsewhere_are_refused(tmp_path: Path) -> None:
    """A projection of the bank cannot have its models in the shop's database."""
    two = Two(tmp_path, "models")
    base: Any = two.db.Model
    body: dict[str, Any] = {"__tablename__": "wrong", "id": orm.mapped_column(sa.Integer, primary_key=True)}
    wrong = type(base)("Wrong", (base,), body)
    with pytest.raises(ConfigurationError, match="bind key None, and the events have 'bank'"):

        @two.es.projection(of=Bank)
        class Wrongs(ModelProjection):
            models = (wrong,)

            @on(Account.Event)
            def note(self, event: Any, session: Any) -> None:
                """Do nothing."""

    two.close()


class TestUsing:
    """``es.using(session)``."""

    def session(self, two: Two, name: str = "bank") -> orm.Session:
        """Make a session of one's own for one of the databases."""
        with two.app.app_context():
            engines = two.db.engines
            return orm.Session(engines.get("bank") if name == "bank" else engines.get(None, engines.get("default")))

    def test_it_is_the_current_one(self, two: Two) -> None:
        """Recorders and ``db.session`` use it, nothing is stored before its commit, and the former comes back."""
        with two.app.app_context():
            former = two.session
            with self.session(two) as session:
                with two.es.using(session) as used:
                    assert used is session
                    assert two.session is session
                    account_id = two.es[Bank].open_account()
                    assert two.es[Bank].balance(account_id) == 0
                assert two.session is former
                assert two.es[Bank].balance(account_id) is None
                former.rollback()
                assert two.stored("bank") == 0
                session.commit()
                assert two.es[Bank].balance(account_id) == 0

    def test_it_is_nestable(self, two: Two) -> None:
        """Each block has its own session, one within the other, also after an error."""
        first, second = self.session(two), self.session(two)
        with two.app.app_context(), first, second, two.es.using(first):
            with pytest.raises(KeyError), two.es.using(second):
                raise KeyError
            with two.es.using(second), two.es.transaction() as inner:
                assert inner is second
            with two.es.transaction() as outer:
                assert outer is first

    def test_units_of_work_run_on_it(self, two: Two) -> None:
        """``transaction()`` commits it, and rolls it back."""
        with two.app.app_context(), self.session(two) as session, two.es.using(session):
            with two.es.transaction() as used:
                assert used is session
                two.es[Bank].open_account()

            @two.es.transactional
            def fail() -> None:
                two.es[Bank].open_account()
                raise KeyError

            with pytest.raises(KeyError):
                fail()
        assert two.stored("bank") == 1

    def test_session_of_another_database_is_refused(self, two: Two) -> None:
        """One for a database without events is refused at once, one for the other application's at ``save()``."""
        engine = sa.create_engine("sqlite://")
        with two.app.app_context(), orm.Session(engine) as session, orm.Session() as unbound:
            with pytest.raises(ConfigurationError, match=r"This session is for the database sqlite://"):
                two.es.using(session).__enter__()
            with pytest.raises(ConfigurationError, match="no engine"):
                two.es.using(unbound).__enter__()
        session = self.session(two)
        with two.app.app_context(), session, two.es.using(session), pytest.raises(ConfigurationError, match="'shop_ev"):
            two.es[Shop].open_account()
        engine.dispose()
        assert [two.stored(name) for name in ("main", "bank")] == [0, 0]

    def test_session_on_a_connection(self, two: Two) -> None:
        """A session that is bound to a connection is used on that, so that the caller's rollback takes all along."""
        with two.app.app_context(), two.db.engines["bank"].connect() as connection:
            transaction = connection.begin()
            session = orm.Session(connection, join_transaction_mode="create_savepoint")
            with session, two.es.using(session):
                account_id = two.es[Bank].open_account()
                session.commit()
                assert two.es[Bank].balance(account_id) == 0
            transaction.rollback()
        assert two.stored("bank") == 0

    @pytest.mark.parametrize("mode", ["explicit", "request", "save"])
    @pytest.mark.parametrize("commits", [True, False])
    def test_answer_tells_of_one_that_was_left(self, tmp_path: Path, mode: str, commits: bool) -> None:
        """If it was not committed when the view has answered, that is a 500."""
        two = Two(tmp_path, "models", EVENTSOURCING_COMMIT=mode)
        heard: list[Any] = []
        session = self.session(two)

        def hear(sender: object, application: Any, notifications: Any) -> None:
            heard.append(application)

        def view() -> str:
            with two.es.using(session):
                session.begin_nested()
                two.es[Bank].open_account()
            if commits:
                session.commit()
            return "done"

        with events_discarded.connected_to(hear, two.app):
            answer = two.app.test_client().post("/", environ_overrides={"tests.view": view})
        assert answer.status_code == (200 if commits else 500)
        assert two.stored("bank") == (1 if commits else 0)
        assert len(heard) == (0 if commits else 1)
        session.close()
        two.close()

    def test_one_that_was_lent_to_a_nested_context(self, tmp_path: Path) -> None:
        """The answer tells of it, too."""
        two = Two(tmp_path, "models")
        session = self.session(two)

        def view() -> str:
            with two.app.app_context(), two.es.using(session):
                two.es[Bank].open_account()
            return "done"

        assert two.app.test_client().post("/", environ_overrides={"tests.view": view}).status_code == 500
        assert two.stored("bank") == 0
        session.close()
        two.close()

    def test_it_may_outlive_the_context(self, two: Two) -> None:
        """Without a request only the owner of a session ends it, and may commit it after the application context."""
        with self.session(two) as session:
            with two.app.app_context(), two.es.using(session):
                two.es[Bank].open_account()
            session.commit()
        assert two.stored("bank") == 1

    def test_outside_a_context(self, two: Two) -> None:
        """There is no current session outside an application context."""
        with self.session(two) as session, pytest.raises(NotInitializedError), two.es.using(session):
            pass


@pytest.mark.parametrize("scoped", [True, False])
def test_plain_host(tmp_path: Path, scoped: bool) -> None:
    """``PlainHost.using_session()`` does the same without a framework."""
    base = orm.declarative_base()
    engine, other = (sa.create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("bank", "other"))
    records = make_models(base, "Bank")
    base.metadata.create_all(engine)
    factory = orm.sessionmaker(engine)
    host = PlainHost(orm.scoped_session(factory) if scoped else factory, {Bank: records})
    bank = host[Bank]
    with orm.Session(engine) as session:
        with host.using_session(session) as used:
            assert used is session
            account_id = bank.open_account()
        assert bank.balance(account_id) is None
        if scoped:
            host.unit().session.rollback()  # type: ignore[union-attr]
        session.commit()
        assert bank.balance(account_id) == 0
    with orm.Session(other) as session, pytest.raises(ConfigurationError, match=r"other\.db"):
        host.using_session(session).__enter__()
    host.close()
    if scoped:
        host._factory.remove()  # type: ignore[union-attr]
    engine.dispose()
