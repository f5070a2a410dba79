"""Tasks and jobs are sent once the events that cause them are committed, and never otherwise; into a real Redis."""

from __future__ import annotations

import importlib.util
import json
import logging
from abc import ABC, abstractmethod
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_eventsourcing.exceptions import NotInitializedError
from tests.bank import Site, make_site
from tests.servers import free_port, require


def greet(name: str, greeting: str = "Hello") -> None:
    """Be the body of a task."""


class Sender(ABC):
    """A task queue, as its producer sees it."""

    @abstractmethod
    def send(self, *args: Any, **kwargs: Any) -> str:
        """Send ``greet`` after the commit, and return the id."""

    @abstractmethod
    def sent(self) -> list[str]:
        """Return the ids of what was sent."""

    @abstractmethod
    @contextmanager
    def broken(self) -> Iterator[None]:
        """Make the broker one that does not answer."""

    @abstractmethod
    def close(self) -> None:
        """Close connections."""


class CelerySender(Sender):
    """Celery."""

    def __init__(self, redis_url: str) -> None:
        import redis

        self.app = self.producer(redis_url)
        self.greet = self.app.task(greet, shared=False)
        self.redis = redis.Redis.from_url(redis_url)

    def producer(self, url: str) -> Any:
        """Make a Celery app that does not wait long for its broker."""
        from celery import Celery

        app = Celery("producer", broker=url, set_as_current=False)
        app.conf.update(task_ignore_result=True, broker_pool_limit=None, task_publish_retry=False)
        app.conf.broker_transport_options = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
        return app

    def send(self, *args: Any, **kwargs: Any) -> str:
        """Send ``greet`` after the commit."""
        from flask_eventsourcing.workers.celery import send_after_commit

        task_id: str = send_after_commit(self.greet, *args, **kwargs).id
        return task_id

    def sent(self) -> list[str]:
        """Return the ids of what was sent."""
        return self.queue("celery")

    def queue(self, name: str) -> list[str]:
        """Return the ids in a queue."""
        messages: Any = self.redis.lrange(name, 0, -1)
        return [json.loads(message)["headers"]["id"] for message in messages][::-1]

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Make the broker one that does not answer."""
        app, greets = self.producer(f"redis://127.0.0.1:{free_port()}/0"), self.greet
        self.greet = app.task(greet, shared=False)
        yield
        self.greet = greets
        app.close()

    def close(self) -> None:
        """Close connections."""
        self.redis.close()
        self.app.close()


class RQSender(Sender):
    """RQ."""

    def __init__(self, redis_url: str) -> None:
        from redis import Redis
        from rq import Queue

        self.redis = Redis.from_url(redis_url)
        self.queue = Queue(connection=self.redis)

    def send(self, *args: Any, **kwargs: Any) -> str:
        """Send ``greet`` after the commit."""
        from flask_eventsourcing.workers.rq import enqueue_after_commit

        return enqueue_after_commit(self.queue, greet, *args, **kwargs)

    def sent(self) -> list[str]:
        """Return the ids of what was sent."""
        ids: list[str] = self.queue.get_job_ids()
        return ids

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Make the broker one that does not answer."""
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with Redis(port=free_port(), retry=Retry(NoBackoff(), 0)) as nobody:
            self.queue.connection = nobody
            yield
        self.queue.connection = self.redis

    def close(self) -> None:
        """Close connections."""
        self.redis.close()


@pytest.fixture(params=["celery", "rq"])
def sender(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Sender]:
    """Each task queue."""
    require(importlib.util.find_spec(request.param), request.param, f"pip install Flask-EventSourcing[{request.param}]")
    sender: Sender = CelerySender(redis_url) if request.param == "celery" else RQSender(redis_url)
    yield sender
    sender.close()


@pytest.fixture
def celery_sender(redis_url: str) -> Iterator[CelerySender]:
    """Celery."""
    require(importlib.util.find_spec("celery"), "Celery", "pip install Flask-EventSourcing[celery]")
    sender = CelerySender(redis_url)
    yield sender
    sender.close()


