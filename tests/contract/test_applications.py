"""The library's tests of applications, on each database."""

from __future__ import annotations

import pytest
from eventsourcing.tests import application
from eventsourcing.utils import get_topic

from flask_eventsourcing.persistence import Factory
from tests.contract.backends import on_each_backend

# The library's test of its own deprecated attribute expects the warning to be a warning.
pytestmark = pytest.mark.filterwarnings("default:'log' is deprecated:DeprecationWarning")

on_each_backend(globals(), application.ApplicationTestCase)
on_each_backend(globals(), application.ExampleApplicationTestCase, expected_factory_topic=get_topic(Factory))
