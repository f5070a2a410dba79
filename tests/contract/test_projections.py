"""The library's tests of projections and their runners, on each database."""

from __future__ import annotations

from typing import ClassVar

import sqlalchemy as sa
from eventsourcing.persistence import Tracking
from eventsourcing.tests import projection

from flask_eventsourcing.persistence import SQLAlchemyTrackingRecorder
from tests.contract.backends import OnBackend, on_each_backend

counters = sa.Table(
    "event_counters",
    sa.MetaData(),
    sa.Column("name", sa.String(20), primary_key=True),
    sa.Column("amount", sa.Integer, nullable=False),
)


class CountersView(SQLAlchemyTrackingRecorder, projection.EventCountersView):
    """Counts events in a table beside the position."""

    tables: ClassVar[tuple[sa.Table, ...]] = (counters,)

    def get_created_event_counter(self) -> int:
        """How many aggregates were created."""
        return self._get("created")

    def get_subsequent_event_counter(self) -> int:
        """How many events came after that."""
        return self._get("subsequent")

    def incr_created_event_counter(self, tracking: Tracking) -> None:
        """Count a created aggregate."""
        self._increment("created", tracking)

    def incr_subsequent_event_counter(self, tracking: Tracking) -> None:
        """Count another event."""
        self._increment("subsequent", tracking)

    def _get(self, name: str) -> int:
        with self.datastore.reading() as read:
            return read.connection.scalar(sa.select(counters.c.amount).where(counters.c.name == name)) or 0

    def _increment(self, name: str, tracking: Tracking) -> None:
        with self.transaction() as connection:
            self.write_tracking(connection, tracking)
            change = sa.update(counters).where(counters.c.name == name).values(amount=counters.c.amount + 1)
            if not connection.execute(change).rowcount:
                connection.execute(sa.insert(counters).values(name=name, amount=1))


class Views(OnBackend, projection.EventCountersViewTestCase):
    """A view that derives from the tracking recorder."""

    __test__ = False

    def construct_event_counters_view(self) -> projection.EventCountersView:
        """A view on fresh tables."""
        datastore, models = self.create_datastore()
        counters.drop(datastore.engine, checkfirst=True)
        counters.create(datastore.engine)
        return CountersView(datastore, models.tables["tracking"])


on_each_backend(globals(), Views, projection.EventSourcedProjectionTestCase)
on_each_backend(globals(), projection.AggregateEventCountersProjectionTestCase, view_class=CountersView)
