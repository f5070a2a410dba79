"""Celery and RQ in a Django project, and the metadata of its requests and tasks."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from celery import Celery
from django.core.handlers.asgi import ASGIRequest
from django.db import OperationalError, connections, transaction
from django.http import FileResponse, HttpResponse, JsonResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, RequestFactory, TestCase, override_settings
from rq import Queue, Retry

from flask_eventsourcing.contrib.django import project_site
from flask_eventsourcing.contrib.django.middleware import EventSourcingMiddleware
from flask_eventsourcing.exceptions import ConfigurationError, EventMetadataError
from flask_eventsourcing.metadata import CAUSATION_ID, CORRELATION_ID, USER, event_metadata, get_metadata_from_context
from flask_eventsourcing.signals import events_recorded
from flask_eventsourcing.workers import CARRIED, carried, rq, task_unit
from flask_eventsourcing.workers.celery import init_celery, send_after_commit
from tests.bank import make_site
from tests.django_host.conftest import DjangoBank
from tests.django_host.project import database
from tests.django_host.test_projections import declaring, quiet, run
from tests.django_host.test_requests import as_test_case
from tests.django_host.urls import route
from tests.domain import Account, conflict_with
from tests.headers import HOSTILE, TRACE, assert_left_out
from tests.published import published

__all__ = ["quiet"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """One database: the others are tried under load with real workers."""
    return f"sqlite:///{tmp_path}/bank.db"


def make_task(body: Any, *, eager: bool = False, retries: int = 10) -> Any:
    """Make a Celery app for the project, and a task of it."""
    celery_app = Celery("django", set_as_current=False)
    celery_app.conf.update(broker_url="memory://", task_always_eager=eager, task_eager_propagates=True)
    init_celery(celery_app, project_site, conflict_retries=retries)
    return celery_app.task(body, name=f"task_{uuid4().hex}", shared=False)


def nothing_to_do(number: int) -> None:
    """Be a task."""


def metadata_of(site: DjangoBank) -> list[dict[str, str]]:
    """Return the metadata of all events, in the order of the log."""
    from tests.django_host.ledger.models import BankRecords

    events = BankRecords.StoredEvent.objects.using(site.alias).order_by("notification_id")
    return [{**(each.metadata or {}), "id": str(each.event_id)} for each in events]


def answer(view: Any, *, user: Any = None, **headers: str) -> Any:
    """Have the middleware answer a request."""
    request = RequestFactory().get("/", headers=headers)
    request.user = user
    return EventSourcingMiddleware(view)(request)


def test_tasks_are_sent_after_the_commit(site: DjangoBank) -> None:
    """A task goes out after the commit of the outermost ``atomic()``, and never after a rollback of what sent it."""
    task = make_task(nothing_to_do)
    with published() as sent:
        with site.atomic():
            send_after_commit(task, 1)
            with site.rolled_back():
                send_after_commit(task, 2)
            assert sent == []
        assert len(sent) == 1
        with site.rolled_back():
            send_after_commit(task, 3)
        assert len(sent) == 1
        send_after_commit(task, 4)
        assert len(sent) == 2
        with as_test_case(site):
            with TestCase.captureOnCommitCallbacks(using=site.alias) as callbacks:
                send_after_commit(task, 5)
            assert len(sent) == 2
            assert len(callbacks) == 1
            callbacks[0]()
        assert len(sent) == 3


def test_unit_of_work_of_a_task(site: DjangoBank) -> None:
    """A task's events and models are committed at its end, and gone when it fails; eager tasks join a transaction."""
    account_id = site.opened()

    def work(fails: bool) -> None:
        assert site.connection.in_atomic_block
        site.bank.deposit(account_id, 5)
        site.note()
        if fails:
            raise KeyError

    task = make_task(work, eager=True)
    task.delay(fails=False)
    assert site.stored() == (2, 1)
    with pytest.raises(KeyError):
        task.delay(fails=True)
    assert site.stored() == (2, 1)
    with site.rolled_back():
        task.delay(fails=False)
    with as_test_case(site):
        task.delay(fails=False)
        assert site.bank.balance(account_id) == 10
    assert site.stored() == (2, 1)


def test_conflict_of_a_task(site: DjangoBank) -> None:
    """A task that had a conflict is run again."""
    account_id = site.opened()
    tries: list[int] = []

    def work() -> None:
        save = conflict_with(site.bank, account_id)
        tries.append(1)
        if len(tries) < 3:
            # As another writer would do it.
            site.bank.deposit(account_id, 1)
        save()

    make_task(work, eager=True).delay()
    assert len(tries) == 3
    assert site.bank.balance(account_id) == 1000


