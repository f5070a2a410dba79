"""Celery: every task has an application context and a unit of work. Tasks can be sent after the commit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from celery import Celery, Task, current_task, signals
from celery import current_app as current_celery_app
from celery.app.registry import TaskRegistry
from celery.app.task import Context
from celery.canvas import Signature
from celery.result import AsyncResult, GroupResult
from eventsourcing.persistence import IntegrityError
from kombu.serialization import dumps

from .._patches import task_attribute, task_registry_class
from ..applications.known_sites import SiteState, current_site, find_current_site
from ..exceptions import ConfigurationError
from ..metadata import CORRELATION_ID, get_metadata_from_context
from ..uow import Run
from . import (
    CARRIED,
    CONFLICT_RETRIES,
    FlaskAppOrFactory,
    StateSlot,
    after_commit,
    carried,
    check_retries,
    describe,
    pause,
    received,
    run_after_task,
    state_slot,
    task_unit,
)

LONGEST_PAUSE = 5.0
"""The longest pause before a task is tried again after a conflict, in seconds."""

logger: logging.Logger = logging.getLogger(__name__)

_MARK = "_flask_eventsourcing"


def init_celery(
    celery_app: Celery, flask_app_or_factory: FlaskAppOrFactory, *, conflict_retries: int = CONFLICT_RETRIES
) -> None:
    """Give every task of a Celery app an application context and a unit of work of its own.

    Call it once, where the Celery app is made. It applies to all tasks, registered before or after the call, with any
    base class. The unit of work is committed before the task counts as done. It is rolled back if the task raises,
    also ``Retry``, ``Ignore`` or ``Reject``.

    :param celery_app: the Celery app.
    :param flask_app_or_factory: the Flask app, or a function that makes it, which is called once in each process that
        runs tasks; instead of a Flask app also a Pyramid application, or an ``EventSourcing`` of ``contrib.zope``.
    :param conflict_retries: after a conflict Celery retries a task as long as ``request.retries`` is below this number;
        ``@celery_app.task(conflict_retries=…)`` sets it for one task.
    :raises ConfigurationError: when an argument cannot be used, or the Celery app has been initialised already.
    :raises NotInitializedError: when the Flask app is one without ``es.init_app(app)``.
    """
    if not isinstance(celery_app, Celery):
        raise ConfigurationError(f"init_celery takes a Celery app first; found {celery_app!r}.")
    if isinstance(celery_app._tasks, _UnitTasks):
        raise ConfigurationError(
            f"init_celery was called for the Celery app {celery_app.main!r} already. If a function makes several Flask "
            "apps, pass that function, once, where you make the Celery app: init_celery(celery_app, create_app)."
        )
    check_retries(conflict_retries)
    slot = state_slot(flask_app_or_factory, "init_celery")
    _Worker(celery_app, slot, conflict_retries).install()


class _UnitTasks(TaskRegistry):
    """Makes tasks run in a unit of work as they are registered."""

    worker: _Worker

    def __setitem__(self, name: str, task: Any) -> None:
        self.worker.wrap(task)
        super().__setitem__(name, task)


class _Worker:
    """Runs the tasks of one Celery app in units of work."""

    def __init__(self, celery_app: Celery, slot: StateSlot, conflict_retries: int) -> None:
        self.celery_app = celery_app
        self.slot = slot
        self.conflict_retries = conflict_retries

    def install(self) -> None:
        """Wrap the tasks that are registered, and those that will be.

        A common base class would miss the tasks that have another one, so the registry is extended.
        """
        tasks = self.celery_app._tasks
        for task in tasks.values():
            self.wrap(task)
        task_registry_class(tasks, type("UnitTasks", (_UnitTasks, type(tasks)), {"worker": self}))
        signals.before_task_publish.connect(carry)
        # The signals have weak references. The registry's class keeps this object alive.
        signals.worker_process_init.connect(self.construct)
        signals.worker_process_shutdown.connect(self.close)
        signals.worker_shutdown.connect(self.close)

    def construct(self, **_: Any) -> None:
        """Construct the applications of a worker's process; if it fails, Celery logs it and the first task tries."""
        # The worker in this process may belong to another Celery app.
        if current_celery_app._get_current_object() is self.celery_app:
            constructed = ", ".join(cls.__qualname__ for cls in self.slot.get().applications)
            logger.info("Constructed %s in process %d.", constructed, os.getpid())

    def close(self, **_: Any) -> None:
        """Close the applications of a process that ends."""
        self.slot.close()

    def wrap(self, task: Any) -> None:
        """Make a task run in a unit of work."""
        if _MARK in vars(task):
            return
        if type(task).run is Task.run:
            raise ConfigurationError(
                f"The task {task.name} has no run() to call in a unit of work: rename its __call__() to run()."
            )
        check_retries(getattr(task, "conflict_retries", self.conflict_retries))
        # Celery's autoretry stays outside, so that it sees errors of the commit, after the rollback.
        attribute = "_orig_run" if hasattr(task, "_orig_run") else "run"
        task_attribute(task, attribute, self._in_unit(task, getattr(task, attribute)))
        task_attribute(task, _MARK, True)

    def _in_unit(self, task: Any, body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def run(*args: Any, **kwargs: Any) -> Any:
            ended = _ended(task, args)
            if ended is not None and find_current_site(last=False) is None:
                return self._run_after(ended, task, lambda: body(*args, **kwargs))
            request = _request(task)
            # A task that is called as a function is a function: it runs in the caller's context.
            if request is None or hasattr(request, _MARK):
                return body(*args, **kwargs)
            task_attribute(request, _MARK, True)
            return self._run(task, request, lambda: body(*args, **kwargs))

        return run

    def _run(self, task: Any, request: Any, body: Callable[[], Any]) -> Any:
        state = self._state(request)
        retries = getattr(task, "conflict_retries", self.conflict_retries)
        if request.is_eager:
            # Celery sends no signal for it. A worker would get the metadata in force where it is sent.
            found = brought(request) or carried()
            # Celery would raise Retry to the caller when task_eager_propagates is set.
            with received(found, request.root_id or request.id), state.host.context():
                return state.host.retry(body, retries, lenient=True)
        run = Run(lenient=True)
        try:
            with received(brought(request), request.root_id or request.id), task_unit(state, run):
                return body()
        except IntegrityError as error:
            if run.has_committed or request.retries >= retries:
                raise
            try:
                return task.retry(exc=error, countdown=pause(request.retries, LONGEST_PAUSE), max_retries=retries)
            finally:
                # retry() leaves it set for Celery's autoretry, which has a limit of its own.
                vars(task).pop("override_max_retries", None)

    def _run_after(self, ended: Any, task: Any, body: Callable[[], Any]) -> Any:
        retries = getattr(task, "conflict_retries", self.conflict_retries)
        return run_after_task(self.slot.get(), body, retries, brought(ended), ended.root_id or ended.id)

    def _state(self, request: Any) -> SiteState:
        current = find_current_site(last=False) if request.is_eager else None
        return self.slot.get() if current is None else current


def carry(headers: Any = None, **_: Any) -> None:
    """Give a task that is sent the metadata in force, in its headers."""
    if not isinstance(headers, dict) or CARRIED in headers:
        return
    found, request = carried(), current_task.request if current_task else None
    if request is not None and _has_ended(request):
        # A request that the process keeps, as that of Pyramid's bootstrap(), is not the task's.
        found = get_metadata_from_context()
    if request is not None and CORRELATION_ID not in found:
        found = brought(request) or found
    if found:
        headers[CARRIED] = found


def _has_ended(request: Any) -> bool:
    """Whether the worker itself sends another try of a task, or the next of a chain: the unit of work has ended."""
    is_own = hasattr(request, _MARK) and not request.is_eager
    return is_own and CORRELATION_ID not in get_metadata_from_context()


def brought(request: Any) -> Any:
    """Return the metadata in the headers of a task that is run."""
    return (getattr(request, "headers", None) or {}).get(CARRIED) or getattr(request, CARRIED, None)


def _request(task: Any) -> Any:
    """Return the request of a worker, or of eager mode, or None if the task is called as a function."""
    # Before Celery 5.5, a user's __call__ that calls super() adds a request that looks like that of a function call.
    return next((request for request in reversed(task.request_stack.stack) if not request.called_directly), None)


def _ended(task: Any, args: tuple[Any, ...]) -> Any:
    """Return the request after which Celery calls this task as a function, as it does for errbacks, or None.

    An errback of a bound task, or with one parameter, is sent as a task.
    """
    latest = task.request_stack.top
    if latest is not None and not latest.called_directly:
        return None
    if args and isinstance(args[0], Context):
        return args[0]
    ended = task.app.current_worker_task
    return None if ended is None else ended.request


def send_after_commit(task: Any, /, *args: Any, **kwargs: Any) -> AsyncResult | GroupResult:
    """Send a task after the work so far in ``db.session`` is committed, and never if it is rolled back.

    :param task: a Celery task, or a signature where there are options: ``task.s(1).set(queue="mail", countdown=60)``.
    :param args: arguments of the task.
    :param kwargs: arguments of the task.
    :return: its ``AsyncResult``, or ``GroupResult``, with the id that the task will have.
    :raises TypeError: when it is neither, or the arguments do not fit.
    :raises kombu.exceptions.EncodeError: when the arguments cannot be serialised.
    :raises NotInitializedError: outside an application context.

    If a savepoint is rolled back, its tasks are not sent. If nothing has to be committed, the task is sent at once. If
    the broker fails after the commit, this is logged, and the commit still succeeds.
    """
    if isinstance(task, Signature):
        signature = task.clone(args, kwargs)
    elif isinstance(task, Task):
        signature = task.signature(args, kwargs)
    else:
        raise TypeError(f"send_after_commit takes a Celery task or a signature; found {task!r}.")
    description = _checked(signature)
    current_site()
    result = signature.freeze()
    after_commit(signature.apply_async, description)
    return result


def _checked(signature: Any) -> str:
    """Describe a signature for the log. Arguments that apply_async() would refuse are refused now."""
    app = signature.app
    task = app.tasks.get(signature.task) if type(signature) is Signature else None
    if task is None:
        dumps(dict(signature), serializer=app.conf.task_serializer)
        return f"the task {signature.task}"
    if task.typing and hasattr(task, "__header__"):
        task.__header__(*signature.args, **signature.kwargs)
    if getattr(task, "_dump_pydantic_arguments", None) is None:
        serializer = signature.options.get("serializer") or task.serializer
        dumps((signature.args, signature.kwargs), serializer=serializer or app.conf.task_serializer)
    return "the task " + describe(task.name, task.run, signature.args, signature.kwargs)