@pytest.fixture(params=["explicit"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A site, with a commit mode."""
    site = make_site(f"sqlite:///{tmp_path / 'bank.db'}", EVENTSOURCING_COMMIT=request.param)
    yield site
    site.close()


def in_mode(*modes: str) -> pytest.MarkDecorator:
    """Run a test in these commit modes."""
    return pytest.mark.parametrize("site", modes, indirect=True)


@in_mode("explicit", "request")
def test_commit_sends(site: Site, sender: Sender) -> None:
    """Tasks that were sent before the commit go out with it, in order, with the ids that ``send`` returned."""
    with site.app.app_context():
        site.bank.open_account()
        ids = [sender.send("Ada"), sender.send("Ben", greeting="Hi")]
        assert sender.sent() == []
        site.db.session.commit()
        assert sender.sent() == ids
        site.bank.open_account()
        site.db.session.commit()
    assert sender.sent() == ids


def test_rollback_sends_nothing(site: Site, sender: Sender) -> None:
    """After a rollback nothing is sent, and a later commit does not send it either."""
    with site.app.app_context():
        site.bank.open_account()
        sender.send("Ada")
        site.db.session.rollback()
        site.bank.open_account()
        site.db.session.commit()
    assert sender.sent() == []


@in_mode("explicit", "request", "save")
def test_unit_of_work_that_fails_sends_nothing(site: Site, sender: Sender) -> None:
    """A unit of work sends at its end, and nothing when it fails, before anything was saved in it too."""

    @site.es.transactional
    def fail(saves: bool) -> None:
        sender.send("Ada")
        if saves:
            site.bank.open_account()
        raise ValueError("no")

    with site.app.app_context():
        for saves in (True, False):
            with pytest.raises(ValueError, match="no"):
                fail(saves)
        site.bank.open_account()
        site.db.session.commit()
        assert sender.sent() == []
        with site.es.transaction():
            task_id = sender.send("Ada")
            site.bank.open_account()
            assert sender.sent() == []
    assert sender.sent() == [task_id]


def test_savepoints_are_followed(site: Site, sender: Sender) -> None:
    """A task that is sent in a savepoint is dropped with its rollback, or sent by the outer commit."""
    with site.app.app_context():
        savepoint = site.db.session.begin_nested()
        site.bank.open_account()
        sender.send("nobody")
        savepoint.rollback()
        with site.db.session.begin_nested():
            site.bank.open_account()
            task_id = sender.send("Ada")
        assert sender.sent() == []
        site.db.session.commit()
    assert sender.sent() == [task_id]


@pytest.mark.parametrize("flushed", [False, True])
def test_models_alone_are_waited_for(site: Site, sender: Sender, flushed: bool) -> None:
    """Without any event, rows of the user's own models are waited for as well."""
    with site.app.app_context():
        site.note("one")
        if flushed:
            site.db.session.flush()
        sender.send("nobody")
        site.db.session.rollback()
        site.note("two")
        if flushed:
            site.db.session.flush()
        task_id = sender.send("Ada")
        assert sender.sent() == []
        site.db.session.commit()
    assert sender.sent() == [task_id]


@in_mode("explicit", "save")
def test_at_once_when_nothing_waits(site: Site, sender: Sender) -> None:
    """With nothing to commit, a task is sent at once, and an error of the broker is raised to the caller."""
    with site.app.app_context():
        site.bank.open_account()
        site.db.session.commit()
        task_id = sender.send("Ada")
        assert sender.sent() == [task_id]
        with sender.broken(), pytest.raises(Exception, match="refused"):
            sender.send("Ben")


@in_mode("save")
def test_mode_save_sends_at_once_after_a_save(site: Site, sender: Sender) -> None:
    """In the mode "save" a task is sent at once, after a read too, but waits for models that are not committed."""
    with site.app.app_context():
        account_id = site.bank.open_account()
        site.bank.account(account_id)
        first = sender.send("Ada")
        assert sender.sent() == [first]
        site.note()
        second = sender.send("Ben")
        assert sender.sent() == [first]
        site.bank.open_account()
        assert sender.sent() == [first, second]
        with site.db.session.begin_nested():
            third = sender.send("Eve")
        assert sender.sent() == [first, second]
        site.db.session.commit()
    assert sender.sent() == [first, second, third]


@in_mode("request")
def test_mode_request_waits_for_the_answer(site: Site, sender: Sender) -> None:
    """In the mode "request" the answer decides, whether a view sends before it saves, or saves nothing."""

    def view(status: int, saves: bool) -> tuple[str, int]:
        sent.append(sender.send("Ada"))
        assert sender.sent() == sent[: len(sent) - 1]
        if saves:
            site.bank.open_account()
        return "", status

    sent: list[str] = []
    for status, saves in ((200, True), (409, True), (200, False), (409, False)):
        site.answer(partial(view, status, saves))
        if status == 409:
            sent.pop()
        assert sender.sent() == sent
    assert site.answer(partial(fail_after, sender)).status_code == 500
    assert sender.sent() == sent


def fail_after(sender: Sender) -> None:
    """Be a view that fails."""
    sender.send("Ada")
    raise ValueError("no")


def test_request_that_rolls_back_sends_nothing(site: Site, sender: Sender, caplog: pytest.LogCaptureFixture) -> None:
    """A view that forgets the commit gets its 500, and nothing is sent."""

    def forgetful() -> str:
        site.bank.open_account()
        sender.send("Ada")
        return "done"

    site.app.config["PROPAGATE_EXCEPTIONS"] = False
    assert site.answer(forgetful).status_code == 500
    assert sender.sent() == []
    assert "committed nor rolled back" in caplog.text


def test_commit_that_never_came_is_told(site: Site, sender: Sender, caplog: pytest.LogCaptureFixture) -> None:
    """When a transaction that was waited for ends with its context, the log names what was not sent."""
    account_id = site.opened()

    def reads() -> str:
        site.bank.account(account_id)
        sender.send("Ada", greeting="secret")
        return "done"

    site.app.config["PROPAGATE_EXCEPTIONS"] = False
    with caplog.at_level(logging.WARNING):
        assert site.answer(reads).status_code == 200
    assert sender.sent() == []
    (record,) = [record for record in caplog.records if "has ended without a commit" in record.message]
    assert "greet(name, greeting)" in record.message
    assert "secret" not in record.message
    caplog.clear()

    def fails() -> None:
        site.bank.account(account_id)
        fail_after(sender)

    assert site.answer(fails).status_code == 500
    assert "has ended without a commit" not in caplog.text


def test_broker_that_fails_after_the_commit(site: Site, sender: Sender, caplog: pytest.LogCaptureFixture) -> None:
    """When the broker fails after the commit, that is logged without the values, and the commit has succeeded."""
    with site.app.app_context():
        with sender.broken():
            site.bank.open_account()
            sender.send("Ada", greeting="secret")
            sender.send("Ben")
            site.db.session.commit()
        site.bank.open_account()
        task_id = sender.send("Eve")
        site.db.session.commit()
    assert site.stored() == (2, 0)
    assert sender.sent() == [task_id]
    records = [record for record in caplog.records if "could not be sent" in record.message]
    assert ["greet(name, greeting)" in records[0].message, "greet(name)" in records[1].message] == [True, True]
    assert "secret" not in "".join(record.message for record in records)


def test_bad_arguments_are_refused_at_once(site: Site, sender: Sender) -> None:
    """A task that could not be sent after the commit is refused before it, and the others stay as they were."""
    with site.app.app_context():
        site.bank.open_account()
        with pytest.raises(Exception, match=r"JSON|pickle"):
            sender.send(open_lock())
        task_id = sender.send("Ada")
        site.db.session.commit()
    assert sender.sent() == [task_id]


def open_lock() -> Any:
    """Return what no serialiser takes."""
    import threading

    return threading.Lock()


def test_wrong_context_is_told(sender: Sender) -> None:
    """Outside an application context, or in an app without the extension, the error says what is missing."""
    with pytest.raises(NotInitializedError, match="application context"):
        sender.send("Ada")
    with Flask("bare").app_context(), pytest.raises(NotInitializedError, match="init_app"):
        sender.send("Ada")
    assert sender.sent() == []


def test_celery_checks_the_arguments(site: Site, celery_sender: CelerySender) -> None:
    """A call that does not fit the task, or no task at all, is refused before the commit."""
    from flask_eventsourcing.workers.celery import send_after_commit

    with site.app.app_context():
        for wrong in (
            celery_sender.send,
            lambda: celery_sender.send("Ada", wrong=1),
            lambda: send_after_commit(celery_sender.greet.s(), "Ada", "Hi", "more"),
            lambda: send_after_commit(greet, "Ada"),
            lambda: send_after_commit("greet", "Ada"),
        ):
            with pytest.raises(TypeError):
                wrong()
    assert celery_sender.sent() == []


def test_celery_takes_signatures(site: Site, celery_sender: CelerySender) -> None:
    """A signature keeps its options, is not changed, and may be a chain or a group."""
    from celery import chain, group

    from flask_eventsourcing.workers.celery import send_after_commit

    one = celery_sender.greet.s("Ada").set(queue="mail")
    before = dict(one.options)
    with site.app.app_context():
        site.bank.open_account()
        ids = [send_after_commit(one, greeting="Hi").id for _ in range(2)]
        last = send_after_commit(chain(celery_sender.greet.si("Ben"), celery_sender.greet.si("Eve"))).id
        both = send_after_commit(group(celery_sender.greet.s(name) for name in "AB"))
        unknown = send_after_commit(celery_sender.app.signature("elsewhere.task", (1,)).set(queue="other")).id
        site.db.session.commit()
    assert one.options == before
    assert celery_sender.queue("mail") == ids
    assert celery_sender.queue("other") == [unknown]
    first, *grouped = celery_sender.sent()
    assert sorted(grouped) == sorted(result.id for result in both.results)
    (message,) = [
        m for m in map(json.loads, celery_sender.redis.lrange("celery", 0, -1)) if m["headers"]["id"] == first
    ]
    assert json.loads(b64decode(message["body"]))[2]["chain"][0]["options"]["task_id"] == last


def test_celery_eager_task_runs_after_the_commit(site: Site, celery_sender: CelerySender) -> None:
    """In eager mode the task runs right after the commit, in a unit of work of its own, and sees what was committed."""
    from flask_eventsourcing.workers.celery import init_celery, send_after_commit

    app = celery_sender.app
    app.conf.task_always_eager = True
    init_celery(app, site.app)
    seen: list[Any] = []

    @app.task(shared=False)
    def count(fail: bool) -> None:
        seen.append(site.stored()[0])
        site.bank.open_account()
        if fail:
            raise ValueError

    with site.app.app_context():
        for fail in (False, True):
            site.bank.open_account()
            send_after_commit(count, fail)
            assert len(seen) == int(fail)
            site.db.session.commit()
    assert seen == [1, 3]
    assert site.stored()[0] == 3


def test_rq_options_are_kept(site: Site, redis_url: str) -> None:
    """RQ's own options of ``enqueue`` are kept, and an id that was given is the job's."""
    require(importlib.util.find_spec("rq"), "RQ", "pip install Flask-EventSourcing[rq]")
    from redis import Redis
    from rq import Queue, Retry

    from flask_eventsourcing.workers.rq import enqueue_after_commit

    with Redis.from_url(redis_url) as connection, site.app.app_context():
        queue = Queue(connection=connection)
        site.bank.open_account()
        given = enqueue_after_commit(queue, greet, "Ada", job_id="mine", job_timeout=7, retry=Retry(max=2))
        enqueue_after_commit(queue, "somewhere.else", args=("Ben",), kwargs={"greeting": "Hi"}, at_front=True)
        site.db.session.commit()
        other, mine = queue.jobs
        assert (given, mine.id, mine.timeout, mine.retries_left, mine.args) == ("mine", "mine", 7, 2, ("Ada",))
        assert (other.func_name, other.args, other.kwargs) == ("somewhere.else", ("Ben",), {"greeting": "Hi"})
        with pytest.raises(TypeError, match="queue first"):
            enqueue_after_commit(greet, queue)
