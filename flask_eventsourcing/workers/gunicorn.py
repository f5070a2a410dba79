"""gunicorn: constructs the applications when a worker begins, and closes them when it ends.

Nothing here is needed for a fork to be safe. Import the hooks in ``gunicorn.conf.py``::

    from flask_eventsourcing.workers.gunicorn import post_worker_init, worker_exit

Where you have hooks of these names yourself, call these in yours.
"""

from __future__ import annotations

from typing import Any

from ..web.state import states


def post_worker_init(worker: Any) -> None:
    """Construct the applications of every Flask app in the process, before the worker takes its first request.

    The apps are not looked for in what gunicorn serves, so that any middleware may be around them. What an application
    raises ends the worker, and gunicorn with it.
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
    """Close the applications of this process, after the worker's last request."""
    for state in states():
        state.close()
