"""Decorators that run a function, such as a view, in a unit of work: its return value decides about the commit."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from io import BytesIO
from typing import Any

import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from flask import has_request_context, request
from werkzeug.datastructures import Headers, MultiDict
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from ..applications.apart import ApartHost, await_again, run_again
from ..exceptions import ConfigurationError
from ..uow import Run, UnitOfWork
from ..uow.running import LONGEST_PAUSE, as_conflict
from .sessions import FlaskHost
from .state import current_state
from .uncommitted import FAILURE, refuse_lost, rolled_back

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
"""The types of bodies that are parsed into values that can be read again."""

LONGEST_KEPT = 2_500_000
"""The most bytes of a body that are kept for the next try."""

TASK = "flask_eventsourcing.task"
"""The key in ``Session.info`` of the asyncio task whose unit of work the session is in."""


class Rereading:
    """Lets a function that is run again read the request again, from the place where the function began."""

    def __init__(self) -> None:
        proxy: Any = request
        self._there: Any = vars(proxy._get_current_object()) if has_request_context() else {}
        self._uploads = [(each, _position(each.stream)) for each in self._parsed()]
        self._body: bytes | None = None
        is_new = has_request_context() and not {"stream", "form", "_cached_data"} & self._there.keys()
        if is_new and request.mimetype not in FORMS and 0 < (request.content_length or 0) <= LONGEST_KEPT:
            # If it cannot be read, the function gets the error when it reads.
            with suppress(HTTPException):
                self._body = request.get_data()
                self._there["stream"] = BytesIO(self._body)
        self._read = _position(self._there.get("stream"))

    def _parsed(self) -> list[Any]:
        return [upload for _, named in self._there.get("files", MultiDict()).lists() for upload in named]

    def rewind(self) -> bool:
        """Go back to that place. Return False if a body that was not kept was read."""
        before = {id(upload): position for upload, position in self._uploads}
        for each in self._parsed():
            # An upload that the function has closed stays closed.
            with suppress(ValueError):
                each.seek(before.get(id(each)) or 0)
        if self._body is not None:
            self._there["stream"] = BytesIO(self._body)
            return True
        is_parsed = "form" in self._there and request.mimetype in FORMS
        return is_parsed or "_cached_data" in self._there or _position(self._there.get("stream")) == self._read


def _position(stream: Any) -> int | None:
    """Return the position in a stream, or None if it does not tell."""
    if stream is None:
        return 0
    try:
        return int(stream.tell())
    except (AttributeError, OSError, ValueError):
        return None


class _FailureReturned(Exception):  # noqa: N818
    """Ends a unit of work that has to be rolled back, and carries the return value of its function."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned


def in_unit(
    function: Callable[..., Any], *, times: int | None, status: bool, noted: list[str] | None = None
) -> Callable[..., Any]:
    """Return a function that runs another one in a unit of work of the current app.

    :param times: how often it is run again after a conflict, at most; None for never.
    :param status: whether a return value with a status of 400 or more, as Flask reads it, rolls back.
    :param noted: takes the name of the function.
    :raises ConfigurationError: for a generator, which would run after the end of the unit.
    """
    name = getattr(function, "__qualname__", repr(function))
    called = (function, getattr(function, "__call__", None))  # noqa: B004
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in called):
        raise ConfigurationError(
            f"{name} is a generator function, which runs when its unit of work has ended: decorate the function that "
            "goes through the generator, or use 'with es.transaction():' in it."
        )
    if noted is not None:
        noted.append(name)
    is_async = any(inspect.iscoroutinefunction(each) for each in called)
    return (_awaited if is_async else _called)(function, name, times, status=status)


def _awaited(function: Callable[..., Any], name: str, times: int | None, *, status: bool) -> Callable[..., Any]:
    @wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        if (apart := current_state().apart) is not None:
            again = _times(apart, times)
            return await await_again(partial(function, *args, **kwargs), again, asyncio.sleep, Rereading().rewind)
        host = current_state().current_host
        judge = _judge(host, name, status=status)

        async def work() -> Any:
            return judge(await function(*args, **kwargs))

        try:
            with _of_one_task(_unit(host), name):
                return await _await(host, work, times)
        except _FailureReturned as failure:
            return failure.returned

    return awaited


