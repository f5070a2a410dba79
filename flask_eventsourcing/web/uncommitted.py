"""The guard: no client is told "done" for events that are not stored."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flask import (
    Flask,
    Response,
    appcontext_pushed,
    appcontext_tearing_down,
    g,
    has_app_context,
    request,
    request_finished,
    request_started,
    request_tearing_down,
)
from sqlalchemy import orm
from werkzeug.exceptions import HTTPException, InternalServerError

from .._patches import finalize_request, handle_user_exception
from ..exceptions import UncommittedEventsError
from ..metadata import enter_request, finish_request, leave_request
from ..persistence.forks import leave_inherited_connections
from ..uow import AfterCommit, Batch, UnitOfWork, commit, describe, roll_back
from .request_metadata import answer_in_steps, request_context
from .sessions import ENDED, LEFT
from .state import EventSourcingState, discard, state_of

FAILURE = 400
"""The lowest HTTP status that tells the client that the request was not carried out."""
ENVIRON = "flask_eventsourcing.answer"
"""The key in the WSGI environment of a request of its :class:`Answer`."""
CONTEXT = "_flask_eventsourcing_answer"
"""The attribute of ``flask.g`` with the :class:`Answer` of the context's outermost request."""
IN_SAVEPOINT = (
    "EVENTSOURCING_COMMIT = 'save' commits nothing within a savepoint or a transaction that you began: end it, and "
    "call db.session.commit()"
)
IN_ANSWER = {
    "explicit": "call db.session.commit() or .rollback() before the end, or set EVENTSOURCING_COMMIT to 'request' or "
    "'save'",
    "request": "EVENTSOURCING_COMMIT = 'request' commits db.session alone, and after a view that has returned: commit "
    "a session of your own yourself",
    "save": IN_SAVEPOINT,
}
AT_END = {
    "explicit": "call db.session.commit() or .rollback() before the end, or set EVENTSOURCING_COMMIT to 'save'",
    "request": "EVENTSOURCING_COMMIT = 'request' commits after a view that has returned, and not here: call "
    "db.session.commit()",
    "save": IN_SAVEPOINT,
}
"""The remedies by commit mode: if an answer can still be changed, and if not."""


@dataclass(eq=False)
class Answer:
    """The state of a request until its answer can no longer change.

    :param outer: the answer of the request in whose view this request was made, for example with a test client.
    :param inner: whether this request uses the transaction of the outer one, which then commits it or rolls it back.
    :param before: what was pending when it began.
    :param context: returns the context of Flask's in which it began.
    """

    outer: Answer | None
    inner: bool
    before: Sequence[Batch]
    context: Callable[[], object]
    dropped: list[str] = field(default_factory=list)
    """Events that were lost in other code while the request was answered."""
    rolled_back: list[str] = field(default_factory=list)
    """Events that were rolled back because of the status that a function has returned."""
    lent: dict[orm.Session, None] = field(default_factory=dict)
    """Sessions of the user's own that were current in a nested context."""
    over: bool = False


_answers: ContextVar[Answer | None] = ContextVar("answer", default=None)


def unanswered() -> Answer | None:
    """Return the innermost request that is not answered yet."""
    return _not_over(_answers.get())


def _answered_here() -> Answer | None:
    """Return the same, or the request in whose copied context something was done, which another thread answers."""
    return unanswered() or (_not_over(g.get(CONTEXT)) if has_app_context() else None)


def _not_over(answer: Answer | None) -> Answer | None:
    while answer is not None and answer.over:
        answer = answer.outer
    return answer


def install(state: EventSourcingState) -> None:
    """Check each answer when it can no longer change, and the end of each application context.

    :raises AssertionError: from Flask, when the app has handled a request already; nothing was installed then.
    """
    if state.apart is not None:
        # No event is ever uncommitted.
        return
    app = state.app
    app.teardown_appcontext(partial(_check_end, app))
    functions = app.teardown_appcontext_funcs
    # Teardown functions run from the last to the first: this one just before the sessions are closed.
    closing = [n for n, each in enumerate(functions) if str(each.__module__).startswith("flask_sqlalchemy")]
    functions.insert(max(closing, default=len(functions) - 2) + 1, functions.pop())


def connect(state: EventSourcingState) -> None:
    """Connect the signals. This cannot fail, and cannot be undone."""
    app = state.app
    request_started.connect(_begin_request, app)
    request_finished.connect(_answered, app)
    request_tearing_down.connect(_end_request, app)
    if state.apart is not None:
        return
    request_started.connect(_begin_answer, app)
    appcontext_pushed.connect(_begin_context, app)
    appcontext_tearing_down.connect(_end_context, app)
    finalize_request(app, partial(_finalize, app, app.finalize_request))
    if state.config.commit == "request":
        handle_user_exception(app, partial(_handle, state, app.handle_user_exception))


def _begin_request(_: Flask, **__: object) -> None:
    leave_inherited_connections()
    # Not by its environment, which a view may have passed to another request.
    enter_request(request_context())


