"""The bank on sessions that zope.sqlalchemy has registered, for the tests that hold for every host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import zope.sqlalchemy
from sqlalchemy import orm
from transaction import ThreadTransactionManager, TransactionManager

from flask_eventsourcing.contrib.zope import EventSourcing, event_models
from tests.domain import Bank
from tests.hosts.sites import HostSite, engine_for, make_note


class ExplicitManager(ThreadTransactionManager):  # type: ignore[misc]
    """A manager whose transactions have to be begun, with one for each thread."""

    def __init__(self) -> None:
        self.manager = TransactionManager(explicit=True)


class ZopeSite(HostSite):
    """Sessions whose transactions a manager commits, one for each thread.

    :param explicit: whether its transactions have to be begun.
    :param options: of the engine's sessions.
    """

    def __init__(
        self,
        url: str,
        *,
        scoped: bool,
        env: Mapping[str, str] | None = None,
        explicit: bool = False,
        **options: Any,
    ) -> None:
        base = orm.declarative_base()
        self.engine = engine_for(url)
        self.models = models = event_models(base, "Bank")
        self.StoredEvent = models.StoredEvent
        self.Note = make_note(base)
        base.metadata.create_all(self.engine)
        factory = orm.sessionmaker(self.engine, **options)
        self.scoped = orm.scoped_session(factory) if scoped else None
        self.manager = ExplicitManager() if explicit else ThreadTransactionManager()
        zope.sqlalchemy.register(factory, transaction_manager=self.manager)
        self.es = EventSourcing(Bank, models=models, session=self.scoped or factory, env=env)
        self.host = self.es.host

    @property
    def bank(self) -> Bank:
        """The application."""
        return self.es.application

    @property
    def session(self) -> orm.Session:
        """The current session."""
        unit = self.es.host.unit()
        assert unit is not None
        return unit.session

    def commit(self) -> None:
        """Commit the manager's transaction."""
        self.manager.commit()

    def rollback(self) -> None:
        """Abort the manager's transaction."""
        self.manager.abort()

    def working(self) -> AbstractContextManager[object]:
        """A session that is closed at the end, and a transaction that is aborted unless it was committed."""
        return self._closed()

    @contextmanager
    def _closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            unit = self.host.open_unit()
            try:
                if unit is not None:
                    unit.session.close()
            finally:
                self.manager.abort()

    def close(self) -> None:
        """Close the application and every connection."""
        self.es.close()
        self.manager.abort()
        if self.scoped is not None:
            self.scoped.remove()
        self.engine.dispose()
