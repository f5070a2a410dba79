"""The fixture for pytest, beside those of pytest-django.

Name it in ``conftest.py``: ``pytest_plugins = ["flask_eventsourcing.contrib.django.testing.fixtures"]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from eventsourcing.application import Application

from . import initialized


@pytest.fixture
def eventsourcing_application() -> Iterator[Application[Any]]:
    """The first application of the setting; all of them are initialised for the test, and closed after it."""
    with initialized() as application:
        yield application
