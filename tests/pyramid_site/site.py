"""A Pyramid application around the bank of ``tests.domain``, as the cookiecutter of Pyramid lays one out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import zope.sqlalchemy
from pyramid.config import Configurator
from pyramid.response import Response
from sqlalchemy import orm
from webtest import TestApp

from flask_eventsourcing.contrib.pyramid import event_models
from tests.domain import Bank, in_thread
from tests.hosts.sites import engine_for, make_note

VETO: dict[str, Any] = {"tm.commit_veto": "pyramid_tm.default_commit_veto"}
SETTINGS = {"tm.manager_hook": "pyramid_tm.explicit_manager", "retry.attempts": "3"}
View = Callable[[Any], Any]


class UsersError(Exception):
    """An error of the user's own code."""


class PyramidSite:
    """The application, whose one view does what the test wants.

    :param url: the database.
    :param catching: the status that an exception view answers to ``UsersError``, or None for no such view.
    :param configure: adds to the configuration.
    :param application: the bank's class.
    :param metadata: the functions that provide metadata, or False.
    :param settings: of the application, and ``own_record``, which makes a record class of the user's on the base.
    """

    def __init__(
        self,
        url: str,
        *,
        catching: int | None = None,
        configure: Callable[[Any], object] | None = None,
        registered: bool = True,
        includes: tuple[str, ...] = ("pyramid_tm", "pyramid_retry"),
        session: Any = "dbsession",
        application: type[Bank] = Bank,
        metadata: Any = (),
        **settings: Any,
    ) -> None:
        self.Base = orm.declarative_base()
        make_record: Callable[[Any], Any] = settings.pop("own_record", lambda base: None)
        self.models = event_models(self.Base, "Bank", stored_event_model=make_record(self.Base))
        self.Note = make_note(self.Base)
        self.engine = engine_for(url)
        self.Base.metadata.create_all(self.engine)
        self.factory = orm.sessionmaker(self.engine)
        self.view: View = lambda request: {}
        self.registered = registered
        with Configurator(settings={**SETTINGS, **settings}) as config:
            for each in includes:
                config.include(each)
            config.registry["dbsession_factory"] = self.factory
            config.add_request_method(self.session_of, "dbsession", reify=True)
            config.include("flask_eventsourcing.contrib.pyramid")
            config.add_eventsourcing(application, models=self.models, session=session, metadata=metadata)
            config.add_route("bank", "/")
            config.add_view(self._answer, route_name="bank", renderer="json")
            if catching is not None:
                config.add_exception_view(lambda _: Response("caught", catching), context=UsersError)
            if configure is not None:
                configure(config)
        self.config = config
        self.app = config.make_wsgi_app()
        self.es = config.registry["flask_eventsourcing"]

    def _answer(self, request: Any) -> Any:
        return self.view(request)

    def session_of(self, request: Any) -> orm.Session:
        """Make the session of a request."""
        session: orm.Session = self.factory()
        if self.registered:
            zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    def answer(self, view: View, method: str = "POST", **further: Any) -> Any:
        """Send a request that is answered by a function, whatever the status."""
        self.view = view
        return TestApp(self.app).request("/", method=method, expect_errors=True, **further)

    def opened(self) -> UUID:
        """Open an account, commit, and return its id."""
        opened: list[UUID] = []
        in_thread(lambda: opened.append(self.es[Bank].open_account()))
        return opened[0]

    def elsewhere(self, function: Callable[[Bank], Any]) -> None:
        """Do something in a thread and a transaction of its own, and commit it."""

        def run() -> None:
            with self.es.transaction():
                function(self.es[Bank])

        in_thread(run)

    def balance(self, account_id: UUID) -> int | None:
        """Return what a new transaction sees in an account."""
        bank: Bank = self.es[Bank]
        return bank.balance(account_id)

    def stored(self) -> tuple[int, int]:
        """Count the events and the notes that a new transaction sees."""
        with self.engine.connect() as connection:
            events, notes = (
                connection.scalar(sa.select(sa.func.count()).select_from(each))
                for each in (self.models.StoredEvent, self.Note)
            )
        return events or 0, notes or 0

    def close(self) -> None:
        """Close the application and every connection."""
        self.es.close()
        self.engine.dispose()


def bank_of(request: Any) -> Bank:
    """Return the bank of a request."""
    bank: Bank = request.eventsourcing[Bank]
    return bank