def test_errors_of_django_stay_its_own(site: DjangoBank) -> None:
    """A task sees Django's errors, so that its own ``autoretry_for`` works."""

    def work() -> None:
        with site.connection.cursor() as cursor:
            cursor.execute("SELECT nothing FROM nowhere")

    with pytest.raises(OperationalError), task_unit(project_site()):
        work()
    assert not site.connection.in_atomic_block


def test_jobs(site: DjangoBank, redis_url: str) -> None:
    """RQ's jobs are enqueued after the commit, with what was in force; a job that asks for a retry is rolled back."""
    from redis import Redis

    account_id = site.opened()
    with Redis.from_url(redis_url) as redis:
        queue = rq.EventSourcingQueue(f"django-{uuid4().hex}", connection=redis)

        def view(request: Any) -> JsonResponse:
            with site.atomic():
                rq.enqueue_after_commit(queue, deposit, str(account_id), 5)
                assert queue.count == 0
            return JsonResponse({})

        answer(view, X_Request_ID="r1")
        assert queue.jobs[0].meta[CARRIED][CORRELATION_ID] == "r1"
        worker = _worker(queue)
        worker.work(burst=True)
        assert site.bank.balance(account_id) == 5
        assert metadata_of(site)[1][CORRELATION_ID] == "r1"
        queue.enqueue(deposit_and_retry, str(account_id))
        worker.work(burst=True)
        queue.delete(delete_jobs=True)
    assert site.bank.balance(account_id) == 5


def _worker(queue: Queue) -> Any:
    class Worker(rq.EventSourcingSimpleWorker):
        flask_app = staticmethod(project_site)

    return Worker([queue], connection=queue.connection)


def deposit(account_id: str, amount: int) -> None:
    """Pay in, as a job."""
    from flask_eventsourcing.contrib.django import get_application

    get_application("Bank").deposit(UUID(account_id), amount)


def deposit_and_retry(account_id: str) -> Any:
    """Pay in, and want to be run again."""
    deposit(account_id, 1)
    return Retry(max=1)


def test_metadata_of_a_request(site: DjangoBank) -> None:
    """The events of a request have its correlation, also in its tasks. The user is recorded only on request."""

    class User:
        pk = 7
        is_authenticated = True

    def view(request: Any) -> JsonResponse:
        site.opened()
        site.opened()
        return JsonResponse(carried())

    response = answer(view, user=User(), X_Correlation_ID="c1")
    assert b"c1" in response.content
    answer(view, user=User(), X_Correlation_ID="\t")
    site.opened()
    first, second, third, fourth, fifth = metadata_of(site)
    assert first[CORRELATION_ID] == second[CORRELATION_ID] == "c1"
    assert USER not in first
    assert third[CORRELATION_ID] == fourth[CORRELATION_ID]
    assert len({each[CORRELATION_ID] for each in (first, third, fifth)}) == 3
    assert carried() == {}
    with _setting(site, METADATA_USER=True, METADATA=["tests.django_host.test_tasks.release"]):
        answer(view, user=User())
        answer(view, user=None)
        answer(view, user=type("Nobody", (), {"is_authenticated": False})())
    asked, _, unknown, _, nobody, _ = metadata_of(site)[5:]
    assert (asked[USER], asked["release"]) == ("7", "1.4")
    assert USER not in unknown
    assert USER not in nobody


def test_block_that_is_never_left_ends_with_its_request(site: DjangoBank) -> None:
    """Metadata that a view sets do not reach the next request, and a request within a view removes none."""
    left = []

    def view(request: Any) -> JsonResponse:
        left.append(event_metadata(leak="yes"))
        left[-1].__enter__()
        if "X-Inner" not in request.headers:
            answer(view, X_Inner="yes")
        return JsonResponse(get_metadata_from_context())

    with event_metadata(own="caller's"):
        assert json.loads(answer(view).content) == {"own": "caller's", "leak": "yes"}
        assert get_metadata_from_context() == {"own": "caller's"}
    assert json.loads(answer(lambda _: JsonResponse(get_metadata_from_context())).content) == {}


