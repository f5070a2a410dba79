"""The registered projections, and their binding to a host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from eventsourcing.application import Application

from ..exceptions import ConfigurationError
from ..host import Host, PlainHost
from ..models import ProjectionModels
from ..uow import same_database, writer_of
from .consumers import Consumer, ProjectedApplication, consumers_of, tables_of
from .consumers.inline import InlineApplier
from .definitions import ModelProjection, check_projection
from .upkeep.following import Health, Waiters, status_of, wait_for
from .workers import Worker


@dataclass(frozen=True)
class Registration:
    """A projection class and the application class whose events it follows."""

    projection_class: type[ModelProjection]
    of: type[Application[Any]]


@dataclass
class Registrations:
    """The projections that one extension object knows, in the order of their registration, and the functions."""

    entries: list[Registration] = field(default_factory=list)
    transactional: list[str] = field(default_factory=list)
    """The functions that are to run in a unit of work, by their names."""

    def add(self, projection_class: Any, of: type[Application[Any]]) -> Registration:
        """Add a projection.

        :raises ConfigurationError: when it is no projection, or its name is taken.
        """
        registration = Registration(check_projection(projection_class), of)
        for other in self.entries:
            # Some collations take names that differ only in case for the same.
            if other.of is of and other.projection_class.name.casefold() == projection_class.name.casefold():
                if _same_source(other.projection_class, projection_class):
                    # An application factory that runs again defines its classes again.
                    self.entries[self.entries.index(other)] = registration
                    return registration
                raise ConfigurationError(
                    f"Two projections of {of.__name__} are called {projection_class.name!r}, so they would share their "
                    "position: set another class attribute 'name' on one of them."
                )
        self.entries.append(registration)
        return registration


def _same_source(one: type[Any], other: type[Any]) -> bool:
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


class BoundProjections:
    """The projections of one host.

    :param make_application: makes what the projections of an application share; called once for each that has any.
    :param check_table: raises a ``ConfigurationError`` when a table is not in the database of the events.
    """

    def __init__(
        self,
        host: Host,
        make_application: Callable[[type[Application[Any]]], ProjectedApplication],
        check_table: Callable[[type[ModelProjection], sa.Table], None],
    ) -> None:
        self.host = host
        self._make_application = make_application
        self._check_table = check_table
        self.applications: dict[type[Application[Any]], ProjectedApplication] = {}
        self.waiters: dict[ProjectedApplication, Waiters] = {}
        self.bound: dict[tuple[str, str], tuple[Registration, ProjectedApplication]] = {}

    def check(self, projection_class: Any) -> None:
        """Check a projection before it is bound.

        :raises ConfigurationError: when it is no projection, or one of its tables is in another database.
        """
        for table in tables_of(self.host, check_projection(projection_class)):
            self._check_table(projection_class, table)

    def check_owner(self, projection_class: type[ModelProjection], of: type[Application[Any]]) -> None:
        """Check that no other projection writes the tables of one.

        :raises ConfigurationError: naming both.
        """
        if not projection_class.handlers:
            return
        wanted = set(tables_of(self.host, projection_class))
        for key, (other, _) in self.bound.items():
            if key == (of.name, projection_class.name) or not other.projection_class.handlers:
                continue
            for table in tables_of(self.host, other.projection_class):
                if table in wanted:
                    raise ConfigurationError(
                        f"Projections {other.projection_class.name!r} of {other.of.name} and {projection_class.name!r} "
                        f"of {of.name} both have table {table.name!r} among their models, and a rebuild of one would "
                        "lose the rows of the other: make them one projection, or give each a model of its own."
                    )

    def add(self, registration: Registration) -> None:
        """Bind a projection.

        :raises ConfigurationError: when one of its tables is in another database, or another projection's.
        """
        projection_class, of = registration.projection_class, registration.of
        self.check(projection_class)
        self.check_owner(projection_class, of)
        application = self.applications.get(of)
        if application is None:
            application = self.applications[of] = self._make_application(of)
            self.waiters[application] = Waiters(application)
        self.bound[of.name, projection_class.name] = registration, application
        application.registered[projection_class.name] = projection_class
        if projection_class.inline:
            bound = [r.projection_class for r, a in self.bound.values() if a is application]
            InlineApplier(application, bound).install()

    def __iter__(self) -> Iterator[Consumer]:
        """Iterate over all that workers run, and inline projections."""
        for registration, application in self.bound.values():
            if registration.projection_class.inline:
                yield Consumer(application, registration.projection_class)
            yield from consumers_of(application, registration.projection_class)

    def runnable(self) -> list[Consumer]:
        """Return all that workers run."""
        return [consumer for consumer in self if consumer.kind == "reactions" or not consumer.projection_class.inline]

    def find(self, projection: str | type[ModelProjection]) -> Consumer:
        """Return a projection by its class or name.

        :raises ConfigurationError: when there is none, or several applications have one of that name.
        """
        if isinstance(projection, str):
            found = [consumer for consumer in self if consumer.name == projection]
        else:
            found = [c for c in self if _same_source(c.projection_class, projection)]
        if not found:
            names = ", ".join(consumer.name for consumer in self) or "none"
            raise ConfigurationError(
                f"There is no projection {projection!r} "
                f"(registered: {names}): register its class, in a Flask app with @es.projection(of=…)."
            )
        if len({consumer.application for consumer in found}) > 1:
            raise ConfigurationError(f"Several applications have a projection {projection!r}: give one another name.")
        return found[0]

    def waiters_of(self, consumer: Consumer) -> Waiters:
        """Return the connections that wait for positions of a consumer."""
        return self.waiters[consumer.application]

    def worker(self, *names: str, once: bool = False) -> Worker:
        """Return a worker for the projections and reactions with these names, or for all.

        :param once: end as soon as each has reached the end of its log.
        """
        return Worker([each for each in self.runnable() if not names or each.name in names], once=once)

    def wait_for(self, projection: type[ModelProjection] | str, recordings: Any, timeout: float = 5.0) -> None:
        """Block until a projection has handled the events that ``save()`` recorded, so you can read your own writes.

        :param recordings: what ``Application.save()`` returned, or a position of the log.
        :param timeout: in seconds.
        :raises TimeoutError: when it takes longer.
        :raises UncommittedEventsError: when there are uncommitted events, which no projection can see.
        :raises ProjectionHaltedError: when the projection has halted at an earlier event, or is paused.
        """
        consumer = self.find(projection)
        wait_for(consumer, recordings, timeout, self.waiters_of(consumer))

    def health(self) -> Health:
        """Return the state of every projection; it takes a few queries for each."""
        return Health(tuple(status_of(consumer) for consumer in self))

    def dead_letters_of(self, application_name: str) -> sa.Table | None:
        """Return the table of the dead letters of an application's projections, if it has any."""
        found = (each for each in self.applications.values() if each.name == application_name)
        return next((each.models.tables["dead_letters"] for each in found), None)

    def tables(self) -> list[sa.Table]:
        """Return the tables that projections need: those of this package, and those of their models."""
        found: dict[str, sa.Table] = {}
        for registration, application in self.bound.values():
            for table in (
                *application.models.tables.values(),
                *tables_of(self.host, registration.projection_class),
            ):
                found[table.key] = table
        return list(found.values())

    def close(self) -> None:
        """Close the connections that wait for positions."""
        for waiters in self.waiters.values():
            waiters.close()


