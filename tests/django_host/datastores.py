"""Recorders on Django's connections, for the library's tests of recorders and for tests under load."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from django.db.backends.signals import connection_created

from flask_eventsourcing.contrib.django.hosting import DjangoDatastore
from flask_eventsourcing.contrib.django.lending import make_engine
from flask_eventsourcing.contrib.django.transactions import DjangoUnits
from flask_eventsourcing.models import Models
from flask_eventsourcing.persistence import Datastore, DialectOptions
from tests.django_host import project


def _ignore(batches: Any) -> None:
    """Tell nobody."""


class Opened:
    """Keeps every connection that threads of one alias open, to close it when they are gone.

    A thread of the library's does not close its connection, as a worker or a request of Django's does.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._drivers: list[Any] = []
        connection_created.connect(self._keep)

    def _keep(self, sender: Any, connection: Any, **_: Any) -> None:
        if connection.alias == self._alias:
            self._drivers.append(connection.connection)

    def close(self) -> None:
        """Close them all."""
        connection_created.disconnect(self._keep)
        for each in self._drivers:
            # One driver has the opposite of what the others have, and does not close twice.
            if getattr(each, "open", not getattr(each, "closed", False)):
                each.close()


def make_datastore(stack: ExitStack, engine: sa.Engine, models: Models) -> Datastore:
    """Return the datastore of a new alias of Django's for the database of an engine.

    :param stack: closes its connections.
    """
    alias = f"alias{uuid4().hex}"
    # After Django has closed that of this thread, as one driver refuses to close twice.
    stack.callback(Opened(alias).close)
    stack.enter_context(project.alias(alias, engine.url.render_as_string(hide_password=False)))
    plain = DjangoDatastore(make_engine(alias), DialectOptions(), {"": models.tables}.get)
    stack.callback(plain.engine.dispose)
    units = DjangoUnits(alias, plain, _ignore, _ignore)
    return plain.joining(units.current)
