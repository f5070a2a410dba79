"""What is stored of an event beside its state: its id, time, metadata and correlation, on every database.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from flask import Flask, Request, Response, copy_current_request_context, request, stream_with_context
from flask_sqlalchemy import SQLAlchemy
from markupsafe import Markup
from sqlalchemy import orm
from sqlalchemy.dialects import postgresql
from werkzeug.local import LocalProxy
from werkzeug.test import run_wsgi_app

from flask_eventsourcing import ConfigurationError, EventMetadataError, EventSourcing, StoredEventMixin, events_recorded
from flask_eventsourcing.metadata import (
    event_metadata,
    get_metadata_from_context,
    null_metadata_in_context,
    put_metadata_in_context,
)
from tests.bank import Site
from tests.domain import Account, Bank
from tests.headers import CORRELATION, HOSTILE, TRACE, assert_left_out
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_postgresql, on_sqlite_file

on_memory = pytest.mark.parametrize("uri", ["sqlite-memory"], indirect=True)


def records(site: Site) -> list[Any]:
    """Return the stored events in their order."""
    with site.app.app_context():
        query = sa.select(site.es.StoredEvent).order_by(site.es.StoredEvent.notification_id)
        return list(site.db.session.scalars(query))


def send(
    site: Site,
    headers: dict[str, str] | None = None,
    view: Callable[[], Any] | None = None,
    environ: dict[str, str] | None = None,
) -> Any:
    """Open an account in a request."""

    def opened() -> str:
        with site.es.transaction():
            if view is not None:
                view()
            site.bank.open_account()
        return "done"

    return site.app.test_client().post(
        "/", headers=headers, environ_overrides={"tests.view": opened, **(environ or {})}
    )


@pytest.mark.parametrize("count", [1, 2, 150])
def test_every_event_has_an_id_a_time_and_a_correlation(site: Site, count: int) -> None:
    """Each event of a save has an id of its own, and all have one time, in UTC with microseconds, and correlation."""
    with site.app.app_context(), site.es.event_metadata(reason="import 7"):
        before = datetime.now(UTC)
        account = Account("Ada")
        for _ in range(count - 1):
            account.deposit(1)
        site.bank.save(account)
        site.db.session.commit()
        after = datetime.now(UTC)
    found = records(site)
    assert len(found) == count
    ids = [each.event_id for each in found]
    assert ids == sorted(set(ids))
    assert {each.version for each in ids} == {7}
    (time,) = {each.recorded_at for each in found}
    assert before <= time.replace(tzinfo=time.tzinfo or UTC) <= after
    (correlation,) = {each.correlation_id for each in found}
    assert UUID(correlation).version == 7
    assert all(each.event_metadata == {"reason": "import 7", "correlation_id": correlation} for each in found)


def test_events_outside_of_a_session_have_it_too(site: Site) -> None:
    """What a thread saves without an application context is recorded with metadata as in a session."""
    with site.app.app_context():
        bank = site.bank
    with ThreadPoolExecutor(1) as pool, site.es.event_metadata(reason="not in the thread"):

        def save() -> None:
            with site.es.event_metadata(reason="thread"):
                bank.open_account()

        pool.submit(save).result()
    (found,) = records(site)
    assert found.event_id.version == 7
    assert found.event_metadata["reason"] == "thread"
    assert found.recorded_at is not None


def test_false_stores_nothing(new_site: MakeSite) -> None:
    """With ``EVENTSOURCING_METADATA = False`` the columns are NULL."""
    site = new_site(EVENTSOURCING_METADATA=False)
    with site.es.event_metadata(reason="none"):
        assert send(site, {"X-Correlation-ID": "c"}).status_code == 200
    (found,) = records(site)
    assert (found.event_id, found.recorded_at, found.event_metadata, found.correlation_id) == (None,) * 4


def test_request_and_its_headers(site: Site) -> None:
    """The events of a request have the correlation and the trace that it was sent with."""
    send(site, {"X-Correlation-ID": "c 1", "X-Request-ID": "r", "traceparent": TRACE}, site_opens(site))
    first, second = records(site)
    assert {first.correlation_id, second.correlation_id} == {"c 1"}
    assert first.event_metadata == {"correlation_id": "c 1", "traceparent": TRACE}
    send(site, {"X-Request-ID": "r"})
    assert records(site)[-1].correlation_id == "r"


def site_opens(site: Site) -> Callable[[], Any]:
    """Return what opens one account more, in an application context of its own."""

    def opens() -> None:
        site.bank.open_account()

    return opens


def test_each_request_has_a_correlation_of_its_own(site: Site) -> None:
    """Without a header a request has a new correlation, which all of its saves have, and the next has another."""
    for _ in range(3):
        send(site, view=site_opens(site))
    found = [each.correlation_id for each in records(site)]
    assert found[0::2] == found[1::2]
    assert len(set(found)) == 3


@on_memory
@pytest.mark.parametrize("headers", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_left_out(site: Site, headers: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """A header that is not as it should be is left out: the request works, and nothing of it is logged."""
    with caplog.at_level(logging.DEBUG):
        assert send(site, environ=headers).status_code == 200
    assert_left_out(records(site)[0].event_metadata, headers, caplog.text)


@on_memory
def test_second_header_takes_the_place_of_one_that_cannot_be_used(site: Site) -> None:
    """An ``X-Request-ID`` is the correlation also where an ``X-Correlation-ID`` was left out."""
    for raw in ("a\nb", "x" * 129, ""):
        send(site, environ={CORRELATION: raw, "HTTP_X_REQUEST_ID": "good"})
    assert {each.correlation_id for each in records(site)} == {"good"}


@on_memory
@pytest.mark.parametrize("trace", [TRACE, "01" + TRACE[2:], "01" + TRACE[2:] + "-what.will:be"])
def test_traces_of_later_versions_are_kept(site: Site, trace: str) -> None:
    """A trace of a future version, with more fields, is kept as it is."""
    send(site, {"traceparent": trace})
    assert records(site)[0].event_metadata["traceparent"] == trace


def test_nothing_leaks_from_one_request_into_the_next(site: Site) -> None:
    """Metadata of a view, also of a block that it never left, are not in another request."""
    left = []

    def view() -> None:
        block = site.es.event_metadata(leak="yes")
        left.append(block)
        with block:
            site.bank.open_account()

    send(site, view=view)
    send(site)
    found = [each.event_metadata.get("leak") for each in records(site)]
    assert found == ["yes", None, None]


def test_sixteen_threads_at_once(new_site: MakeSite, uri: str) -> None:
    """Sixteen requests at once with different metadata: each event has that of its own request."""
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS={} if uri == "sqlite://" else {"pool_size": 20})
    start = threading.Barrier(16)

    def run(number: int) -> None:
        def view() -> None:
            with site.es.event_metadata(thread=str(number)):
                start.wait()
                site.bank.save(Account("Ada"))

        send(site, {"X-Correlation-ID": f"c{number}"}, view)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, range(16)))
    found = [each for each in records(site) if "thread" in each.event_metadata]
    assert len(found) == 16
    assert all(each.correlation_id == f"c{each.event_metadata['thread']}" for each in found)


@on_memory
def test_asynchronous_views(site: Site) -> None:
    """Asynchronous views at once see their own metadata only."""
    pytest.importorskip("asgiref")

    async def view() -> str:
        with site.es.event_metadata(view="async"):
            site.bank.open_account()
        site.db.session.commit()
        return "done"

    site.app.add_url_rule("/async", view_func=view)
    assert site.app.test_client().get("/async", headers={"X-Correlation-ID": "c"}).status_code == 200
    (found,) = records(site)
    assert found.event_metadata == {"view": "async", "correlation_id": "c"}


@on_memory
def test_hidden_metadata(site: Site) -> None:
    """Within ``null_metadata_in_context()`` only what is filled in by itself is recorded."""
    with site.app.app_context(), site.es.event_metadata(a="1"), null_metadata_in_context():
        site.bank.open_account()
        site.db.session.commit()
    assert records(site)[0].event_metadata.keys() == {"correlation_id"}


def test_provider_that_fails_fails_the_save(new_site: MakeSite) -> None:
    """If a provider raises, ``save()`` names it and stores nothing, and the unit of work can go on."""

    def broken() -> Any:
        raise LookupError("secret")

    site = new_site(EVENTSOURCING_METADATA=[broken])
    with site.app.app_context():
        with pytest.raises(EventMetadataError, match=r"broken failed.*LookupError"):
            site.bank.open_account()
        site.note()
        site.db.session.commit()
    assert site.stored() == (0, 1)


@on_memory
def test_providers_and_the_user(new_site: MakeSite) -> None:
    """Providers and the function for the user are called at each save; a user of None is none."""
    users = iter(["ada", None])
    site = new_site(
        EVENTSOURCING_METADATA=[lambda: {"release": "1.2"}], EVENTSOURCING_METADATA_USER=lambda: next(users)
    )
    send(site)
    send(site)
    found = [each.event_metadata for each in records(site)]
    assert [each.get("user") for each in found] == ["ada", None]
    assert {each["release"] for each in found} == {"1.2"}


@on_memory
def test_user_that_is_no_text_is_refused(new_site: MakeSite) -> None:
    """A user's id that is a number is refused with what to do."""
    site = new_site(EVENTSOURCING_METADATA_USER=lambda: 7)
    with site.app.app_context(), pytest.raises(EventMetadataError, match=r"'user' is of type int.*str"):
        site.bank.open_account()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("METADATA", True),
        ("METADATA", [1]),
        ("METADATA", "module:function"),
        ("METADATA", {"a": "b"}),
        ("METADATA_USER", "basic"),
        ("METADATA_USER", 1),
        ("CORRELATION_INDEX", "yes"),
    ],
)
def test_wrong_settings_are_refused(key: str, value: Any) -> None:
    """A setting of a wrong type is refused by its name."""
    app = Flask("wrong")
    app.config[f"EVENTSOURCING_{key}"] = value
    with pytest.raises(ConfigurationError, match=f"EVENTSOURCING_{key} must"):
        EventSourcing(app)


