"""What happens in a frozen snapshot, after a fork, and when a unit of work follows uncommitted events."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError, StoredEvent
from sqlalchemy.pool import StaticPool

from flask_eventsourcing.persistence.dialects.event_tables import ConflictError
from tests.bank import make_site
from tests.unit.test_lifecycle_fork import in_child


def an_event() -> StoredEvent:
    """An event of an aggregate of its own."""
    return StoredEvent(uuid4(), 1, "t:Happened", b"{}")


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_the_log_is_not_read_in_a_frozen_snapshot(postgres_url: str, isolation_level: str) -> None:
    """In a transaction whose snapshot is old, the log is read on another connection and skips nothing."""
    site = make_site(postgres_url)
    with site.app.app_context():
        recorder = site.es.application.recorder
        session = site.db.session
        session.connection(execution_options={"isolation_level": isolation_level})
        session.execute(sa.text("SELECT count(*) FROM bank_events"))
        with site.app.app_context():
            recorder.insert_events([an_event(), an_event()])
            site.db.session.commit()
        assert [n.id for n in recorder.select_notifications(None, 10)] == [1, 2]
        assert recorder.max_notification_id() == 2
        session.rollback()
    site.close()


def test_a_forked_process_has_connections_of_its_own(postgres_url: str) -> None:
    """A process that was forked after the database was used takes other connections, for the user's queries too."""
    site = make_site(postgres_url)

    def backend() -> int:
        with site.app.app_context():
            pid: int = site.db.session.scalar(sa.text("SELECT pg_backend_pid()"))
            return pid

    parents = backend()
    assert backend() == parents

    def child() -> Any:
        first = backend()
        with site.app.app_context():
            site.es.application.recorder.insert_events([an_event()])
            site.db.session.commit()
        return [first, backend()]

    first, second = in_child(child)
    assert first == second != parents
    assert backend() == parents
    site.close()


def test_a_unit_after_uncommitted_events_is_not_run_again(tmp_path: Path) -> None:
    """A conflict after uncommitted events is raised at once: to run the unit again would go on without them."""
    site = make_site(f"sqlite:///{tmp_path}/bank.db")
    runs = []

    @site.es.retry_on_conflict(times=3)
    def unit() -> None:
        runs.append(1)
        raise ConflictError

    with site.app.app_context():
        site.es.application.recorder.insert_events([an_event()])
        with pytest.raises(IntegrityError):
            unit()
        assert len(runs) == 1
        with pytest.raises(IntegrityError):
            unit()
        assert len(runs) == 5
    site.close()


def test_an_in_memory_database_goes_on_in_a_forked_process() -> None:
    """The one connection of an in-memory database is the database, so a forked process keeps its copy of it."""
    site = make_site("sqlite://")
    account_id = site.opened()
    with site.app.app_context():
        assert isinstance(site.db.engine.pool, StaticPool)
    assert in_child(lambda: site.balance(account_id) is not None)
    site.close()
