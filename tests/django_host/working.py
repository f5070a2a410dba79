"""Runs the tests' projections in a process of its own, on a database that has the tables already.

``python -m tests.django_host.working URL`` ends with the signal. With ``rebuild`` and further words, it rebuilds a
projection whose handler ends the process at a deadly event, without a word.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, ClassVar

from django.core.management import CommandError, call_command
from django.db import connections

from tests.django_host import project

# After the project's settings.
from flask_eventsourcing.contrib.django.projections import ModelProjection, on, projection  # isort: skip
from tests.domain import Account

AnyAccount: Any = Account


DIED = 9
RETRIES = 1


def use(url: str) -> None:
    """Have the project's second database there."""
    handler: Any = connections
    handler.settings["ledger"] = handler.configure_settings(
        {"default": project.DEFAULT, "ledger": project.database_settings(url)}
    )["ledger"]


def work(url: str) -> int:
    """Run them until the process is told to end."""
    from flask_eventsourcing.contrib.django.projecting import projections

    use(url)
    with project.applications(Bank="ledger"):
        worker = projections().bound["ledger"].worker()
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        return len(worker.run())


def rebuild(url: str, failing: str, *words: str) -> int:
    """Rebuild the deadly projection."""
    from tests.django_host.ledger.models import Note

    class Deadly(ModelProjection):
        models = (Note,)
        retries = RETRIES
        on_failure: ClassVar[Any] = failing

        @on(AnyAccount.Created)
        def opened(self, event: Any, using: str) -> None:
            """Keep a note, or end the process."""
            if event.owner == "deadly":
                os._exit(DIED)
            Note.objects.using(using).create(text=event.owner)

    use(url)
    projection(of="Bank")(Deadly)
    with project.applications(Bank="ledger"):
        try:
            call_command("eventsourcing", "rebuild", "Deadly", "--offline", *words, database="ledger")
        except CommandError as error:
            sys.stdout.write(str(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(rebuild(sys.argv[1], *sys.argv[3:]) if "rebuild" in sys.argv else work(sys.argv[1]))
