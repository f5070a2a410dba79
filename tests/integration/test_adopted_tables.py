"""Tables that eventsourcing-sqlalchemy has made: refused as they are, and read after a migration."""

from __future__ import annotations

from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy_utils import UUIDType as PlainUUIDType

from flask_eventsourcing import EventSourcing, StoredEventMixin
from flask_eventsourcing.exceptions import UnsafeTableError
from tests.bank import make_app, make_site
from tests.domain import Account, Bank
from tests.integration.marks import on_files

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def make_theirs(engine: sa.Engine, *, position: str = "id") -> tuple[UUID, sa.Table]:
    """Make the table as eventsourcing-sqlalchemy makes it, with an account that was opened."""
    table = sa.Table(
        "bank_events",
        sa.MetaData(),
        sa.Column(position, BIG, primary_key=True, autoincrement=True),
        sa.Column("originator_id", PlainUUIDType(), nullable=False),
        sa.Column("originator_version", BIG, nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("state", sa.LargeBinary(2**30), nullable=False),
        sa.Index("stored_aggregate_event_index", "originator_id", "originator_version", unique=True),
        # Of the migration, where a table had none.
        sqlite_autoincrement=position != "id",
    )
    table.create(engine)
    account = Account("Ada")
    (event,) = account.collect_events()
    with Bank() as bank:
        stored = bank.mapper.to_stored_event(event)
    values = {name: getattr(stored, name) for name in ("originator_id", "originator_version", "topic", "state")}
    with engine.begin() as connection:
        connection.execute(sa.insert(table).values(values))
    return account.id, table


@on_files
def test_tables_as_they_are(uri: str) -> None:
    """Neither an append nor a read is tried on them, and the error says which column to rename."""
    engine = sa.create_engine(uri)
    account_id, table = make_theirs(engine)
    site = make_site(uri)
    with site.app.app_context():
        for use in (site.bank.open_account, lambda: site.bank.account(account_id)):
            with pytest.raises(UnsafeTableError, match="rename its id to notification_id"):
                use()
            site.db.session.rollback()
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 1
    result = site.app.test_cli_runner().invoke(args=["eventsourcing", "check"])
    assert result.exit_code == 1
    assert "rename its id to notification_id" in result.output
    site.close()
    engine.dispose()


def adopting(uri: str) -> tuple[Flask, SQLAlchemy, EventSourcing[Bank]]:
    """Make an app whose record class has the column types of the tables."""
    app, db = make_app(uri), SQLAlchemy()

    class StoredEvent(StoredEventMixin, db.Model):  # type: ignore[name-defined,misc]
        __tablename__ = "bank_events"
        originator_id = db.mapped_column(PlainUUIDType(), nullable=False)

    es = EventSourcing(db=db, application=Bank, stored_event_model=StoredEvent)
    db.init_app(app)
    es.init_app(app)
    return app, db, es


@on_files
def test_migrated_tables(uri: str) -> None:
    """After the migration old aggregates go on, and a version that is there is a conflict."""
    engine = sa.create_engine(uri)
    account_id, _ = make_theirs(engine, position="notification_id")
    app, db, es = adopting(uri)
    added = es.models[Bank].tables["events"].c
    with engine.begin() as connection:
        for name in ("recorded_at", "correlation_id", "event_id", "metadata"):
            kind = added[name].type.compile(engine.dialect)
            connection.exec_driver_sql(f"ALTER TABLE bank_events ADD COLUMN {name} {kind}")
    with app.app_context():
        db.create_all()
        es.application.deposit(account_id, 5)
        db.session.commit()
        assert es.application.balance(account_id) == 5
        first = next(iter(es.application.events.get(account_id)))
        with pytest.raises(IntegrityError):
            es.application.events.put([first])
        db.session.rollback()
        assert es.application.recorder.max_notification_id() == 2
    es.close(app)
    with app.app_context():
        db.engine.dispose()
    engine.dispose()
