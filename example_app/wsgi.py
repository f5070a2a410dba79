"""The WSGI entry point: ``uwsgi … -w example_app.wsgi:app``."""

from example_app import create_app

app = create_app()
