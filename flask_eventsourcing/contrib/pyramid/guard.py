"""A tween over that of pyramid_tm: no client is told "done" for events that are not stored."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pyramid.registry import Registry

from ...exceptions import FlaskEventSourcingError, RollbackOnlyError, UncommittedEventsError
from ...failures import OnError
from ...uow import Batch, describe
from .pyramid_host import DOOMED, DROPPED, SESSIONS, is_managed
from .site_state import KEY, EventSourcing

try:
    from pyramid_retry import is_error_retryable
except ImportError:  # nobody tries again without it

    def is_error_retryable(request: Any, error: Any) -> bool:
        """Return False."""
        return False


logger: logging.Logger = logging.getLogger(__name__)

FAILURE = 400
"""The lowest HTTP status that tells the client that the request was not carried out."""


def guard_tween_factory(handler: Callable[[Any], Any], registry: Registry) -> Callable[[Any], Any]:
    """Make the tween."""

    def guard_tween(request: Any) -> Any:
        state: EventSourcing | None = registry.get(KEY)
        if state is None or is_managed(request):
            # Somebody around the request decides, as functional tests do.
            return handler(request)
        for key in (DOOMED, DROPPED, SESSIONS):
            request.environ.pop(key, None)
        # What is raised is a failure by itself; what nobody commits must not stay in the session.
        with OnError(lambda _: state.drop_pending()):
            response = handler(request)
        error = find_error(state, request, response)
        return response if error is None else answer_with(request, error)

    return guard_tween


def answer_with(request: Any, error: Exception) -> Any:
    """Return the response of the exception view for an error, or raise the error where there is none."""
    try:
        raise error
    except FlaskEventSourcingError:
        return request.invoke_exception_view(sys.exc_info(), reraise=True)


def find_error(state: EventSourcing, request: Any, response: Any) -> FlaskEventSourcingError | None:
    """Return the error for an answer that would say "done" wrongly, or None."""
    pending = state.drop_pending()
    if pending:
        return _unmanaged(state, pending, response)
    if response.status_code >= FAILURE or response.headers.get("x-tm") is not None:
        return None
    if request.environ.get(DOOMED):
        return RollbackOnlyError(
            "A unit of work in this request failed, and its error was caught, so that the transaction was aborted: let "
            "the error pass, or use a savepoint."
        )
    error = getattr(request, "exception", None)
    dropped = request.environ.get(DROPPED)
    if not dropped or error is None or is_error_retryable(request, error):
        return None
    return _behind_view(dropped, error, response)


def _unmanaged(state: EventSourcing, batches: Sequence[Batch], response: Any) -> FlaskEventSourcingError | None:
    message = (
        f"{describe(batches)} saved with no active transaction manager and neither committed nor rolled back when the "
        "request was answered: let pyramid_tm manage the request, or commit with 'with request.tm:'."
    )
    state.discard(batches)
    if response.status_code >= FAILURE:
        logger.warning("%s The client was told of a failure: %s.", message, response.status)
        return None
    logger.error("%s The client is told 500 instead of %s.", message, response.status)
    return UncommittedEventsError(message)


def _behind_view(batches: Sequence[Batch], error: BaseException, response: Any) -> FlaskEventSourcingError | None:
    message = (
        f"{describe(batches)} rolled back, as the view raised {type(error).__name__} and pyramid_tm has no commit veto "
        f"to ask, and the exception view answered {response.status}"
    )
    if response.status_code >= 300:
        # To raise a redirect aborts, as it does for rows.
        logger.warning("%s: return the redirect if the events are to be stored.", message)
        return None
    return UncommittedEventsError(f"{message}: let it answer a failure.")
