"""What decorated functions return, and how they are called: views that answer with a failure have stored nothing.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from eventsourcing.persistence import IntegrityError
from flask import Flask, Response, abort, jsonify, make_response
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug import Response as WerkzeugResponse
from werkzeug.datastructures import Headers
from werkzeug.exceptions import Conflict, HTTPException, NotFound
from werkzeug.routing import RequestRedirect

from flask_eventsourcing import ConfigurationError
from flask_eventsourcing.web.decorators import status_of
from tests.bank import Site, make_site
from tests.domain import conflict_with

DECORATORS = ("transactional", "retry_on_conflict")
MODES = ("explicit", "request", "save")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A file, as what is decorated does not differ by database."""
    return f"sqlite:///{tmp_path / 'bank.db'}"


@pytest.fixture(params=MODES)
def site(request: pytest.FixtureRequest, uri: str) -> Iterator[Site]:
    """A site in each mode."""
    site = make_site(uri, EVENTSOURCING_COMMIT=request.param)
    yield site
    site.close()


FAILURES: dict[str, Callable[[], Any]] = {
    "tuple": lambda: ("no", 409),
    "tuple with headers": lambda: ("no", 404, {"X-Why": "so"}),
    "text": lambda: ("no", "422 Unprocessable"),
    "enum": lambda: ({"why": "so"}, HTTPStatus.CONFLICT),
    "response": lambda: Response("no", 500),
    "made response": lambda: make_response(jsonify(why="so"), 400),
    "response of Werkzeug": lambda: WerkzeugResponse("no", 403),
    "exception returned": lambda: Conflict("no"),
    "exception with a response": lambda: HTTPException(response=WerkzeugResponse("no", 418)),
}
SUCCESSES: dict[str, Callable[[], Any]] = {
    "text": lambda: "409",
    "json": lambda: {"status": 409},
    "list": lambda: [500, 500],
    "tuple": lambda: ("yes", 201),
    "headers": lambda: ("yes", {"X-Status": "409"}),
    "list of headers": lambda: ("yes", [("X-Status", "409")]),
    "redirect": lambda: Response(status=303),
    "stream": lambda: iter(["yes"]),
    "status that replaces another": lambda: (Response("no", 409), 200),
}


@pytest.mark.parametrize("decorator", DECORATORS)
@pytest.mark.parametrize("returned", [*FAILURES, "abort"])
def test_failure_stores_nothing(site: Site, decorator: str, returned: str) -> None:
    """A decorated view that answers 400 or more has stored nothing, however it says so and in every mode."""

    def view() -> Any:
        site.note()
        site.bank.open_account()
        return abort(404) if returned == "abort" else FAILURES[returned]()

    assert site.answer(getattr(site.es, decorator)(view)).status_code >= 400
    assert site.stored() == (0, 0)


@pytest.mark.parametrize("decorator", DECORATORS)
@pytest.mark.parametrize("returned", SUCCESSES)
def test_success_is_stored(site: Site, decorator: str, returned: str) -> None:
    """A decorated view that answers below 400 is committed; its answer is what it returned."""

    def view() -> Any:
        site.note()
        site.bank.open_account()
        return SUCCESSES[returned]()

    assert site.answer(getattr(site.es, decorator)(view)).status_code < 400
    assert site.stored() == (1, 1)


@pytest.mark.parametrize("decorator", DECORATORS)
def test_view_that_has_lost_events_elsewhere_stores_nothing(site: Site, decorator: str) -> None:
    """If a nested context loses events, the client is told of a failure, and what the view has saved is not stored."""

    def view() -> str:
        with site.app.app_context():
            site.db.session.begin_nested()
            site.bank.open_account()
        site.bank.open_account()
        site.note()
        return "done"

    site.quiet()
    assert site.answer(getattr(site.es, decorator)(view)).status_code == 500
    assert site.stored() == (0, 0)