def _answered(_: Flask, response: Response, **__: object) -> None:
    # A stream may keep the request's context to its end, and a test client while the test puts blocks of its own around
    # the next one.
    end = leave_request if answer_in_steps(response) else finish_request
    end(request_context())


def _begin_answer(app: Flask, **_: object) -> None:
    first: Answer | None = g.get(CONTEXT)
    alone = first is None or first.over
    session = None if alone else state_of(app).host.database.open_session()
    inner = session is not None and session.in_transaction()
    before = [batch for unit in state_of(app).open_units() for batch in unit.batches] if inner else []
    answer = Answer(unanswered(), inner, before, weakref.ref(request_context()))
    request.environ[ENVIRON] = answer
    if alone:
        g._flask_eventsourcing_answer = answer
    _answers.set(answer)


def _end_request(_: Flask, **__: object) -> None:
    """End a request whose error is raised to a test client: it has no answer, and no other request is within it.

    A copy of its context, for example in another thread, has an end of its own, which is not the end of the request.
    """
    context = request_context()
    leave_request(context)
    answer: Answer | None = request.environ.get(ENVIRON)
    if answer is None:
        return
    if answer.context() is context:
        answer.over = True
    elif CONTEXT not in g:
        # What the copy loses is to be told to the client too.
        g._flask_eventsourcing_answer = answer


def _begin_context(_: Flask, **__: object) -> None:
    g.pop(ENDED, None)


# ------------------------------------------------------------------------------------------------------- the answer


def _handle(state: EventSourcingState, handle: Callable[..., Any], *args: Any) -> Any:
    """Do what ``Flask.handle_user_exception()`` does, which may call an error handler that commits a row of its own."""
    error = args[-1]
    if not isinstance(error, HTTPException) or (_code_of(error) or 0) >= FAILURE:
        _roll_back_failed(state, f"the view raised {type(error).__name__}")
    return handle(*args)


def _code_of(error: HTTPException) -> int | None:
    """Return the status of an exception that is the answer, such as a redirect. Flask takes None for no failure."""
    return error.code if error.response is None else error.response.status_code


def _roll_back_failed(state: EventSourcingState, why: str) -> None:
    """Roll back what the view of a failed request has saved, unless the request around it decides about that."""
    answer = unanswered()
    if answer is None or answer.inner:
        return
    batches = _roll_back_all(state, ())
    if batches:
        answer.rolled_back.append(f"{describe(batches)} rolled back, as {why}.")


def _finalize(
    app: Flask, finalize: Callable[..., Response], *args: Any, from_error_handler: bool = False, again: bool = False
) -> Response:
    """Do what ``Flask.finalize_request()`` does, and then look: every function that might commit or save has run."""
    with ExitStack() as failed:
        if state_of(app).config.commit == "request":
            # As after an error in the view.
            failed.callback(_roll_back_failed, state_of(app), "an after_request function raised an error")
        response = finalize(*args, from_error_handler=from_error_handler)
        failed.pop_all()
    # A view may have passed its environment to another request, or app.
    answer = _not_over(request.environ.get(ENVIRON)) or Answer(None, inner=False, before=[], context=request_context)
    try:
        _look(state_of(app), answer, response, after_error=from_error_handler)
    except Exception as error:
        response.close()
        if from_error_handler:
            app.logger.exception("The client is told 500, as the request cannot be finished.")
            response = app.make_response(InternalServerError())
        elif again:
            raise
        else:
            # As for an error in the view: the user's error handlers see it, and without one it is raised for a 500.
            handle: Callable[..., Any] = app.handle_user_exception
            return _finalize(app, finalize, *args[:-1], handle(*args[:-1], error), again=True)
    answer.over = True
    return response


def _look(state: EventSourcingState, answer: Answer, response: Response, *, after_error: bool) -> None:
    """Commit or roll back, or refuse an answer that would not be true.

    :param after_error: whether an error that no handler has dealt with led to the answer.
    :raises UncommittedEventsError: when the client would be told "done" for events that are not stored.
    """
    done = response.status_code < FAILURE
    by_request = state.config.commit == "request"
    left = state.units_of(dict.fromkeys([*g.get(LEFT, ()), *answer.lent]))
    true = done and not after_error and not answer.dropped and not any(unit.batches for unit in left)
    if answer.inner:
        _leave_to_outer(state, answer, response)
    elif by_request and true:
        _commit(state)
    else:
        _drop_all(state, answer, response, left)
    dropped, answer.dropped = answer.dropped, []
    # A handler for the view's error may answer anything. A handler for every 500 does not know which error it answers.
    if after_error:
        dropped = [*dropped, *answer.rolled_back]
    if dropped and done:
        raise UncommittedEventsError(" ".join(dropped))
    for message in answer.rolled_back if done else ():
        state.app.logger.warning("%s The client was told of a success: %s.", message, response.status)


