"""The library's contract for recorders, on each database."""

from __future__ import annotations

from contextlib import ExitStack

import sqlalchemy as sa
import zope.sqlalchemy
from eventsourcing.application import Application
from eventsourcing.persistence import AggregateRecorder, ApplicationRecorder, ProcessRecorder, TrackingRecorder
from eventsourcing.tests import persistence
from sqlalchemy import orm
from transaction import TransactionManager

from flask_eventsourcing.contrib.zope import ZopeHost
from flask_eventsourcing.models import Models
from flask_eventsourcing.persistence import (
    Datastore,
    SQLAlchemyAggregateRecorder,
    SQLAlchemyApplicationRecorder,
    SQLAlchemyProcessRecorder,
    SQLAlchemyTrackingRecorder,
)
from tests.contract.backends import OnBackend, on_each_backend
from tests.django_host.datastores import make_datastore


class Aggregates(OnBackend, persistence.AggregateRecorderTestCase):
    """Snapshots and other events without a position."""

    __test__ = False

    def create_recorder(self) -> AggregateRecorder:
        """A recorder on a fresh table."""
        datastore, models = self.create_datastore()
        return SQLAlchemyAggregateRecorder(datastore, models.tables["snapshots"])


class Applications(OnBackend, persistence.ApplicationRecorderTestCase):
    """Events in the application's log."""

    __test__ = False

    def create_recorder(self) -> ApplicationRecorder:
        """A recorder on a fresh table."""
        datastore, models = self.create_datastore()
        return SQLAlchemyApplicationRecorder(
            datastore, models.tables["events"], tracking_table=models.tables["tracking"]
        )

    def test_insert_subscribe(self) -> None:
        """A subscription yields what was recorded before and what is recorded later, and stops when it is asked to."""
        self.optional_test_insert_subscribe()


class NonInterleaving(OnBackend, persistence.NonInterleavingNotificationIDsBaseCase):
    """The events of one save are contiguous."""

    __test__ = False

    def create_recorder(self) -> ApplicationRecorder:
        """A recorder on a fresh table."""
        datastore, models = self.create_datastore()
        return SQLAlchemyApplicationRecorder(
            datastore, models.tables["events"], tracking_table=models.tables["tracking"]
        )


class Trackings(OnBackend, persistence.TrackingRecorderTestCase):
    """Positions in the logs of others."""

    __test__ = False

    def create_recorder(self) -> TrackingRecorder:
        """A recorder on a fresh table."""
        datastore, models = self.create_datastore()
        return SQLAlchemyTrackingRecorder(datastore, models.tables["tracking"])


class Processes(OnBackend, persistence.ProcessRecorderTestCase):
    """Events together with positions."""

    __test__ = False

    def create_recorder(self) -> ProcessRecorder:
        """A recorder on a fresh table."""
        datastore, models = self.create_datastore()
        return SQLAlchemyProcessRecorder(datastore, models.tables["tracking"], models.tables["events"])


on_each_backend(globals(), Aggregates, Applications, NonInterleaving, Trackings, Processes)


def on_zope(_: ExitStack, engine: sa.Engine, models: Models) -> Datastore:
    """Return the datastore of sessions that zope.sqlalchemy has registered, with an explicit manager."""
    factory = orm.sessionmaker(engine)
    zope.sqlalchemy.register(factory, transaction_manager=TransactionManager(explicit=True))
    return ZopeHost(factory, {Application: models}).datastore


on_each_backend(
    globals(), Aggregates, Applications, NonInterleaving, Trackings, Processes,
    place="WithZopeOn", makes_datastore=staticmethod(on_zope),
)  # fmt: skip

on_each_backend(
    globals(), Aggregates, Applications, NonInterleaving, Trackings, Processes,
    place="WithDjangoOn", makes_datastore=staticmethod(make_datastore),
    backends=("sqlite-file", "postgresql", "mariadb-mysqlclient"), further=("postgresql", "mariadb-mysqlclient"),
)  # fmt: skip
