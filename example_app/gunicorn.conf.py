"""gunicorn: ``gunicorn -c example_app/gunicorn.conf.py``, from the folder that holds ``example_app``."""

import os

from flask_eventsourcing.workers.gunicorn import post_worker_init, worker_exit

# gunicorn takes every name in here that is the name of a setting.
__all__ = ["post_worker_init", "worker_exit"]

wsgi_app = "example_app.wsgi:app"
bind = os.environ.get("BIND", "127.0.0.1:8000")
worker_class = "gthread"
workers = 4
threads = 2
# Loaded once, before the fork: workers start faster and share memory. Safe, as is False.
preload_app = True
# Seconds for requests in progress at SIGTERM.
graceful_timeout = 30
