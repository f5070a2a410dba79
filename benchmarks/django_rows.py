"""Commits of one event in Django's ``atomic()``, beside those of one row of its ORM, which are the limit.

``python -m benchmarks.django_rows`` measures both in one thread, in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import django
import sqlalchemy as sa
from django.conf import settings
from django.core.signals import setting_changed
from django.db import connections, models, transaction

from .domain import new_events
from .limits import EVENT, Commits, report

HEADING = "## Rows of Django's ORM\n"
ENGINES = {"sqlite": "sqlite3", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
SAFE = {"transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL;"}


def configure(url: sa.URL) -> None:
    """Make a project in this process, or give the one that there is another database."""
    backend = url.get_backend_name()
    database = {
        "ENGINE": f"django.db.backends.{ENGINES[backend]}",
        "NAME": url.database,
        "USER": url.username or "",
        "PASSWORD": url.password or "",
        "HOST": url.host or url.query.get("host", ""),
        "PORT": url.port or "",
        "OPTIONS": SAFE if backend == "sqlite" else {},
    }
    if settings.configured:
        handler: Any = connections
        handler.settings["default"] = handler.configure_settings({"default": database})["default"]
        setting_changed.send(sender=configure, setting="DATABASES", value=None, enter=True)
        return
    settings.configure(
        DATABASES={"default": database},
        EVENTSOURCING={"Bench": {"APPLICATION": "benchmarks.domain.Bench"}},
        INSTALLED_APPS=["flask_eventsourcing.contrib.django", "benchmarks"],
        USE_TZ=True,
    )
    django.setup()


@cache
def make_models() -> tuple[Any, Any]:
    """Return the record classes, and the model of a row."""
    from flask_eventsourcing.contrib.django.models import event_models

    class LimitRow(models.Model):  # type: ignore[misc]
        text = models.BinaryField()

        class Meta:
            app_label = "benchmarks"

        def __str__(self) -> str:
            return str(self.pk)

    return event_models(__name__, "Bench"), LimitRow


@contextmanager
def on_django(url: sa.URL) -> Iterator[Commits]:
    """Commit events and rows in ``atomic()``."""
    configure(url)
    from flask_eventsourcing.contrib.django import close_application, get_application

    records, row = make_models()
    with connections["default"].schema_editor() as editor:
        for model in (*records.models, row):
            editor.create_model(model)
    recorder: Any = get_application("Bench").recorder
    state = new_events(1)[0].state

    def save() -> None:
        with transaction.atomic():
            recorder.insert_events(new_events(1))

    def create() -> None:
        with transaction.atomic():
            row.objects.create(text=state)

    yield {EVENT: save, "one row, create()": create}
    close_application()
    connections["default"].close()
    del connections["default"]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the section."""
    report(arguments, "benchmarks.django_rows", __doc__ or "", HEADING, {"Django": (on_django, 0.7)})


if __name__ == "__main__":
    # As a module, so that topics of events name it as others do.
    from benchmarks.django_rows import main as run

    run(sys.argv[1:])
