"""The conditions of PostgreSQL's order are checked.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flask_eventsourcing import StandbyError, UnsafeSequenceError
from tests.bank import Site, make_site
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_postgresql
from tests.servers import ServerFolder, restart_postgres, start_postgres


def alter(site: Site, how: str) -> None:
    """Change the sequence of the positions."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        connection.execute(sa.text(f"ALTER SEQUENCE bank_events_notification_id_seq {how}"))


@on_postgresql
@pytest.mark.parametrize("order", ["advisory-lock", "table-lock"])
@pytest.mark.parametrize(("how", "remedy"), [("CACHE 20", "CACHE 1"), ("INCREMENT 2", "INCREMENT 1")])
def test_a_sequence_that_would_break_the_order_is_refused(
    new_site: MakeSite, order: str, how: str, remedy: str
) -> None:
    """If readers could miss positions of a sequence, appends fail with its name and the remedy."""
    site = new_site(EVENTSOURCING_POSTGRES_ORDER=order)
    alter(site, how)
    with pytest.raises(UnsafeSequenceError, match=f"bank_events_notification_id_seq.*{how}.*ALTER SEQUENCE"):
        site.opened()
    assert site.stored() == (0, 0)
    alter(site, remedy)
    site.opened()
    assert site.stored() == (1, 0)


@contextmanager
def on_standby(server_folder: ServerFolder) -> Iterator[tuple[Site, Any]]:
    """A site with an account, on a server that is then started again as a standby."""
    with server_folder.private("standby", start_postgres) as server:
        before = make_site(server.url)
        account_id = before.opened()
        before.close()
        (Path(str(sa.make_url(server.url).query["host"])) / "standby.signal").touch()
        restart_postgres(server)
        site = make_site(server.url, create=False)
        try:
            yield site, account_id
        finally:
            site.close()


def test_the_log_is_not_read_on_a_standby(server_folder: ServerFolder, caplog: pytest.LogCaptureFixture) -> None:
    """A standby shows aggregates but refuses the log, as it does not know what writers are at work."""
    with on_standby(server_folder) as (site, account_id):
        assert site.balance(account_id) == 0
        with site.app.app_context():
            with pytest.raises(StandbyError, match="on the primary"):
                site.bank.notification_log.select(start=1, limit=10)
            with pytest.raises(StandbyError):
                site.bank.recorder.max_notification_id()
            recorder = site.bank.recorder
        # It waits until the server is a primary, as after a failover.
        with recorder.subscribe() as subscription, caplog.at_level(logging.WARNING):
            assert subscription_is_silent(subscription)
        assert "on the primary" in caplog.text


def subscription_is_silent(subscription: Any) -> bool:
    """Tell whether a subscription has nothing to give within a moment."""
    timer = threading.Timer(0.3, subscription.stop)
    timer.start()
    found = list(subscription)
    timer.join()
    return found == []
