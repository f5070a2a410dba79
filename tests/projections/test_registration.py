"""Registering projections: before and after ``init_app``, on several apps, and what is refused.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy_lite import SQLAlchemy as Lite
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError, EventSourcing
from flask_eventsourcing.exceptions import MissingTableError
from flask_eventsourcing.projections import ModelProjection, on, reaction
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.workers import Worker
from tests.bank import make_app
from tests.domain import Bank, Member, Shop
from tests.integration.test_databases import Club
from tests.projections.conftest import MakeFlaskDesk
from tests.projections.desk import Created, Deposited, Idle, make_models
from tests.projections.desk_hosts import FlaskDesk, make_desk

on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)


@pytest.fixture
def host() -> str:
    """Registration on Flask apps."""
    return "flask"


def dispose(es: EventSourcing[Any, Any], app: Flask, db: Any) -> None:
    """Close every connection."""
    es.close(app)
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


def registered(app: Flask) -> list[str]:
    """The names of what is bound to an app."""
    return [consumer.name for consumer in app.extensions["eventsourcing"].projections]


def test_before_and_after_init_app() -> None:
    """A projection may be registered before and after ``init_app``, with the decorator in both of its forms."""
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bank)

    @es.projection
    class Before(Idle):
        """Registered before."""

    app = make_app("sqlite://")
    db.init_app(app)
    es.init_app(app)

    @es.projection(of=Bank)
    class After(Idle):
        """Registered after."""

    assert registered(app) == ["Before", "After"]
    assert {"bank_projections", "bank_dead_letters"} < set(db.metadata.tables)
    es.close()


def test_without_projections_there_are_no_tables_for_them() -> None:
    """An app without projections gets no tables for them."""
    db = SQLAlchemy()
    app = make_app("sqlite://")
    db.init_app(app)
    EventSourcing(app, db=db, application=Bank)
    assert not [name for name in db.metadata.tables if "projections" in name or "dead" in name]


def test_a_factory_that_runs_twice_defines_its_projection_twice(tmp_path: Path) -> None:
    """An application factory that defines projections may run again; either app finds its own by class and name."""
    db = SQLAlchemy()
    balance, _ = make_models(db.Model)
    es = EventSourcing(db=db, application=Bank)

    def create_app(number: int) -> tuple[Flask, type[ModelProjection]]:
        app = make_app(f"sqlite:///{tmp_path}/{number}.db")
        db.init_app(app)
        es.init_app(app)

        @es.projection(of=Bank)
        class Balances(ModelProjection):
            models = (balance,)

            @on(Created)
            def opened(self, event: Any, session: orm.Session) -> None:
                session.add(balance(account_id=event.originator_id, amount=number))

        with app.app_context():
            db.create_all()
        return app, Balances

    for app, projection in [create_app(1), create_app(2)]:
        assert registered(app) == ["Balances"]
        with app.app_context():
            es.application.open_account()
            db.session.commit()
            assert not Worker(app.extensions["eventsourcing"].projections.runnable(), once=True).run()
            es.wait_for(projection, 1, timeout=5)
            assert es.health().projections[0].position == 1
    es.close()


def wrong(**attributes: Any) -> Any:
    """Make a projection class with attributes that may be wrong."""
    return type("Wrong", (Idle,), attributes)


class NoHandler(ModelProjection):
    """A projection without handlers."""


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (Bank, "is not a projection: derive a class from ModelProjection"),
        (Idle(), "is not a projection"),
        (None, "is not a projection"),
        (NoHandler, "it has no handler: mark its methods"),
        (wrong(on_failure="ignore"), "on_failure is 'halt' or 'dead-letter'; found 'ignore'"),
        (wrong(retries=-1), "retries is a whole number from 0 up; found -1"),
        (wrong(retries=True), "retries is a whole number"),
        (wrong(batch_size=0), "batch_size is a whole number from 1 to 2000; found 0"),
        (wrong(batch_size=2001), "batch_size is"),
        (wrong(name="a:b"), "name must be a string of 1 to 100 characters without ':'"),
        (wrong(name=""), "name must be"),
        (wrong(models=["balance"]), "'balance' in models is not a mapped class"),
        (wrong(models=[Bank]), "in models is not a mapped class"),
        (wrong(inline=True, on_failure="dead-letter"), "inline projections fail with the save"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_registered(projection: Any, message: str) -> None:
    """A wrong class or attribute is named, and the app has no projection afterwards."""
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bank)
    app = make_app("sqlite://")
    db.init_app(app)
    es.init_app(app)
    for register in (es.projection(of=Bank), es.projection()):
        with pytest.raises(ConfigurationError, match=message):
            register(projection)
    assert registered(app) == []
    assert "bank_projections" not in db.metadata.tables
    es.close()


def test_two_handlers_of_one_name() -> None:
    """Two handlers of one name in a class are refused, as nobody would ever call the first."""
    with pytest.raises(ConfigurationError, match=r"Twice\._ is the name of two handlers"):

        class Twice(ModelProjection):
            @on(Created)
            def _(self, event: Any, session: orm.Session) -> None: ...

            @reaction(Created)
            def _(self, event: Any, key: str) -> None: ...


def test_names_of_handlers_that_are_none_of_two() -> None:
    """A handler may be marked twice, replace one of its base class, and be defined in a loop."""

    class Base(ModelProjection):
        @on(Created)
        @on(Deposited)
        def opened(self, event: Any, session: orm.Session) -> None: ...

    class Derived(Base):
        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None: ...

    handlers = []
    for event_class in (Created, Deposited):

        @on(event_class)
        def handler(self: Any, event: Any, session: orm.Session) -> None: ...

        handlers.append(handler)
    assert len({id(each) for each in (Base.opened, Derived.opened, *handlers)}) == 4


def test_the_application_must_be_registered() -> None:
    """``of=`` names a registered application, and is needed where there are several."""
    es = EventSourcing(db=SQLAlchemy(), applications=[Bank, Shop])
    with pytest.raises(ConfigurationError, match=r"is not a registered application class \(registered: Bank, Shop\)"):
        es.projection(Idle)
    with pytest.raises(ConfigurationError, match=r"of=.*Application"):
        es.projection(of=Application)(Idle)


@on_sqlite
def test_names_are_unique_in_an_application(desk: FlaskDesk) -> None:
    """Two projections of one name would share their position; a second name helps."""
    desk.register(Idle)
    with pytest.raises(ConfigurationError, match="Two projections of Bank are called 'Idle'"):
        desk.register(type("Other", (Idle,), {"name": "Idle"}))
    # On MySQL these would be one row.
    with pytest.raises(ConfigurationError, match="Two projections of Bank are called 'idle'"):
        desk.register(type("idle", (Idle,), {}))
    assert registered(desk.app) == ["Idle"]
    desk.register(type("Other", (Idle,), {"name": "Idle too"}))
    assert registered(desk.app) == ["Idle", "Idle too"]


def test_several_applications_on_one_database(new_desk: MakeFlaskDesk) -> None:
    """Projections of two applications have tables and positions of their own, also under one name."""
    desk = new_desk(Bank, Shop)
    for application in (Bank, Shop):
        desk.es.projection(of=application)(type("Openings", (Idle,), {}))
    with desk.app.app_context():
        desk.db.create_all()
        desk.es[Bank].open_account()
        desk.es[Shop].open_account()
        desk.es[Shop].open_account()
        desk.db.session.commit()
        assert not desk.run_once()
        found = {each.application: each.position for each in desk.es.health().projections}
        assert found == {"Bank": 1, "Shop": 2}
        with pytest.raises(ConfigurationError, match="Several applications have a projection 'Openings'"):
            desk.es.wait_for("Openings", 1)


def test_two_apps_on_one_database(new_desk: MakeFlaskDesk) -> None:
    """The position of a worker of one app is seen by another app on the same database."""
    one, two = new_desk(), new_desk()
    for desk in (one, two):
        desk.balances()
    account_id = one.open(5)
    assert not one.run_once()
    assert two.amounts() == {account_id: 5}
    assert two.row().position == 2
    assert not two.run_once()
    assert two.amounts() == {account_id: 5}


@on_sqlite
def test_models_in_another_database_are_refused(uri: str, tmp_path: Path) -> None:
    """A model with another bind key than the events is refused, and the app is as it was."""
    desk = make_desk(
        f"sqlite:///{tmp_path}/other.db", SQLALCHEMY_BINDS={"events": uri}, EVENTSOURCING_BIND_KEY="events"
    )
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="Table 'balance' of Balances has the bind key None"):
            desk.balances()
        assert registered(desk.app) == []
    desk.close()


def test_models_beside_events_with_a_bind_key(uri: str, tmp_path: Path) -> None:
    """With a bind key the projections' tables and models are in the database of the events."""
    db = SQLAlchemy()
    app = make_app(f"sqlite:///{tmp_path}/other.db", SQLALCHEMY_BINDS={"e": uri}, EVENTSOURCING_BIND_KEY="e")
    es = EventSourcing(db=db, application=Bank)
    db.init_app(app)
    es.init_app(app)
    base: Any = db.Model
    columns = {"__tablename__": "balance", "account_id": orm.mapped_column(sa.Uuid(), primary_key=True)}
    balance: Any = type(base)("Balance", (base,), {"__bind_key__": "e", **columns})

    @es.projection
    class Balances(ModelProjection):
        models = (balance,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(balance(account_id=event.originator_id))

    with app.app_context():
        db.create_all()
        account_id = es.application.open_account()
        db.session.commit()
        assert not Worker(app.extensions["eventsourcing"].projections.runnable(), once=True).run()
        assert db.session.scalars(sa.select(balance.account_id)).all() == [account_id]
    dispose(es, app, db)


def test_flask_sqlalchemy_lite(uri: str) -> None:
    """The same works with Flask-SQLAlchemy-Lite, whose models have a base of their own."""

    class Base(orm.DeclarativeBase):
        pass

    class Balance(Base):
        __tablename__ = "balance"
        account_id: orm.Mapped[UUID] = orm.mapped_column(primary_key=True)
        amount: orm.Mapped[int]

    app = Flask("lite")
    app.config["SQLALCHEMY_ENGINES"] = {"default": uri}
    db = Lite(app)
    es = EventSourcing(app, db=db, application=Bank, model_class=Base)

    @es.projection
    class Balances(ModelProjection):
        models = (Balance,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            session.add(Balance(account_id=event.originator_id, amount=0))

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            session.get_one(Balance, event.originator_id).amount += event.amount

        @reaction(Deposited)
        def told(self, event: Any, key: str) -> None:
            told.append(key)

    told: list[str] = []
    with app.app_context():
        Base.metadata.create_all(db.engine)
        account_id = es.application.open_account()
        es.application.deposit(account_id, 5)
        db.session.commit()
        assert not Worker(app.extensions["eventsourcing"].projections.runnable(), once=True).run()
        es.wait_for(Balances, 2, timeout=5)
        assert db.session.get_one(Balance, account_id).amount == 5
        assert [UUID(key.rpartition("/")[2]).version for key in told] == [7]
        db.session.execute(sa.update(Balance).values(amount=-1))
        db.session.commit()
    assert Rebuild(app.extensions["eventsourcing"].projections.find(Balances)).run()
    with app.app_context():
        assert db.session.get_one(Balance, account_id).amount == 5
    dispose(es, app, db)


@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_a_schema_on_postgresql(new_desk: MakeFlaskDesk) -> None:
    """With a schema the projections' tables are in it, and waiting for a position works there."""
    desk = new_desk(EVENTSOURCING_SCHEMA="Old Money")
    with desk.app.app_context(), desk.db.engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("Old Money"))
    desk.balances()
    account_id = desk.open(5)
    with desk.app.app_context():
        assert "bank_projections" in sa.inspect(desk.db.engine).get_table_names(schema="Old Money")
        with desk.running():
            desk.es.wait_for("Balances", 2, timeout=20)
            assert desk.status().state == "running"
    assert desk.amounts() == {account_id: 5}


def test_text_ids(new_desk: MakeFlaskDesk) -> None:
    """Aggregates with text ids are applied, and set aside, as others are."""
    desk = new_desk(Club, id_type=sa.String(50))
    visited: Any = Member.Visited  # type: ignore[attr-defined]

    class Visits(ModelProjection):
        models = (desk.Balance,)
        retries = 0
        on_failure = "dead-letter"

        @on(Member.Joined)
        def joined(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=0))

        @on(visited)
        def seen(self, event: Any, session: orm.Session) -> None:
            if event.originator_id == "member/ada" and event.originator_version == 3:
                raise ValueError("not her")
            session.get_one(desk.Balance, event.originator_id).amount += 1

    desk.register(Visits)
    with desk.app.app_context():
        for name, visits in (("member/ada", 3), ("member/böb", 2)):
            member = Member(name)
            for _ in range(visits):
                member.visit()
            cast(Any, desk.es.application).save(member)
        desk.db.session.commit()
    assert not desk.run_once()
    assert desk.amounts() == {"member/ada": 1, "member/böb": 2}
    assert (desk.status("Visits").dead_letters, desk.status("Visits").waiting) == (1, 1)


