"""A Django project for the tests, in this process; each test has a database of its own under an alias of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import django
import sqlalchemy as sa
from django.conf import settings
from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from tests.django_host.databases import database_settings
from tests.servers import require_mysqlclient

__all__ = ["alias", "applications", "database", "database_settings"]

DEFAULT = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}

if not settings.configured:
    # Not a module, which would set the time zone of the process.
    settings.configure(
        DATABASES={"default": DEFAULT},
        # Each test says which applications there are: without any, the project is nobody's site.
        EVENTSOURCING={},
        INSTALLED_APPS=["flask_eventsourcing.contrib.django", "tests.django_host.ledger"],
        LOGGING_CONFIG=None,
        MIDDLEWARE=["flask_eventsourcing.contrib.django.middleware.EventSourcingMiddleware"],
        ROOT_URLCONF="tests.django_host.urls",
        SECRET_KEY="of the tests",
        USE_TZ=True,
    )
    django.setup()


@contextmanager
def alias(name: str, url: str, **further: Any) -> Iterator[None]:
    """Within it, Django has a database of that alias."""
    if sa.make_url(url).get_backend_name() in {"mysql", "mariadb"}:
        require_mysqlclient()
    handler: Any = connections
    found = handler.configure_settings({"default": DEFAULT, name: database_settings(url, **further)})
    handler.settings[name] = found[name]
    try:
        yield
    finally:
        connections[name].close()
        del connections[name]
        del handler.settings[name]


@contextmanager
def database(name: str, url: str, **further: Any) -> Iterator[None]:
    """Within it, Django has a database of that alias, with the tables of the tests' app."""
    with alias(name, url, **further):
        call_command("migrate", database=name, run_syncdb=True, verbosity=0)
        yield


@contextmanager
def applications(further: Mapping[str, Any] | None = None, /, **aliases: str) -> Iterator[None]:
    """Within it, the setting has the tests' applications, each in the database of an alias.

    :param further: what it has for each of them beside that.
    """
    found = {
        name: {"APPLICATION": f"tests.domain.{name}", "DATABASE": alias, **(further or {})}
        for name, alias in aliases.items()
    }
    with override_settings(EVENTSOURCING=found):
        yield
