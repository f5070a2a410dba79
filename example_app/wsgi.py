"""The WSGI entry point: ``uwsgi … -w example_app.wsgi:app``, ``gunicorn example_app.wsgi:app``."""

from example_app import create_app
from flask_eventsourcing.workers.uwsgi import init_uwsgi

app = create_app()
init_uwsgi(app)
