"""MariaDB with and without ``innodb_snapshot_isolation``: a row that others have changed is a conflict, or none.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError

from flask_eventsourcing import AbortedTransactionError, StaleAggregateError
from tests.bank import Site
from tests.domain import Account
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_mariadb


def isolated(new_site: MakeSite, setting: str) -> Site:
    """Make a site with a row, whose connections have the setting."""
    options = {"connect_args": {"init_command": f"SET innodb_snapshot_isolation = {setting}"}}
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS=options)
    with site.app.app_context():
        site.note()
        site.db.session.commit()
    return site


def read(site: Site) -> Any:
    """Read the row, with which the transaction's snapshot is made."""
    return site.db.session.scalars(sa.select(site.Note.text)).all()


def change(site: Site, text: str) -> None:
    """Change the row."""
    site.db.session.execute(sa.update(site.Note).values(text=text))


@on_mariadb
def test_changed_row_ends_the_transaction(new_site: MakeSite) -> None:
    """Earlier events are rolled back too, and a caller that catches the error and commits gets an error."""
    site = isolated(new_site, "ON")
    account = Account("Ada")
    with site.app.app_context():
        read(site)
        site.bank.save(account)
        site.elsewhere(lambda: change(site, "theirs"))
        with pytest.raises(sa.exc.OperationalError):
            change(site, "mine")
        with pytest.raises(AbortedTransactionError):
            site.db.session.commit()
        site.db.session.rollback()
        with pytest.raises(StaleAggregateError):
            site.bank.save(account)
        site.db.session.rollback()
    assert site.stored() == (0, 1)


@on_mariadb
@pytest.mark.parametrize(("setting", "tries"), [("ON", 2), ("OFF", 1)])
def test_unit_is_run_again_where_it_is_a_conflict(new_site: MakeSite, setting: str, tries: int) -> None:
    """With the setting, a unit whose row others have changed is run again; without it, this is no conflict."""
    site = isolated(new_site, setting)
    made = []

    @site.es.retry_on_conflict(times=3)
    def unit() -> None:
        read(site)
        site.bank.open_account()
        made.append(1)
        if len(made) == 1:
            site.elsewhere(lambda: change(site, "theirs"))
        change(site, "mine")

    with site.app.app_context():
        unit()
        assert read(site) == ["mine"]
        site.db.session.rollback()
    assert len(made) == tries
    assert site.stored() == (1, 1)


@on_mariadb
@pytest.mark.parametrize("setting", ["ON", "OFF"])
def test_stream_that_others_have_gone_on_with(new_site: MakeSite, setting: str) -> None:
    """In an older snapshot, too, a version that others have stored is a conflict, and the next try follows theirs."""
    site = isolated(new_site, setting)
    account_id = site.opened()
    with site.app.app_context():
        account = site.bank.account(account_id)
        site.elsewhere(lambda: site.bank.deposit(account_id, 1))
        account.deposit(2)
        with pytest.raises(IntegrityError):
            site.bank.save(account)
        site.db.session.rollback()
        site.bank.deposit(account_id, 2)
        site.db.session.commit()
    assert site.balance(account_id) == 3