def test_correlation_index(new_site: MakeSite) -> None:
    """``EVENTSOURCING_CORRELATION_INDEX`` indexes the correlation, which is not indexed otherwise."""
    site = new_site(EVENTSOURCING_CORRELATION_INDEX=True)
    send(site, {"X-Correlation-ID": "c"})
    with site.app.app_context():
        indexed = [each["column_names"] for each in sa.inspect(site.db.engine).get_indexes("bank_events")]
        site.db.drop_all()
    assert ["correlation_id"] in indexed
    with (other := new_site()).app.app_context():
        indexed = [each["column_names"] for each in sa.inspect(other.db.engine).get_indexes("bank_events")]
    assert ["correlation_id"] not in indexed


def test_snapshots_have_none(new_site: MakeSite) -> None:
    """The id and the metadata of snapshots are always NULL."""
    site = new_site(EVENTSOURCING_ENV={"IS_SNAPSHOTTING_ENABLED": "y"})
    with site.app.app_context(), site.es.event_metadata(a="1"):
        account = site.bank.open_account()
        site.bank.take_snapshot(account)
        site.db.session.commit()
        (found,) = site.db.session.scalars(sa.select(site.es.Snapshot))
        assert (found.event_id, found.event_metadata) == (None, None)


def test_metadata_are_those_at_the_save(site: Site) -> None:
    """Events have the metadata in force at ``save()``, not those in force when they were triggered."""
    with site.app.app_context():
        with site.es.event_metadata(reason="triggered"):
            account = Account("Ada")
        with site.es.event_metadata(reason="saved"):
            site.bank.save(account)
        with site.es.event_metadata(reason="committed"):
            site.db.session.commit()
    assert [each.event_metadata["reason"] for each in records(site)] == ["saved"]


