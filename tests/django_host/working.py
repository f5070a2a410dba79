"""Runs the tests' projections in a process of its own, on a database that has the tables already.

``python -m tests.django_host.working URL`` ends with the signal.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from django.db import connections

from tests.django_host import project


def main(url: str) -> int:
    """Run them until the process is told to end."""
    from flask_eventsourcing.contrib.django.projecting import projections

    handler: Any = connections
    handler.settings["ledger"] = handler.configure_settings(
        {"default": project.DEFAULT, "ledger": project.database_settings(url)}
    )["ledger"]
    with project.applications(Bank="ledger"):
        worker = projections().bound["ledger"].worker()
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        return len(worker.run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
