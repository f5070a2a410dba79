"""What a batch does in fewer calls than the library and SQLAlchemy do, and with the same result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import JSONTranscoder, Mapper, Notification, StoredEvent
from sqlalchemy import orm

from flask_eventsourcing.projections.applying.batches import Batches
from flask_eventsourcing.projections.applying.pages import Decoding
from tests.projections.desk import Desk

on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)
on_flask = pytest.mark.parametrize("host", ["flask"], indirect=True)


class Note(Aggregate):
    """An aggregate with values of each type that the library's transcoder knows."""

    @event("Written")
    def write(self, text: str, at: datetime, price: Decimal, other: Any) -> None:
        """Keep them."""
        self.kept = (text, at, price, other)


class Renamed(Aggregate):
    """An aggregate whose events had another attribute before."""

    class Happened(Aggregate.Event):
        """The event."""

        text: str
        class_version = 2

        @staticmethod
        def upcast_v1_v2(state: dict[str, Any]) -> None:
            """Give the attribute its name."""
            state["text"] = state.pop("words")


class OwnTranscoder(JSONTranscoder):
    """A transcoder that decodes in its own way."""

    def decode(self, data: bytes) -> Any:
        """Leave a mark."""
        return {**super().decode(data), "mark": 1}


def mapper_of(*, env: dict[str, str] | None = None) -> Mapper[Any]:
    """Return the mapper that the library makes for an application."""
    found: Mapper[Any] = Application(env={"PERSISTENCE_MODULE": "eventsourcing.popo", **(env or {})}).mapper
    return found


def notified(stored: StoredEvent) -> Notification:
    """Return an event of the log."""
    return Notification(**vars(stored), id=1)


def outcome(decode: Any, stored: Notification) -> Any:
    """Return the class and the attributes of an event, or the class and the text of an error."""
    try:
        made = decode(stored)
    except Exception as error:  # noqa: BLE001 — whatever it is, it is compared
        return type(error), str(error)
    return type(made), list(vars(made).items())


def written() -> Notification:
    """Return an event with values of each type."""
    note = Note()
    note.write("é \U0001f600", datetime(2026, 1, 2, tzinfo=UTC), Decimal("1.10"), [uuid4(), {"a": None, "b": {}}])
    return notified(mapper_of().to_stored_event(note.collect_events()[-1]))


STATES = (
    b"",
    b"null",
    b"1",
    b"[]",
    b"{}",
    b'{"a":1}',
    b' {"a":1} ',
    b'{"a":1}{"b":2}',
    b'{"a":1},',
    b'{"a":',
    b"\xff",
    b'{"a":"\xff"}',
    b'{"a":NaN}',
    b'{"a":{"_type_":"unknown","_data_":1}}',
    b'{"a":{"_type_":"datetime_iso","_data_":1}}',
    b'{"_type_":"uuid_hex","_data_":"zz"}',
    b'{"a":1,"class_version":1}',
    b'{"a":1,"class_version":"x"}',
    b'{"originator_version":7,"originator_id":1}',
)


@pytest.mark.parametrize("state", [None, *STATES], ids=repr)
def test_events_are_decoded_as_the_mapper_decodes_them(state: bytes | None) -> None:
    """An event has the class and the attributes that the mapper gives it, or fails with the mapper's error."""
    stored = written()
    if state is not None:
        stored = notified(StoredEvent(stored.originator_id, 1, stored.topic, state))
    mapper = mapper_of()
    assert outcome(Decoding(mapper), stored) == outcome(mapper.to_domain_event, stored)


@pytest.mark.parametrize("topic", ["tests.nowhere:Event", "tests.domain", "builtins:int", "json:dumps", ""])
def test_a_topic_without_a_class_of_events(topic: str) -> None:
    """A topic that names no class of events fails as it does with the mapper."""
    stored = notified(StoredEvent(uuid4(), 1, topic, b"{}"))
    mapper = mapper_of()
    assert outcome(Decoding(mapper), stored) == outcome(mapper.to_domain_event, stored)