class Kinds(StrEnum):
    """Texts of a subclass of ``str``."""

    LONGEST = "é" * 128


@pytest.mark.parametrize("outside", [False, True])
def test_what_is_accepted_is_read_back(site: Site, outside: bool) -> None:
    """Each database gives back every character that is accepted, up to the longest correlation and the most bytes."""
    special = {"text": '\U0001f980 "quoted" \\ \n\r\t\x1b é\'%s:a', "ключ": "", "correlation_id": Kinds.LONGEST}
    longest = {"note": "x" * (4096 - len('{"note":"","correlation_id":"c"}')), "correlation_id": "c"}
    for given in (special, longest):
        with site.app.app_context():
            bank = site.bank

            def save(bank: Bank = bank, given: dict[str, str] = given) -> None:
                with put_metadata_in_context(given):
                    bank.open_account()

            if outside:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(save).result()
            else:
                save()
            site.db.session.commit()
    found = records(site)
    assert [each.event_metadata for each in found] == [special, longest]
    assert [each.correlation_id for each in found] == ["é" * 128, "c"]


TYPES = {
    "sqlite": ("CHAR(32)", "BLOB", "DATETIME", "VARCHAR(128)"),
    "postgresql": ("UUID", "JSONB", "TIMESTAMP", "VARCHAR(128)"),
    "mysql": ("CHAR(32)", "BLOB", "DATETIME(6)", "VARCHAR(128)"),
}


