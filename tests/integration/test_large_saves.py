"""Saves of more events than one statement inserts.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from itertools import pairwise
from uuid import uuid4

import pytest
from eventsourcing.persistence import IntegrityError, StoredEvent

from tests.bank import Site
from tests.integration.marks import on_serial_databases

EVENTS = 1100


def events(first: int = 1) -> list[StoredEvent]:
    """Return many events of one aggregate."""
    originator_id = uuid4()
    return [StoredEvent(originator_id, version, "topic", b"state") for version in range(first, first + EVENTS)]


def test_large_save_is_in_order(site: Site) -> None:
    """All events of a large save are stored, at positions one after the other."""
    with site.app.app_context():
        positions = site.bank.recorder.insert_events(events())
        assert positions is not None
        assert [second - first for first, second in pairwise(positions)] == [1] * (EVENTS - 1)
        site.db.session.commit()
    assert site.stored() == (EVENTS, 0)


@on_serial_databases
@pytest.mark.parametrize("watched", [False, True])
def test_none_of_a_large_save_with_a_conflict_stays(site: Site, watched: bool) -> None:
    """After a conflict late in a large save none of it is stored, and other work can be committed."""
    many = events()
    with site.app.app_context():
        site.db.engine.echo = watched
        site.note()
        taken = StoredEvent(uuid4(), 1, "topic", b"state")
        site.bank.recorder.insert_events([taken])
        with pytest.raises(IntegrityError):
            site.bank.recorder.insert_events([*many[:-3], taken, *many[-3:]])
        site.db.session.commit()
        site.db.engine.echo = False
    assert site.stored() == (1, 1)
