"""Commits of one event in a session, beside those of one row in a bare session, which are the limit.

``python -m benchmarks.sessions`` measures them in one thread, in turns: on Flask beside SQLAlchemy's session, and in a
session of zope.sqlalchemy beside that session's own. A row is inserted as a session does it, with ``add()``, and on
Flask also by an ``insert()`` of SQLAlchemy Core, which has no object to look after. It has the columns of an event.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import sqlalchemy as sa
import zope.sqlalchemy
from eventsourcing.persistence import StoredEvent
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm
from transaction import TransactionManager

from flask_eventsourcing import EventSourcing
from flask_eventsourcing.contrib.zope import EventSourcing as ZopeEventSourcing
from flask_eventsourcing.contrib.zope import event_models

from .domain import Bench, new_events
from .limits import EVENT, Commits, Hosts, report

HEADING = "## Sessions\n"


def row_of(base: Any, events: sa.Table) -> Any:
    """Return a class whose rows have the columns and the key of a table of events."""
    columns = [sa.Column(each.name, each.type, primary_key=each.primary_key) for each in events.columns]
    unique = sa.UniqueConstraint("originator_id", "originator_version")
    table = sa.Table("limit_row", base.metadata, *columns, unique, **events.dialect_kwargs)
    return type(base)("Row", (base,), {"__table__": table})


def values(event: StoredEvent) -> dict[str, Any]:
    """Return an event as the values of a row."""
    names = ("originator_id", "originator_version", "topic", "state")
    return {name: getattr(event, name) for name in names}


@contextmanager
def on_flask(url: sa.URL) -> Iterator[Commits]:
    """Commit events by ``db.session``, and rows in a session without Flask."""
    app = Flask("bench")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["EVENTSOURCING_METADATA"] = False
    db = SQLAlchemy()
    es = EventSourcing(application=Bench, db=db)
    db.init_app(app)
    es.init_app(app)
    base: Any = orm.declarative_base()
    engine = sa.create_engine(url)
    with app.app_context(), orm.Session(engine) as session:
        db.create_all()
        recorder = es.application.recorder
        row = row_of(base, db.metadata.tables["bench_events"])
        base.metadata.create_all(engine)
        statement = sa.insert(row.__table__)

        def save() -> None:
            recorder.insert_events(new_events(1))
            db.session.commit()

        def add() -> None:
            session.add(row(**values(new_events(1)[0])))
            session.commit()

        def insert() -> None:
            session.execute(statement, values(new_events(1)[0]))
            session.commit()

        yield {EVENT: save, "one row, add()": add, "one row, insert()": insert}
        es.close(app)
        db.engine.dispose()
    engine.dispose()


@contextmanager
def on_zope(url: sa.URL) -> Iterator[Commits]:
    """Commit events and rows by a transaction manager, in one session of zope.sqlalchemy."""
    base: Any = orm.declarative_base()
    models = event_models(base, "Bench")
    row = row_of(base, base.metadata.tables["bench_events"])
    engine = sa.create_engine(url)
    base.metadata.create_all(engine)
    manager = TransactionManager()
    session = orm.scoped_session(orm.sessionmaker(engine))
    zope.sqlalchemy.register(session, transaction_manager=manager)
    with closing(ZopeEventSourcing(Bench, models=models, session=session)) as es:
        recorder = es.application.recorder

        def save() -> None:
            with manager:
                recorder.insert_events(new_events(1))

        def add() -> None:
            with manager:
                session.add(row(**values(new_events(1)[0])))

        yield {EVENT: save, "one row, add()": add}
    session.remove()
    engine.dispose()


HOSTS: Hosts = {"Flask": (on_flask, 0.9), "zope.sqlalchemy": (on_zope, 0.85)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    report(arguments, "benchmarks.sessions", __doc__ or "", HEADING, HOSTS)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.sessions import main as run

    run()
