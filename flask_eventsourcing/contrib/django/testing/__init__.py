"""Test cases for a Django project: each test has an application of its own. ``fixtures`` has the same for pytest.

Django isolates the tests: ``TestCase`` rolls back, ``TransactionTestCase`` empties the tables.
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
    """A context with new applications, which are closed at its end; its value is the first one of the setting.

    So no test sees what another test has cached in an application, or set on it.
    """
    # An application may have been constructed for data that several tests share.
    close_application()
    application = init_application()
    try:
        yield application
    finally:
        close_application()


def run_projections(*names: str) -> None:
    """Run projections, and their reactions, to the end of the log, in this thread and on its connection.

    In a ``TestCase`` they see the events of the test, which no worker sees.

    :param names: their names, as ``manage.py eventsourcing status`` shows them; by default all.
    :raises ConfigurationError: when there is no projection of a name.
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
        """Initialise the applications. They are closed after the test and all of its clean-up functions."""
        super().setUp()  # type: ignore[misc]
        self.application: Any = self.enterContext(initialized())  # type: ignore[attr-defined]


class EventSourcingTestCase(_Initialized, TestCase):
    """A ``TestCase`` that initialises the applications before each test, and closes them after it.

    ``self.application`` is the first one. A ``TestCase`` never commits, so ``events_recorded`` is not sent unless the
    test uses ``captureOnCommitCallbacks(execute=True)``.
    """


class EventSourcingTransactionTestCase(_Initialized, TransactionTestCase):
    """A ``TransactionTestCase`` that initialises the applications before each test, and closes them after it.

    Use it for tests of what comes after a commit, such as ``events_recorded`` or a worker in another thread.
    """
