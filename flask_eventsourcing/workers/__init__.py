"""What the adapters for task queues share: a process's app, the unit of work of a task, sending after the commit."""

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
"""A Flask app, a Pyramid application, or what ``EventSourcing`` of ``contrib.zope`` makes; or a function for one."""
StateSlot = ApplicationSlot[SiteState]

CONFLICT_RETRIES = 10
"""How often a task is sent again after a conflict, unless told otherwise."""


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

    :raises ConfigurationError: when what it returns is no Flask app, nor another site.
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
    # Where events are apart, what was saved so far is stored.
    if unit is not None and unit.awaits_commit:
        # What is in force now, as the commit may come when the event is handled no more that it belongs to.
        with_metadata = kept_for_later(carried())(send)
        unit.on_commit(Sending(description, with_metadata))
    else:
        send()


CARRIED = "flask_eventsourcing_metadata"
"""Where a task has the metadata that were in force when it was sent."""


def carried() -> dict[str, str]:
    """Return the metadata for a task that is sent now; empty if metadata are not stored."""
    state = find_current_site()
    return get_metadata_from_context() if state is None else state.metadata_to_carry()


def received(found: Any, task_id: str | None = None) -> MetadataBlock:
    """Return a context with the metadata that came with a task; invalid ones are ignored.

    What the task leaves in the context ends with it.

    :param task_id: what the task and its retries have in common: their correlation if no other came with it.
    """
    try:
        known = checked({} if found is None else found)
    except EventMetadataError:
        known = {}
    if not fits_column(known.get(CORRELATION_ID, "")):
        known[CORRELATION_ID] = task_id if task_id and is_correlation(task_id) else new_id()
    return brought_along(known)


def run_after_task(state: SiteState, body: Callable[[], Any], retries: int, found: Any, task_id: str | None) -> Any:
    """Run what a queue calls when a task has ended, in a context and a unit of work, with the task's metadata.

    :param retries: how often it is run again after a conflict, at most.
    :param found: the metadata that came with the task.
    :param task_id: what the task and its retries have in common.
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
