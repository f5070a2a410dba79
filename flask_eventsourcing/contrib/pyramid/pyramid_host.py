"""A Pyramid application as a host: its requests, their sessions and transactions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyramid.threadlocal import get_current_request, manager
from sqlalchemy import orm

from ...exceptions import ConfigurationError
from ...metadata import TRACEPARENT, USER
from ...metadata.values import metadata_of_headers, trace_of_span
from ...persistence.dialects.event_tables import ConflictError
from ...uow import Batch
from ..zope.registered import of_thread
from ..zope.zope_host import ZopeHost

try:
    from pyramid_retry import is_error_retryable
except ImportError:  # nobody tries again without it

    def is_error_retryable(request: Any, error: Any) -> bool:
        """Return False."""
        return False


CONFLICTS = "flask_eventsourcing.conflicts"
"""The key in the WSGI environment of the conflicts of a request's earlier tries."""
DOOMED = "flask_eventsourcing.doomed"
"""The key that is set after a failed unit of work has doomed the transaction of the request."""
DROPPED = "flask_eventsourcing.dropped"
"""The key of the events that were rolled back after the view had answered, with the type of the error."""
SESSIONS = "flask_eventsourcing.sessions"
"""The key of the sessions of a request."""
KEPT = "flask_eventsourcing.metadata"
"""The key of the metadata that all saves of a request share."""
SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods of requests that change nothing, so that they need not queue for contended aggregates."""


class Subrequest:
    """Stands for the error when a subrequest has begun a transaction with the manager of the outer request."""


class PyramidHost(ZopeHost):
    """A Pyramid application, whose current request has the session and the transaction manager.

    Without a request, recorders commit by themselves, and units of work have sessions of the factory.

    :param session: the name of a request's attribute, a ``scoped_session``, or a function that takes the request.
    :param ended: called at the end of a request that no tween handles, such as that of a script.
    :param arguments: those of :class:`ZopeHost`.
    """

    def __init__(self, session: Any, *arguments: Any, ended: Callable[[Any], object], **further: Any) -> None:
        if not isinstance(session, str | orm.scoped_session) and not callable(session):
            raise ConfigurationError(
                f"session={session!r} must be the name of a request's attribute, a scoped_session, or a function that "
                "takes the request."
            )
        super().__init__(session, *arguments, **further)
        self._ended = ended

    def expected_manager(self) -> Any:
        """Return the manager of the current request."""
        return getattr(get_current_request(), "tm", None)

    def memory(self, manager: Any) -> dict[Any, Any]:
        """Return where the conflicts of a request are kept for its next try."""
        request = get_current_request()
        if request is None:
            return super().memory(manager)
        found: dict[Any, Any] = request.environ.setdefault(CONFLICTS, {})
        return found

    def committing(self, manager: Any) -> None:
        """Raise the conflict that an exception view has answered at the commit, if the request is run again.

        pyramid_retry discards that answer, and otherwise the work of the request would be committed twice.
        """
        request = get_current_request()
        error = getattr(request, "exception", None)
        if (
            isinstance(error, ConflictError)
            and of_thread(manager) is of_thread(self.expected_manager())
            and is_run_again(request, error)
        ):
            raise error

    def doomed(self) -> None:
        """Note that the response must not be a success."""
        request = get_current_request()
        if request is not None:
            request.environ[DOOMED] = True

    def dropped(self, batches: Sequence[Batch], session: orm.Session | None) -> None:
        """Note events that were rolled back at the end of their request, or by a subrequest, rather than by a view."""
        request = get_current_request()
        if request is None:
            return
        if not is_managed(request):
            request.environ.setdefault(DROPPED, []).append((batches, type(sys.exception())))
        elif session is not None and self._used_session() is not session:
            around = [each["request"].environ for each in manager.stack if each["request"] is not None]
            for environ in around:
                if environ.get(SESSIONS, {}).get(self) is session:
                    environ.setdefault(DROPPED, []).append((batches, Subrequest))

    def _may_be_repeated(self) -> bool:
        request = get_current_request()
        return request is not None and request.method not in SAFE and request.environ.get("retry.attempts", 1) > 1

    def _find(self, *, make: bool) -> orm.Session | None:
        request = get_current_request()
        if make and request is not None and SESSIONS not in request.environ:
            request.environ[SESSIONS] = {}
            if not is_managed(request) and not is_within_another(request):
                request.add_finished_callback(self._ended)
        if isinstance(self._session, orm.scoped_session):
            return super()._find(make=make)
        if request is None:
            return None
        sessions: dict[PyramidHost, orm.Session] = request.environ.get(SESSIONS, {})
        if not make:
            return sessions.get(self)
        found = self._session_of(request)
        sessions[self] = found
        return found

    def _session_of(self, request: Any) -> orm.Session:
        session: Any = self._session
        named = isinstance(session, str)
        found: Any = getattr(request, session, None) if named else session(request)
        if not isinstance(found, orm.Session):
            what, remedy = (
                (f"request.{session}", "include the module that sets it, or name another attribute")
                if named
                else (f"What {session!r} returns", "give a function that returns the session of the request")
            )
            raise ConfigurationError(
                f"{what} is {found!r}, not a session: {remedy} in config.add_eventsourcing(…, session=…)."
            )
        return found

    def _scope(self) -> object:
        if isinstance(self._session, orm.scoped_session):
            return super()._scope()
        return get_current_request()


def is_run_again(request: Any, error: Any) -> bool:
    """Whether pyramid_retry discards the answer to an error, and runs the request again."""
    return error is not None and bool(is_error_retryable(request, error))


def is_within_another(request: Any) -> bool:
    """Whether a request is a part of another one, whose transaction it may share."""
    return any(each["request"] not in (None, request) for each in manager.stack)


def is_managed(request: Any) -> bool:
    """Whether the request's transaction will be committed or aborted by its manager."""
    return "tm.active" in request.environ or "repoze.tm.active" in request.environ


def of_request() -> Mapping[str, str]:
    """Provide the correlation and the trace of the current request; a subrequest has those of the one around it."""
    current = get_current_request()
    if current is None:
        return {}
    found: Mapping[str, str] = {}
    for request in (each["request"] for each in manager.stack if each["request"] is not None):
        if request is not current and not (SESSIONS in request.environ or is_managed(request)):
            # The process keeps it, as that of ``bootstrap()``, and no client has sent it.
            continue
        if KEPT not in request.environ:
            request.environ[KEPT] = metadata_of_headers(request.headers, found)
        found = request.environ[KEPT]
    trace = trace_of_span()
    return found if trace is None else {**found, TRACEPARENT: trace}


def of_user() -> Mapping[str, str] | None:
    """Provide the user of the current request."""
    request = get_current_request()
    user = None if request is None else request.authenticated_userid
    return None if user is None else {USER: str(user)}