def test_streamed_response_has_its_request(site: DjangoBank, tmp_path: Path) -> None:
    """A generator that streams a response saves with its request's metadata, also asynchronously; others do not."""
    kept: list[Any] = []

    def steps() -> Iterator[str]:
        with event_metadata(leak="yes"):
            yield "kept"

    def parts() -> Iterator[str]:
        with event_metadata(stream="yes"):
            yield "1"
            site.opened()
            kept.append(steps())
            yield next(kept[-1])

    async def asynchronous() -> AsyncIterator[str]:
        with event_metadata(stream="yes"):
            yield "1"
            await sync_to_async(site.opened)()
            yield "2"

    user = type("User", (), {"pk": 7, "is_authenticated": True})()
    with _setting(site, METADATA_USER=True):
        response = answer(lambda _: StreamingHttpResponse(parts()), user=user, X_Request_ID="s1")
        for part in response:
            assert get_metadata_from_context() == {}, part
        assert response.getvalue() == b""
    assert get_metadata_from_context() == {}
    assert carried() == {}

    async def send() -> None:
        async with ThreadSensitiveContext():
            found = await AsyncClient().get("/", headers={"X-Request-ID": "a1"})
            assert [part async for part in found] == [b"1", b"2"]
            await sync_to_async(connections.close_all)()

    route(lambda _: StreamingHttpResponse(asynchronous()))
    asyncio.run(send())
    first, second = metadata_of(site)
    assert first == {CORRELATION_ID: "s1", "stream": "yes", USER: "7", "id": first["id"]}
    assert second == {CORRELATION_ID: "a1", "stream": "yes", "id": second["id"]}
    file = tmp_path / "file"
    file.write_text("whole")
    sent = answer(lambda _: FileResponse(file.open("rb")))
    assert sent.file_to_stream is not None
    assert sent.getvalue() == b"whole"
    sent.close()


def test_metadata_are_of_one_request(site: DjangoBank) -> None:
    """Sixteen threads at once, and sixteen asynchronous views, have their own metadata; an error leaves nothing."""
    start = threading.Barrier(16)

    def view(request: Any) -> HttpResponse:
        with event_metadata(who=request.headers["X-Request-ID"]):
            if not isinstance(request, ASGIRequest):
                start.wait()
            site.opened()
        return HttpResponse()

    async def asynchronous(request: Any) -> HttpResponse:
        with event_metadata(task="yes"):
            await asyncio.sleep(0)
            return await sync_to_async(view)(request)

    async def at_once() -> None:
        client = AsyncClient()
        # In a thread of its own: that of the process may have a connection to the database of another test.
        async with ThreadSensitiveContext():
            await asyncio.gather(*(client.get("/", headers={"X-Request-ID": f"a{number}"}) for number in range(16)))
            await sync_to_async(connections.close_all)()

    def send(number: int) -> None:
        try:
            Client().get("/", headers={"X-Request-ID": f"t{number}"})
        finally:
            site.connection.close()

    route(view)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send, range(16)))
    route(asynchronous)
    asyncio.run(at_once())

    def failing(request: Any) -> HttpResponse:
        raise KeyError

    route(failing)
    with pytest.raises(KeyError):
        Client().get("/", headers={"X-Request-ID": "failing"})
    site.opened()
    *found, last = metadata_of(site)
    assert len({each["who"] for each in found}) == len(found) == 32
    assert all(each[CORRELATION_ID] == each["who"] and ("task" in each) == (each["who"][0] == "a") for each in found)
    assert last.keys() == {CORRELATION_ID, "id"}
    assert last[CORRELATION_ID] != "failing"


