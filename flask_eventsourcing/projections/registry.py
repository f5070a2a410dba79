"""Which projections there are, and what they are bound to in one Flask app."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from eventsourcing.application import Application

from ..exceptions import ConfigurationError
from . import inline
from .consumers import Consumer, ProjectionHost, consumers_of
from .definitions import ModelProjection, check_projection
from .waiting import Waiters


@dataclass(frozen=True)
class Registration:
    """A projection class and the application class whose events it follows."""

    projection_class: type[ModelProjection]
    of: type[Application[Any]]


@dataclass
class Registrations:
    """The projections that one extension object knows, in the order of their registration."""

    entries: list[Registration] = field(default_factory=list)

    def add(self, projection_class: Any, of: type[Application[Any]]) -> Registration:
        """Add a projection.

        :raises ConfigurationError: when it is none, or its name is taken.
        """
        registration = Registration(check_projection(projection_class), of)
        for other in self.entries:
            # Most of MySQL's collations do not tell names that differ in case only.
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
    """The projections of one Flask app.

    :param make_host: makes what the projections of an application share; called once for each that has any.
    :param check_table: raises a ``ConfigurationError`` when a table is not in the database of the events.
    """

    def __init__(
        self,
        make_host: Callable[[type[Application[Any]]], ProjectionHost],
        check_table: Callable[[type[ModelProjection], sa.Table], None],
    ) -> None:
        self._make_host = make_host
        self._check_table = check_table
        self.hosts: dict[type[Application[Any]], ProjectionHost] = {}
        self.waiters: dict[type[Application[Any]], Waiters] = {}
        self.bound: dict[tuple[str, str], tuple[Registration, ProjectionHost]] = {}

    def check(self, projection_class: Any) -> None:
        """Check what is about to be bound.

        :raises ConfigurationError: when it is no projection, or one of its tables is in another database.
        """
        for table in check_projection(projection_class).tables():
            self._check_table(projection_class, table)

    def add(self, registration: Registration) -> None:
        """Bind a projection.

        :raises ConfigurationError: when one of its tables is in another database.
        """
        projection_class, of = registration.projection_class, registration.of
        self.check(projection_class)
        host = self.hosts.get(of)
        if host is None:
            host = self.hosts[of] = self._make_host(of)
            self.waiters[of] = Waiters(host)
        self.bound[of.name, projection_class.name] = registration, host
        if projection_class.inline:
            inline.install(host, [r.projection_class for r, h in self.bound.values() if h is host])

    def __iter__(self) -> Iterator[Consumer]:
        """Iterate over all that workers run, and inline projections."""
        for registration, host in self.bound.values():
            if registration.projection_class.inline:
                yield Consumer(host, registration.projection_class)
            yield from consumers_of(host, registration.projection_class)

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
                f"(registered: {names}): decorate its class with @es.projection(of=…)."
            )
        if len({consumer.host for consumer in found}) > 1:
            raise ConfigurationError(f"Several applications have a projection {projection!r}: give one another name.")
        return found[0]

    def waiters_of(self, consumer: Consumer) -> Waiters:
        """Return the kept connections with which positions of a consumer are waited for."""
        return next(w for of, w in self.waiters.items() if self.hosts[of] is consumer.host)

    def tables(self) -> list[sa.Table]:
        """Return the tables that projections need: ours, and those of their models."""
        found: dict[str, sa.Table] = {}
        for registration, host in self.bound.values():
            for table in (*host.models.tables.values(), *registration.projection_class.tables()):
                found[table.key] = table
        return list(found.values())

    def close(self) -> None:
        """Close the connections that wait for positions."""
        for waiters in self.waiters.values():
            waiters.close()
