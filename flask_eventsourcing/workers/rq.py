"""RQ: every job has an application context and a unit of work. Jobs can be enqueued after the commit.

``flask_app`` is a class attribute, as RQ's own workers are configured by subclasses.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar
from uuid import uuid4

from eventsourcing.persistence import IntegrityError
from rq import Queue, Retry, SimpleWorker, Worker, get_current_job
from rq.job import Job
from rq.utils import import_attribute
from sqlalchemy import orm

from .._patches import job_callback, job_perform, queue_jobs
from ..applications.known_sites import current_site, site_of
from ..exceptions import ConfigurationError
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

LONGEST_PAUSE = 0.1
"""The longest pause before a job is enqueued again after a conflict, in seconds; the work-horse waits."""

FLASK_APP = "FLASK_APP"


class _UndoneError(Exception):
    """Leaves a unit of work that is to be rolled back."""


class EventSourcingWorkerMixin:
    """Gives every job of an RQ worker an application context and a unit of work of its own.

    Put it before a worker class of RQ: ``class MyWorker(EventSourcingWorkerMixin, SpawnWorker)``. The unit of work is
    committed before the job counts as finished, and rolled back when it raises or returns a ``Retry``.
    """

    flask_app: ClassVar[FlaskAppOrFactory | None] = None
    """The Flask app, or a function that makes it, which is called in each work-horse; instead of a Flask app also a
    Pyramid application, or an ``EventSourcing`` of ``contrib.zope``. Without it, the environment's
    ``FLASK_APP`` says which app it is, as for the command ``flask``."""

    conflict_retries: ClassVar[int] = CONFLICT_RETRIES
    """How often a job that had an optimistic conflict is enqueued again, at most."""

    @cached_property
    def _slot(self) -> StateSlot:
        check_retries(self.conflict_retries)
        given = inspect.getattr_static(type(self), "flask_app")
        if isinstance(given, staticmethod):
            given = given.__func__
        return state_slot(_app_of_environment if given is None else given, f"{type(self).__name__}.flask_app")

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Work on the queues, as RQ's worker does.

        A worker that does not know its Flask app ends here, before it takes a job.

        :raises ConfigurationError: when there is no Flask app.
        """
        if inspect.getattr_static(type(self), "flask_app") is None and not os.environ.get(FLASK_APP):
            raise ConfigurationError(
                f"{type(self).__name__} does not know the Flask app: set the environment's {FLASK_APP}, or the class "
                "attribute flask_app in a subclass."
            )
        slot = self._slot
        try:
            return bool(super().work(*args, **kwargs))  # type: ignore[misc]
        finally:
            slot.close()

    def perform_job(self, job: Job, *args: Any, **kwargs: Any) -> bool:
        """Perform a job in a unit of work. A work-horse then closes its applications."""
        # RQ calls job.perform() under its time limit, before it stores the result.
        job_perform(job, partial(self._perform, job, job.perform))
        for kind in ("success", "failure"):
            job_callback(job, kind, self._in_unit)
        try:
            return bool(super().perform_job(job, *args, **kwargs))  # type: ignore[misc]
        finally:
            job_perform(job, None)
            if self.is_horse:  # type: ignore[attr-defined]
                # The work-horse ends by os._exit().
                self._slot.close()

    def monitor_work_horse(self, job: Job, *args: Any, **kwargs: Any) -> None:
        """Wait for a work-horse. This process calls the callback of a job that was stopped."""
        job_callback(job, "stopped", self._in_closing_unit)
        super().monitor_work_horse(job, *args, **kwargs)  # type: ignore[misc]

    def clean_registries(self) -> None:
        """Clean the registries, as RQ's worker does. This process calls the failure callback of an abandoned job."""
        # A worker that forks has no connection open in this process.
        wrapped = self._in_unit if isinstance(self, SimpleWorker) else self._in_closing_unit
        with queue_jobs(self.queues, lambda job: job_callback(job, "failure", wrapped)):  # type: ignore[attr-defined]
            super().clean_registries()  # type: ignore[misc]

    def _in_unit(self, name: str) -> Callable[..., Any]:
        def call(job: Job, *args: Any) -> Any:
            callback = import_attribute(name)
            if inspect.iscoroutinefunction(callback):
                raise TypeError(f"The callback {name} is a coroutine function, which RQ does not await.")
            called = partial(callback, job, *args)
            return run_after_task(self._slot.get(), called, self.conflict_retries, job.meta.get(CARRIED), job.id)

        return call

    def _in_closing_unit(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return self._in_unit(name)(*args)
            finally:
                # The next work-horse is forked from this process, which must have no connection open.
                self._slot.close()

        return call

    def _perform(self, job: Job, perform: Callable[[], Any]) -> Any:
        retries = job.number_of_retries or 0
        run, result = Run(lenient=True), None
        try:
            with received(job.meta.get(CARRIED), job.id), task_unit(self._slot.get(), run):
                result = perform()
                if isinstance(result, Retry):
                    raise _UndoneError
                return result
        except _UndoneError:
            return result
        except IntegrityError:
            if run.has_committed or retries >= self.conflict_retries:
                raise
            time.sleep(pause(retries, LONGEST_PAUSE))
            return Retry(max=self.conflict_retries)


class EventSourcingWorker(EventSourcingWorkerMixin, Worker):
    """RQ's worker that forks a work-horse for each job. Each work-horse has its own applications."""


class EventSourcingSimpleWorker(EventSourcingWorkerMixin, SimpleWorker):
    """RQ's worker that performs jobs in its own process, for tests. A debugger can stop in a job."""


def _app_of_environment() -> Any:
    from flask.cli import ScriptInfo

    return ScriptInfo(app_import_path=os.environ[FLASK_APP]).load_app()


@contextmanager
def job_context(flask_app_or_factory: FlaskAppOrFactory) -> Iterator[orm.Session]:
    """A context with an application context and a unit of work for one job, for other workers.

    It is also a decorator of job functions. An app that is made by a function is closed at the end.

    :param flask_app_or_factory: the Flask app, or a function that makes it.
    :raises ConfigurationError: when it is neither.
    :raises NotInitializedError: when ``es.init_app(app)`` was not called.
    """
    slot = state_slot(flask_app_or_factory, "job_context")
    try:
        job = get_current_job()
        brought = (None, None) if job is None else (job.meta.get(CARRIED), job.id)
        with received(*brought), task_unit(slot.get()) as session:
            yield session
    finally:
        if site_of(flask_app_or_factory) is None:
            slot.close()


class EventSourcingQueue(Queue):
    """RQ's queue, whose jobs carry the metadata in force when they are enqueued, in ``job.meta``.

    Events that a job saves then have the correlation of the request that enqueued it.
    """

    def create_job(self, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any) -> Job:
        """Make a job, as RQ's queue does."""
        return super().create_job(*args, meta={CARRIED: carried(), **(meta or {})}, **kwargs)


def enqueue_after_commit(queue: Queue, function: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> str:
    """Enqueue a job after the work so far in ``db.session`` is committed, and never if it is rolled back.

    :param queue: the RQ queue.
    :param function: the job's function, or its name with its module.
    :param args: its arguments, as for ``queue.enqueue``.
    :param kwargs: its arguments and RQ's options, as for ``queue.enqueue``.
    :return: the id that the job will have.
    :raises TypeError: when *queue* is not a queue.
    :raises NotInitializedError: outside an application context.

    Arguments that RQ cannot serialise raise the error of ``queue.enqueue``. If a savepoint is rolled back, its jobs are
    not enqueued. If nothing has to be committed, the job is enqueued at once. If Redis fails after the commit, this is
    logged, and the commit still succeeds.
    """
    if not isinstance(queue, Queue):
        raise TypeError(f"enqueue_after_commit takes an RQ queue first; found {queue!r}.")
    job_id: str = kwargs.setdefault("job_id", None) or str(uuid4())
    kwargs["job_id"] = job_id
    job_args, job_kwargs = _checked(queue, function, args, kwargs)
    name = function if isinstance(function, str) else f"{function.__module__}.{function.__qualname__}"
    description = "the job " + describe(name, function, job_args, job_kwargs)
    current_site()
    kwargs["meta"] = {CARRIED: carried(), **(kwargs.get("meta") or {})}
    after_commit(partial(queue.enqueue, function, *args, **kwargs), description)
    return job_id


def _checked(
    queue: Queue, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the function. Arguments that RQ would refuse later are refused now."""
    parsed: Any = Queue.parse_args(function, *args, **kwargs)
    # A named tuple in RQ 3, and a plain one that ends with them in RQ 2.
    found = (parsed.args, parsed.kwargs) if hasattr(parsed, "kwargs") else parsed[-2:]
    job_args, job_kwargs = tuple(found[0] or ()), dict(found[1] or {})
    queue.serializer.dumps((function if isinstance(function, str) else None, job_args, job_kwargs))
    return job_args, job_kwargs
