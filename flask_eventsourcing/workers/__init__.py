"""What the adapters for task queues share: a process's app, the unit of work of a task, sending after the commit."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flask import Flask, current_app, has_app_context
from sqlalchemy import orm

from ..exceptions import ConfigurationError, EventMetadataError, NotInitializedError
from ..failures import Logged
from ..lifecycle import ApplicationSlot
from ..metadata import MetadataBlock, get_metadata_from_context, put_metadata_in_context, set_metadata_in_context
from ..uow import Run
from ..web.request_metadata import metadata_to_carry
from ..web.state import EXTENSION, EventSourcingState, current_state, state_of

FlaskAppOrFactory = Flask | Callable[[], Flask]
StateSlot = ApplicationSlot[EventSourcingState]

CONFLICT_RETRIES = 10
"""How often a task is sent again after a conflict, unless told otherwise."""

logger: logging.Logger = logging.getLogger(__name__)


def state_slot(flask_app_or_factory: Any, user: str) -> StateSlot:
    """Return the slot of a Flask app's state, made at the first use in each process.

    :param flask_app_or_factory: a Flask app, or a function without arguments that makes one.
    :param user: who wants it, for messages.
    :raises ConfigurationError: when it is neither.
    :raises NotInitializedError: when it is an app without ``es.init_app(app)``.
    """
    if isinstance(flask_app_or_factory, Flask):
        state = state_of(flask_app_or_factory)
        return ApplicationSlot(lambda: state)
    if not callable(flask_app_or_factory):
        raise ConfigurationError(
            f"{user} takes a Flask app or a function that makes one; found {flask_app_or_factory!r}."
        )
    return ApplicationSlot(lambda: state_of(made_app(flask_app_or_factory, user)))


def made_app(factory: Callable[[], Any], user: str) -> Flask:
    """Call an application factory.

    :raises ConfigurationError: when what it returns is no Flask app.
    """
    app = factory()
    if not isinstance(app, Flask):
        raise ConfigurationError(f"{user} takes a function that returns a Flask app; {factory!r} returned {app!r}.")
    return app


def check_retries(retries: Any) -> None:
    """Check a number of retries.

    :raises ConfigurationError: when it is not a whole number from 0 up.
    """
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ConfigurationError(f"conflict_retries is a whole number from 0 up; found {retries!r}.")


def pause(retries: int, longest: float) -> float:
    """Return the seconds to wait before a retry: random, and more for the later ones."""
    return random.uniform(0, min(longest, 0.05 * 2.0**retries))  # noqa: S311


@contextmanager
def task_unit(state: EventSourcingState, run: Run | None = None) -> Iterator[orm.Session]:
    """An application context and a unit of work of its own for one task.

    It is committed at the end, and rolled back on an error. The task may commit and roll back itself.

    :param run: tells whether the task has committed itself, so that it must not be run again as a whole.
    """
    run = run or Run(lenient=True)
    with state.host.context(), state.host.transaction(queueing=True, run=run) as session:
        yield session


@dataclass(frozen=True, eq=False)
class Sending:
    """A task that is sent once its cause is committed."""

    description: str
    send: Callable[[], object]

    def __call__(self) -> None:
        """Send it."""
        # The events are committed: the caller of commit() must not take that for a failure.
        with Logged(
            logger,
            "The commit succeeded, and then %s could not be sent. It is not sent again: what must never be lost "
            "belongs in a projection of the events, which goes on where it was.",
            self.description,
        ):
            self.send()

    def __repr__(self) -> str:
        return self.description


def after_commit(send: Callable[[], object], description: str) -> None:
    """Call *send* once what was done so far in ``db.session`` is committed, and never if that is rolled back.

    When nothing waits for a commit it is called at once, and its errors are raised.

    :raises NotInitializedError: outside an application context.
    """
    unit = current_state().host.unit()
    if unit is None:
        raise NotInitializedError
    if unit.awaits_commit:
        # What is in force now, as the commit may come when the event is handled no more that it belongs to.
        with_metadata = set_metadata_in_context(carried())(send)
        unit.on_commit(Sending(description, with_metadata))
    else:
        send()


CARRIED = "flask_eventsourcing_metadata"
"""Where a task has the metadata that were in force when it was sent."""


def carried() -> dict[str, str]:
    """Return the metadata that a task which is sent now is to have; none where none are stored."""
    if not has_app_context() or EXTENSION not in current_app.extensions:
        return get_metadata_from_context()
    state = current_state()
    return {} if state.config.metadata is False else metadata_to_carry(state.app)


def received(found: Any) -> MetadataBlock:
    """Return a block with the metadata that a task has brought; what is none is left out."""
    try:
        return put_metadata_in_context(found if isinstance(found, Mapping) else {})
    except EventMetadataError:
        return put_metadata_in_context({})


def describe(name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return a call as text, with the names of its arguments and not their values, which may be confidential."""
    try:
        names = list(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        names = [f"{len(args)} arguments"] * bool(args) + list(kwargs)
    return f"{name}({', '.join(names)})"
