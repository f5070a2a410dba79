"""The library's own runners: what is saved in them has the correlation of the event that is processed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import Tracking
from eventsourcing.projection import EventSourcedProjection, EventSourcedProjectionRunner, Projection, ProjectionRunner
from eventsourcing.system import ProcessApplication, System

from flask_eventsourcing.persistence import SQLAlchemyTrackingRecorder
from tests.bank import make_site
from tests.contract.test_system import RUNNERS
from tests.domain import PATIENCE, Bank, until


class Mirror(Aggregate):
    """Stands for an account in another application."""


class Copies(ProcessApplication[Any]):
    """Makes a mirror of each account."""

    def policy(self, domain_event: Any, processing_event: Any) -> None:
        """Make it."""
        if domain_event.originator_version == 1:
            processing_event.collect_events(Mirror())


class CopiesOfCopies(Copies):
    """Makes a mirror of each mirror."""


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_system(tmp_path: Path, runner_class: Any) -> None:
    """In a ``System`` all events that a request causes have its correlation, and each names its cause."""
    site = make_site(f"sqlite:///{tmp_path / 'system.db'}", Bank, Copies, CopiesOfCopies)
    env = site.app.extensions["eventsourcing"].env
    runner = runner_class(System(pipes=[[Bank, Copies, CopiesOfCopies]]), env=env)
    runner.start()
    try:
        with site.app.app_context(), site.es.event_metadata(correlation_id="c"):
            runner.get(Bank).open_account()
            site.db.session.commit()
        last = runner.get(CopiesOfCopies)
        until(lambda: last.recorder.max_notification_id() == 1)
    finally:
        runner.stop()
    with site.app.app_context():
        models = site.es.models
        found = [site.db.session.scalars(sa.select(models[cls].StoredEvent)).one() for cls in models]
    assert [each.correlation_id for each in found] == ["c"] * 3
    causes = [(each.event_metadata or {}).get("causation_id") for each in found]
    assert causes == [None, str(found[0].event_id), str(found[1].event_id)]
    site.close()


class Counted(EventSourcedProjection[Any]):
    """An event-sourced projection of the library's."""

    def policy(self, domain_event: Any, processing_event: Any) -> None:
        """Make a mirror."""
        processing_event.collect_events(Mirror())


class Saving(Projection[SQLAlchemyTrackingRecorder]):
    """A projection of the library's that saves by itself."""

    application: ClassVar[Application[Any]]

    def process_event(self, domain_event: Any, tracking: Tracking) -> None:
        """Save, and count."""
        self.application.save(Mirror())
        self.view.insert_tracking(tracking)


@pytest.mark.parametrize("kind", [Counted, Saving])
def test_projection_runners(tmp_path: Path, kind: Any) -> None:
    """What the library's projection runners save has the correlation of the handled event, and that event as cause."""
    site = make_site(f"sqlite:///{tmp_path / 'runner.db'}", Bank, Counted)
    env = site.app.extensions["eventsourcing"].env
    with site.app.app_context():
        Saving.application = site.es[Counted]
        with site.es.event_metadata(correlation_id="c"):
            site.bank.open_account()
            site.db.session.commit()
    env = {**env, "CREATE_TABLE": "y"}
    if kind is Saving:
        runner: Any = ProjectionRunner(
            application_class=Bank, projection_class=Saving, view_class=SQLAlchemyTrackingRecorder, env=env
        )
    else:
        runner = EventSourcedProjectionRunner(application_class=Bank, projection_class=Counted, env=env)
    with runner:
        runner.wait(1, timeout=PATIENCE)
    with site.app.app_context():
        first = site.db.session.scalars(sa.select(site.es.models[Bank].StoredEvent)).one()
        second = site.db.session.scalars(sa.select(site.es.models[Counted].StoredEvent)).one()
    assert (first.correlation_id, second.correlation_id) == ("c", "c")
    assert (second.event_metadata or {})["causation_id"] == str(first.event_id)
    site.close()


def test_loop_over_a_subscription_that_is_left(tmp_path: Path) -> None:
    """Events saved in a loop over the log have its event as their cause; events saved after the loop do not."""
    site = make_site(f"sqlite:///{tmp_path / 'loop.db'}")
    site.opened()
    with site.app.app_context():
        recorder = site.bank.recorder

        def loop() -> None:
            for _ in recorder.subscribe():
                site.bank.open_account()
                break

        loop()
        site.bank.open_account()
        site.db.session.commit()
        first, second, third = site.db.session.scalars(
            sa.select(site.es.StoredEvent).order_by(site.es.StoredEvent.notification_id)
        )
    assert (second.event_metadata or {})["causation_id"] == str(first.event_id)
    assert "causation_id" not in (third.event_metadata or {})
    site.close()
