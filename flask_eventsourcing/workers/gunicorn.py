"""gunicorn: constructs the applications when a worker begins, and closes them when it ends.

Forks are safe without these hooks. Import them in ``gunicorn.conf.py``::

    from flask_eventsourcing.workers.gunicorn import post_worker_init, worker_exit

If you have hooks with these names, call these from yours.
"""

from __future__ import annotations

from typing import Any

from ..web.state import states


def post_worker_init(worker: Any) -> None:
    """Construct the applications of every Flask app in the process, before the worker takes its first request.

    It finds all apps of the process, so there may be middleware around them. An error of an application ends the
    worker, and gunicorn with it.
    """
    found = states()
    if not found:
        worker.log.warning(
            "flask_eventsourcing.workers.gunicorn: no Flask app has called es.init_app(app) by now, so no application "
            "is constructed before the first request."
        )
    for state in found:
        state.construct()


def worker_exit(server: Any, worker: Any) -> None:
    """Close the applications of this process, after the worker's last request.

    Import it in gunicorn's configuration file, which looks for hooks by their names.
    """
    for state in states():
        state.close()