def test_events_of_an_earlier_class_are_upcast() -> None:
    """An event that was stored before its class had another version is brought up to date."""
    topic = f"{__name__}:Renamed.Happened"
    decode = Decoding(mapper_of())
    for state, text in (({"words": "a"}, "a"), ({"text": "b", "class_version": 2}, "b")):
        made = decode(notified(StoredEvent(uuid4(), 1, topic, json.dumps(state).encode())))
        assert (type(made), made.text) == (Renamed.Happened, text)


def test_what_the_user_decodes_is_left_to_it() -> None:
    """A transcoder, a mapper or a compressor of the user's is asked for each event."""
    stored = written()
    assert Decoding(Mapper(OwnTranscoder()))(notified(StoredEvent(uuid4(), 1, stored.topic, b"{}"))).mark == 1

    class Own(Mapper[Any]):
        def to_domain_event(self, stored_event: Any) -> Any:
            return "mine"

    assert Decoding(Own(JSONTranscoder()))(stored) == "mine"
    mapper = mapper_of(env={"COMPRESSOR_TOPIC": "zlib"})
    packed = notified(mapper.to_stored_event(mapper_of().to_domain_event(stored)))
    assert vars(Decoding(mapper)(packed)) == vars(mapper_of().to_domain_event(stored))


@contextmanager
def batch_of(desk: Desk, session: orm.Session, *models: Any) -> Iterator[None]:
    """A batch in a session."""
    batches = Batches(desk.consumer().application.datastore.dialect, models, [], "ended", lambda *_: None)
    connection = session.connection()
    batches.look_at(connection, [each.__table__ for each in models], "")
    with batches.applying(session, connection, [written()]):
        yield


@on_sqlite
@on_flask
def test_rows_are_gotten_as_the_session_gets_them(desk: Desk) -> None:
    """``session.get()`` in a handler finds what it finds elsewhere, whatever was done to the row."""
    desk.balances()
    account_id, other = uuid4(), uuid4()
    with desk.context(), orm.Session(desk.engine) as made:
        session: Any = made
        session.add_all(
            [desk.Balance(account_id=account_id, amount=1), desk.Seen(id=1, account_id="", version=1, text="")]
        )
        session.flush()
        with batch_of(desk, session, desk.Balance, desk.Seen):
            assert session.get(desk.Balance, other) is None
            row: Any = session.get_one(desk.Balance, account_id)
            assert session.get(desk.Balance, account_id) is row
            assert session.get(desk.Balance, (account_id,)) is row
            assert session.get(desk.Balance, {"account_id": account_id}) is row
            assert session.get(desk.Seen, 1) is session.get(desk.Seen, True) is session.get(desk.Seen, 1.0)
            assert session.get(desk.Seen, "nothing") is None
            with pytest.raises(sa.exc.InvalidRequestError):
                session.get(desk.Balance, (account_id, 1))
            session.connection().exec_driver_sql("UPDATE balance SET amount = 2")
            assert row.amount == 2
            assert session.get(desk.Balance, account_id) is row
            row.amount = 3
            session.get(desk.Balance, account_id, populate_existing=True)
            session.delete(row)
            assert session.get(desk.Balance, account_id) is row
            session.flush()
            assert session.get(desk.Balance, account_id) is None
            with pytest.raises(sa.exc.NoResultFound):
                session.get_one(desk.Balance, account_id)
        assert "get" not in vars(session)


@on_sqlite
@on_flask
def test_a_session_that_gets_in_its_own_way(desk: Desk) -> None:
    """A session class with a ``get()`` of its own keeps it in a batch."""

    class Own(orm.Session):
        def get(self, *arguments: Any, **options: Any) -> Any:
            return "mine"

    desk.balances()
    with desk.context(), Own(desk.engine) as session, batch_of(desk, session, desk.Balance):
        found: Any = session.get(desk.Balance, uuid4())
        assert found == "mine"
