"""Accepted values are returned unchanged by recorder, log and models, on every database; others are refused.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import IntegrityError, StoredEvent, Tracking
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_eventsourcing.exceptions import EventValueError, IdentifierTypeError
from flask_eventsourcing.persistence import SQLAlchemyTrackingRecorder
from tests.bank import Site
from tests.domain import Bank
from tests.integration.conftest import MakeSite
from tests.length import examples

drawn = settings(
    max_examples=examples(25),
    deadline=None,
    # Each example has an aggregate of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Texts(Application[str]):
    """An application with text ids."""


@pytest.fixture
def texts(new_site: MakeSite) -> Site:
    """A site whose ids are texts."""
    return new_site(Texts)


@pytest.fixture
def uuids(new_site: MakeSite) -> Site:
    """A site whose ids are UUIDs."""
    return new_site()


def as_view(state: bytes) -> Any:
    """Return a state as some transcoders do."""
    return memoryview(state)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(max_size=300),
    st.binary(max_size=20),
    st.uuids(),
    st.lists(st.integers(), max_size=2),
)
# The first are what people have, and what they happen to have in it.
plain = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=255)
pieces = st.sampled_from(
    ["a", "É", "💰", " ", "'", '"', "%", "%s", "\\", "`", "\n", "\r", "\x1b[2J", "\0", "\ud800", "\u2028"]
)
text_ids = st.one_of(plain, st.lists(pieces, max_size=4).map("".join), st.text(max_size=300))
states = st.one_of(st.binary(max_size=300), st.binary(max_size=20).map(bytearray), st.binary(max_size=20).map(as_view))


def is_refused(site: Site, event: Any) -> bool:
    """Try to store an event: whether it was refused, by an error of ours that says why, and left nothing."""
    with site.app.app_context():
        before = site.bank.recorder.max_notification_id()
        refusal: Exception | None = None
        try:
            site.bank.recorder.insert_events([event])
        except (IdentifierTypeError, EventValueError) as error:
            refusal = error
        site.db.session.commit()
        if refusal is not None:
            assert "\n" not in str(refusal)
            assert len(str(refusal)) < 300
            assert site.bank.recorder.max_notification_id() == before
        return refusal is not None


def check_read_back(site: Site, event: StoredEvent) -> None:
    """Check that recorder, log and model have an event as it was."""
    expected = (event.originator_id, event.originator_version, event.topic, bytes(event.state))
    with site.app.app_context():
        recorder = site.bank.recorder
        (found,) = recorder.select_events(event.originator_id)
        notification = recorder.select_notifications(recorder.max_notification_id(), 1)[0]
        model = site.es.StoredEvent
        row = site.db.session.scalars(sa.select(model).where(model.originator_id == event.originator_id)).one()
        for each in (found, notification, row):
            assert (each.originator_id, each.originator_version, each.topic, bytes(each.state)) == expected
            assert type(each.originator_id) in (str, UUID)


@drawn
@given(originator_id=text_ids, topic=st.one_of(plain, text_ids), state=states)
def test_text_id_topic_and_state(texts: Site, originator_id: str, topic: str, state: Any) -> None:
    """A text id, a topic and a state are stored and read back as they were, or the event is refused."""
    originator_id += str(uuid4()) if 0 < len(originator_id) < 100 else ""
    event = StoredEvent(originator_id, 1, topic, state)
    odd = any(
        ord(each) < 32 or 0x7F <= ord(each) < 0xA0 or each in "\u2028\u2029\ud800" for each in originator_id + topic
    )
    refused = is_refused(texts, event)
    assert refused or not odd
    if not refused:
        check_read_back(texts, event)
    else:
        with texts.app.app_context():
            assert originator_id == "" or texts.bank.recorder.select_events(originator_id) == []


@drawn
@given(originator_id=plain.filter(lambda text: len(text) < 219), topic=plain)
def test_plain_text_is_accepted(texts: Site, originator_id: str, topic: str) -> None:
    """Ids of up to 255 characters of any script, with quotes, percent signs and spaces, are accepted."""
    event = StoredEvent(f"{uuid4()}{originator_id}", 1, topic, b"")
    assert not is_refused(texts, event)
    check_read_back(texts, event)


@drawn
@given(originator_id=anything)
def test_id_of_any_type(texts: Site, uuids: Site, originator_id: Any) -> None:
    """An id of another type than the application's is refused."""
    assert is_refused(texts, StoredEvent(originator_id, 1, "a:b", b"")) or isinstance(originator_id, str)
    if isinstance(originator_id, UUID):
        originator_id = uuid4()
    assert is_refused(uuids, StoredEvent(originator_id, 1, "a:b", b"")) != isinstance(originator_id, UUID)


