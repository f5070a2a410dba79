"""The project as a site of task queues: each task runs in ``atomic()``, and sends other tasks after the commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from django.conf import settings
from django.db import Error, connections, transaction
from eventsourcing.application import Application

from ...exceptions import NotInitializedError
from ...metadata import get_metadata_from_context
from ...uow import Run
from .configuring import EXAMPLE, SETTING
from .hosting import Database, close_application, get_application, site
from .of_requests import of_request
from .retrying import as_conflict, queueing_for, run_again
from .transactions import DjangoUnit

R = TypeVar("R")


def _close_old_connections() -> None:
    """Close lost and old connections as Django does, except those in a transaction, in which a task may be called."""
    for each in connections.all(initialized_only=True):
        if not each.in_atomic_block:
            each.close_if_unusable_or_obsolete()


class ProjectHost:
    """The host that task queues use: it treats all databases with events as one."""

    @property
    def _databases(self) -> Sequence[Database]:
        return list(site().databases.values())

    @contextmanager
    def context(self) -> Iterator[None]:
        """A context for a task: lost and old connections are closed before and after it, as for a request."""
        _close_old_connections()
        try:
            yield
        finally:
            _close_old_connections()

    def unit(self) -> DjangoUnit:
        """The unit of work of this thread, of a database with a transaction if there is one."""
        units = [each.units.current() for each in self._databases]
        if not units:
            raise NotInitializedError(f"{SETTING} has no application: write for example {EXAMPLE}.")
        open_units = [each for each in units if each.in_transaction]
        return next((each for each in open_units if each.batches), (open_units or units)[0])

    @contextmanager
    def transaction(self, *, queueing: bool = False, run: Run | None = None) -> Iterator[None]:
        """A block of ``atomic()`` in each database with events.

        :raises IntegrityError: the library's, for a conflict.
        """
        units = [each.units.current() for each in self._databases]
        try:
            with ExitStack() as stack:
                for unit in units:
                    stack.enter_context(transaction.atomic(using=unit.wrapper.alias))
                    if queueing:
                        stack.enter_context(queueing_for(unit))
                yield
        except Error as error:
            for unit in units:
                conflict = as_conflict(unit, error)
                if conflict is not None:
                    raise conflict from error
            raise

    def retry(self, function: Callable[[], R], times: int, *, lenient: bool = False) -> R:
        """Call a function in a block, and again after a conflict; within another block it is called once."""
        databases = self._databases
        if len(databases) == 1 and not databases[0].units.current().in_transaction:
            found: R = run_again(function, times, databases[0].alias)
            return found
        with self.transaction():
            return function()


class ProjectSite:
    """The project as a site: what ``init_celery(celery_app, project_site)`` and RQ's workers use."""

    @property
    def host(self) -> Any:
        """The host of tasks. If no database of Django's has events, it is another one."""
        found = ProjectHost()
        return site().host_apart(found.context) or found

    @property
    def applications(self) -> Mapping[type[Application[Any]], Application[Any]]:
        """The single instance of each application class in this process; this constructs them."""
        made = [get_application(name) for name in site().configured]
        return {type(each): each for each in made}

    def metadata_to_carry(self) -> dict[str, str]:
        """Return the metadata for a task that is sent now; empty if no application stores any."""
        if all(each.metadata is False for each in site().configured.values()):
            return {}
        return {**of_request(), **get_metadata_from_context()}

    def close(self) -> None:
        """Close the applications of this process."""
        close_application()


_project = ProjectSite()


def project_site() -> ProjectSite:
    """Return the project as a site of task queues; nothing is constructed, and no setting is read.

    Pass the function itself, which a worker calls after its fork: ``init_celery(celery_app, project_site)``.
    """
    return _project


class DjangoSites:
    """Finds the project, which is the current site if there is no other."""

    def current(self) -> ProjectSite | None:
        """Return the project, if there is one."""
        return _project if getattr(settings, SETTING, None) else None

    def of(self, given: object) -> ProjectSite | None:
        """Return the argument if it is a project."""
        return given if isinstance(given, ProjectSite) else None

    def refuse(self) -> None:
        """Do nothing: the general message is enough."""