def _called(function: Callable[..., Any], name: str, times: int | None, *, status: bool) -> Callable[..., Any]:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if (apart := current_state().apart) is not None:
            again = _times(apart, times)
            return _of_function(run_again(partial(function, *args, **kwargs), again, Rereading().rewind), name)
        host = current_state().current_host
        judge = _judge(host, name, status=status)

        def work() -> Any:
            return judge(function(*args, **kwargs))

        try:
            if times is not None:
                return host.retry(work, times, rewind=Rereading().rewind)
            with host.transaction():
                return work()
        except _FailureReturned as failure:
            return failure.returned

    return called


def _times(apart: ApartHost, times: int | None) -> int:
    if times is None:
        apart.refuse("@es.transactional")
    return times


def _unit(host: FlaskHost) -> UnitOfWork:
    return host.unit_of(host.database.session())


def _judge(host: FlaskHost, name: str, *, status: bool) -> Callable[[Any], Any]:
    """Return a function that takes the return value, and returns it or raises an error that rolls the unit back."""
    # If there is an outer unit, it has to decide about the work of both.
    looks = status and has_request_context() and not _unit(host).shared.depth

    def judge(returned: Any) -> Any:
        _of_function(returned, name)
        if looks:
            refuse_lost()
        code = status_of(returned) if looks else None
        if code is not None and code >= FAILURE:
            rolled_back(current_state(), name, code)
            raise _FailureReturned(returned)
        return returned

    return judge


def _of_function(returned: Any, name: str) -> Any:
    """Return what a function has returned, unless it has to be awaited."""
    if inspect.iscoroutine(returned):
        returned.close()
        raise ConfigurationError(
            f"{name} returned a coroutine, which would run when its unit of work has ended: decorate the "
            "'async def' function itself, below other decorators."
        )
    return returned


def status_of(returned: Any) -> int | None:
    """Return the status that ``Flask.make_response()`` would give to what a view has returned, without consuming it.

    None for a WSGI application, whose status is known after it has run.
    """
    status = None
    if isinstance(returned, tuple):
        if len(returned) == 3:
            returned, status, _ = returned
        elif len(returned) == 2 and isinstance(returned[1], Headers | dict | tuple | list):
            returned = returned[0]
        elif len(returned) == 2:
            returned, status = returned
    if status is not None:
        return _code_of(status)
    if isinstance(returned, Response):
        return returned.status_code
    if isinstance(returned, HTTPException):
        return returned.get_response().status_code
    return None if callable(returned) else 200


def _code_of(status: Any) -> int | None:
    if isinstance(status, bytes | bytearray):
        status = status.decode("latin-1")
    try:
        return int(status.split(None, 1)[0] if isinstance(status, str) else status)
    except (ValueError, TypeError, IndexError):
        return None


async def _await(host: FlaskHost, work: Callable[[], Awaitable[Any]], times: int | None) -> Any:
    """Do what ``UnitRunner.retry()`` does, or ``transaction()``, with pauses in which other tasks run."""
    if times is None:
        with host.transaction():
            return await work()
    unit, reading = _unit(host), Rereading()
    again = not unit.has_changes() and not unit.shared.depth
    for tries in range(times + 1):
        run = Run()
        try:
            with host.transaction(queueing=True, run=run):
                return await work()
        except (IntegrityError, sa.exc.DBAPIError) as error:
            conflict = as_conflict(unit, error)
            if conflict is None:
                raise
            if not again or tries == times or run.has_committed or not reading.rewind():
                raise conflict from conflict.__cause__
        await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.004 * 2**tries)))  # noqa: S311
    raise IntegrityError


@contextmanager
def _of_one_task(unit: UnitOfWork, name: str) -> Iterator[None]:
    """Refuse concurrent tasks in one unit of work, because each would commit half of the other's work."""
    info = unit.session.info
    task = asyncio.current_task()
    outer = info.get(TASK)
    if outer is not None and outer is not task:
        raise ConfigurationError(
            f"{name} runs in an asyncio task while another one has a unit of work on the same session: push an "
            "application context in each task, 'with app.app_context():', or await one after the other."
        )
    info[TASK] = task
    try:
        yield
    finally:
        if outer is None:
            info.pop(TASK, None)