def returned_values() -> st.SearchStrategy[Any]:
    """Draw what a view may return."""
    codes = st.sampled_from([200, 201, 204, 302, 399, 400, 404, 409, 500, 503])
    statuses: st.SearchStrategy[Any] = st.one_of(codes, codes.map(str), codes.map(lambda c: f"{c} Name"), st.none())
    headers = st.sampled_from([{"X-A": "b"}, [("X-A", "b")], Headers({"X-A": "b"}), {}])
    bodies: st.SearchStrategy[Any] = st.one_of(
        st.sampled_from(["", "409", b"no", {"status": 409}, [409]]),
        codes.map(lambda code: Response("x", code)),
        codes.map(lambda code: WerkzeugResponse("x", code)),
        codes.map(lambda code: HTTPException(response=WerkzeugResponse("x", code))),
        st.sampled_from([NotFound(), Conflict("x"), RequestRedirect("http://localhost/")]),
    )
    return st.one_of(
        bodies, st.tuples(bodies, statuses), st.tuples(bodies, headers), st.tuples(bodies, statuses, headers)
    )


@settings(deadline=None, database=None)
@given(returned_values())
def test_status_is_the_one_that_flask_reads(returned: Any) -> None:
    """A unit is committed or rolled back by the status of the answer that Flask makes from the return value."""
    app = Flask("statuses")
    with app.test_request_context():
        judged = status_of(returned)
        assert judged == app.make_response(returned).status_code


def test_a_stream_is_not_consumed() -> None:
    """A return value that is an iterator is not consumed."""
    body = iter(["a", "b"])
    assert [status_of(value) for value in (body, (body, 404), Response(body, 500))] == [200, 404, 500]
    assert list(body) == ["a", "b"]


