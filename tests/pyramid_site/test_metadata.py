"""Metadata of a Pyramid application: each request has its own, a retry has the same, bad headers leave nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from pyramid.request import Request
from pyramid.response import Response
from pyramid.scripting import prepare
from pyramid_retry import RetryableException
from sqlalchemy import orm
from webtest import TestApp

from flask_eventsourcing.exceptions import EventMetadataError
from flask_eventsourcing.metadata import event_metadata, get_metadata_from_context
from flask_eventsourcing.models import StoredEventMixin
from flask_eventsourcing.signals import events_recorded
from flask_eventsourcing.workers import carried
from tests.headers import HOSTILE, TRACE, assert_left_out
from tests.pyramid_site.conftest import MakePyramidSite
from tests.pyramid_site.site import VETO, PyramidSite, bank_of


class Policy:
    """Every request is Ada's."""

    def authenticated_userid(self, request: Any) -> str:
        """Return her id."""
        return "ada"

    def identity(self, request: Any) -> str:
        """Return it."""
        return "ada"


def described(site: PyramidSite) -> list[dict[str, Any]]:
    """Return the metadata of all events."""
    with site.engine.connect() as connection:
        return [dict(each) for each in connection.scalars(sa.select(site.models.StoredEvent.__table__.c.metadata))]


def test_metadata(new_site: MakePyramidSite) -> None:
    """Events have the request's id, its trace, and the user where that is asked for; a retry has the same."""
    site = new_site(
        configure=lambda config: config.set_security_policy(Policy()), **VETO, **{"eventsourcing.metadata_user": "true"}
    )
    tries: list[str] = []

    def view(request: Any) -> Any:
        with event_metadata(reason="mine"):
            bank_of(request).open_account()
        tries.append(carried()["correlation_id"])
        if len(tries) % 2:
            raise RetryableException
        return {}

    site.answer(view, headers={"X-Request-ID": "r1", "traceparent": TRACE})
    site.answer(view)
    first, second = described(site)
    assert first == {"correlation_id": "r1", "traceparent": TRACE, "user": "ada", "reason": "mine"}
    assert second == {"correlation_id": tries[2], "user": "ada", "reason": "mine"}
    assert tries == ["r1", "r1", tries[2], tries[2]]
    assert len(set(tries)) == 2


def test_body_that_is_sent_in_parts(site: PyramidSite) -> None:
    """What such a body saves has the metadata of its request and its own, and no other request has any of these."""

    def body(request: Any) -> Iterator[bytes]:
        with event_metadata(reason="body"):
            yield b"one"
            bank_of(request).open_account()
            yield b"two"

    site.view = lambda request: Response(app_iter=body(request), content_length=6)
    response = Request.blank("/", method="POST", headers={"X-Request-ID": "r1"}).get_response(site.app)
    parts = iter(response.app_iter)
    assert (response.content_length, next(parts), get_metadata_from_context()) == (6, b"one", {})
    assert site.answer(lambda request: {"id": str(bank_of(request).open_account())}, headers={"X-Request-ID": "r2"})
    assert list(parts) == [b"two"]
    assert described(site) == [{"correlation_id": "r2"}, {"correlation_id": "r1", "reason": "body"}]


def test_metadata_are_of_one_request(site: PyramidSite) -> None:
    """Sixteen requests at once have their own metadata, and what is saved outside of requests has none of theirs."""
    start = threading.Barrier(16)

    def view(request: Any) -> Any:
        with event_metadata(who=request.headers["X-Request-ID"]):
            start.wait()
            bank_of(request).open_account()
        return {}

    site.view = view

    def send(number: int) -> None:
        TestApp(site.app).post("/", headers={"X-Request-ID": f"r{number}"})

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send, range(16)))
    site.opened()
    *found, last = described(site)
    assert len({each["who"] for each in found}) == 16
    assert all(each == {"who": each["who"], "correlation_id": each["who"]} for each in found)
    assert last.keys() == {"correlation_id"}
    assert not last["correlation_id"].startswith("r")


def test_block_that_is_never_left_ends_with_its_request(site: PyramidSite) -> None:
    """Metadata that a view sets do not reach the next request, and a subrequest removes none."""
    left = []

    def view(request: Any) -> Any:
        if request.headers.get("X-Look"):
            return get_metadata_from_context()
        left.append(event_metadata(leak="yes"))
        left[-1].__enter__()
        if not request.headers.get("X-Inner"):
            inner = Request.blank("/", method="POST", headers={"X-Inner": "yes"})
            request.invoke_subrequest(inner, use_tweens=True)
        return get_metadata_from_context()

    with event_metadata(own="caller's"):
        assert site.answer(view).json == {"own": "caller's", "leak": "yes"}
        assert get_metadata_from_context() == {"own": "caller's"}
    assert site.answer(view, headers={"X-Look": "yes"}).json == {}


def test_request_that_the_process_keeps(site: PyramidSite) -> None:
    """The request of ``bootstrap()``, where a process keeps it, gives its correlation to no request of a client."""

    def view(request: Any) -> Any:
        bank_of(request).open_account()
        return {}

    with prepare(Request.blank("/", headers={"X-Request-ID": "kept"}), site.config.registry) as kept:
        for _ in range(2):
            site.answer(view)
        with kept["request"].tm:
            bank_of(kept["request"]).open_account()
    correlations = [each["correlation_id"] for each in described(site)]
    assert len(set(correlations)) == 3
    assert correlations[2] == "kept"


