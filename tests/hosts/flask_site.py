"""The bank in a Flask app, for the tests that hold for every host."""

from __future__ import annotations

from contextlib import AbstractContextManager

from sqlalchemy import orm

from flask_eventsourcing.web.state import state_of
from tests.bank import make_site
from tests.domain import Bank
from tests.hosts.sites import HostSite


class FlaskSite(HostSite):
    """A Flask app with Flask-SQLAlchemy."""

    def __init__(self, url: str) -> None:
        self.site = make_site(url)
        self.host = state_of(self.site.app).host
        self.Note = self.site.Note
        with self.site.app.app_context():
            self.StoredEvent = self.site.es.StoredEvent

    @property
    def bank(self) -> Bank:
        """The application."""
        bank: Bank = state_of(self.site.app)[Bank]  # type: ignore[assignment]
        return bank

    @property
    def session(self) -> orm.Session:
        """The current session."""
        session: orm.Session = self.site.db.session()
        return session

    def working(self) -> AbstractContextManager[object]:
        """An application context."""
        return self.site.app.app_context()

    def close(self) -> None:
        """Close the applications and every connection."""
        self.site.close()