@pytest.mark.parametrize("decorator", DECORATORS)
def test_function_that_is_no_view(site: Site, decorator: str, caplog: pytest.LogCaptureFixture) -> None:
    """With ``status=False`` a function may return pairs of numbers, and else the log tells."""

    def service() -> tuple[str, int]:
        site.bank.open_account()
        return "ada", 500

    decorate = getattr(site.es, decorator)
    answer = site.answer(lambda: str(decorate(status=False)(service)()))
    assert (answer.status_code, answer.text) == (200, "('ada', 500)")
    assert site.stored() == (1, 0)
    assert caplog.records == []
    assert site.answer(lambda: str(decorate(service)())).status_code == 200
    assert site.stored() == (1, 0)
    line = next(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "service returned the status 500" in line
    assert "status=False" in line


def test_outside_a_request_there_is_no_status(site: Site) -> None:
    """In a command, a task or a context without a request a return value does not decide about the commit."""

    @site.es.transactional
    def work() -> tuple[str, int]:
        site.bank.open_account()
        return "ada", 500

    with site.app.app_context():
        assert work() == ("ada", 500)
    assert site.stored() == (1, 0)


def test_only_the_outermost_is_judged(site: Site) -> None:
    """A decorated function within another unit of work gives its status to that, which decides."""

    @site.es.transactional
    def inner() -> tuple[str, int]:
        site.bank.open_account()
        return "no", 409

    @site.es.retry_on_conflict
    def outer() -> str:
        inner()
        return "done"

    assert site.answer(outer).status_code == 200
    assert site.stored() == (1, 0)


class TestCoroutines:
    """Coroutine functions are awaited within their unit of work."""

    @pytest.mark.parametrize("decorator", DECORATORS)
    @pytest.mark.parametrize("status", [200, 409])
    def test_async_view(self, site: Site, decorator: str, status: int) -> None:
        """The unit of work spans what is awaited, is committed for 200 and rolled back for 409."""

        async def view() -> tuple[str, int]:
            site.bank.open_account()
            await asyncio.sleep(0)
            site.note()
            return "answer", status

        site.app.post("/async")(getattr(site.es, decorator)(view))
        assert site.app.test_client().post("/async").status_code == status
        assert site.stored() == ((1, 1) if status == 200 else (0, 0))

    def test_error_rolls_back(self, site: Site) -> None:
        """An error after an await rolls everything back."""

        @site.es.transactional
        async def work() -> None:
            site.bank.open_account()
            await asyncio.sleep(0)
            raise KeyError

        with site.app.app_context(), pytest.raises(KeyError):
            asyncio.run(work())
        assert site.stored() == (0, 0)

    def test_conflict_is_tried_again(self, site: Site) -> None:
        """After a conflict the coroutine function is awaited again, and others may run in the pause."""
        account_id = site.opened()
        tries: list[int] = []

        @site.es.retry_on_conflict(times=2)
        async def work() -> str:
            save = conflict_with(site.bank, account_id)
            tries.append(1)
            if len(tries) == 1:
                site.elsewhere(lambda: site.bank.deposit(account_id))
            await asyncio.sleep(0)
            save()
            return "done"

        with site.app.app_context():
            assert asyncio.run(work()) == "done"
        assert len(tries) == 2
        assert site.balance(account_id) == 1001

    def test_last_conflict_is_raised(self, site: Site) -> None:
        """When the tries are used up the conflict is raised."""
        account_id = site.opened()

        @site.es.retry_on_conflict(times=0)
        async def work() -> None:
            save = conflict_with(site.bank, account_id)
            site.elsewhere(lambda: site.bank.deposit(account_id))
            save()

        with site.app.app_context(), pytest.raises(IntegrityError):
            asyncio.run(work())
        assert site.balance(account_id) == 1

    def test_tasks_that_share_a_session_are_refused(self, site: Site) -> None:
        """Two tasks at the same time on one session would commit half of each other."""

        @site.es.transactional
        async def work() -> None:
            site.bank.open_account()
            await asyncio.sleep(0.01)

        async def both() -> Any:
            return await asyncio.gather(work(), work(), return_exceptions=True)

        with site.app.app_context():
            first, second = asyncio.run(both())
        assert first is None
        assert isinstance(second, ConfigurationError)
        assert "in each task" in str(second)
        assert site.stored() == (1, 0)

    def test_coroutine_functions_stay_what_they_are(self, site: Site) -> None:
        """Flask and others see that a decorated coroutine function is one."""

        async def work() -> None:
            """Work."""

        for decorate in (site.es.transactional, site.es.retry_on_conflict, site.es.retry_on_conflict(times=1)):
            decorated = decorate(work)
            assert inspect.iscoroutinefunction(decorated)
            assert (decorated.__name__, decorated.__doc__) == ("work", "Work.")


def generator() -> Iterator[int]:
    """Yield."""
    yield 1


async def async_generator() -> AsyncIterator[int]:
    """Yield."""
    yield 1


class Callables:
    """An object whose call is a generator."""

    def __call__(self) -> Iterator[int]:
        """Yield."""
        yield 1


@pytest.mark.parametrize("decorator", DECORATORS)
@pytest.mark.parametrize("function", [generator, async_generator, partial(generator), Callables()])
def test_generators_are_refused(site: Site, decorator: str, function: Any) -> None:
    """A generator would run after its unit of work, so it is refused where it is decorated."""
    for decorate in (getattr(site.es, decorator), getattr(site.es, decorator)()):
        with pytest.raises(ConfigurationError, match="generator function"):
            decorate(function)


def test_hidden_coroutine_is_refused(site: Site) -> None:
    """A coroutine that another decorator hides is refused when it is returned, and nothing is stored."""

    async def work() -> str:
        return "never"

    def hide() -> Any:
        site.bank.open_account()
        return work()

    with site.app.app_context(), pytest.raises(ConfigurationError, match="returned a coroutine"):
        site.es.transactional(hide)()
    assert site.stored() == (0, 0)