def test_types_of_the_columns(new_site: MakeSite) -> None:
    """The columns are nullable and have their types whatever the settings are; snapshots have two of them."""
    names = ("event_id", "metadata", "recorded_at", "correlation_id")
    for settings in ({}, {"EVENTSOURCING_METADATA": False}):
        site = new_site(**settings)
        with site.app.app_context():
            look = sa.inspect(site.db.engine)
            expected = TYPES["mysql" if site.db.engine.dialect.name == "mariadb" else site.db.engine.dialect.name]
            columns = {each["name"]: each for each in look.get_columns("bank_events")}
            compiled = [columns[name]["type"].compile(site.db.engine.dialect) for name in names]
            assert tuple(each.split()[0] for each in compiled) == expected, compiled
            assert all(columns[name]["nullable"] for name in names)
            snapshots = {each["name"]: each["type"] for each in look.get_columns("bank_snapshots")}
            assert [snapshots[name].compile(site.db.engine.dialect) for name in names[:2]] == compiled[:2]
            assert not snapshots.keys() & set(names[2:])
            site.db.drop_all()


def own_site(uri: str, **columns: Any) -> Site:
    """Make a site with a record class of one's own."""
    db = SQLAlchemy()
    base: Any = db.Model
    record = type(base)(
        "Record", (*columns.pop("bases", (StoredEventMixin,)), base), {"__tablename__": "records"} | columns
    )
    app = Flask("own")
    app.config["SQLALCHEMY_DATABASE_URI"] = uri
    es = EventSourcing(db=db, application=Bank, stored_event_model=record)
    db.init_app(app)
    es.init_app(app)
    with app.app_context():
        db.drop_all()
        db.create_all()
    return Site(app, db, es, None)


@pytest.mark.parametrize("count", [1, 3, 120])
def test_columns_of_ones_own(uri: str, count: int) -> None:
    """``column_values()`` fills columns of a record class from event and metadata, in a session and outside."""
    calls: list[Any] = []

    @classmethod  # type: ignore[misc]
    def column_values(cls: Any, event: Any, metadata: Any) -> dict[str, Any]:
        calls.append(event)
        return {"tenant": metadata["tenant"], "kind": type(event).__name__, "day": event.timestamp.date()}

    site = own_site(
        uri,
        tenant=orm.mapped_column(sa.String(20), nullable=False),
        kind=orm.mapped_column(sa.String(20)),
        day=orm.mapped_column(sa.Date),
        column_values=column_values,
    )

    def save() -> None:
        account = Account("Ada")
        for _ in range(count - 1):
            account.deposit(1)
        bank.save(account)

    with site.app.app_context(), site.es.event_metadata(tenant="acme"):
        bank = site.bank
        save()
        site.db.session.commit()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(site.es.event_metadata(tenant="other")(save)).result()
    found = records(site)
    assert [each.tenant for each in found] == ["acme"] * count + ["other"] * count
    assert {each.kind for each in found[1:count]} <= {"Deposited"}
    assert found[0].kind == "Created"
    assert abs(found[0].day - datetime.now(UTC).date()) <= timedelta(days=1)
    assert len({each.event_id for each in found}) == 2 * count
    site.close()