def _roll_back_all(state: EventSourcingState, left: Sequence[UnitOfWork]) -> list[Batch]:
    """Roll back the sessions with events, and in the mode ``request`` always the current session."""
    batches = _drop(dict.fromkeys([*state.open_units(), *left]))
    session = state.host.database.open_session() if state.config.commit == "request" else None
    if session is not None:
        roll_back(session)
    return batches


def _drop_all(state: EventSourcingState, answer: Answer, response: Response, left: Sequence[UnitOfWork]) -> None:
    batches = _roll_back_all(state, left)
    by_request = state.config.commit == "request"
    # A rollback by the extension after a failure is no mistake of the user's code.
    if batches and (response.status_code < FAILURE or not by_request):
        answer.dropped.append(_tell(state, batches, response))


def rolled_back(state: EventSourcingState, name: str, code: int) -> None:
    """Note that the pending events will be rolled back because of the status that a function has returned."""
    answer = unanswered()
    batches = [batch for unit in state.open_units() for batch in unit.batches]
    if answer is not None and batches:
        answer.rolled_back.append(
            f"{describe(batches)} rolled back, as {name} returned the status {code}; if it is no status, decorate it "
            "with status=False."
        )


def refuse_lost() -> None:
    """Keep a view's unit of work from being committed, as the client will be told of a failure.

    :raises UncommittedEventsError: when events were lost elsewhere while the request was answered.
    """
    answer = unanswered()
    if answer is not None and answer.dropped:
        dropped, answer.dropped = answer.dropped, []
        raise UncommittedEventsError(" ".join(dropped))


def _leave_to_outer(state: EventSourcingState, answer: Answer, response: Response) -> None:
    """Leave the transaction to the outer request, which uses it too, but do not let it commit what failed here."""
    if response.status_code < FAILURE:
        return
    for unit in state.open_units():
        if any(batch not in answer.before for batch in unit.batches):
            unit.refuse(f"A request within this one has saved events and then answered {response.status}")


def _commit(state: EventSourcingState) -> None:
    session = state.host.database.open_session()
    if session is None:
        return
    # After any error the worker may go on, with this session's connection in its pool.
    with ExitStack() as failed:
        failed.callback(roll_back, session)
        commit(state.host.unit_of(session))
        failed.pop_all()


def _tell(state: EventSourcingState, batches: Sequence[Batch], response: Response) -> str:
    remedy = IN_ANSWER[state.config.commit]
    message = f"{describe(batches)} neither committed nor rolled back when the view answered: {remedy}."
    if response.status_code < FAILURE:
        state.app.logger.error("%s The client is told 500 instead of %s.", message, response.status)
    else:
        state.app.logger.warning("%s The client was told of a failure: %s.", message, response.status)
    discard(state, batches)
    return message


# ---------------------------------------------------------------------------------------- the end of a context


def _check_end(app: Flask, error: BaseException | None) -> None:
    state = state_of(app)
    units = state.open_units()
    batches = _drop(units)
    for unit in units:
        _forget(state, unit, error)
    if not batches:
        return
    if error is None:
        lost(state, batches, "at the end of the application context")
    else:
        discard(state, batches)


def lost(state: EventSourcingState, batches: Sequence[Batch], when: str) -> None:
    """Report events that are not stored although no code asked for a rollback.

    They are logged, the signal is sent, and a request that is not answered yet gets another answer.
    """
    message = f"{describe(batches)} neither committed nor rolled back {when}, and nothing is stored"
    state.app.logger.error("%s: %s.", message, AT_END[state.config.commit])
    discard(state, batches)
    answer = _answered_here()
    if answer is not None:
        answer.dropped.append(f"{message}: {AT_END[state.config.commit]}.")


def lose(app: Flask, batches: Sequence[Batch]) -> None:
    """Report events whose session was closed."""
    lost(state_of(app), batches, "when their session was closed")


def _end_context(app: Flask, exc: BaseException | None = None, **_: object) -> None:
    """After all teardown functions: report events in a session that was opened after the first was closed."""
    _check_end(app, exc)
    answer = _answered_here()
    if answer is not None:
        answer.lent.update(g.get(LEFT, {}))
    state_of(app).host.database.drop_session()
    g._flask_eventsourcing_ended = True


def _forget(state: EventSourcingState, unit: UnitOfWork, error: BaseException | None) -> None:
    waiting = ", ".join(repr(item.function) for item in unit.pending.all(AfterCommit))
    if not waiting:
        return
    roll_back(unit.session)
    if error is None:
        state.app.logger.warning(
            "The application context has ended without a commit, and what waited for one is not done: %s; "
            "call db.session.commit() after you ask for it.",
            waiting,
        )


def _drop(units: Iterable[UnitOfWork]) -> list[Batch]:
    """Roll back the sessions of those units that have events, and return these."""
    found = [(unit, unit.batches) for unit in units]
    for unit, batches in found:
        if batches:
            roll_back(unit.session)
    return [batch for _, batches in found for batch in batches]
