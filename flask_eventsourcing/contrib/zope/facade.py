"""The object that users call for applications, units of work and projections."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from eventsourcing.application import Application
from sqlalchemy import orm

from ...applications.erasure import Erasure, erase
from ...applications.known_sites import add_kind
from ...exceptions import ConfigurationError
from ...metadata import MetadataBlock, event_metadata, get_metadata_from_context
from ...projections.definitions import ModelProjection
from ...projections.registry import PlainProjections
from ...projections.upkeep.following import Health
from ...uow import check_times
from .zope_host import ZopeHost

A = TypeVar("A", bound=Application[Any])
P = ParamSpec("P")
R = TypeVar("R")


class Facade:
    """The applications of one or more hosts, and the operations on them."""

    def __init__(self) -> None:
        _known.add(self)

    @property
    def hosts(self) -> Mapping[type[Application[Any]], ZopeHost]:
        """The host of each application class."""
        raise NotImplementedError

    @property
    def projections(self) -> PlainProjections:
        """The registered projections: iterate over them, or call ``.worker().run()`` in a process of its own."""
        raise NotImplementedError

    @property
    def host(self) -> ZopeHost:
        """The host of the first application, in which projections and commands run too."""
        return next(iter(self.hosts.values()))

    def __getitem__(self, application_class: type[A]) -> A:
        """Return the single instance of an application class in this process, where there are several: ``es[Bank]``.

        It is constructed at its first use.

        :raises ConfigurationError: when there are no models for the class.
        """
        if application_class not in self.hosts:
            names = ", ".join(cls.__qualname__ for cls in self.hosts) or "none"
            raise ConfigurationError(f"{application_class!r} has no models here (there are some for: {names}).")
        return self.hosts[application_class][application_class]

    @property
    def applications(self) -> dict[type[Application[Any]], Application[Any]]:
        """The single instance of each application class in this process. Asking constructs all of them."""
        return {application_class: self[application_class] for application_class in self.hosts}

    def transaction(self) -> AbstractContextManager[orm.Session]:
        """A unit of work: commits the manager's transaction on success, aborts it on error.

        If other code has begun a transaction, the unit joins it and the owner commits. An error then dooms the
        transaction, so that no half of the unit is committed.

        :raises RollbackOnlyError: from the outermost, when an inner one had failed.
        """
        return self.host.transaction()

    def transactional(self, function: Callable[P, R]) -> Callable[P, R]:
        """Run a function in :meth:`transaction`.

        Use it as a decorator of a function of your own::

            @es.transactional
            def open_account(owner): ...
        """

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.host.transaction():
                return function(*args, **kwargs)

        return run

    def retry_on_conflict(self, times: int = 3) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Run a function in :meth:`transaction`, and run it again after a conflict.

        If other code has begun a transaction, the function runs once: only the owner can begin again, with
        ``transaction.attempts()`` or pyramid_retry.

        :param times: how often it is run again, at most.
        :raises ConfigurationError: when it is not a whole number from 0 up.
        """
        check_times(times)

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            @wraps(function)
            def run(*args: P.args, **kwargs: P.kwargs) -> R:
                return self.host.retry(partial(function, *args, **kwargs), times)

            return run

        return decorate

    def using(self, session: orm.Session) -> AbstractContextManager[orm.Session]:
        """Make a session of your own the current one within a block. You commit and close it.

        :raises ConfigurationError: when it is for another database than that of the events.
        """
        return self.host.using_session(session)

    @staticmethod
    def event_metadata(**metadata: str) -> MetadataBlock:
        """Add metadata to the events saved in a block. See :func:`~flask_eventsourcing.metadata.event_metadata`."""
        return event_metadata(**metadata)

    def wait_for(self, projection: type[ModelProjection] | str, recordings: Any, timeout: float = 5.0) -> None:
        """Block until a projection has handled the events that ``save()`` recorded, so you can read your own writes.

        Call it after the commit, and only where the next page would miss a row: it makes a request as slow as the
        worker.

        :param recordings: what ``Application.save()`` returned, or a position of the log.
        :param timeout: in seconds.
        :raises TimeoutError: when it takes longer.
        :raises UncommittedEventsError: when there are uncommitted events, which no projection can see.
        :raises ProjectionHaltedError: when the projection has halted at an earlier event, or is paused.
        """
        self.projections.wait_for(projection, recordings, timeout)

    def health(self) -> Health:
        """Return the state of every projection; it takes a few queries for each.

        A view for a load balancer or a monitor answers 503 if ``.ok`` is False.
        """
        return self.projections.health()

    def erase(
        self, aggregate_id: Any, *, application: type[Application[Any]] | None = None, redact: bool = False
    ) -> Erasure:
        """Erase an aggregate with the next commit: its events, snapshots and dead letters.

        An event ``AggregateErased`` stays in the log, so that projections hear of it and the id is not used again.

        :param application: the application class, if there are several.
        :param redact: empty the events, rather than delete their rows.
        """
        application_class = application or next(iter(self.hosts))
        letters = self.projections.dead_letters_of(application_class.name)
        return erase(self[application_class], aggregate_id, redact=redact, dead_letters=letters)

    def is_at_work(self) -> bool:
        """Whether a transaction of its sessions' manager has begun in this thread."""
        return any(host.is_at_work() for host in set(self.hosts.values()))

    def metadata_to_carry(self) -> dict[str, str]:
        """Return the metadata for a task that is sent now; empty if no application stores any."""
        if all(each.datastore.metadata is None for each in set(self.hosts.values())):
            return {}
        return {**self._of_request(), **get_metadata_from_context()}

    def _of_request(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        """Close the applications of this process and their idle connections.

        It may be called again. An application that is used afterwards is constructed again.
        """
        self.projections.close()
        for host in set(self.hosts.values()):
            host.close()


_known: weakref.WeakSet[Facade] = weakref.WeakSet()


class FacadeSites:
    """Finds the object that a script or a task uses, while a transaction is open."""

    def current(self) -> Facade | None:
        """Return the object whose transaction manager has a transaction in this thread, unless there are several."""
        found = [each for each in list(_known) if each.is_at_work()]
        return found[0] if len(found) == 1 else None

    def of(self, given: object) -> Facade | None:
        """Return the argument if it is such an object."""
        return given if isinstance(given, Facade) else None

    def refuse(self) -> None:
        """Do nothing: the general message is enough."""


add_kind(FacadeSites())
