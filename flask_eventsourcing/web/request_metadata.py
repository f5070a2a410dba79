"""Metadata that Flask provides: the correlation and trace of a request, and, if configured, the user.

A header that cannot be used is ignored and not logged.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flask import Flask, Response, current_app, has_app_context, has_request_context, request
from flask import globals as flask_globals
from flask.globals import app_ctx

from ..config import Config
from ..metadata import (
    CORRELATION_ID,
    TRACEPARENT,
    USER,
    Collector,
    MetadataBlock,
    Provider,
    Steps,
    get_metadata_from_context,
    new_id,
)
from ..metadata.values import metadata_of_headers, trace_of_span

KEPT = "flask_eventsourcing.metadata"
"""The key in the environment of a request of the metadata for all of its saves."""

# Since Flask 3.2, this is the application context.
_request_context: Any = vars(flask_globals).get("request_ctx", app_ctx)


def request_context() -> object:
    """Return Flask's context of the current request. A copy of it, as for another thread, has the same request."""
    return _request_context._get_current_object()


def make_collector(app: Flask, config: Config) -> Collector | None:
    """Return the collector of the metadata of a save in an app, or None if none are stored."""
    if config.metadata is False:
        return None
    providers: list[Provider] = []
    if config.metadata_user is not None:
        providers.append(_User(app, config.metadata_user))
    return Collector([*providers, *config.metadata], Carried(app))


class Carried:
    """Provides the correlation and the trace of a request, or of an application context.

    :param app: the Flask app whose work it is.
    """

    def __init__(self, app: Flask) -> None:
        self._app = app

    def __call__(self) -> Mapping[str, str]:
        """Return it; empty outside an application context of the app."""
        # Called by each save. The objects themselves are faster than Flask's proxies.
        context: Any = app_ctx._get_current_object() if has_app_context() else None  # type: ignore[attr-defined]
        if context is None or context.app is not self._app:
            return {}
        if has_request_context():
            of_request: Any = request._get_current_object()  # type: ignore[attr-defined]
            found: dict[str, str] | None = of_request.environ.get(KEPT)
            if found is None:
                found = of_request.environ[KEPT] = metadata_of_headers(of_request.headers)
        else:
            of_context: Any = context.g
            found = of_context.get("_flask_eventsourcing_metadata")
            if found is None:
                found = of_context._flask_eventsourcing_metadata = {CORRELATION_ID: new_id()}
        trace = trace_of_span()
        return found if trace is None else {**found, TRACEPARENT: trace}


def answer_in_steps(response: Response) -> bool:
    """Keep the metadata of the code that makes the parts of a response, after the view has returned, to itself.

    :return: whether the response is made of such parts.
    """
    # A file stays a file, so that the server may send it by itself.
    in_steps = response.is_streamed and not response.direct_passthrough
    if in_steps:
        response.response = _Parts(response.response)
    return in_steps


class _Parts:
    """The parts of a streamed response. Metadata that their code sets are in force in its steps, and in no other code.

    A server that gives up a response, or a test that never reads it, leaves a generator in the middle of a block.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        self._parts = parts
        self._iterator = iter(parts)
        self._steps = Steps(MetadataBlock({}))

    def __iter__(self) -> _Parts:
        return self

    def __next__(self) -> Any:
        with self._steps:
            return next(self._iterator)

    def close(self) -> None:
        """End it."""
        close = getattr(self._parts, "close", None)
        if close is not None:
            with self._steps:
                close()


def is_current(app: Flask) -> bool:
    """Whether this is an application context of an app."""
    return has_app_context() and current_app._get_current_object() is app  # type: ignore[attr-defined]


def metadata_to_carry(app: Flask) -> dict[str, str]:
    """Return the metadata for a task that is sent now: those of the request, and those in the context."""
    return {**Carried(app)(), **get_metadata_from_context()}


class _User:
    """Provides the user, in an application context.

    :param given: ``"flask-login"``, or a function that returns the user or None.
    """

    def __init__(self, app: Flask, given: str | Callable[[], str | None]) -> None:
        self._app = app
        self._find = _login_user if isinstance(given, str) else given
        self.__module__, self.__qualname__ = self._find.__module__, getattr(self._find, "__qualname__", repr(given))

    def __call__(self) -> Mapping[str, str] | None:
        user: Any = self._find() if is_current(self._app) else None
        return None if user is None else {USER: user}


def _login_user() -> str | None:
    if not has_request_context():
        return None
    user: Any = importlib.import_module("flask_login").current_user
    return user.get_id() if user and user.is_authenticated else None
