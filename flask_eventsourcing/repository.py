"""A repository that rebuilds aggregates without asking of every event what it asked of the one before.

The library's ``project_aggregate()`` checks with ``isinstance()`` that each event has the attributes of a protocol. Up
to Python 3.11 that takes four times as long as to read the event and to apply it. Here the first event of each class
goes that way, and the others of that class do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eventsourcing.application import Application, ProjectorFunction, Repository, project_aggregate

_checked: set[type[Any]] = set()
"""As in the library's own cache of topics, classes of events are kept for ever."""


def project_checked(aggregate: Any, domain_events: Iterable[Any]) -> Any:
    """Do what ``project_aggregate()`` does, with its check once for each class of events.

    :raises AssertionError: as that does, for an object that is no event of an aggregate.
    """
    for domain_event in domain_events:
        if type(domain_event) in _checked:
            aggregate = domain_event.mutate(aggregate)
        else:
            aggregate = project_aggregate(aggregate, (domain_event,))
            _checked.add(type(domain_event))
    return aggregate


class CheckedRepository(Repository[Any]):
    """The library's repository, but for the function that it takes where none is given."""

    def get(
        self,
        aggregate_id: Any,
        *,
        version: int | None = None,
        projector_func: ProjectorFunction[Any, Any] = project_aggregate,
        fastforward_skipping: bool = False,
        deepcopy_from_cache: bool = True,
    ) -> Any:
        """See ``Repository.get()``."""
        return super().get(
            aggregate_id,
            version=version,
            projector_func=project_checked if projector_func is project_aggregate else projector_func,
            fastforward_skipping=fastforward_skipping,
            deepcopy_from_cache=deepcopy_from_cache,
        )


def install(application: Application[Any]) -> None:
    """Let an application's repository be one of this kind, unless it has brought one of its own."""
    if type(application.repository) is Repository:
        application.repository.__class__ = CheckedRepository