@on_memory
def test_columns_that_are_not_the_users_are_refused(uri: str) -> None:
    """``column_values()`` that names a column which is not its own is refused by that name."""

    @classmethod  # type: ignore[misc]
    def column_values(cls: Any, event: Any, metadata: Any) -> dict[str, Any]:
        return {"state": b""}

    site = own_site("sqlite://", column_values=column_values)
    with site.app.app_context(), pytest.raises(EventMetadataError, match="'state'"):
        site.bank.open_account()


@pytest.mark.parametrize(
    "returned",
    [
        {"tenant": "a\0b"},
        {"tenant": "\ud800"},
        {"tenant": 7},
        {"tenant": b"acme"},
        {"tenant": LocalProxy(lambda: "acme")},
        {"day": "today"},
        {"size": "7"},
        {"kind": "unknown"},
        {7: "acme"},
        [("tenant", "acme")],
        None,
    ],
    ids=repr,
)
def test_columns_that_cannot_be_stored_are_refused(uri: str, returned: Any) -> None:
    """What ``column_values()`` returns wrongly is refused by its name before it is sent, and the unit can go on."""
    returns = [returned, {"tenant": Markup("<acme>"), "day": date(2026, 1, 2), "kind": "known"}]

    @classmethod  # type: ignore[misc]
    def column_values(cls: Any, event: Any, metadata: Any) -> Any:
        return returns.pop(0)

    site = own_site(
        uri,
        tenant=orm.mapped_column(sa.String(20)),
        day=orm.mapped_column(sa.Date),
        size=orm.mapped_column(sa.Integer),
        kind=orm.mapped_column(sa.Enum("known", "other", native_enum=False, validate_strings=True)),
        column_values=column_values,
    )
    with site.app.app_context():
        with pytest.raises(EventMetadataError, match=r"column_values\(\) of the record class of records returns"):
            site.bank.open_account()
        site.bank.open_account()
        site.db.session.commit()
    (found,) = records(site)
    assert (found.tenant, found.day, found.kind) == ("<acme>", date(2026, 1, 2), "known")
    site.close()


def save_account(site: Any, count: int) -> None:
    """Save a new account with so many events at once."""
    with site.app.app_context():
        account = Account("Ada")
        for _ in range(count - 1):
            account.deposit(1)
        site.bank.save(account)
        site.db.session.commit()


@on_postgresql
@pytest.mark.parametrize("count", [1, 3, 120])
def test_columns_that_are_arrays(uri: str, count: int) -> None:
    """A column of arrays gets that of each event, whatever is in it, in saves of every size."""
    texts = ['a,"b"', "\\{}", "", None, "NULL"]

    @classmethod  # type: ignore[misc]
    def column_values(cls: Any, event: Any, metadata: Any) -> Any:
        if event.originator_version % 2 == 0:
            return {"texts": None, "pairs": [], "blobs": []}
        return {"texts": texts, "pairs": [[1, 2], [3, 4]], "blobs": [b"\0\\x"]}

    site = own_site(
        uri,
        texts=orm.mapped_column(postgresql.ARRAY(sa.Text)),
        pairs=orm.mapped_column(postgresql.ARRAY(sa.Integer, dimensions=2)),
        blobs=orm.mapped_column(postgresql.ARRAY(sa.LargeBinary)),
        column_values=column_values,
    )
    save_account(site, count)
    full: Any = (texts, [[1, 2], [3, 4]], [b"\0\\x"])
    empty: Any = (None, [], [])
    found = [(each.texts, each.pairs, each.blobs) for each in records(site)]
    assert found == [full if number % 2 else empty for number in range(1, count + 1)]
    site.close()


@pytest.mark.parametrize("count", [1, 3, 600])
def test_columns_may_have_any_name(uri: str, count: int) -> None:
    """Columns of one's own have any name that the database takes, that of something in our statements too."""
    names = ["place", "first", "user", "per%cent", "Mixed Case", "last_value"]

    @classmethod  # type: ignore[misc]
    def column_values(cls: Any, event: Any, metadata: Any) -> Any:
        return {name: f"{name} {event.originator_version}" for name in names}

    columns = {f"own_{number}": orm.mapped_column(name, sa.String(20)) for number, name in enumerate(names)}
    site = own_site(uri, **columns, column_values=column_values)
    save_account(site, count)
    for number, each in enumerate(records(site), 1):
        assert [getattr(each, key) for key in columns] == [f"{name} {number}" for name in names]
    site.close()


