"""Finds the Flask app, Pyramid application or script that a task belongs to, for task queues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from eventsourcing.application import Application

from ..exceptions import NotInitializedError


class SiteState(Protocol):
    """The state of a Flask app, a Pyramid application or a script, for task queues."""

    @property
    def host(self) -> Any:
        """The ``flask_eventsourcing.host.Host`` of its units of work."""

    @property
    def applications(self) -> Mapping[type[Application[Any]], Application[Any]]:
        """The single instance of each application class in this process; asking constructs them."""

    def metadata_to_carry(self) -> dict[str, str]:
        """Return the metadata for a task that is sent now."""

    def close(self) -> None:
        """Close the applications of this process."""


class KindOfSite(Protocol):
    """Finds the states of one kind of site."""

    def current(self) -> SiteState | None:
        """Return the state of the current site, or None if it is of another kind."""

    def of(self, given: object) -> SiteState | None:
        """Return the state of a site, or None if it is of another kind.

        :raises NotInitializedError: when it is one of this kind and has none.
        """

    def refuse(self) -> None:
        """Raise an error that says why there is no current site, if that is known.

        :raises NotInitializedError: when it is known.
        """


_kinds: list[KindOfSite] = []
_last: list[KindOfSite] = []
"""The kinds whose site is the current one unless another kind has one."""
_working_for: ContextVar[SiteState | None] = ContextVar("flask_eventsourcing.working_for", default=None)


def add_kind(kind: KindOfSite, *, last: bool = False) -> None:
    """Add a kind of site. It is asked before those that were added earlier.

    :param last: whether it is asked after the site of a task.
    """
    (_last if last else _kinds).insert(0, kind)


def find_current_site(*, last: bool = True) -> SiteState | None:
    """Return the state of the site whose work this is, or None.

    :param last: whether to ask the kinds whose site is current only because no other is.
    """
    return _current_of(_kinds) or _working_for.get() or (_current_of(_last) if last else None)


def _current_of(kinds: Sequence[KindOfSite]) -> SiteState | None:
    return next((found for kind in kinds if (found := kind.current()) is not None), None)


@contextmanager
def working_for(state: SiteState) -> Iterator[None]:
    """Make a site the current one for a task in the block, unless another one is found."""
    token = _working_for.set(state)
    try:
        yield
    finally:
        _working_for.reset(token)


def current_site() -> SiteState:
    """Return the state of the current site.

    :raises NotInitializedError: when there is none.
    """
    found = find_current_site()
    if found is None:
        for kind in _kinds:
            kind.refuse()
        raise NotInitializedError(
            "This needs a Flask app context, a request of Pyramid, or a transaction of a transaction manager."
        )
    return found


def site_of(given: object) -> SiteState | None:
    """Return the state of a site, or None for an object that is no site.

    :raises NotInitializedError: when it is one that has no state.
    """
    return next((found for kind in (*_kinds, *_last) if (found := kind.of(given)) is not None), None)
