"""Sees to it that no client is told "done" for events that are not stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from eventsourcing.persistence import Notification
from flask import Flask, Response, request_started

from ..exceptions import UncommittedEventsError
from ..persistence.forks import leave_inherited_connections
from ..uow import AfterCommit, Batch, UnitOfWork, commit, roll_back
from .state import EventSourcingState, discard, take_lost

FAILURE = 400
"""The lowest HTTP status that tells the client that the request was not carried out."""
NAMED = 5
REMEDY = "call db.session.commit() or .rollback() before the end, or set EVENTSOURCING_COMMIT to 'request' or 'save'"


def install(state: EventSourcingState) -> None:
    """Check each response, and the end of each application context, for uncommitted events.

    Functions that were registered later run earlier, so that the user's own ``after_request`` functions may still
    commit.
    """
    state.app.after_request(partial(_check_response, state))
    state.app.teardown_appcontext(partial(_check_end, state))
    request_started.connect(_begin_request, state.app)


def _begin_request(_: Flask, **__: object) -> None:
    leave_inherited_connections()


def _check_response(state: EventSourcingState, response: Response) -> Response:
    try:
        if state.config.commit == "request":
            _commit_or_roll_back(state, response)
        else:
            _refuse_uncommitted(state, response)
    except Exception as error:  # noqa: BLE001
        # As for an error in the view: the user's error handlers see it, and without one it is re-raised for a 500.
        return state.app.make_response(state.app.handle_user_exception(error))
    return response


def _commit_or_roll_back(state: EventSourcingState, response: Response) -> None:
    session = state.host.database.open_session()
    if session is None:
        return
    if response.status_code >= FAILURE:
        roll_back(session)
        return
    try:
        commit(state.host.unit_of(session))
    except BaseException:
        # The worker may go on after any error, with this session's connection in its pool.
        roll_back(session)
        raise


def _refuse_uncommitted(state: EventSourcingState, response: Response) -> None:
    unit = state.host.open_unit()
    batches = take_lost() + ([] if unit is None else _drop(unit))
    if not batches:
        return
    message = f"{_describe(batches)} neither committed nor rolled back when the view answered: {REMEDY}."
    if response.status_code >= FAILURE:
        state.app.logger.warning("%s The client was told of a failure: %s.", message, response.status)
        discard(state, batches)
        return
    state.app.logger.error("%s The client is told 500 instead of %s.", message, response.status)
    discard(state, batches)
    raise UncommittedEventsError(message)


def _check_end(state: EventSourcingState, error: BaseException | None) -> None:
    unit = state.host.open_unit()
    if unit is None:
        return
    if not unit.batches:
        _forget(state, unit, error)
        return
    batches = _drop(unit)
    if error is None:
        state.app.logger.error(
            "%s neither committed nor rolled back at the end of the application context, and nothing is stored: %s.",
            _describe(batches),
            REMEDY,
        )
    discard(state, batches)


def _forget(state: EventSourcingState, unit: UnitOfWork, error: BaseException | None) -> None:
    waiting = ", ".join(repr(item.function) for item in unit.pending.all(AfterCommit))
    if not waiting:
        return
    roll_back(unit.session)
    if error is None:
        state.app.logger.warning(
            "No commit came before the end of the application context, and what waited for one is not done: %s; "
            "call db.session.commit() after it.",
            waiting,
        )


def _drop(unit: UnitOfWork) -> list[Batch]:
    batches = unit.batches
    if batches:
        roll_back(unit.session)
    return batches


def _describe(batches: Sequence[Batch]) -> str:
    notifications = [notification for batch in batches for notification in batch.notifications]
    names = ", ".join(_name(notification) for notification in notifications[:NAMED])
    more = f" and {len(notifications) - NAMED} more" if len(notifications) > NAMED else ""
    applications = ", ".join(dict.fromkeys(batch.application_name for batch in batches))
    count = f"{len(notifications)} event{'s' if len(notifications) > 1 else ''}"
    return f"{count} of {applications} ({names}{more}) {'were' if len(notifications) > 1 else 'was'}"


def _name(notification: Notification) -> str:
    event_class = notification.topic.partition(":")[2]
    return f"{event_class} {notification.originator_id} version {notification.originator_version}"