@on_memory
def test_columns_may_be_taken_from_the_metadata(uri: str) -> None:
    """``column_values()`` may take values out of the mapping that it gets, for each event of a save."""

    @classmethod  # type: ignore[misc]
    def column_values(cls: Any, event: Any, metadata: Any) -> Any:
        return {"tenant": metadata.pop("tenant")}

    site = own_site("sqlite://", tenant=orm.mapped_column(sa.String(20)), column_values=column_values)
    account = Account("Ada")
    account.deposit(1)
    told: list[Any] = []

    def receiver(sender: Any, recorded: Any, **_: Any) -> None:
        told.extend(recorded)

    with events_recorded.connected_to(receiver, site.app), site.app.app_context(), event_metadata(tenant="acme"):
        site.bank.save(account)
        site.db.session.commit()
    assert [each.tenant for each in records(site)] == ["acme", "acme"]
    assert [each.metadata["tenant"] for each in told] == ["acme", "acme"]
    site.close()


def test_record_class_may_leave_the_columns_out(uri: str) -> None:
    """A record class without the columns works, and nothing is recorded of metadata."""
    left_out = dict.fromkeys(("event_id", "recorded_at", "event_metadata", "correlation_id"))
    site = own_site(uri, **left_out)
    assert "metadata" not in site.es.StoredEvent.__table__.c
    with site.app.app_context(), site.es.event_metadata(a="1"):
        site.bank.open_account()
        site.db.session.commit()
    assert len(records(site)) == 1
    site.close()


@on_memory
def test_own_column_of_another_type_is_refused(uri: str) -> None:
    """A record class whose column has the name of one of ours and another type is refused with what to do."""
    with pytest.raises(ConfigurationError, match=r"'correlation_id'.*text"):
        own_site("sqlite://", correlation_id=orm.mapped_column(sa.Integer))


@on_sqlite_file
def test_metadata_are_bytes_of_json_on_sqlite(site: Site) -> None:
    """On SQLite the id is 32 hexadecimal characters and the metadata are JSON in a BLOB, as version 10 has them."""
    send(site, {"X-Correlation-ID": "c"})
    with site.app.app_context():
        row = site.db.session.execute(sa.text("SELECT event_id, metadata, recorded_at FROM bank_events")).one()
    assert len(row[0]) == 32
    assert int(row[0], 16)
    assert json.loads(row[1].decode()) == {"correlation_id": "c"}
    assert "." in row[2]


def test_receivers_that_name_it_are_told_what_was_recorded(site: Site) -> None:
    """A receiver of ``events_recorded`` gets ``recorded`` if it has that parameter."""
    told: list[Any] = []

    def telling(sender: Any, application: Any, notifications: Any, recorded: Any) -> None:
        told.append(recorded)

    def plain(sender: Any, application: Any, notifications: Any) -> None:
        told.append(len(notifications))

    with events_recorded.connected_to(telling, site.app), events_recorded.connected_to(plain, site.app):
        send(site, {"X-Correlation-ID": "c"}, site_opens(site))
    assert 2 in told
    (recorded,) = [each for each in told if each != 2]
    found = records(site)
    assert [each.event_id for each in recorded] == [each.event_id for each in found]
    assert [each.position for each in recorded] == [each.notification_id for each in found]
    assert {each.correlation_id for each in recorded} == {"c"}


@on_memory
def test_user_of_flask_login(new_site: MakeSite) -> None:
    """With ``"flask-login"`` the id of the logged-in user is recorded, if there is one."""
    login: Any = pytest.importorskip("flask_login")
    site = new_site(EVENTSOURCING_METADATA_USER="flask-login", SECRET_KEY="key")
    user = type("User", (login.UserMixin,), {"id": "ada"})
    login.LoginManager(site.app).user_loader(lambda _: user())
    send(site)
    send(site, view=lambda: login.login_user(user()))
    assert [each.event_metadata.get("user") for each in records(site)] == [None, "ada"]