@drawn
@given(version=anything, topic=anything, state=anything)
def test_values_of_any_type(uuids: Site, version: Any, topic: Any, state: Any) -> None:
    """A version that is not an int, a topic that is not a string and a state that is not bytes are refused."""
    for event in (event_of(1, topic, b""), event_of(1, "a:b", state), event_of(version, "a:b", b"")):
        refused = is_refused_or_gap(uuids, event)
        is_version = event.originator_version is version and version != 1
        assert refused or not is_version or (type(version) is int and 0 <= version < 2**63)
        if not refused:
            check_read_back(uuids, event)


def event_of(version: Any, topic: Any, state: Any) -> StoredEvent:
    """Make an event of a new aggregate, of whatever it is given."""
    return StoredEvent(uuid4(), version, topic, state)


def is_refused_or_gap(site: Site, event: StoredEvent) -> bool:
    """As :func:`is_refused`, or the event would not be the first of its aggregate."""
    try:
        return is_refused(site, event)
    except IntegrityError:
        return True


@pytest.mark.parametrize("kind", [str, bytes])
def test_state_that_a_mapper_returns_as_text(uuids: Site, kind: Callable[[Any], Any]) -> None:
    """A mapper that returns texts is refused at ``save()``, on every database."""
    state = "{}" if kind is str else b"{}"
    assert is_refused(uuids, StoredEvent(uuid4(), 1, "a:b", state)) is (kind is str)  # type: ignore[arg-type]


def test_large_save_with_one_wrong_value_stores_nothing(uuids: Site) -> None:
    """Of a save with one wrong value nothing is stored, no position is lost, and the session can be used further."""
    events = [StoredEvent(uuid4(), 1, "a:b", b"") for _ in range(600)]
    with uuids.app.app_context():
        with pytest.raises(EventValueError, match=r"state of an event for .*is of type str"):
            uuids.bank.recorder.insert_events([*events, StoredEvent(uuid4(), 1, "a:b", "")])  # type: ignore[arg-type]
        positions = uuids.bank.recorder.insert_events(events[:2])
        uuids.db.session.commit()
        assert [each.id for each in uuids.bank.recorder.select_notifications(None, 10)] == positions


@drawn
@given(name=st.one_of(text_ids, anything), position=anything)
def test_tracking(uuids: Site, name: Any, position: Any) -> None:
    """A position of an upstream application is read back as it was, or refused."""
    with uuids.app.app_context():
        datastore = uuids.app.extensions["eventsourcing"].datastore
        recorder = SQLAlchemyTrackingRecorder(datastore, uuids.es.models[Bank].tables["tracking"])
        name = f"{uuid4()}{name}" if isinstance(name, str) and len(name) < 100 else name
        try:
            recorder.insert_tracking(Tracking(name, position))
        except EventValueError:
            uuids.db.session.rollback()
            return
        assert recorder.max_tracking_id(name) == position
        uuids.db.session.rollback()


@pytest.mark.parametrize("far", [2**63, 2**70])
def test_bounds_of_any_size(uuids: Site, far: int) -> None:
    """A version or position to read from may be any number, on every database."""
    account_id = uuids.opened()
    with uuids.app.app_context():
        recorder = uuids.bank.recorder
        assert len(recorder.select_events(account_id, lte=far)) == len(recorder.select_events(account_id, gt=-far)) == 1
        assert recorder.select_events(account_id, gt=far) == recorder.select_events(account_id, lte=-far) == []
        assert len(recorder.select_notifications(-far, 10, far)) == 1
        assert recorder.select_notifications(far, 10) == []
        assert uuids.bank.repository.get(account_id, version=far).version == 1
