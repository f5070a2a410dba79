"""Events that a trigger keeps out of their table.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from uuid import uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import StoredEvent

from flask_eventsourcing import AbortedTransactionError, UnsafeTableError
from tests.bank import Site
from tests.domain import in_thread
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_postgresql, on_sqlite_file
from tests.integration.test_looks import change, refused, run_check

LAST_ONLY = "IF NEW.originator_version < {last} THEN RETURN NEW; END IF; RETURN NULL;"
"""What keeps the last event of a save out."""
ELSEWHERE = "INSERT INTO elsewhere SELECT NEW.*; RETURN NULL;"
"""What puts the events into another table, as old ways of dividing a table do."""


def keep_out(site: Site, body: str) -> None:
    """Create the trigger, and the other table."""
    change(
        site,
        "CREATE TABLE elsewhere (LIKE bank_events)",
        f"CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$",
        "CREATE TRIGGER keep_out BEFORE INSERT ON bank_events FOR EACH ROW EXECUTE FUNCTION keep_out()",
    )


def stream(count: int) -> list[StoredEvent]:
    """Make the events of a new aggregate."""
    originator_id = uuid4()
    return [StoredEvent(originator_id, version, "topic", b"state") for version in range(1, count + 1)]


@pytest.mark.parametrize("order", ["advisory-lock", "table-lock"])
@pytest.mark.parametrize("body", [LAST_ONLY, ELSEWHERE], ids=["some", "all"])
@pytest.mark.parametrize("count", [1, 3, 150])
@on_postgresql
def test_save_from_which_a_trigger_keeps_events_is_refused(
    new_site: MakeSite, count: int, body: str, order: str
) -> None:
    """A save of which a trigger keeps a part out, or all, raises an error, and stores nothing, whoever commits then."""
    site = new_site(EVENTSOURCING_POSTGRES_ORDER=order)
    keep_out(site, body.format(last=count))
    with site.app.app_context():
        recorder = site.bank.recorder
        site.note()
        with pytest.raises(UnsafeTableError, match=r"table bank_events has kept events out.*none of them were saved"):
            recorder.insert_events(stream(count))
        with pytest.raises(AbortedTransactionError):
            site.db.session.commit()
        site.db.session.rollback()
    errors: list[str] = []

    def outside() -> None:
        try:
            recorder.insert_events(stream(count))
        except UnsafeTableError as error:
            errors.append(str(error))

    in_thread(outside)
    assert len(errors) == 1
    assert site.stored() == (0, 0)
    change(site, "DROP TRIGGER keep_out ON bank_events")
    site.opened(1)
    assert site.stored() == (2, 0)


@on_postgresql
def test_trigger_that_changes_nothing_is_no_matter(new_site: MakeSite) -> None:
    """A trigger that lets every event in is not noticed, and one that writes other rows beside them neither."""
    site = new_site()
    keep_out(site, "INSERT INTO elsewhere SELECT NEW.*; RETURN NEW;")
    with site.app.app_context():
        for count in (1, 3, 150):
            site.bank.recorder.insert_events(stream(count))
        site.db.session.commit()
        assert site.db.session.scalar(sa.text("SELECT count(*) FROM elsewhere")) == 154
    assert site.stored() == (154, 0)


@pytest.mark.parametrize("used", [True, False])
@on_sqlite_file
def test_trigger_that_ignores_events_is_refused(new_site: MakeSite, used: bool) -> None:
    """On SQLite a trigger with ``RAISE(IGNORE)`` is found before the first event, and ``check`` names it."""
    site = new_site()
    if used:
        site.opened()
    change(
        site,
        "CREATE TRIGGER silent BEFORE INSERT ON bank_events WHEN NEW.originator_version = 2 "
        "BEGIN SELECT raise ( ignore ); END",
    )
    refused(new_site(create=False), UnsafeTableError, r"Trigger silent of table bank_events.*RAISE\(ABORT")
    change(site, "DROP TRIGGER silent")
    site.opened(1)


@on_sqlite_file
def test_trigger_that_protects_events_is_no_matter(new_site: MakeSite) -> None:
    """A trigger that keeps events from being changed or deleted is not one that keeps them out."""
    site = new_site()
    for action in ("UPDATE", "DELETE"):
        change(site, f"CREATE TRIGGER no_{action} BEFORE {action} ON bank_events BEGIN SELECT RAISE(IGNORE); END")
    site.opened(1)
    assert run_check(site)[0] == 0
    assert site.stored() == (2, 0)
