"""Commits of one event in a session of zope.sqlalchemy, beside its own commits of one row, which are the limit.

``python -m benchmarks.zope_sessions`` measures both in one thread, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
import zope.sqlalchemy
from sqlalchemy import orm
from transaction import TransactionManager

from flask_eventsourcing.contrib.zope import EventSourcing, event_models

from .domain import Bench, new_events
from .limits import report

HEADING = "## Sessions of zope.sqlalchemy\n"
LIMIT = 0.85
"""What the commits of an event are to come to, as a part of those of a row."""


def open_both(url: sa.URL) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """Return what commits an event, what commits a row, and what closes both."""
    base: Any = orm.declarative_base()
    models = event_models(base, "Bench")
    body = {
        "__tablename__": "limit_row",
        "id": orm.mapped_column(sa.Integer, primary_key=True),
        "text": orm.mapped_column(sa.LargeBinary, nullable=False),
    }
    row: Any = type(base)("Row", (base,), body)
    engine = sa.create_engine(url)
    base.metadata.create_all(engine)
    manager = TransactionManager()
    session = orm.scoped_session(orm.sessionmaker(engine))
    zope.sqlalchemy.register(session, transaction_manager=manager)
    es = EventSourcing(Bench, models=models, session=session)
    recorder = es.application.recorder
    state = new_events(1)[0].state

    def save() -> None:
        with manager:
            recorder.insert_events(new_events(1))

    def insert() -> None:
        with manager:
            session.add(row(text=state))

    def close() -> None:
        es.close()
        session.remove()
        engine.dispose()

    return save, insert, close


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    report(arguments, "benchmarks.zope_sessions", __doc__ or "", HEADING, LIMIT, open_both)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.zope_sessions import main as run

    run()