class PlainProjections(BoundProjections):
    """The projections of a ``PlainHost``.

    Register a class with :meth:`register`, and run it with a worker of :meth:`worker`.

    :param host: the host.
    :param models: the record classes for the projections of each application class, as
        ``flask_eventsourcing.models.make_projection_models`` makes them.
    :param lease: whether workers hold a lease rather than a server lock, which does not work behind a connection
        pooler.
    :param hosts: the host of each application, where there are several.
    :raises ConfigurationError: when the database cannot have a table with the name of one of *models*.
    """

    host: PlainHost

    def __init__(
        self,
        host: PlainHost,
        models: Mapping[type[Application[Any]], ProjectionModels],
        *,
        lease: bool = False,
        hosts: Mapping[type[Application[Any]], PlainHost] | None = None,
    ) -> None:
        self.hosts: Mapping[type[Application[Any]], PlainHost] = hosts or dict.fromkeys(models, host)
        for of, own in models.items():
            self.hosts[of].datastore.dialect.check_names(own.tables.values())

        def followed(of: type[Application[Any]]) -> ProjectedApplication:
            own = self.hosts[of]
            return ProjectedApplication(own, of.name, lambda: own[of], models[of], lease=lease)

        super().__init__(host, followed, self._check_database)
        self._registrations = Registrations()
        self._classes = list(models)

    def register(
        self, projection_class: type[ModelProjection], of: type[Application[Any]] | None = None
    ) -> type[ModelProjection]:
        """Register a projection, and return it. Use it as a decorator where there is one application.

        :param of: the application class whose events it follows; not needed if there is only one.
        :raises ConfigurationError: when the class cannot be used; the message says why.
        """
        if of is None and len(self._classes) == 1:
            of = self._classes[0]
        if of not in self._classes:
            names = ", ".join(cls.__qualname__ for cls in self._classes) or "none"
            raise ConfigurationError(
                f"Projection {projection_class!r}: of={of!r} has no models for projections here (there are some for: "
                f"{names})."
            )
        # Everything is checked before anything is registered.
        self.check(projection_class)
        self.check_owner(projection_class, of)
        self.add(self._registrations.add(projection_class, of))
        return projection_class

    def _check_database(self, projection_class: type[ModelProjection], table: sa.Table) -> None:
        if not any(_has_table(host, table) for host in set(self.hosts.values())):
            raise ConfigurationError(
                f"Table {table.name!r} of {projection_class.__name__} is not in the database of the events: move it "
                "there, because one transaction commits both."
            )


def _has_table(host: PlainHost, table: sa.Table) -> bool:
    """Whether the sessions of a host write a table to the database of its events."""
    with host.session() as session:
        try:
            found = writer_of(session, table).engine
        except sa.exc.UnboundExecutionError:
            return False
    return same_database(found, host.datastore.engine)
