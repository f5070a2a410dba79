"""The library's contract for infrastructure factories, on each database."""

from __future__ import annotations

from typing import Any

from eventsourcing.tests import persistence
from eventsourcing.utils import Environment

from flask_eventsourcing.persistence import (
    Factory,
    SQLAlchemyAggregateRecorder,
    SQLAlchemyApplicationRecorder,
    SQLAlchemyProcessRecorder,
    SQLAlchemyTrackingRecorder,
)
from tests.contract.backends import OnBackend, on_each_backend


class View(SQLAlchemyTrackingRecorder):
    """A tracking recorder of a user's own."""


class Factories(OnBackend, persistence.InfrastructureFactoryTestCase[Factory]):
    """The factory that the library finds in ``flask_eventsourcing.persistence``."""

    __test__ = False

    def setUp(self) -> None:
        """Name the database in the factory's environment."""
        self.env = Environment(
            env={
                "PERSISTENCE_MODULE": "flask_eventsourcing.persistence",
                "SQLALCHEMY_DATABASE_URI": self.url,
                "CREATE_TABLE": "y",
            }
        )
        super().setUp()

    def expected_factory_class(self) -> type[Factory]:
        """The only factory in the package."""
        return Factory

    def expected_aggregate_recorder_class(self) -> type[Any]:
        """What records snapshots."""
        return SQLAlchemyAggregateRecorder

    def expected_application_recorder_class(self) -> type[Any]:
        """What records events."""
        return SQLAlchemyApplicationRecorder

    def expected_tracking_recorder_class(self) -> type[Any]:
        """What records positions."""
        return SQLAlchemyTrackingRecorder

    def tracking_recorder_subclass(self) -> type[Any]:
        """A view."""
        return View

    def expected_process_recorder_class(self) -> type[Any]:
        """What records both."""
        return SQLAlchemyProcessRecorder


on_each_backend(globals(), Factories)
