"""Starts the site: ``python -m examples.django_site`` migrates its database, serves, and runs the projections."""

from __future__ import annotations

import os
import sys
import threading

import django
from django.core.management import call_command


def main(port: int = 8000) -> None:
    """Serve until Ctrl-C.

    :param port: of the loopback address.
    """
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_site.settings")
    django.setup()
    call_command("migrate", verbosity=0)
    from flask_eventsourcing.contrib.django import close_application
    from flask_eventsourcing.contrib.django.projecting import projections

    # In production this is a process of its own: manage.py eventsourcing run
    worker = projections().bound["default"].worker()
    thread = threading.Thread(target=worker.run, name="worker")
    thread.start()
    try:
        call_command("runserver", f"127.0.0.1:{port}", use_reloader=False)
    finally:
        worker.stop()
        thread.join()
        close_application()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
