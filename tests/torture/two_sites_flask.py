"""The Flask app of ``two_sites``, for uWSGI."""

from __future__ import annotations

from tests.torture.two_sites import make_flask_app

app = make_flask_app()
