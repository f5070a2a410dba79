"""Starts the site: ``python -m examples.pyramid_site`` migrates its database, serves, and runs the projections."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from pyramid.paster import get_app, setup_logging
from waitress import serve

INI = Path(__file__).parent / "development.ini"


def main(port: int = 6543) -> None:
    """Serve until Ctrl-C.

    :param port: of the loopback address.
    """
    setup_logging(str(INI))
    command.upgrade(Config(INI), "head")
    app = get_app(str(INI))
    es = app.registry["flask_eventsourcing"]
    # In production this is a process of its own: pyramid-eventsourcing production.ini run --all
    worker = es.projections.worker()
    thread = threading.Thread(target=worker.run, name="worker")
    thread.start()
    try:
        serve(app, listen=f"127.0.0.1:{port}")
    finally:
        worker.stop()
        thread.join()
        es.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
