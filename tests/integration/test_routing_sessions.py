"""Sessions that choose their engine by a ``get_bind()`` of their own: events go where the models go, or are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError, EventSourcing
from flask_eventsourcing.host import PlainHost
from flask_eventsourcing.models import make_models
from tests.bank import add_note, make_app
from tests.domain import Bank

Route = Callable[[Any, Any], Any]


def by_flush(session: Any, clause: Any) -> Any:
    """As in SQLAlchemy's documentation: what is flushed, changed or deleted goes to the primary."""
    return "primary" if session._flushing or isinstance(clause, sa.Update | sa.Delete) else "replica"


def by_flush_alone(session: Any, clause: Any) -> Any:
    """Only what is flushed goes to the primary."""
    return "primary" if session._flushing else "replica"


def by_statement(session: Any, clause: Any) -> Any:
    """What writes goes to the primary."""
    return "primary" if session._flushing or isinstance(clause, sa.sql.dml.UpdateBase) else "replica"


ROUTES = (by_flush, by_flush_alone, by_statement)


class Routed:
    """An app with a primary and a replica, which the default address may be."""

    def __init__(self, folder: Path, route: Route, default: str, **config: Any) -> None:
        class Routing(Session):
            def get_bind(self, mapper: Any = None, clause: Any = None, bind: Any = None, **options: Any) -> Any:
                if bind is not None:
                    return bind
                key = route(self, clause)
                return self._db.engines[None if key == default else key]

        other = {"primary": "replica", "replica": "primary"}[default]
        self.app = make_app(
            f"sqlite:///{folder / default}.db", SQLALCHEMY_BINDS={other: f"sqlite:///{folder / other}.db"}, **config
        )
        self.db = SQLAlchemy(session_options={"class_": Routing})
        self.Note = add_note(self.db)
        self.es = EventSourcing(db=self.db, application=Bank)
        self.db.init_app(self.app)
        self.es.init_app(self.app)
        self.other = other
        with self.app.app_context():
            for engine in self.db.engines.values():
                for metadata in self.db.metadatas.values():
                    metadata.create_all(engine)

    def save(self) -> None:
        """Save an event and a row."""
        with self.app.app_context():
            self.db.session.add(self.Note(text="note"))
            self.es.application.open_account()
            self.db.session.commit()

    def found(self) -> dict[str, tuple[int, int]]:
        """Return the number of events and rows in each database."""
        counts = {}
        with self.app.app_context():
            for key, engine in self.db.engines.items():
                with engine.connect() as connection:
                    events, notes = (
                        connection.scalar(sa.text(f"SELECT count(*) FROM {table}")) or 0
                        for table in ("bank_events", "note")
                    )
                counts[key or {"primary": "replica", "replica": "primary"}[self.other]] = events, notes
        return counts

    def close(self) -> None:
        """Close every connection."""
        self.es.close(self.app)
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()


@pytest.fixture
def routed(tmp_path: Path) -> Iterator[Callable[..., Routed]]:
    """Makes apps with a primary and a replica."""
    made: list[Routed] = []

    def make(route: Route, default: str, **config: Any) -> Routed:
        made.append(Routed(tmp_path, route, default, **config))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("route", ROUTES)
def test_events_go_where_the_models_go(routed: Callable[..., Routed], route: Route) -> None:
    """With a session that reads from a replica, events and rows are in the primary, in one transaction."""
    site = routed(route, "primary")
    site.save()
    assert site.found() == {"primary": (1, 1), "replica": (0, 0)}
    with site.app.app_context():
        site.db.session.add(site.Note(text="other"))
        site.es.application.open_account()
        site.db.session.rollback()
    assert site.found() == {"primary": (1, 1), "replica": (0, 0)}


@pytest.mark.parametrize("route", ROUTES)
def test_save_is_refused_where_the_models_go_elsewhere(routed: Callable[..., Routed], route: Route) -> None:
    """An app whose own address is the replica's gets an error with both databases and the remedy; nothing is stored."""
    site = routed(route, "replica")
    with pytest.raises(ConfigurationError, match=r"primary\.db.*replica\.db.*EVENTSOURCING_BIND_KEY"):
        site.save()
    assert site.found() == {"primary": (0, 0), "replica": (0, 0)}


@pytest.mark.parametrize("route", ROUTES)
def test_bind_key_says_where_the_events_are(routed: Callable[..., Routed], route: Route) -> None:
    """With ``EVENTSOURCING_BIND_KEY`` the events are in that database, whatever the session would choose."""
    site = routed(route, "replica", EVENTSOURCING_BIND_KEY="primary")
    site.save()
    assert site.found() == {"primary": (1, 1), "replica": (0, 0)}


def test_second_engine_for_one_database_is_refused(routed: Callable[..., Routed], tmp_path: Path) -> None:
    """Two engines are two connections, and two transactions, also if they are for one database."""
    second = sa.create_engine(f"sqlite:///{tmp_path / 'primary'}.db")

    def route(session: Any, clause: Any) -> Any:
        return "second" if session._flushing else "primary"

    site = routed(route, "primary")
    with site.app.app_context():
        engines: Any = site.db.engines
        engines["second"] = second
    with pytest.raises(ConfigurationError, match="another connection"):
        site.save()
    assert site.found()["primary"] == (0, 0)


@pytest.mark.parametrize("route", ROUTES)
def test_plain_host_writes_to_the_primary(tmp_path: Path, route: Route) -> None:
    """Without Flask, too, a factory whose sessions read from a replica has its events in the primary."""
    base = orm.declarative_base()
    models = make_models(base, "Bank")
    engines = {name: sa.create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("primary", "replica")}

    class Routing(orm.Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, bind: Any = None, **options: Any) -> Any:
            return engines[route(self, clause)] if bind is None else bind

    for engine in engines.values():
        base.metadata.create_all(engine)
    host = PlainHost(orm.sessionmaker(class_=Routing), {Bank: models})
    with host.transaction():
        account_id = host[Bank].open_account()
    with host.session() as session, host.using_session(session):
        assert host[Bank].balance(account_id) == 0
    counts = []
    for engine in engines.values():
        with engine.connect() as connection:
            counts.append(connection.scalar(sa.select(sa.func.count()).select_from(models.StoredEvent)))
        engine.dispose()
    host.close()
    assert counts == [1, 0]
