"""Commits of one event in a session, beside those of one row in a bare session, which are the limit.

``python -m benchmarks.sessions`` measures them in one thread, in turns: on Flask beside SQLAlchemy's session, and in a
session of zope.sqlalchemy beside that session's own. A row is inserted as a session does it, with ``add()``, and on
Flask also by an ``insert()`` of SQLAlchemy Core, which has no object to look after. It has the columns of an event.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
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

from .databases import DATABASES, Database
from .domain import Bench, new_events

HEADING = "## Sessions\n"
EVENT = "one event"
Commits = dict[str, Callable[[], None]]
"""What commits, by its name; that of an event is the first."""


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


HOSTS = {"Flask": (on_flask, 0.9), "zope.sqlalchemy": (on_zope, 0.85)}
"""By its name, what opens a host, and what commits of events are to come to, as a part of those by ``add()``."""


def rates(commits: Commits, seconds: float) -> dict[str, float]:
    """Return how many commits of each there are a second, called in turns, as a machine's speed changes."""
    spent, count = dict.fromkeys(commits, 0.0), 0
    while sum(spent.values()) < len(commits) * seconds:
        for name, commit in commits.items():
            begun = time.perf_counter()
            commit()
            spent[name] += time.perf_counter() - begun
        count += 1
    return {name: count / each for name, each in spent.items()}


def measure(database: Database, host: str, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Return the rates, round by round."""
    url = database.create_empty()
    try:
        with HOSTS[host][0](url) as commits:
            rates(commits, seconds / 5)
            return [rates(commits, seconds) for _ in range(rounds)]
    finally:
        database.drop(url)


def to_lines(version: str, host: str, measured: Sequence[dict[str, float]]) -> list[str]:
    """Return the rows of the table."""
    lines = []
    for name in list(measured[0])[1:]:
        ratios = [each[EVENT] / each[name] for each in measured]
        event, row = (median(each[key] for each in measured) for key in (EVENT, name))
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        lines.append(f"| {version} | {host} | {name} | {event:,.0f} | {row:,.0f} | {spread} |")
    return lines


def to_markdown(lines: Sequence[str], rounds: int) -> str:
    """Return the section."""
    limits = ", ".join(f"{limit} on {host}" for host, (_, limit) in HOSTS.items())
    text = (
        f"Commits a second in one thread, median of {rounds} rounds; the ratio is the median of those of each round. "
        f"Beside `add()` it is to be at least {limits}.\n"
    )
    head = ["| database | host | beside | events | rows | ratio |", "|---|---|---|---:|---:|---|"]
    return "\n".join([HEADING, text, *head, *lines]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    parser = argparse.ArgumentParser("python -m benchmarks.sessions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    options = parser.parse_args(arguments)
    rounds, seconds = (1, 0.2) if options.quick else (options.rounds, 1.0)
    lines: list[str] = []
    for name in options.databases:
        missing = DATABASES[name].missing()
        if missing:
            print(f"{name} is left out: {missing}.", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="flask-eventsourcing-bench-", ignore_cleanup_errors=True) as folder:
            Path(folder).chmod(0o755)
            database = DATABASES[name](Path(folder))
            with ExitStack() as stack:
                stack.callback(database.stop)
                database.start()
                for host in options.hosts:
                    lines += to_lines(database.version(), host, measure(database, host, rounds, seconds))
    print(to_markdown(lines, rounds), flush=True)


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.sessions import main as run

    run()