@pytest.mark.parametrize("headers", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_left_out(
    site: DjangoBank, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """A header that is not as it should be is left out: the request works, and nothing of it is logged."""

    def view(request: Any) -> HttpResponse:
        site.opened()
        return HttpResponse()

    route(view)
    with caplog.at_level(logging.DEBUG):
        assert Client().get("/", **headers).status_code == 200
    (found,) = metadata_of(site)
    del found["id"]
    assert_left_out(found, headers, caplog.text)


def release() -> dict[str, str]:
    """Provide metadata."""
    return {"release": "1.4"}


@contextmanager
def _setting(site: DjangoBank, **further: Any) -> Iterator[None]:
    found = {"Bank": {"APPLICATION": "tests.domain.Bank", "DATABASE": site.alias, **further}}
    with override_settings(EVENTSOURCING=found):
        yield


def failing_release() -> dict[str, str]:
    """Fail to provide metadata."""
    raise LookupError("secret")


def test_provider_that_fails_fails_the_save(site: DjangoBank) -> None:
    """If a provider raises, ``save()`` names it and stores nothing, and the transaction can go on."""
    with _setting(site, METADATA=["tests.django_host.test_tasks.failing_release"]), site.atomic():
        with pytest.raises(EventMetadataError, match=r"failing_release failed.*LookupError"):
            site.opened()
        site.note()
    assert site.stored() == (0, 1)


def test_current_span_and_receivers(site: DjangoBank) -> None:
    """The trace is that of a current span of OpenTelemetry's; receivers of the signal are told what was recorded."""
    trace: Any = pytest.importorskip("opentelemetry.trace")
    span = trace.NonRecordingSpan(trace.SpanContext(7, 9, is_remote=False))
    told: list[Any] = []

    def receiver(sender: object, recorded: Any, **_: Any) -> None:
        told.extend(recorded)

    def view(request: Any) -> JsonResponse:
        with trace.use_span(span), site.atomic():
            site.opened()
        site.opened()
        return JsonResponse({})

    with events_recorded.connected_to(receiver):
        answer(view, X_Request_ID="r1", traceparent=TRACE)
    assert [{**each.metadata, "id": str(each.event_id)} for each in told] == metadata_of(site)
    assert [each.metadata["traceparent"] for each in told] == [f"00-{7:032x}-{9:016x}-00", TRACE]
    assert {each.correlation_id for each in told} == {"r1"}


def test_no_metadata(site: DjangoBank) -> None:
    """Where metadata are switched off, none are stored and none are carried; a bad setting is refused."""

    def view(request: Any) -> JsonResponse:
        site.opened()
        return JsonResponse(carried())

    with _setting(site, METADATA=False):
        assert answer(view, X_Request_ID="r1").content == b"{}"
    assert metadata_of(site) == [{"id": "None"}]
    for further in ({"METADATA": True}, {"METADATA": ["no.such"]}, {"METADATA_USER": "flask-login"}):
        with _setting(site, **further), pytest.raises(ConfigurationError, match="METADATA"):
            site.opened()


def test_causes(site: DjangoBank) -> None:
    """What a reaction saves has the event as its cause, and its correlation; handlers are told of them."""
    from flask_eventsourcing.contrib.django.projections import ModelProjection, on, reaction

    told: list[Any] = []

    class Paying(ModelProjection):
        @on(Account.Created)
        def opened(self, event: Any, using: str, recorded: Any) -> None:
            told.append((using, recorded.correlation_id, str(recorded.event_id)))

        @reaction(Account.Created)
        def pay(self, event: Any, key: str) -> None:
            site.bank.deposit(event.originator_id, 7)

    def view(request: Any) -> JsonResponse:
        site.opened()
        return JsonResponse({})

    answer(view, X_Request_ID="r1")
    with declaring(Paying):
        run("Paying")
        run("Paying:reactions")
    cause, effect = metadata_of(site)
    assert told == [(site.alias, "r1", cause["id"])]
    assert (effect[CORRELATION_ID], effect[CAUSATION_ID]) == ("r1", cause["id"])


def test_two_databases(site: DjangoBank, tmp_path: Path) -> None:
    """A task has a block in each database with events, and what it sends waits for the one it has written."""
    with (
        database("shop", f"sqlite:///{tmp_path}/shop.db"),
        override_settings(
            EVENTSOURCING={
                "Bank": {"APPLICATION": "tests.domain.Bank", "DATABASE": site.alias},
                "Shop": {"APPLICATION": "tests.domain.Shop", "DATABASE": "shop"},
            }
        ),
    ):
        from flask_eventsourcing.contrib.django import get_application

        task = make_task(nothing_to_do)
        with published() as sent:
            with task_unit(project_site()):
                get_application("Shop").open_account()
                assert transaction.get_connection("shop").in_atomic_block
                assert site.connection.in_atomic_block
                send_after_commit(task, 1)
                assert sent == []
            assert len(sent) == 1
        assert {type(each).__name__ for each in project_site().applications.values()} == {"Bank", "Shop"}


def test_eager_task_of_a_flask_app_is_that_apps(site: DjangoBank, tmp_path: Path) -> None:
    """An eager task of a Flask app runs in its app, although the process has a Django project too."""
    other = make_site(f"sqlite:///{tmp_path}/other.db")
    celery_app = Celery("other", set_as_current=False)
    celery_app.conf.update(broker_url="memory://", task_always_eager=True)
    init_celery(celery_app, other.app)

    def note() -> None:
        other.note()

    task = celery_app.task(note, name=f"task_{uuid4().hex}", shared=False)
    assert task.delay().state == "SUCCESS"
    assert other.stored() == (0, 1)
    other.close()
