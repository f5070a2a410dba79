"""A log has an identity, made with its tables.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import sqlalchemy as sa

from tests.bank import Site


def identity(site: Site) -> int:
    """Return the identity of the bank's log."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        datastore = site.app.extensions["eventsourcing"].datastore
        number: int = datastore.dialect.log_identity(connection, site.es.Tracking.__table__)
        return number


def test_identity_stays_as_long_as_the_tables(site: Site) -> None:
    """A log's identity is made with its tables and stays; tables that are created again have another."""
    first = identity(site)
    site.opened()
    assert identity(site) == first > 0
    with site.app.app_context():
        site.db.drop_all()
        site.db.create_all()
    assert identity(site) != first


def test_tables_of_a_migration_get_an_identity(site: Site) -> None:
    """Tables that were created in another way get their identity at its first use."""
    with site.app.app_context(), site.db.engine.begin() as connection:
        connection.execute(sa.delete(site.es.Tracking))
    first = identity(site)
    assert identity(site) == first > 0
