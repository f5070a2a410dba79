"""A tween over that of pyramid_tm, so that no client is told "done" for events that are not stored."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import GeneratorType, NoneType
from typing import Any

from pyramid.registry import Registry

from ...exceptions import FlaskEventSourcingError, RollbackOnlyError, UncommittedEventsError
from ...metadata import enter_request, kept_for_later, leave_request
from ...uow import Batch, describe
from .pyramid_host import DOOMED, DROPPED, SESSIONS, Subrequest, is_managed, is_run_again, is_within_another, of_request
from .site_state import KEY, EventSourcing

VETOED: tuple[type, ...] = (NoneType,)
"""The reasons of rollbacks that no error has caused."""
try:
    from pyramid_tm import AbortWithResponse
except ImportError:  # nobody aborts with it
    pass
else:
    VETOED = (NoneType, AbortWithResponse)

logger: logging.Logger = logging.getLogger(__name__)

FAILURE = 400
"""The lowest HTTP status that tells the client that the request was not carried out."""


def guard_tween_factory(handler: Callable[[Any], Any], registry: Registry) -> Callable[[Any], Any]:
    """Make the tween.

    ``includeme()`` adds it. Name it above pyramid_tm's in ``pyramid.tweens`` if your settings list every tween.
    """

    def guard_tween(request: Any) -> Any:
        enter_request(request)
        try:
            response = answer(request)
            _give_metadata(response)
            return response
        finally:
            leave_request(request)

    def answer(request: Any) -> Any:
        state: EventSourcing | None = registry.get(KEY)
        if state is None or is_managed(request):
            # The caller of the request decides, such as a functional test.
            return handler(request)
        if not (SESSIONS in request.environ or is_within_another(request)):
            # Events that are left in a session of this thread were saved after the answer to an earlier request.
            state.finish(request)
        early = state.drop_pending()
        for key in (DOOMED, DROPPED):
            request.environ.pop(key, None)
        request.environ[SESSIONS] = {}
        if early:
            return answer_with(request, _early(state, early))
        # The client gets the error, and events that no code commits must not stay in the session.
        with ExitStack() as failed:
            failed.callback(state.drop_pending)
            response = handler(request)
            failed.pop_all()
        error = find_error(state, request, response)
        # Called last, because the other callbacks may save as well.
        request.add_finished_callback(state.finish)
        return response if error is None else answer_with(request, error)

    return guard_tween


def _give_metadata(response: Any) -> None:
    """Run a body that is a generator with the metadata of the request, and keep its metadata from other code."""
    body = getattr(response, "app_iter", None)
    if not isinstance(body, GeneratorType):
        return
    length = getattr(response, "content_length", None)
    response.app_iter = kept_for_later(of_request())(lambda: body)()
    if length is not None:
        # WebOb removes the length together with the body.
        response.content_length = length


def answer_with(request: Any, error: Exception) -> Any:
    """Return the response of the exception view for an error, or raise the error where there is none."""
    try:
        raise error
    except FlaskEventSourcingError:
        return request.invoke_exception_view(sys.exc_info(), reraise=True)


def find_error(state: EventSourcing, request: Any, response: Any) -> FlaskEventSourcingError | None:
    """Return the error for a response that would tell a success although events are not stored, or None."""
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
    dropped = request.environ.pop(DROPPED, None)
    error = getattr(request, "exception", None)
    if not dropped or is_run_again(request, error):
        return None
    return _dropped([batch for batches, _ in dropped for batch in batches], dropped[0][1], error, response)


def _dropped(batches: Sequence[Batch], kind: type, error: Any, response: Any) -> FlaskEventSourcingError | None:
    if kind is Subrequest:
        return UncommittedEventsError(
            f"{describe(batches)} rolled back because a subrequest began a transaction with the same manager: set "
            "tm.manager_hook = pyramid_tm.explicit_manager."
        )
    if not issubclass(kind, VETOED):
        return _behind_view(batches, f"the transaction was aborted for {kind.__name__}", response)
    # By a commit veto, which is the host's rule, or by an exception view without one.
    reason = f"the view raised {type(error).__name__} and pyramid_tm has no commit veto to ask"
    return None if error is None else _behind_view(batches, reason, response)


def _early(state: EventSourcing, batches: Sequence[Batch]) -> FlaskEventSourcingError:
    message = (
        f"{describe(batches)} saved before pyramid_tm began the transaction of the request, and would be lost: commit "
        "with 'with request.tm:', or save in a tween under that of pyramid_tm."
    )
    state.discard(batches)
    logger.error("%s The client is told 500.", message)
    return UncommittedEventsError(message)


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


def _behind_view(batches: Sequence[Batch], reason: str, response: Any) -> FlaskEventSourcingError | None:
    message = f"{describe(batches)} rolled back because {reason}, but the response was {response.status}"
    if response.status_code >= 300:
        # A redirect that is raised aborts the transaction, for rows too.
        logger.warning("%s: return the redirect instead of raising it, to store the events.", message)
        return None
    return UncommittedEventsError(f"{message}: respond with a 4xx or 5xx status instead.")