def test_subrequest_belongs_to_the_request_around_it(site: PyramidSite) -> None:
    """What a subrequest saves has the correlation and the trace of its parent, unless its own headers say otherwise."""

    def view(request: Any) -> Any:
        for headers in ({}, {"X-Request-ID": "own"}) if request.headers.get("X-Outer") else ():
            request.invoke_subrequest(Request.blank("/", method="POST", headers=headers), use_tweens=True)
        bank_of(request).open_account()
        return {}

    site.answer(view, headers={"X-Outer": "yes", "traceparent": TRACE})
    site.answer(view, headers={"X-Outer": "yes", "X-Request-ID": "r1"})
    found = described(site)
    first, *_ = (each["correlation_id"] for each in found)
    assert [each["correlation_id"] for each in found] == [first, "own", first, "r1", "own", "r1"]
    assert first not in {"own", "r1"}
    assert [each.get("traceparent") for each in found] == [TRACE] * 3 + [None] * 3


def test_provider_that_fails_fails_the_save(new_site: MakePyramidSite) -> None:
    """If a provider raises, ``save()`` names it and stores nothing; one that returns a mapping adds to the metadata."""
    fails = [True, False]

    def release() -> dict[str, str]:
        if fails.pop(0):
            raise LookupError("secret")
        return {"release": "1.4"}

    def view(request: Any) -> Any:
        with pytest.raises(EventMetadataError, match=r"release failed.*LookupError"):
            bank_of(request).open_account()
        bank_of(request).open_account()
        return {}

    site = new_site(metadata=[release], **VETO)
    assert site.answer(view, headers={"X-Request-ID": "r1"}).status_int == 200
    assert described(site) == [{"release": "1.4", "correlation_id": "r1"}]


def test_no_metadata(new_site: MakePyramidSite) -> None:
    """Where metadata are switched off none are stored, and none are carried."""

    def view(request: Any) -> Any:
        bank_of(request).open_account()
        return carried()

    site = new_site(metadata=False, **VETO)
    assert site.answer(view, headers={"X-Request-ID": "r1"}).json == {}
    with site.engine.connect() as connection:
        (row,) = connection.execute(site.models.StoredEvent.__table__.select()).mappings()
    assert [row[name] for name in ("event_id", "recorded_at", "metadata", "correlation_id")] == [None] * 4


def test_current_span_and_receivers(site: PyramidSite) -> None:
    """The trace is that of a current span of OpenTelemetry's; receivers of the signal are told what was recorded."""
    trace: Any = pytest.importorskip("opentelemetry.trace")
    span = trace.NonRecordingSpan(trace.SpanContext(7, 9, is_remote=False))
    told: list[Any] = []

    def receiver(sender: object, recorded: Any, **_: Any) -> None:
        told.extend(recorded)

    def view(request: Any) -> Any:
        with trace.use_span(span):
            bank_of(request).open_account()
        bank_of(request).open_account()
        return {}

    with events_recorded.connected_to(receiver):
        site.answer(view, headers={"X-Request-ID": "r1", "traceparent": TRACE})
    assert [each.metadata for each in told] == described(site)
    assert [each.metadata["traceparent"] for each in told] == [f"00-{7:032x}-{9:016x}-00", TRACE]
    assert {each.correlation_id for each in told} == {"r1"}


@pytest.mark.parametrize("headers", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_left_out(
    site: PyramidSite, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """A header that is not as it should be is left out: the request works, and nothing of it is logged."""
    with caplog.at_level(logging.DEBUG):
        assert site.answer(lambda request: str(bank_of(request).open_account()), environ=headers).status_int == 200
    assert_left_out(described(site)[0], headers, caplog.text)


def make_tenant_record(base: Any) -> Any:
    """Make a record class with a column of its own."""

    class TenantEvent(StoredEventMixin, base):  # type: ignore[misc]
        __tablename__ = "bank_events"
        tenant = orm.mapped_column(sa.String(20), nullable=False)
        kind = orm.mapped_column(sa.String(20))

        @classmethod
        def column_values(cls, event: Any, metadata: Mapping[str, str]) -> Mapping[str, Any]:
            """Fill them."""
            return {"tenant": metadata["tenant"], "kind": type(event).__name__}

    return TenantEvent


def test_column_values(new_site: MakePyramidSite) -> None:
    """``column_values()`` of a record class fills its columns from the event and the metadata of the request."""
    site = new_site(own_record=make_tenant_record, metadata=(lambda: {"tenant": "acme"},), **VETO)
    site.answer(lambda request: {"id": str(bank_of(request).open_account())})
    with event_metadata(tenant="other"):
        site.answer(lambda request: {"id": str(bank_of(request).open_account())})
    columns = site.models.StoredEvent.__table__.c
    with site.engine.connect() as connection:
        found = connection.execute(sa.select(columns.tenant, columns.kind).order_by(columns.notification_id)).all()
    assert [tuple(each) for each in found] == [("acme", "Created"), ("other", "Created")]


def test_column_values_that_cannot_be_made_store_nothing(new_site: MakePyramidSite) -> None:
    """An error of ``column_values()`` comes out of ``save()``, and nothing is stored."""
    site = new_site(own_record=make_tenant_record, **VETO)
    with pytest.raises(KeyError, match="tenant"):
        site.answer(lambda request: {"id": str(bank_of(request).open_account())})
    assert described(site) == []