def test_missing_tables_are_named_with_the_remedy(desk: FlaskDesk) -> None:
    """Without the tables, worker, status and waiting say how they are created."""
    desk.balances()
    desk.open()
    with desk.app.app_context():
        with desk.db.engine.begin() as connection:
            desk.consumer().application.models.tables["projections"].drop(connection)
        for call in (desk.es.health, lambda: desk.es.wait_for("Balances", 1, timeout=1)):
            with pytest.raises(MissingTableError, match=r"bank_projections.*flask eventsourcing init-db"):
                call()
    (error,) = desk.run_once()
    assert isinstance(error, MissingTableError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP TABLE bank_inline_ranges", "bank_inline_ranges is missing"),
        ("ALTER TABLE bank_inline_ranges DROP COLUMN last_position", "bank_inline_ranges.last_position is missing"),
        ("ALTER TABLE bank_dead_letters DROP COLUMN reason", "bank_dead_letters.reason is missing"),
        ("ALTER TABLE balance DROP COLUMN amount", "balance.amount is missing"),
    ],
)
def test_check_names_what_the_tables_of_projections_lack(desk: FlaskDesk, change: str, message: str) -> None:
    """``check`` names a table or a column that a projection needs and the database lacks, and exits with 1."""
    desk.balances()
    with desk.app.app_context(), desk.db.engine.begin() as connection:
        connection.exec_driver_sql(change)
    done = desk.app.test_cli_runner().invoke(args=["eventsourcing", "check"])
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
