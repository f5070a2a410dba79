"""The common part of the adapters for task queues: the app of a process, units of work, sending after the commit."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from sqlalchemy import orm

from ..applications.apart import ApartHost
from ..applications.known_sites import SiteState, current_site, find_current_site, site_of, working_for
from ..exceptions import ConfigurationError, EventMetadataError, NotInitializedError
from ..lifecycle import ApplicationSlot, HostSlot
from ..metadata import (
    CORRELATION_ID,
    MetadataBlock,
    brought_along,
    checked,
    get_metadata_from_context,
    kept_for_later,
    new_id,
)
from ..metadata.values import fits_column, is_correlation
from ..uow import Run

if TYPE_CHECKING:
    from flask import Flask

FlaskAppOrFactory: TypeAlias = "Flask | SiteState | Callable[..., Any]"
"""A Flask app, a Pyramid application, or an ``EventSourcing`` of ``contrib.zope``; or a function that returns one."""
StateSlot = ApplicationSlot[SiteState]

CONFLICT_RETRIES = 10
"""By default, how often a task is sent again after a conflict."""


def state_slot(flask_app_or_factory: Any, user: str) -> StateSlot:
    """Return the slot of a site's state, made at the first use in each process.

    :param flask_app_or_factory: a Flask app or another site, or a function without arguments that makes one.
    :param user: the caller, as messages name it.
    :raises ConfigurationError: when it is neither.
    :raises NotInitializedError: when it is an app without ``es.init_app(app)``.
    """
    state = site_of(flask_app_or_factory)
    if state is not None:
        return HostSlot(lambda: state)
    if not callable(flask_app_or_factory):
        raise ConfigurationError(
            f"{user} takes a Flask app or a function that makes one; found {flask_app_or_factory!r}."
        )
    return HostSlot(lambda: made_state(flask_app_or_factory, user))


def made_state(factory: Callable[[], Any], user: str) -> SiteState:
    """Call an application factory, and return the state of what it makes.

    :raises ConfigurationError: when it returns neither a Flask app nor another site.
    """
    app = factory()
    state = site_of(app)
    if state is None:
        raise ConfigurationError(f"{user} takes a function that returns a Flask app; {factory!r} returned {app!r}.")
    return state


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
def task_unit(state: SiteState, run: Run | None = None) -> Iterator[orm.Session]:
    """The context of one task: the host's context, in Flask an application context, and a unit of work.

    The unit is committed at the end, and rolled back on error. The task may also commit and roll back.

    :param run: notes whether the task has committed; then it must not be run again.
    """
    run = run or Run(lenient=True)
    with working_for(state), state.host.context(), state.host.transaction(queueing=True, run=run) as session:
        yield session


@dataclass(frozen=True, eq=False)
class Sending:
    """A task that is sent after a commit."""

    remedy: ClassVar[str] = (
        "It could not be sent, and will not be sent again. Send what must never be lost from a projection of the "
        "events, which goes on where it stopped."
    )
    description: str
    send: Callable[[], object]

    def __call__(self) -> None:
        """Send it."""
        self.send()

    def __repr__(self) -> str:
        return self.description


def after_commit(send: Callable[[], object], description: str) -> None:
    """Call *send* after the work so far in ``db.session`` is committed, and never if it is rolled back.

    If nothing has to be committed, it is called at once, and its errors are raised.

    :raises NotInitializedError: outside an application context.
    """
    host = current_site().host
    unit = host.unit()
    if unit is None and not isinstance(host, ApartHost):
        raise NotInitializedError
    # If the events are apart, everything that was saved is stored already.
    if unit is not None and unit.awaits_commit:
        # The current metadata: at the commit, the event that is being handled now may be over.
        with_metadata = kept_for_later(carried())(send)
        unit.on_commit(Sending(description, with_metadata))
    else:
        send()


CARRIED = "flask_eventsourcing_metadata"
"""The key of the metadata that were in force when a task was sent."""


def carried() -> dict[str, str]:
    """Return the metadata for a task that is sent now; empty if metadata are not stored."""
    state = find_current_site()
    return get_metadata_from_context() if state is None else state.metadata_to_carry()


def received(found: Any, task_id: str | None = None) -> MetadataBlock:
    """Return a context with the metadata that came with a task; invalid ones are ignored.

    Metadata that the task leaves in the context end with the task.

    :param task_id: the id that the task and its retries share: their correlation, if no other came with the task.
    """
    try:
        known = checked({} if found is None else found)
    except EventMetadataError:
        known = {}
    if not fits_column(known.get(CORRELATION_ID, "")):
        known[CORRELATION_ID] = task_id if task_id and is_correlation(task_id) else new_id()
    return brought_along(known)


def run_after_task(state: SiteState, body: Callable[[], Any], retries: int, found: Any, task_id: str | None) -> Any:
    """Run a callback that a queue calls after a task, in a context and a unit of work, with the task's metadata.

    :param retries: how often it is run again after a conflict, at most.
    :param found: the metadata that came with the task.
    :param task_id: the id that the task and its retries share.
    """
    with received(found, task_id), working_for(state), state.host.context():
        return state.host.retry(body, retries, lenient=True)


def describe(name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Describe a call by the names of its arguments. Their values may be confidential."""
    try:
        names = list(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        names = [f"{len(args)} arguments"] * bool(args) + list(kwargs)
    return f"{name}({', '.join(names)})"
