"""The settings of the Django site."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa

URL = sa.make_url(os.environ["DATABASE_URL"])
DATABASES: dict[str, dict[str, Any]] = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": URL.database,
        "USER": URL.username or "",
        "PASSWORD": URL.password or "",
        "HOST": URL.query.get("host", URL.host or ""),
        "PORT": URL.port or "",
        "CONN_MAX_AGE": 60,
    }
}
EVENTSOURCING = {"Ledger": {"APPLICATION": "tests.torture.two_sites.Ledger"}}
INSTALLED_APPS = ["flask_eventsourcing.contrib.django", "tests.torture.two_sites_django"]
MIDDLEWARE = ["flask_eventsourcing.contrib.django.middleware.EventSourcingMiddleware"]
ROOT_URLCONF = "tests.torture.two_sites_django.urls"
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
ALLOWED_HOSTS = ["127.0.0.1"]
SECRET_KEY = "of the tests"
USE_TZ = True
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
