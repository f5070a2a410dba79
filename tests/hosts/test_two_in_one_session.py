"""Two hosts whose applications share a session: what one has saved is as safe as what the other has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from sqlalchemy import orm

from flask_eventsourcing.exceptions import SpanningTransactionError
from flask_eventsourcing.host import PlainHost
from flask_eventsourcing.models import make_models
from tests.domain import Bank

Pair = tuple[PlainHost, PlainHost, "orm.scoped_session[orm.Session]"]


class Shop(Bank):
    """Another application."""


def make_pair(*engines: sa.Engine) -> Pair:
    """Return the hosts of a bank and of a shop in one session, and the session."""
    base = orm.declarative_base()
    records = {application: make_models(base, application.name) for application in (Bank, Shop)}
    binds: dict[object, sa.Engine] = {}
    for engine, models in zip(engines, records.values(), strict=True):
        base.metadata.create_all(engine)
        binds |= dict.fromkeys((models.StoredEvent, models.Snapshot, models.Tracking), engine)
    session = orm.scoped_session(orm.sessionmaker(binds=binds))
    bank, shop = (PlainHost(session, {application: models}) for application, models in records.items())
    return bank, shop, session


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[sa.Engine]]:
    """Two databases."""
    made = [sa.create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("bank", "shop")]
    yield made
    for engine in made:
        engine.dispose()


def test_what_another_host_has_saved_is_not_lost_by_a_retry(engines: list[sa.Engine]) -> None:
    """A conflict is raised at once, without a retry, if its rollback includes another host's events."""
    bank, shop, session = make_pair(engines[0], engines[0])
    bank[Bank].open_account()
    tries: list[int] = []

    def conflict() -> None:
        tries.append(1)
        raise IntegrityError

    with pytest.raises(IntegrityError):
        shop.retry(conflict, times=3)
    assert len(tries) == 1
    session.remove()


def test_a_transaction_does_not_span_two_databases(engines: list[sa.Engine]) -> None:
    """Events in a second database are refused until those in the first one are committed or rolled back."""
    bank, shop, session = make_pair(*engines)
    bank[Bank].open_account()
    with pytest.raises(SpanningTransactionError, match="events of Bank in another database"):
        shop[Shop].open_account()
    session.rollback()
    shop[Shop].open_account()
    session.commit()
    bank[Bank].open_account()
    session.commit()
    with session.begin_nested() as savepoint:
        shop[Shop].open_account()
        savepoint.rollback()
    bank[Bank].open_account()
    session.commit()
    session.remove()
    assert len(bank[Bank].recorder.select_notifications(None, 10)) == 2
    assert len(shop[Shop].recorder.select_notifications(None, 10)) == 1
    session.remove()


def test_reading_another_database_spans_nothing(engines: list[sa.Engine]) -> None:
    """An aggregate of a second database may be read in a transaction that has events in the first one."""
    bank, shop, session = make_pair(*engines)
    article = shop[Shop].open_account()
    session.commit()
    account = bank[Bank].open_account()
    assert shop[Shop].account(article).owner == "Ada"
    session.commit()
    assert bank[Bank].account(account).owner == "Ada"
    session.remove()