@on_memory
def test_trace_of_the_current_span(site: Site) -> None:
    """Where OpenTelemetry has a current span, its trace is recorded in the place of the header's."""
    trace: Any = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(7, 9, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        send(site, {"traceparent": TRACE})
    send(site, {"traceparent": TRACE})
    found = [each.event_metadata["traceparent"] for each in records(site)]
    assert found == [f"00-{7:032x}-{9:016x}-01", TRACE]


@on_memory
@pytest.mark.parametrize("copied", [True, False])
def test_what_is_left_after_an_inner_request_ends_with_the_outer_one(uri: str, copied: bool) -> None:
    """What a view leaves in the context ends with its request, and not with another one that it has made."""
    site = own_site("sqlite://")

    @site.app.get("/<how>")
    def view(how: str) -> dict[str, str]:
        if how == "outer":
            site.app.test_client().get("/inner")
            with site.es.event_metadata(around="yes"):
                # An environment that is used again, as by a dispatcher.
                run_wsgi_app(site.app, {**request.environ, "PATH_INFO": "/other"} if copied else again(request))
                assert get_metadata_from_context() == {"around": "yes"}
        if how != "other":
            site.es.event_metadata(**{how: "yes"}).__enter__()
        return get_metadata_from_context()

    def again(of: Request) -> Any:
        of.environ["PATH_INFO"] = "/other"
        return of.environ

    client = site.app.test_client()
    assert [client.get(f"/{how}").json for how in ("outer", "other")] == [{"outer": "yes"}, {}]
    site.close()


@on_memory
def test_generator_that_is_kept_leaks_into_no_other_request(uri: str) -> None:
    """What a generator puts in force ends with its request, if it is kept and not closed; a caller's own stays."""
    site = own_site("sqlite://")
    kept: list[Iterator[int]] = []

    def steps() -> Iterator[int]:
        with site.es.event_metadata(reason="leaked"):
            yield 1

    @site.app.get("/<how>")
    def view(how: str) -> str:
        if how == "leak":
            kept.append(steps())
            next(kept[0])
        return get_metadata_from_context().get("reason", "nothing")

    with event_metadata(own="caller's"):
        client = site.app.test_client()
        assert [client.get(f"/{how}").text for how in ("leak", "other")] == ["leaked", "nothing"]
        assert get_metadata_from_context() == {"own": "caller's"}
    with site.app.test_client() as preserving:
        preserving.get("/leak")
        with event_metadata(reason="caller's"):
            assert preserving.get("/other").text == "caller's"
    site.close()


@on_memory
@pytest.mark.parametrize("closed", [True, False])
def test_what_streams_an_answer_leaks_into_no_other_request(site: Site, closed: bool) -> None:
    """Metadata that a generator sets while it streams an answer stay its own, also if it is not read to its end."""

    def parts() -> Iterator[str]:
        with site.es.event_metadata(reason="streamed"):
            yield "begun"
            site.bank.open_account()
            site.db.session.commit()
            yield "saved"

    @site.app.get("/stream")
    def stream() -> Response:
        site.es.event_metadata(left="by the view").__enter__()
        return Response(stream_with_context(parts()))

    with event_metadata(around="both"):
        answer = site.app.test_client().get("/stream", headers={"X-Correlation-ID": "first"})
        assert get_metadata_from_context() == {"around": "both"}
        if not closed:
            send(site, {"X-Correlation-ID": "second"})
        assert answer.data == b"begunsaved"
        assert get_metadata_from_context() == {"around": "both"}
        if closed:
            send(site, {"X-Correlation-ID": "second"})
    found = {each.correlation_id: each.event_metadata for each in records(site)}
    assert found["second"] == {"around": "both", "correlation_id": "second"}
    assert found["first"] == {"around": "both", "left": "by the view", "reason": "streamed", "correlation_id": "first"}


@on_memory
def test_copied_request_context_ends_no_block(site: Site) -> None:
    """A function with a copy of the request's context leaves what its caller has put in force, wherever it runs."""

    def view() -> None:
        copied = copy_current_request_context(get_metadata_from_context)
        with ThreadPoolExecutor(1) as threads, site.es.event_metadata(reason="kept"):
            assert copied() == {"reason": "kept"}
            assert threads.submit(copied).result() == {}
            site.bank.open_account()

    send(site, view=view)
    assert [each.event_metadata.get("reason") for each in records(site)] == ["kept", None]
