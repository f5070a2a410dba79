"""The guard: no client is told "done" for events that are not stored, however late they were saved.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    after_this_request,
    copy_current_request_context,
    request,
    request_finished,
    stream_with_context,
)
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import EventSourcing, events_discarded
from tests.bank import Site, add_note, make_app, make_site
from tests.domain import Bank
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files

MODES = ("explicit", "request", "save")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A file, as what is looked at does not differ by database."""
    return f"sqlite:///{tmp_path / 'bank.db'}"


@pytest.fixture
def early(uri: str) -> Iterator[Callable[..., Site]]:
    """Makes sites on whose app, and blueprint, something was registered before the extension."""
    made = []

    def make(register: Callable[[Flask, Site], None], **config: Any) -> Site:
        app = make_app(uri, **config)
        db = SQLAlchemy()
        site = Site(app, db, EventSourcing(db=db, application=Bank), add_note(db))
        register(app, site)
        db.init_app(app)
        site.es.init_app(app)
        with app.app_context():
            db.create_all()
        made.append(site)
        return site

    yield make
    for site in made:
        site.close()


@pytest.fixture(params=MODES)
def site(uri: str, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site in each mode."""
    site = make_site(uri, EVENTSOURCING_COMMIT=request.param)
    yield site
    site.close()


@pytest.fixture
def explicit(uri: str) -> Iterator[Site]:
    """A site in the default mode."""
    site = make_site(uri)
    yield site
    site.close()


def late(site: Site) -> Callable[[Response], Response]:
    """Return an ``after_request`` function that saves."""

    def save(response: Response) -> Response:
        site.bank.open_account()
        return response

    return save


def by_app(app: Flask, site: Site) -> None:
    """Save in a function of the app, registered before the extension."""
    app.after_request(late(site))


def by_signal(app: Flask, site: Site) -> None:
    """Save in a receiver of ``request_finished``."""

    def save(*_: object, **__: object) -> None:
        site.bank.open_account()

    request_finished.connect(save, app, weak=False)


@pytest.mark.parametrize("register", [by_app, by_signal])
@pytest.mark.parametrize("mode", MODES)
def test_what_was_registered_before_the_extension_is_seen(
    early: Callable[..., Site], register: Callable[[Flask, Site], None], mode: str
) -> None:
    """Events that are saved after the view are stored and answered 200, or not stored and answered 500."""
    site = early(register, EVENTSOURCING_COMMIT=mode)
    answer = site.answer(lambda: "done")
    # In the mode "explicit" the answer 500 goes through the same functions, which save again.
    assert answer.status_code == (500 if mode == "explicit" else 200)
    assert site.stored() == (0 if mode == "explicit" else 1, 0)


@pytest.mark.parametrize("where", ["this request", "blueprint"])
def test_functions_of_requests_and_blueprints_are_seen(explicit: Site, where: str) -> None:
    """Events that ``after_this_request`` and a blueprint's functions save are checked, too."""

    def view() -> str:
        if where == "this request":
            after_this_request(late(explicit))
        return "done"

    blueprint = Blueprint("branch", __name__)
    blueprint.post("/branch")(view)
    if where == "blueprint":
        blueprint.after_request(late(explicit))
    explicit.app.register_blueprint(blueprint)
    assert explicit.app.test_client().post("/branch").status_code == 500
    assert explicit.stored() == (0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_handler_of_a_500_cannot_tell_done(early: Callable[..., Site], mode: str) -> None:
    """A handler that answers 200 for an error does not make events that were dropped look stored."""
    site = early(lambda app, _: None, EVENTSOURCING_COMMIT=mode)
    site.app.register_error_handler(500, lambda error: ("all is well", 200))

    def view() -> str:
        site.bank.open_account()
        raise KeyError

    assert site.answer(view).status_code == (200 if mode == "save" else 500)
    assert site.stored() == (1 if mode == "save" else 0, 0)


def test_nested_context_is_told_in_the_answer(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Events that a nested application context drops make the outer answer 500; nothing of the request is stored."""
    heard: list[Any] = []

    def hear(sender: object, application: Bank, notifications: Any) -> None:
        heard.extend(notifications)

    def view() -> str:
        site.note()
        with site.app.app_context():
            site.db.session.begin_nested()
            site.bank.open_account()
        return "done"

    with events_discarded.connected_to(hear, site.app):
        assert site.answer(view).status_code == 500
    assert len(heard) == 1
    assert site.stored() == (0, 0)
    lines = [record.getMessage() for record in caplog.records if "application context" in record.getMessage()]
    assert any("1 event of Bank (Account.Created " in line for line in lines)
    assert site.answer(lambda: "the next one is as ever").status_code == 200


@pytest.mark.parametrize("in_thread", [True, False])
def test_copied_request_context_does_not_end_the_request(explicit: Site, in_thread: bool) -> None:
    """After a function with a copy of the request's context has ended, events that are dropped make the answer 500."""

    def path() -> str:
        return request.path

    def view() -> str:
        copied = copy_current_request_context(path)
        with ThreadPoolExecutor(1) as threads:
            assert (threads.submit(copied).result() if in_thread else copied()) == "/"
        with explicit.app.app_context():
            explicit.bank.open_account()
        return "done"

    assert explicit.answer(view).status_code == 500
    assert explicit.stored() == (0, 0)


@pytest.mark.parametrize("how", ["plain", "unit", "commits"])
@on_files
def test_events_of_a_copied_request_context_are_the_requests(new_site: MakeSite, how: str) -> None:
    """What a function loses in another thread, with a copy of the request's context, is no success for the client."""
    site = new_site(PROPAGATE_EXCEPTIONS=False)
    site.quiet()

    def save() -> None:
        site.bank.open_account()
        if how == "commits":
            site.db.session.commit()

    def view() -> str:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(copy_current_request_context(save)).result()
        return "done"

    answer = site.answer(site.es.transactional(view) if how == "unit" else view)
    assert answer.status_code == (200 if how == "commits" else 500)
    assert site.stored() == (1 if how == "commits" else 0, 0)
    assert site.answer(lambda: "the next one is as ever").status_code == 200


def test_nested_context_that_commits_is_left_alone(site: Site) -> None:
    """A nested context that commits its own transaction does not change the outer answer."""

    def view() -> str:
        with site.app.app_context():
            site.bank.open_account()
            site.db.session.commit()
        return "done"

    assert site.answer(view).status_code == 200
    assert site.stored() == (1, 0)


class TestInnerRequests:
    """A view that uses ``app.test_client()``: both requests use one session."""

    def test_inner_404_takes_nothing_along(self, site: Site) -> None:
        """Events of the outer view stay after an inner request, and the outer request commits them."""

        def view() -> str:
            site.bank.open_account()
            assert site.app.test_client().get("/missing").status_code == 404
            if site.app.config["EVENTSOURCING_COMMIT"] == "explicit":
                site.db.session.commit()
            return "done"

        assert site.answer(view).status_code == 200
        assert site.stored() == (1, 0)

    def test_inner_one_commits_nothing_of_a_failing_outer_one(self, site: Site) -> None:
        """An outer view that answers 409 has stored nothing, whatever an inner request answered."""

        def view() -> tuple[str, int]:
            site.note()
            site.db.session.flush()
            assert site.answer(lambda: "inner").status_code == 200
            return "no", 409

        assert site.answer(view).status_code == 409
        assert site.stored() == (0, 0)

    def test_forgetful_outer_one_is_told(self, explicit: Site) -> None:
        """The outer view that does not commit gets 500 after an inner request, too."""

        def view() -> str:
            explicit.bank.open_account()
            explicit.answer(lambda: "inner")
            return "done"

        assert explicit.answer(view).status_code == 500
        assert explicit.stored() == (0, 0)

    def test_environment_that_is_given_on(self, explicit: Site) -> None:
        """A view that passes its own WSGI environment to the app is checked after that."""
        explicit.app.get("/inner")(lambda: "inner")

        def view() -> str:
            explicit.bank.open_account()
            environ = request.environ
            before = dict(environ)
            environ.update(PATH_INFO="/inner", REQUEST_METHOD="GET")
            assert Response.from_app(explicit.app, environ).status_code == 200
            environ.update({key: before[key] for key in ("PATH_INFO", "REQUEST_METHOD")})
            return "done"

        assert explicit.answer(view).status_code == 500
        assert explicit.stored() == (0, 0)

    def test_inner_failure_is_not_committed_by_the_outer_one(self, explicit: Site) -> None:
        """An outer transaction with events of an inner request that answered 409 cannot be committed."""

        def inner() -> tuple[str, int]:
            explicit.bank.open_account()
            return "no", 409

        def view() -> str:
            explicit.bank.open_account()
            assert explicit.answer(inner).status_code == 409
            explicit.db.session.commit()
            return "done"

        assert explicit.answer(view).status_code == 500
        assert explicit.stored() == (0, 0)

    def test_inner_one_in_a_clean_session_is_like_any_other(self, site: Site) -> None:
        """An inner request that finds no transaction has one of its own, with the promises of every request."""

        def inner(status: int) -> Callable[[], tuple[str, int]]:
            def view() -> tuple[str, int]:
                with site.db.session.begin_nested():
                    site.bank.open_account()
                return "inner", status

            return view

        told: list[int] = []

        def view() -> str:
            told.extend(site.answer(inner(status)).status_code for status in (200, 409))
            return "done"

        assert site.answer(view).status_code == 200
        mode = site.app.config["EVENTSOURCING_COMMIT"]
        assert told == [200 if mode == "request" else 500, 409]
        assert site.stored() == (1 if mode == "request" else 0, 0)


def test_async_view_that_forgets(explicit: Site) -> None:
    """An asynchronous view that forgets to commit gets 500, and so does one whose nested context forgets."""

    @explicit.app.post("/forget")
    async def forget() -> str:
        explicit.bank.open_account()
        return "done"

    @explicit.app.post("/nested")
    async def nested() -> str:
        async with _Nested(explicit.app):
            explicit.bank.open_account()
        return "done"

    client = explicit.app.test_client()
    assert [client.post(path).status_code for path in ("/forget", "/nested")] == [500, 500]
    assert explicit.stored() == (0, 0)


class _Nested:
    """An application context in an asynchronous ``with`` block."""

    def __init__(self, app: Flask) -> None:
        self._context = app.app_context()

    async def __aenter__(self) -> None:
        self._context.__enter__()

    async def __aexit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)


class TestNoAnswerToChange:
    """Where no answer can be changed, the log says what was lost."""

    ADVICE: ClassVar = {
        "explicit": "call db.session.commit() or .rollback()",
        "request": "'request' commits after a view that has returned, and not here",
        "save": "within a savepoint",
    }

    def check(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """Check that one error line names the events with the advice of the mode, and that nothing is stored."""
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(lines) == 1
        assert "1 event of Bank (Account.Created " in lines[0]
        assert self.ADVICE[site.app.config["EVENTSOURCING_COMMIT"]] in lines[0]
        assert site.stored() == (0, 0)

    def test_stream(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """A generator that saves while its answer is sent is reported, and nothing is stored."""

        def body() -> Iterator[str]:
            yield "begun"
            site.db.session.begin_nested()
            site.bank.open_account()

        assert site.answer(lambda: Response(stream_with_context(body()))).data == b"begun"
        self.check(site, caplog)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("when", ["before", "between", "after"])
    def test_teardown_function(self, uri: str, mode: str, when: str, caplog: pytest.LogCaptureFixture) -> None:
        """A teardown function that saves, in whatever order it is registered, is reported, and nothing is stored."""
        app = make_app(uri, EVENTSOURCING_COMMIT=mode)
        db = SQLAlchemy()
        site = Site(app, db, EventSourcing(db=db, application=Bank), add_note(db))
        armed: list[int] = []

        def save(error: BaseException | None) -> None:
            if armed:
                armed.pop()
                db.session.begin_nested()
                site.bank.open_account()

        if when == "before":
            app.teardown_appcontext(save)
        db.init_app(app)
        if when == "between":
            app.teardown_appcontext(save)
        site.es.init_app(app)
        if when == "after":
            app.teardown_appcontext(save)
        with app.app_context():
            db.create_all()

        def view() -> str:
            armed.append(1)
            return "done"

        assert site.answer(view).status_code == 200
        self.check(site, caplog)
        site.close()

    def test_thread_with_a_copied_context(self, explicit: Site, caplog: pytest.LogCaptureFixture) -> None:
        """A thread that uses a copy of a context that has ended gets an error that says what to do instead."""
        ended = threading.Event()

        def work() -> None:
            ended.wait(10)
            explicit.bank.open_account()
            explicit.db.session.remove()

        def view() -> str:
            threads.append(threading.Thread(target=contextvars.copy_context().run, args=(work,)))
            threads[0].start()
            return "done"

        threads: list[threading.Thread] = []
        assert explicit.answer(view).status_code == 200
        ended.set()
        threads[0].join(10)
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len([line for line in lines if "Push a context of its own there" in line]) == 1
        assert explicit.stored() == (0, 0)

    def test_context_that_is_pushed_again(self, explicit: Site, caplog: pytest.LogCaptureFixture) -> None:
        """A context object may be used twice, one after the other."""
        context = explicit.app.app_context()
        for _ in range(2):
            with context:
                explicit.bank.open_account()
                explicit.db.session.commit()
        assert caplog.records == []
        assert explicit.stored() == (2, 0)


def test_request_whose_error_was_raised_is_over(explicit: Site) -> None:
    """In an open application context, a 404 rolls back what was saved, also after a request that raised its error."""
    explicit.app.testing = True

    def fails() -> str:
        raise KeyError

    with explicit.app.app_context():
        with pytest.raises(KeyError):
            explicit.answer(fails)
        account_id = explicit.bank.open_account()
        assert explicit.answer(lambda: ("", 404)).status_code == 404
        explicit.db.session.commit()
        assert explicit.bank.recorder.select_events(account_id) == []
