"""The bank in a Django project, for the tests that hold for every host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from django.db import connections, transaction

from flask_eventsourcing.contrib.django import close_application, get_application, retry_on_conflict
from flask_eventsourcing.contrib.django.hosting import site
from tests.django_host import project
from tests.django_host.ledger.models import BankRecords, Note
from tests.domain import Bank
from tests.hosts.sites import HostSite

MANUAL_SAVEPOINTS = "savepoints where autocommit is off, of which Django says that they are of no use on SQLite"
SESSIONS = "sessions, or listeners, of SQLAlchemy's"
WITHOUT_MEANING = {
    "test_unit_within_a_unit_joins_it": "a block in a block is a savepoint, which fails alone",
    "test_signal_names_the_application": "each save has a function of its own in on_commit, with a signal of its own",
    "test_forked_process_leaves_its_parents_transaction_alone": "who forks in a block shares Django's connection",
    "test_listener_that_raises_after_the_commit_swallows_nothing": SESSIONS,
    "test_conflict_outside_of_a_session_is_known": SESSIONS,
    "test_commit_that_the_driver_refuses_stores_nothing": "an end past Django is not one that it knows",
    "test_commit_of_a_connection_that_is_refused_leaves_nothing_in_it": SESSIONS,
    "test_commit_that_the_database_refuses_is_none": "it is Django that commits, and calls on_commit after that",
    "test_session_of_ones_own_may_commit_inside_a_unit": SESSIONS,
    "test_events_of_a_transaction_of_the_caller": SESSIONS,
    "test_save_uses_the_session_that_is_given": SESSIONS,
    "test_session_is_never_ignored": SESSIONS,
    "test_unit_on_another_session_is_another_unit": SESSIONS,
    "test_save_with_a_session_inside_a_unit": SESSIONS,
    "test_rollback_inside_a_unit_rolls_all_of_it_back": "Django refuses both inside a block with its own error",
    "test_only_the_unit_commits_inside_a_unit": "Django refuses both inside a block with its own error",
    "test_events_of_others_at_a_lost_position_are_not_ours": "an end past Django is not one that it knows",
    "test_what_is_unknown_is_not_announced": SESSIONS,
    "test_object_is_refused_whatever_ended_the_transaction[reset": SESSIONS,
    **{
        f"test_{what}_by_any_way_{how}[{way}": "an end past Django is not one that it knows"
        for what, how in (
            ("rollback", "is_a_rollback"),
            ("commit", "is_a_commit"),
            ("savepoint", "takes_its_events_along"),
        )
        for way in ("connection", "text", "driver")
    },
}
"""What is asked of other hosts and has no meaning for Django, with the reason."""
WITHOUT_MEANING_ON_SQLITE = {
    "test_function_waits_for_the_rollback": MANUAL_SAVEPOINTS,
    "test_object_of_a_failed_savepoint_is_refused": MANUAL_SAVEPOINTS,
    "test_released_savepoint_stands_or_falls_with_the_transaction": MANUAL_SAVEPOINTS,
    "test_object_may_be_used_on_as_long_as_its_events_are_there": MANUAL_SAVEPOINTS,
    "test_savepoint_by_any_way_takes_its_events_along": MANUAL_SAVEPOINTS,
}
"""The same on one database."""


def has_meaning(name: str, url: str) -> bool:
    """Whether a test, named with its parameters, can be asked of Django on a database."""
    if url in ("sqlite-memory", "mariadb"):
        # Each thread would have a database of its own; and what a host does differs by host, not by database.
        return False
    known = {**WITHOUT_MEANING, **(WITHOUT_MEANING_ON_SQLITE if url.startswith("sqlite") else {})}
    return not any(name.startswith(each) for each in known)


class UndoneError(Exception):
    """Leaves a block, to roll it back."""


class Savepoint:
    """A block in a block, which has begun."""

    def __init__(self, alias: str) -> None:
        self._block: Any = transaction.atomic(using=alias)
        self._block.__enter__()

    def rollback(self) -> None:
        """Leave it with an error."""
        self._block.__exit__(UndoneError, UndoneError(), None)

    def __enter__(self) -> Savepoint:
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)


class DjangoSession:
    """Django's connection, with the names of a session."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def rollback(self) -> None:
        """Roll back."""
        connections[self._alias].rollback()

    def close(self) -> None:
        """Close the connection."""
        connections[self._alias].close()

    def begin_nested(self) -> Savepoint:
        """Begin a block in what is there."""
        return Savepoint(self._alias)


class DjangoHost:
    """Django's functions, with the names of a host."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    @property
    def datastore(self) -> Any:
        """The database of the events."""
        return site().databases[self._alias].datastore

    @contextmanager
    def context(self) -> Iterator[None]:
        """Close the connection at the end, as Django does after a request."""
        try:
            yield
        finally:
            if not connections[self._alias].in_atomic_block:
                connections[self._alias].close()

    @contextmanager
    def transaction(self) -> Iterator[DjangoSession]:
        """A block."""
        with transaction.atomic(using=self._alias):
            yield DjangoSession(self._alias)

    def retry(self, function: Callable[[], Any], times: int) -> Any:
        """Run a function with ``retry_on_conflict``."""
        return retry_on_conflict(times=times)(function)()

    def unit(self) -> Any:
        """The unit of work of the connection."""
        return site().databases[self._alias].units.current()

    open_unit = unit


class DjangoSite(HostSite):
    """The bank in the tests' project, where recorders always join Django's connection."""

    host: Any

    def __init__(self, url: str) -> None:
        alias = f"host{uuid4().hex}"
        self._alias = alias
        self._stack = ExitStack()
        self._stack.enter_context(project.database(alias, url))
        self._stack.enter_context(project.applications(Bank=alias))
        self._engine = sa.create_engine(url)
        self._stack.callback(self._engine.dispose)
        self.host = DjangoHost(alias)

    @property
    def bank(self) -> Bank:
        """The application."""
        return get_application(Bank)

    @property
    def session(self) -> Any:
        """Django's connection of this thread."""
        return DjangoSession(self._alias)

    def working(self) -> AbstractContextManager[object]:
        """Autocommit is switched off."""
        return self._without_autocommit()

    @contextmanager
    def _without_autocommit(self) -> Iterator[None]:
        connections[self._alias].set_autocommit(False)
        try:
            yield
        finally:
            connections[self._alias].rollback()
            connections[self._alias].set_autocommit(True)

    def commit(self) -> None:
        """Commit."""
        connections[self._alias].commit()

    def rollback(self) -> None:
        """Roll back."""
        connections[self._alias].rollback()

    def note(self, text: str = "note") -> None:
        """Add a row."""
        Note.objects.using(self._alias).create(text=text)

    def stored(self) -> tuple[int, int]:
        """Count the events and the notes that another connection sees."""
        names = BankRecords.StoredEvent._meta.db_table, Note._meta.db_table
        with self._engine.connect() as connection:
            events, notes = (
                connection.scalar(sa.select(sa.func.count()).select_from(sa.table(name))) or 0 for name in names
            )
        return events, notes

    def close(self) -> None:
        """Close the application, and the connection of this thread."""
        close_application()
        connections[self._alias].close()

    def remove(self) -> None:
        """Take the database away from the project."""
        self._stack.close()
