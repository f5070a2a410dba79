"""Erasure on every host."""

from __future__ import annotations

import pytest

from flask_eventsourcing.applications.erasure import erase
from flask_eventsourcing.exceptions import AggregateErasedError
from tests.hosts.sites import HostSite


@pytest.mark.parametrize("redact", [False, True], ids=["delete", "redact"])
def test_an_aggregate_is_erased_in_a_transaction_of_the_host(site: HostSite, redact: bool) -> None:
    """An aggregate is erased with the host's transaction, and cannot be read afterwards; a rollback undoes it."""
    account_id = site.opened()
    with site.host.context():
        with pytest.raises(ZeroDivisionError):
            fail(site, account_id, redact)
        with site.host.transaction():
            assert site.bank.balance(account_id) == 0
            assert erase(site.bank, account_id, redact=redact).events == 1
        with site.host.transaction(), pytest.raises(AggregateErasedError):
            site.bank.account(account_id)
    assert site.stored()[0] == 1 + redact


def fail(site: HostSite, account_id: object, redact: bool) -> None:
    """Erase in a transaction that fails."""
    with site.host.transaction():
        erase(site.bank, account_id, redact=redact)  # type: ignore[arg-type]
        raise ZeroDivisionError
