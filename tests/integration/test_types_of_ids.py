"""An id of another type than the application's is refused, the same on every database.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.application import Application
from eventsourcing.persistence import StoredEvent

from flask_eventsourcing.exceptions import IdentifierTypeError
from tests.bank import Site
from tests.integration.conftest import MakeSite


class Texts(Application[str]):
    """An application with text ids."""


@pytest.mark.parametrize("form", [str, lambda each: each.hex, lambda each: str(each).upper()])
def test_text_is_no_uuid(site: Site, form: Any) -> None:
    """A string is refused as id if ids are UUIDs, in reading and in saving, with the remedy."""
    account_id = site.opened()
    with site.app.app_context():
        for call in (
            lambda: site.bank.account(form(account_id)),
            lambda: site.bank.recorder.insert_events([StoredEvent(form(account_id), 2, "a:b", b"")]),
        ):
            with pytest.raises(IdentifierTypeError, match=r"uuid\.UUID\(…\).*<uuid:id>") as raised:
                call()
            assert isinstance(raised.value, TypeError)
            site.db.session.rollback()
    assert site.stored() == (1, 0)


def test_uuid_is_no_text(new_site: MakeSite) -> None:
    """A UUID is refused where ids are texts."""
    site = new_site(Texts)
    with site.app.app_context():
        site.bank.recorder.insert_events([StoredEvent("ann", 1, "a:b", b"")])
        for call in (
            lambda: site.bank.recorder.select_events(UUID(int=1)),
            lambda: site.bank.recorder.insert_events([StoredEvent(uuid4(), 1, "a:b", b"")]),
        ):
            with pytest.raises(IdentifierTypeError, match="are texts; found UUID"):
                call()
        site.db.session.rollback()
