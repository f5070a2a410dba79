"""Test cases of a Django project, each of whose tests has an application of its own; ``fixtures`` is for pytest.

What isolates the tests is Django's: ``TestCase`` rolls back, ``TransactionTestCase`` empties the tables.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.test import TestCase, TransactionTestCase
from eventsourcing.application import Application

from ....exceptions import ConfigurationError
from ....projections.runners import Runner
from ..hosting import close_application, init_application
from ..projecting import projections

__all__ = ["EventSourcingTestCase", "EventSourcingTransactionTestCase", "initialized", "run_projections"]


@contextmanager
def initialized() -> Iterator[Application[Any]]:
    """Within it, the applications of the project are new ones; at its end they are closed.

    What a test has cached in them, or set on them, is not there for the next one. The block's value is the first
    application of the setting.
    """
    # One may have been constructed for data that several tests share.
    close_application()
    application = init_application()
    try:
        yield application
    finally:
        close_application()


def run_projections(*names: str) -> None:
    """Run projections, and their reactions, to the end of the log, in this thread and on its connection.

    Within a ``TestCase`` they see what the test has saved, which a worker does not.

    :param names: which ones, as ``manage.py eventsourcing status`` names them; without any, all.
    :raises ConfigurationError: when there is none of a name.
    :raises ProjectionHaltedError: when a handler fails.
    """
    known = {each.name: each for bound in projections().bound.values() for each in bound.runnable()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigurationError(f"There is no projection {unknown[0]!r}: there are {', '.join(known) or 'none'}.")
    for name in names or known:
        Runner(known[name], threading.Event()).run(once=True)


class _Initialized:
    """Gives each test applications of its own."""

    def setUp(self) -> None:
        """Initialise the applications, which are closed after the test and whatever cleans up after it."""
        super().setUp()  # type: ignore[misc]
        self.application: Any = self.enterContext(initialized())  # type: ignore[attr-defined]


class EventSourcingTestCase(_Initialized, TestCase):
    """A ``TestCase`` that initialises the applications before each test, and closes them after it.

    ``self.application`` is the first one. ``events_recorded`` waits for a commit that never comes: use
    ``captureOnCommitCallbacks(execute=True)``.
    """


class EventSourcingTransactionTestCase(_Initialized, TransactionTestCase):
    """A ``TransactionTestCase`` that initialises the applications before each test, and closes them after it."""
